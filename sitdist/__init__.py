"""sitdist: interpolant transformers that tie camera poses to pictures, on any number of processes.

`sitdist.load(path)` gives a trained model to render and to estimate poses with; see `sitdist.inference.flow.Flow`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sitdist.geometry.camera import Intrinsics
    from sitdist.inference.flow import Flow
    from sitdist.inference.load import load

__version__ = "0.1.0"
__all__ = ["Flow", "Intrinsics", "__version__", "load"]
_HOMES = {"Flow": "sitdist.inference.flow", "load": "sitdist.inference.load", "Intrinsics": "sitdist.geometry.camera"}


def __getattr__(name: str) -> Any:
    """What is heavy is imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sitdist' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
