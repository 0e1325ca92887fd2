"""`sitdist render RUN`: pictures of a trained model, from a turntable or from the poses in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import (
    add_device,
    add_generator,
    elevation,
    number,
    output,
    positive,
    positive_number,
    sample_options,
    seed,
    whole,
)
from sitdist.cli.outcome import tell
from sitdist.errors import ConfigError


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    command = commands.add_parser("render", help="render pictures with a trained model")
    command.add_argument("run", help="a run, an exported folder, or a hub id")
    command.add_argument(
        "--out", type=output, required=True, help="new folder of PNGs and transforms.json; or a file, .gif or .mp4"
    )
    command.add_argument("--overwrite", action="store_true", help="overwrite the output file if it exists")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--turntable", type=positive, metavar="N", help="N views on a closed circle")
    which.add_argument(
        "--poses", type=Path, metavar="FILE", help="transforms.json, camera path, .npy, .npz, or a COLMAP folder"
    )
    command.add_argument("--radius", type=positive_number, help="of the turntable (default: amid the training radii)")
    command.add_argument("--elevation", type=elevation, help="of the turntable in degrees (default: 20)")
    command.add_argument(
        "--frame", choices=("dataset", "user"), default="dataset", help="of --poses (default: dataset)"
    )
    command.add_argument("--label", type=whole(0), default=0, help="of the object (default: 0)")
    command.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    add_generator(command)
    command.add_argument("--fps", type=number(0.01, 1000.0), default=16.0, help="of a GIF or MP4 (default: 16)")
    command.add_argument("--batch", type=positive, default=64, help="pictures at once (default: 64)")
    add_device(command)
    command.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    if options.poses is not None and (options.radius or options.elevation is not None):
        raise ConfigError("--radius, --elevation: are the turntable's; give them with --turntable")
    if not 0.01 <= options.fps <= 1000.0:
        raise ConfigError(f"--fps {options.fps:g}: expected 0.01 to 1000 pictures per second")
    from sitdist.inference.load import load
    from sitdist.io.pose_files import read_poses
    from sitdist.io.video import check_out, write_rendered

    check_out(options.out, options.overwrite)
    cameras = None if options.poses is None else read_poses(options.poses)
    flow = load(options.run, options.device)
    if cameras is None:
        height = 20.0 if options.elevation is None else options.elevation
        poses, intrinsics = flow.turntable(options.turntable, options.radius, height), None
    else:
        poses, intrinsics = cameras.camera_to_world, cameras.intrinsics
    pictures = flow.render(
        poses,
        intrinsics,
        options.label,
        frame=options.frame if options.poses is not None else "dataset",
        seed=options.seed,
        options=sample_options(options, flow),
        batch=options.batch,
    )
    write_rendered(pictures, poses, intrinsics or flow.camera, options.out, options.fps)
    tell(f"{options.out}: {len(pictures)} pictures")
