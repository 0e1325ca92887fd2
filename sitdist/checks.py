"""Numbers, arrays, words and devices that a caller gives: of the right kind and within bounds, or one line that names
them.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitdist.errors import ConfigError, DataError, SitdistError, shown

if TYPE_CHECKING:
    import torch

LARGEST = 10**9  # no count, length or scale is larger, so that no product of two of them overflows
LARGEST_SEED = 2**63 - 1
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "README.md"]  # and nothing that would have to be unpickled


def whole(name: str, value: Any, low: int = 0, high: int = LARGEST, error: type[SitdistError] = ConfigError) -> int:
    """`value` as an int from `low` to `high`; `error` for anything else, also for a bool, a text or 2.0."""
    try:
        found = low - 1 if _is_bool(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch and numpy say it so of arrays
        found = low - 1
    if not low <= found <= high:
        raise error(f"{name} {shown(value)}: expected a whole number from {low} to {high}")
    return found


def number(
    name: str, value: Any, low: float = -LARGEST, high: float = LARGEST, error: type[SitdistError] = ConfigError
) -> float:
    """`value` as a float from `low` to `high`; `error` for anything else, also for a bool, a text or NaN."""
    try:
        found = math.nan if _is_bool(value) or isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not low <= found <= high:
        raise error(f"{name} {shown(value)}: expected a number from {low:g} to {high:g}")
    return found


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of the words; ConfigError for anything else."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} {shown(value)}: unknown; choose one of {', '.join(choices)}")
    return value


def array(name: str, value: Any, error: type[SitdistError] = ConfigError) -> torch.Tensor:
    """Numbers of any real type, in a tensor, an array or nested lists, as float64 on the CPU; `error` for all else."""
    import numpy as np
    import torch

    try:
        if isinstance(value, torch.Tensor):
            if value.dtype != torch.bool and not value.is_complex() and value.layout == torch.strided:
                return value.detach().cpu().to(torch.float64)
        else:
            given = np.asarray(value)
            if given.dtype.kind in "iuf":
                return torch.from_numpy(given.astype(np.float64))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # as torch and numpy say it
        pass
    kind = getattr(value, "dtype", type(value).__name__)
    raise error(f"{name}: no numbers but {kind}; give a tensor, an array or lists of numbers")


def find_device(device: torch.device | str) -> torch.device:
    """The device of that name, `auto` for the first GPU or else the CPU; ConfigError where it is not there."""
    import torch

    gpus, mps = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    try:
        name = ("cuda" if gpus else "cpu") if str(device) == "auto" else device
        found = torch.device(name) if isinstance(name, str | torch.device) else torch.device("meta")
    except RuntimeError:  # no such kind
        found = torch.device("meta")
    number = found.index or 0
    if not {"cpu": number == 0, "cuda": number < gpus, "mps": mps}.get(found.type, False):
        there = ", ".join(["auto", "cpu", *(f"cuda:{each}" for each in range(gpus)), *["mps"] * mps])
        raise ConfigError(f"device {shown(device)}: there is none here; choose one of {there}")
    return found


def model_folder(path: str) -> Path:
    """The folder of a run, an export, or a model of the hub, which is downloaded; DataError where there is none."""
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


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
