"""Load a run, an export or a model of the hub."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from numbers import Real
from pathlib import Path

import torch

from sitdist.checks import find_device
from sitdist.errors import ConfigError, DataError
from sitdist.inference.export import is_exported, load_exported
from sitdist.inference.flow import Flow
from sitdist.inference.preprocess import preprocess_of
from sitdist.inference.run import load_run

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "README.md"]  # and nothing that would have to be unpickled


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
    folder = _folder_of(str(path))
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


def _folder_of(path: str) -> Path:
    if os.path.isdir(path):  # and no error for names that no folder can have
        return Path(path)
    if not HUB_ID.fullmatch(path):
        raise DataError(f"{path}: no such folder; give a run, an exported folder, or a hub id such as user/chair")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(
            f"{path}: no such folder, and huggingface_hub is not installed to look for it on the hub; "
            "pip install huggingface_hub, or give a folder"
        ) from None
    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES))
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        raise DataError(
            f"{path}: no such folder, and no such model could be had from the hub ({reason}); check the name and the "
            "network, or download it first and give its folder"
        ) from None
