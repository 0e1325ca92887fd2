"""`sitdist shards` and `codec`: build and check datasets, and make their codecs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sitdist.cli.outcome import show, tell
from sitdist.cli.parser import (
    Command,
    Parser,
    add_lpips,
    add_overwrite,
    add_set,
    names,
    output,
    positive,
    positive_number,
    seed,
)
from sitdist.errors import DataError, one_line


def _build_options(command: Parser) -> None:
    command.add_argument("recipe", type=Path, help="Dataset recipe (YAML).")
    command.add_argument("--out", type=output, required=True, help="Folder of the dataset.")
    command.add_argument("--splits", type=names, metavar="A,B", help="Build only these splits; train is one.")
    add_set(command, "image_size=64")


def _cameras_options(command: Parser) -> None:
    command.add_argument("recipe", type=Path, help="Dataset recipe (YAML).")
    command.add_argument("--split", required=True, help="Split of the recipe.")
    command.add_argument("--out", type=output, required=True, help="Camera path to write (JSON).")
    command.add_argument(
        "--transforms",
        type=output,
        metavar="FILE",
        help="Also write a transforms.json for the pictures 00000.png, 00001.png, and so on.",
    )
    add_overwrite(command)
    add_set(command, "image_size=64")


def _dataset_options(command: Parser) -> None:
    command.add_argument("dataset", help="Folder or fsspec URL of the dataset.")


def _build(options: argparse.Namespace) -> None:
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)  # before what is slow to import
    from sitdist.build.writer import build
    from sitdist.dataset.info import info
    from sitdist.distributed.accelerator import processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        build(recipe, options.out, options.splits)
    else:
        with processes() as (_, ranks):
            build(recipe, options.out, options.splits, ranks)
    if os.environ.get("RANK", "0") == "0":
        show(info(options.out))


def _cameras(options: argparse.Namespace) -> None:
    from sitdist.build.camera_path import write_camera_path
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)
    count = write_camera_path(recipe, options.split, options.out, options.transforms, options.overwrite)
    tell(f"{options.out}: {count} cameras of {options.split}")


def _verify(options: argparse.Namespace) -> None:
    from sitdist.dataset.info import info
    from sitdist.dataset.verify import verify

    problems = verify(options.dataset)
    for problem in problems[1:]:
        print(one_line(problem), file=sys.stderr)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DataError(f"{options.dataset}: {problems[0]}{more}")
    show(info(options.dataset))
    show("verified: every sample and every hash is right")


def _info(options: argparse.Namespace) -> None:
    from sitdist.dataset.info import info

    show(info(options.dataset))


def _codec_options(command: Parser) -> None:
    command.add_argument("recipe", type=Path, help="Dataset recipe (YAML). Its codec is not used.")
    command.add_argument("--out", type=output, required=True, help="Folder to write, in diffusers' format.")
    command.add_argument("--steps", type=positive, help="Number of steps. Default: 2000.")
    command.add_argument("--batch", type=positive, help="Views per step, of all processes together. Default: 32.")
    command.add_argument("--views", type=positive, help="Largest number of views to fit on. Default: 4000.")
    command.add_argument("--channels", type=positive, nargs="+", help="Channels of each level. Default: 16 32 32.")
    command.add_argument("--latent-channels", type=positive, help="Channels of the latent. Default: 4.")
    command.add_argument("--loss", choices=("mse", "l1"), help="Loss of the pixels. Default: mse.")
    add_lpips(command)
    command.add_argument("--lr", type=positive_number, help="Largest learning rate. Default: 2e-3.")
    command.add_argument("--precision", choices=("fp32", "bf16"), help="Precision in training. Default: fp32.")
    command.add_argument("--seed", type=seed, help="Seed of the weights and of the order of views. Default: 0.")
    add_set(command, "image_size=64")


def _codec(options: argparse.Namespace) -> None:
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)  # before what is slow to import
    from sitdist.build.codec_fit import CodecFitOptions, fit_codec
    from sitdist.evaluate.metrics import Lpips

    given = {name: getattr(options, name) for name in CodecFitOptions.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    if options.channels:
        given["channels"] = tuple(options.channels)
    backbone = options.lpips_backbone
    perceptual = (lambda device: Lpips(backbone, device).distance) if backbone else None
    result = fit_codec(recipe, options.out, CodecFitOptions(**given), perceptual)
    if os.environ.get("RANK", "0") == "0":
        tell(
            f"{options.out}: held-out round trip {result.psnr:.2f} dB on {result.held_out} views, scaling factor "
            f"{result.scaling_factor:.4f}; put codec: {{kind: vae, path: {options.out}}} into the recipe"
        )


COMMANDS: list[Command] = [
    ("shards build", "Render or load views, encode them, and pack them into shards.", _build_options, _build),
    ("shards cameras", "Write the cameras of a split for nerfstudio to render.", _cameras_options, _cameras),
    ("shards verify", "Read a whole dataset and report what is damaged.", _dataset_options, _verify),
    ("shards info", "Print what a dataset holds.", _dataset_options, _info),
    ("codec fit", "Train an AutoencoderKL on the training views of a recipe.", _codec_options, _codec),
]
