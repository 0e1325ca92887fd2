"""`sitdist codec ACTION`: make codecs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import add_lpips, add_set, output, positive, positive_number, seed
from sitdist.cli.outcome import tell
from sitdist.cli.parser import Parser


def add(commands: Any) -> None:
    """Add the commands to the command line."""
    actions = commands.add_parser("codec", help="Make codecs.").add_actions()
    actions.add_parser(
        "fit", help="Train an AutoencoderKL on the training views of a recipe.", options=_fit_options, run=_fit
    )


def _fit_options(command: Parser) -> None:
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


def _fit(options: argparse.Namespace) -> None:
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
