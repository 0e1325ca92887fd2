"""`sitdist photos` and `sitdist scene`: prepare photos, make scenes from them, and render them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.outcome import tell
from sitdist.cli.parser import (
    Command,
    Parser,
    add_device,
    add_lpips,
    add_set,
    check_there,
    elevation,
    output,
    positive,
    positive_number,
    seed,
    share,
    whole,
)


def add_capture(command: Parser) -> None:
    """Add the arguments that say which photos are prepared, and how."""
    command.add_argument(
        "source",
        type=Path,
        help="A transforms.json or its folder, an .npz file, a COLMAP folder, a folder of photos, or a video.",
    )
    command.add_argument("--size", type=whole(8, 16384), default=64, help="Side of the pictures in pixels.")
    command.add_argument(
        "--crop",
        choices=("principal", "object"),
        default="principal",
        help="What is in the middle of the pictures: the photos' principal points, or the object (the cameras are "
        "turned towards it).",
    )
    command.add_argument("--images", type=Path, help="Folder of the pictures that a COLMAP model names.")
    command.add_argument("--masks", type=Path, metavar="DIR", help="Folder of masks, white where the object is.")
    command.add_argument(
        "--key", type=share, nargs=3, metavar=("R", "G", "B"), help="Colour of the backdrop to remove, from 0 to 1."
    )
    command.add_argument(
        "--key-tolerance", type=share, default=0.1, metavar="D", help="How far from --key the backdrop may be."
    )
    command.add_argument("--remove-background", action="store_true", help="Remove the background by rembg.")
    command.add_argument(
        "--frames", type=positive, default=100, metavar="N", help="Number of sharp frames to take from a video."
    )
    command.add_argument(
        "--hold-out", type=whole(0), default=10, metavar="N", help="Hold out every Nth photo for tests; 0: none."
    )
    command.add_argument("--strict", action="store_true", help="Stop where a photo has no file or no pose.")


def _photos_options(command: Parser) -> None:
    add_capture(command)
    command.add_argument("--out", type=output, required=True, help="New folder of the pictures.")


def _fit_options(command: Parser) -> None:
    command.add_argument("photos", type=Path, help="An .npz, a folder of them, a transforms.json, or a COLMAP folder.")
    command.add_argument("--out", type=output, required=True, help="Folder of the scene.")
    command.add_argument("--images", type=Path, help="Folder of the pictures that a COLMAP model names.")
    command.add_argument(
        "--background",
        type=share,
        nargs=3,
        metavar=("R", "G", "B"),
        help="Colour behind the object, from 0 to 1. Default: the median colour of the photos' borders.",
    )
    command.add_argument("--max-views", type=positive, metavar="N", help="Fit only N photos, evenly spaced.")
    command.add_argument("--keep-frame", action="store_true", help="Keep poses in the frame of the capture.")
    command.add_argument(
        "--no-view-dependence", action="store_true", help="One colour from all sides. The scene is 3 times smaller."
    )
    command.add_argument(
        "--resolutions",
        type=positive,
        nargs="+",
        metavar="N",
        help="About N^3 voxels at each level. Default: 32 64 112.",
    )
    command.add_argument(
        "--steps", type=positive, nargs="+", metavar="N", help="Number of steps at each level. Default: 200 300 450."
    )
    command.add_argument("--seed", type=seed, default=0, help="Seed of the choice of rays.")
    add_device(command)
    add_lpips(command)


def _render_options(command: Parser) -> None:
    command.add_argument("scene", help="Folder of a fitted scene, or built-in.")
    command.add_argument("--out", type=output, required=True, help="New folder of the pictures.")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--turntable", type=positive, metavar="N", help="Render N views on a circle, and a GIF.")
    which.add_argument("--recipe", type=Path, help="Render the cameras of a recipe's --split.")
    command.add_argument("--split", default="train", help="Split of the recipe.")
    command.add_argument("--radius", type=positive_number, default=4.0, help="Radius of the turntable.")
    command.add_argument("--elevation", type=elevation, default=20.0, help="Elevation of the turntable in degrees.")
    command.add_argument("--fov", type=positive_number, default=40.0, help="Field of view of the turntable in degrees.")
    command.add_argument("--size", type=whole(1, 16384), default=256, help="Side of the pictures in pixels.")
    command.add_argument(
        "--supersample",
        type=whole(1, 16),
        default=2,
        help="Supersampling factor N: each pixel averages N x N rays.",
    )
    command.add_argument(
        "--background", type=share, nargs=3, metavar=("R", "G", "B"), help="Overrides the scene's background."
    )
    command.add_argument("--alpha", action="store_true", help="Write RGBA images with a transparent background.")
    add_set(command, "image_size=64")


def _photos(options: argparse.Namespace) -> None:
    check_there(options.source, options.images, options.masks)
    from sitdist.build.matte import Matting
    from sitdist.build.photos import PhotoOptions, prepare_photos
    from sitdist.build.pictures import background_of

    matting = Matting(options.masks, background_of(options.key), options.key_tolerance, options.remove_background)
    prepared = prepare_photos(
        options.source,
        options.out,
        PhotoOptions(
            options.size, options.crop, matting, options.images, options.frames, options.hold_out, options.strict
        ),
    )
    left_out = [
        f"; {count} without a {what} left out"
        for count, what in ((prepared.without_file, "file"), (prepared.without_pose, "pose"))
        if count
    ]
    tell(
        f"{options.out}: {prepared.fitted} photos to fit, {prepared.held_out} held out, {prepared.fov_deg:.1f} degrees "
        f"wide{''.join(left_out)}"
    )
    if not prepared.background_known:
        tell(
            "the photos' borders are not of one colour, and a scene would hold what is behind the object: give "
            "--masks, --key or --remove-background"
        )
    tell(f"next: sitdist scene fit {options.out}/train.json --out {options.out}/scene")


def _fit(options: argparse.Namespace) -> None:
    check_there(options.photos, options.images)
    from sitdist.build.pictures import background_of
    from sitdist.checks import find_device
    from sitdist.evaluate import metrics
    from sitdist.io.atomic import check_free
    from sitdist.model.codec import psnr
    from sitdist.scene.fit import FitOptions, fit_scene, turntable
    from sitdist.scene.photos import read_photos
    from sitdist.scene.store import save_scene

    check_free(options.out)
    device = find_device(options.device)
    background = background_of(options.background)
    photos = read_photos(options.photos, background, options.images).thinned(options.max_views)
    measures: dict[str, Any] = {"psnr": psnr}
    if min(photos.images.shape[-2:]) >= metrics.SSIM_WINDOW:
        measures["ssim"] = metrics.ssim
    if options.lpips_backbone:
        measures["lpips"] = metrics.Lpips(options.lpips_backbone)
    fit_options = FitOptions(
        resolutions=tuple(options.resolutions or FitOptions.resolutions),
        steps=tuple(options.steps or FitOptions.steps),
        view_dependent=not options.no_view_dependence,
        background=background,
        keep_frame=options.keep_frame,
        seed=options.seed,
    )
    scene = fit_scene(photos, fit_options, measures, device)
    save_scene(scene, options.out, turntable(scene, photos))
    formats = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}"}
    held_out = ", ".join(formats[name].format(scene.held_out[name]) for name in measures)
    views = f"{scene.held_out['views']:.0f} of {len(photos)} photos, held out from the fit"
    tell(f"{options.out}: {held_out} on {views}")


def _render(options: argparse.Namespace) -> None:
    from sitdist.build.pictures import background_of, recipe_cameras, turntable_cameras, write_pictures
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    if options.turntable:
        size, fov = options.size, options.fov
        cameras = turntable_cameras(options.turntable, options.radius, options.elevation, fov, size)
    else:
        cameras = recipe_cameras(load_yaml(Recipe, options.recipe, options.set), options.split)
    count = write_pictures(
        None if options.scene == "built-in" else options.scene,
        cameras,
        options.out,
        options.supersample,
        background_of(options.background),
        options.alpha,
        gif=bool(options.turntable),
    )
    tell(f"{options.out}: {count} pictures")


COMMANDS: list[Command] = [
    ("photos", "Prepare photos or a video: square pictures, poses and a recipe.", _photos_options, _photos),
    ("scene fit", "Fit a radiance field to posed photos of one object.", _fit_options, _fit),
    ("scene render", "Render pictures of a scene, with a transforms.json.", _render_options, _render),
]
