"""The poses of picture files: which files, which masks, and what is estimated for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sitdist.errors import DataError
from sitdist.flow.estimate import PoseEstimate
from sitdist.geometry.camera import Intrinsics
from sitdist.inference.flow import Flow
from sitdist.inference.preprocess import centred
from sitdist.io.images import SUFFIXES
from sitdist.io.pose_files import PosedPicture


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named, in order of their names; DataError where there are none."""
    files: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"{path}: a folder without pictures ({', '.join(SUFFIXES)}); name another, or the files")
        files += found
    return files


def mask_of(folder: Path, file: Path) -> Path:
    """The mask of a picture: a file of its name in the folder; DataError if there is none."""
    for candidate in (folder / file.name, folder / f"{file.stem}.png", folder / f"{file.name}.png"):
        if os.path.isfile(candidate):
            return candidate
    raise DataError(f"{folder / file.name}: no mask for {file}; give one for every picture")


def estimate_files(
    flow: Flow,
    files: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    masks: Sequence[Path] | None = None,
    intrinsics: Sequence[float] | None = None,
    label: int = 0,
    batch: int = 64,
    **how: Any,
) -> list[PosedPicture]:
    """The pose of every file, with the intrinsics of its own pixels, of which `sizes` tells width and height.

    `how`: `options`, `zooms`, `scene` and `frame` of `Flow.estimate`.
    """
    flow.check_estimates(label, **{name: value for name, value in how.items() if name != "frame"})
    posed: list[PosedPicture] = []
    for start in tqdm(range(0, len(files), batch), "pictures", disable=len(files) <= batch):
        some = list(files[start : start + batch])
        some_masks = None if masks is None else list(masks[start : start + batch])
        estimate = flow.estimate(some, intrinsics, some_masks, label, **how)
        posed += [_posed(flow, file, sizes[start + row], row, estimate, intrinsics) for row, file in enumerate(some)]
    return posed


def _posed(
    flow: Flow, file: Path, size: tuple[int, int], row: int, estimate: PoseEstimate, given: Sequence[float] | None
) -> PosedPicture:
    width, height = size
    camera: Intrinsics | None
    if given is not None:
        fx, fy, cx, cy = given
        camera = Intrinsics(fx, fy, cx, cy, width, height)
    elif estimate.intrinsics is not None:  # the picture tells them
        camera = centred(flow.preprocess.seen_by(estimate.intrinsics[row].tolist()), width, height)
    else:
        camera = centred(flow.preprocess, width, height)
    facts: dict[str, float | bool] = {
        "so3_residual": float(estimate.so3_residual[row]),
        "converged": bool(estimate.converged[row]),
    }
    for name in ("rotation_std_deg", "translation_std", "trust", "picture_error"):
        column = getattr(estimate, name)
        if column is not None:
            facts[name] = float(column[row])
    if estimate.rotation_bars_deg is not None and estimate.translation_bars is not None:
        facts["rotation_bar_90_deg"] = float(estimate.rotation_bars_deg[row, 1])
        facts["translation_bar_90"] = float(estimate.translation_bars[row, 1])
    return PosedPicture(file, estimate.camera_to_world[row], camera, facts)
