"""`sitdist pose RUN PICTURE...`: the poses of picture files, as other tools read them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import (
    add_device,
    add_evaluate_keys,
    add_overwrite,
    estimate_arguments,
    output,
    positive,
    whole,
)
from sitdist.cli.outcome import tell
from sitdist.cli.parser import Parser
from sitdist.errors import DataError

FORMATS = ("jsonl", "csv", "transforms", "colmap", "tum")


def add(commands: Any) -> None:
    """Add the command to the command line."""
    commands.add_parser("pose", help="Estimate the poses of pictures.", options=_options, run=_run)


def _options(command: Parser) -> None:
    command.add_argument("run", help="A run, an exported folder, or a hub id.")
    command.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="Picture files, or folders of them.")
    command.add_argument("--format", choices=FORMATS, default="jsonl", help="Output format.")
    command.add_argument("--out", type=output, help="Output file; for colmap, a new folder. Default: print.")
    add_overwrite(command)
    command.add_argument(
        "--intrinsics", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"), help="Camera of all pictures, in pixels."
    )
    command.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="Folder of masks with the same names, white on the object."
    )
    command.add_argument("--frame", choices=("dataset", "user"), default="dataset", help="Frame of the poses.")
    command.add_argument("--label", type=whole(0), default=0, help="Label of the object.")
    add_evaluate_keys(command, "estimator", "estimator_steps", "readout", "refine")
    command.add_argument("--batch", type=positive, default=64, help="Number of pictures per batch.")
    add_device(command)


def _run(options: argparse.Namespace) -> None:
    from sitdist.inference.load import load
    from sitdist.inference.pose_pictures import estimate_files, mask_of, picture_files
    from sitdist.io.atomic import check_free
    from sitdist.io.images import picture_sizes
    from sitdist.io.pose_files import picture_names, to_text, write_poses

    files = picture_files(options.pictures)
    masks = None if options.masks is None else [mask_of(options.masks, file) for file in files]
    if options.format == "colmap" and options.out is None:
        raise DataError("--format colmap: a model is a folder of three files; give --out FOLDER")
    picture_names(files, options.format, None if options.out is None else options.out.parent)
    if options.out is not None:
        check_free(options.out, options.overwrite and options.format != "colmap")
    sizes = [picture_sizes(file)[0] for file in files]  # before the model is loaded

    flow = load(options.run, options.device)
    how = estimate_arguments(options, flow)
    posed = estimate_files(
        flow, files, sizes, masks, options.intrinsics, options.label, options.batch, frame=options.frame, **how
    )
    if options.out is None:
        sys.stdout.write(to_text(posed, options.format))
    else:
        write_poses(posed, options.format, options.out, options.overwrite)
        tell(f"{options.out}: poses of {len(posed)} pictures")
