"""Load a run, an export or a model of the hub."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from pathlib import Path

import torch

from sitdist.checks import find_device, model_folder
from sitdist.errors import ConfigError
from sitdist.inference.export import is_exported, load_exported
from sitdist.inference.flow import Flow
from sitdist.inference.preprocess import preprocess_of
from sitdist.inference.run import load_run


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    step: int | None = None,
    background: tuple[float, float, float] | None = None,
) -> Flow:
    """The model in `path`: the folder of a run or of an export, or a hub id such as `user/chair`.

    step: of a run, the checkpoint to load, by default the newest. background: red, green and blue from 0 to 1, which
    overrides the training pictures' own. A hub id is downloaded by huggingface_hub (weights are safetensors, nothing is
    unpickled). A SitdistError says what is missing, in one line.
    """
    device = find_device(device)
    folder = model_folder(str(path))
    if is_exported(folder):
        if step is not None:
            raise ConfigError(f"step {step}: {folder} is an export, which holds one step; export the run at that step")
        run, preprocess = load_exported(folder, device)
    else:
        run = load_run(folder, device, step)
        preprocess = preprocess_of(run.manifest, Path(run.config.data))
    if background is not None:
        try:
            given = [float(each) if isinstance(each, Real) else math.nan for each in background]
        except TypeError:
            given = []
        if len(given) != 3 or not all(0.0 <= each <= 1.0 for each in given):
            raise ConfigError(f"background {background!r:.80}: expected red, green and blue from 0 to 1")
        colour = (given[0], given[1], given[2])
        preprocess = replace(preprocess, backgrounds={entry.label: colour for entry in run.manifest.objects})
    return Flow(run, preprocess, device, folder)
