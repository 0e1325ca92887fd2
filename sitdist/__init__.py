"""sitdist: interpolant transformers that tie camera poses to pictures, on any number of processes.

`sitdist.load(path)` gives a trained model, a `Flow`, that renders poses and reads them off pictures. `build_dataset`,
`train_model` and `evaluate_model` make one; `sitdist.train` and `sitdist.evaluate` are the packages behind them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sitdist.build.writer import build as build_dataset
    from sitdist.evaluate.evaluator import evaluate as evaluate_model
    from sitdist.flow.estimate import PoseEstimate
    from sitdist.geometry.camera import Intrinsics
    from sitdist.inference.flow import Flow
    from sitdist.inference.load import load
    from sitdist.train.trainer import train as train_model

__version__ = "0.1.0"
__all__ = [
    "Flow",
    "Intrinsics",
    "PoseEstimate",
    "__version__",
    "build_dataset",
    "evaluate_model",
    "load",
    "train_model",
]
_HOMES = {
    "Flow": ("sitdist.inference.flow", "Flow"),
    "Intrinsics": ("sitdist.geometry.camera", "Intrinsics"),
    "PoseEstimate": ("sitdist.flow.estimate", "PoseEstimate"),
    "build_dataset": ("sitdist.build.writer", "build"),
    "evaluate_model": ("sitdist.evaluate.evaluator", "evaluate"),
    "load": ("sitdist.inference.load", "load"),
    "train_model": ("sitdist.train.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    """What is heavy is imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sitdist' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
