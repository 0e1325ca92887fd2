"""`sitdist scene`: make scenes from photos, and render them."""

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
    ("scene fit", "Fit a radiance field to posed photos of one object.", _fit_options, _fit),
    ("scene render", "Render pictures of a scene, with a transforms.json.", _render_options, _render),
]
