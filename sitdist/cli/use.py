"""`sitdist pose`, `render`, `view` and `export`: use a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sitdist.checks import model_folder
from sitdist.cli.outcome import tell
from sitdist.cli.parser import (
    Command,
    Parser,
    add_device,
    add_evaluate_keys,
    add_overwrite,
    check_run,
    check_there,
    elevation,
    load_flow,
    number,
    output,
    positive,
    positive_number,
    seed,
    whole,
)
from sitdist.errors import ConfigError, DataError

FORMATS = ("jsonl", "csv", "transforms", "colmap", "tum")


def _pose_options(command: Parser) -> None:
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
    add_evaluate_keys(command, "estimator", "estimator_steps", "readout", "zooms", "guidance", "refine")
    command.add_argument("--batch", type=positive, default=64, help="Number of pictures per batch.")
    add_device(command)


def _pose(options: argparse.Namespace) -> None:
    check_there(*options.pictures, options.masks)
    options.run = model_folder(options.run)
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

    flow = load_flow(options)
    posed = estimate_files(
        flow,
        files,
        sizes,
        masks,
        options.intrinsics,
        options.label,
        options.batch,
        frame=options.frame,
        options=flow.estimate_options,
        zooms=flow.zooms if flow.run.config.evaluate.estimator == "multi_zoom" else None,
        scene=options.refine,
    )
    if options.out is None:
        sys.stdout.write(to_text(posed, options.format))
    else:
        write_poses(posed, options.format, options.out, options.overwrite)
        tell(f"{options.out}: poses of {len(posed)} pictures")


def _render_options(command: Parser) -> None:
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
        help="Render the poses in a transforms.json, an .npy, an .npz, or a COLMAP folder.",
    )
    command.add_argument(
        "--radius", type=positive_number, help="Radius of the turntable. Default: the middle of the training radii."
    )
    command.add_argument("--elevation", type=elevation, help="Elevation of the turntable in degrees. Default: 20.")
    command.add_argument("--frame", choices=("dataset", "user"), default="dataset", help="Frame of --poses.")
    command.add_argument("--label", type=whole(0), default=0, help="Label of the object.")
    command.add_argument("--seed", type=seed, default=0, help="Seed of the noise.")
    add_evaluate_keys(command, "generator", "generator_steps", "guidance")
    command.add_argument("--fps", type=number(0.01, 1000.0), default=16.0, help="Frames per second of a GIF or MP4.")
    command.add_argument("--batch", type=positive, default=64, help="Number of pictures per batch.")
    add_device(command)


def _render(options: argparse.Namespace) -> None:
    if options.poses is not None and (options.radius or options.elevation is not None):
        raise ConfigError("--radius, --elevation: are the turntable's; give them with --turntable")
    check_there(options.poses)
    options.run = model_folder(options.run)
    from sitdist.io.pose_files import read_poses
    from sitdist.io.video import check_out, write_rendered

    check_out(options.out, options.overwrite)
    cameras = None if options.poses is None else read_poses(options.poses)
    flow = load_flow(options)
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
        options=flow.sample_options,
        batch=options.batch,
    )
    write_rendered(pictures, poses, intrinsics or flow.camera, options.out, options.fps)
    tell(f"{options.out}: {len(pictures)} pictures")


def _view_options(command: Parser) -> None:
    command.add_argument("run", help="A run, an exported folder, or a hub id.")
    command.add_argument("--port", type=whole(0, 65535), default=8642, help="Port on 127.0.0.1; 0 takes a free one.")
    add_device(command)


def _view(options: argparse.Namespace) -> None:
    options.run = model_folder(options.run)
    from sitdist.inference.viewer import make_server

    with make_server(load_flow(options), options.port) as server:
        tell(f"http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)")
        server.serve_forever()


def _export_options(command: Parser) -> None:
    command.add_argument("run", type=Path, help="Folder of the run.")
    command.add_argument("out", type=output, metavar="DIR", help="New folder, ready to be uploaded to a hub.")
    command.add_argument("--step", type=positive, help="Step of the checkpoint. Default: the newest.")


def _export(options: argparse.Namespace) -> None:
    check_run(options.run)
    from sitdist.evaluate.report.tables import results_markdown
    from sitdist.inference.export import export_run

    loaded = export_run(options.run, options.out, options.step, results_markdown)
    tell(f"{options.out}: {loaded.config.name} after {loaded.step} steps")


COMMANDS: list[Command] = [
    ("pose", "Estimate the poses of pictures.", _pose_options, _pose),
    ("render", "Render pictures with a trained model.", _render_options, _render),
    ("view", "Move a camera in a browser and see what the model renders.", _view_options, _view),
    ("export", "Write what inference needs of a run to a folder, with a model card.", _export_options, _export),
]
