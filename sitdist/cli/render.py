"""`sitdist render RUN`: pictures of a trained model, from a turntable or from the poses in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import (
    add_device,
    add_evaluate_keys,
    add_overwrite,
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
from sitdist.cli.parser import Parser
from sitdist.errors import ConfigError


def add(commands: Any) -> None:
    """Add the command to the command line."""
    commands.add_parser("render", help="Render pictures with a trained model.", options=_options, run=_run)


def _options(command: Parser) -> None:
    command.add_argument("run", help="A run, an exported folder, or a hub id.")
    command.add_argument(
        "--out", type=output, required=True, help="New folder of PNGs and transforms.json, or a .gif or .mp4 file."
    )
    add_overwrite(command)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--turntable", type=positive, metavar="N", help="Render N views on a closed circle.")
    which.add_argument(
        "--poses",
        type=Path,
        metavar="FILE",
        help="Render the poses in a transforms.json, a camera path, an .npy, an .npz, or a COLMAP folder.",
    )
    command.add_argument(
        "--radius", type=positive_number, help="Radius of the turntable. Default: the middle of the training radii."
    )
    command.add_argument("--elevation", type=elevation, help="Elevation of the turntable in degrees. Default: 20.")
    command.add_argument("--frame", choices=("dataset", "user"), default="dataset", help="Frame of --poses.")
    command.add_argument("--label", type=whole(0), default=0, help="Label of the object.")
    command.add_argument("--seed", type=seed, default=0, help="Seed of the noise.")
    add_evaluate_keys(command, "generator", "generator_steps")
    command.add_argument("--fps", type=number(0.01, 1000.0), default=16.0, help="Frames per second of a GIF or MP4.")
    command.add_argument("--batch", type=positive, default=64, help="Number of pictures per batch.")
    add_device(command)


def _run(options: argparse.Namespace) -> None:
    if options.poses is not None and (options.radius or options.elevation is not None):
        raise ConfigError("--radius, --elevation: are the turntable's; give them with --turntable")
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
