"""`sitdist pose RUN PICTURE...`: the poses of picture files, as other tools read them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitdist.cli.arguments import add_device, add_estimator, estimate_arguments, output, positive, whole
from sitdist.cli.outcome import tell
from sitdist.errors import DataError

if TYPE_CHECKING:
    from sitdist.inference.flow import Flow
    from sitdist.io.pose_files import PosedPicture

FORMATS = ("jsonl", "csv", "transforms", "colmap", "tum")
BATCH = 64


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    command = commands.add_parser("pose", help="estimate the poses of pictures")
    command.add_argument("run", help="a run, an exported folder, or a hub id")
    command.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="picture files, or folders of them")
    command.add_argument("--format", choices=FORMATS, default="jsonl", help="(default: jsonl)")
    command.add_argument("--out", type=output, help="file, for colmap a new folder (default: print)")
    command.add_argument("--overwrite", action="store_true", help="write over --out if it is a file that is there")
    command.add_argument(
        "--intrinsics", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"), help="of all pictures, in pixels"
    )
    command.add_argument("--masks", type=Path, metavar="FOLDER", help="pictures of the same names, white on the object")
    command.add_argument("--frame", choices=("dataset", "user"), default="dataset", help="(default: dataset)")
    command.add_argument("--label", type=whole(0), default=0, help="of the object (default: 0)")
    add_estimator(command)
    command.add_argument("--batch", type=positive, default=BATCH, help=f"pictures at once (default: {BATCH})")
    add_device(command)
    command.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    files = picture_files(options.pictures)
    masks = None if options.masks is None else [_mask(options.masks, file) for file in files]
    if options.format == "colmap" and options.out is None:
        raise DataError("--format colmap: a model is a folder of three files; give --out FOLDER")
    from sitdist.inference.load import load
    from sitdist.io.atomic import check_free
    from sitdist.io.images import picture_sizes
    from sitdist.io.pose_files import picture_names, to_text, write_poses

    beside = None if options.out is None else options.out.parent
    picture_names(files, options.format, beside)
    if options.out is not None:
        check_free(options.out, options.overwrite and options.format != "colmap")
    sizes = [picture_sizes(file)[0] for file in files]

    flow = load(options.run, options.device)
    posed = pose_files(flow, files, sizes, masks, options)
    if options.out is None:
        sys.stdout.write(to_text(posed, options.format))
    else:
        write_poses(posed, options.format, options.out, options.overwrite)
        tell(f"{options.out}: poses of {len(posed)} pictures")


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named, in order of their names; DataError where there are none."""
    from sitdist.io.images import SUFFIXES

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


def _mask(folder: Path, file: Path) -> Path:
    for candidate in (folder / file.name, folder / f"{file.stem}.png", folder / f"{file.name}.png"):
        if os.path.isfile(candidate):
            return candidate
    raise DataError(f"{folder / file.name}: no mask for {file}; give one for every picture")


def pose_files(
    flow: Flow,
    files: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    masks: Sequence[Path] | None,
    options: argparse.Namespace,
) -> list[PosedPicture]:
    """What is estimated for every file, with the intrinsics of its own pixels, of which `sizes` tells the number."""
    from tqdm import tqdm

    how = estimate_arguments(options, flow)
    flow.check_estimates(options.label, **how)
    posed: list[PosedPicture] = []
    starts: Iterable[int] = range(0, len(files), options.batch)
    for start in tqdm(starts, "pictures", disable=len(files) <= options.batch):
        some = list(files[start : start + options.batch])
        estimate = flow.estimate(
            some,
            options.intrinsics,
            None if masks is None else list(masks[start : start + options.batch]),
            options.label,
            frame=options.frame,
            **how,
        )
        posed += [
            _posed(flow, file, sizes[start + row], row, estimate, options.intrinsics) for row, file in enumerate(some)
        ]
    return posed


def _posed(
    flow: Flow, file: Path, size: tuple[int, int], row: int, estimate: Any, given: Sequence[float] | None
) -> PosedPicture:
    from sitdist.geometry.camera import Intrinsics
    from sitdist.inference.preprocess import centred
    from sitdist.io.pose_files import PosedPicture

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
    if estimate.rotation_bars_deg is not None:
        facts["rotation_bar_90_deg"] = float(estimate.rotation_bars_deg[row, 1])
        facts["translation_bar_90"] = float(estimate.translation_bars[row, 1])
    return PosedPicture(file, estimate.camera_to_world[row], camera, facts)
