"""The command line: `sitdist COMMAND`, or `python -m sitdist COMMAND` under a launcher.

Commands are thin; what is heavy is imported when a command runs. A user's mistake is one line on stderr and exit code
2, a bug of sitdist one line and exit code 1; a run that was asked to stop, saved everything and can be resumed exits
with 75.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from sitdist import __version__
from sitdist.checks import find_device
from sitdist.cli import export, pose, render, view
from sitdist.cli.arguments import (
    ESTIMATORS,
    READOUTS,
    add_device,
    elevation,
    names,
    output,
    positive,
    positive_number,
    radii,
    seed,
    share,
    whole,
)
from sitdist.cli.outcome import EXIT_RESUME, EXIT_USAGE, check_launcher, exit_code, prepare_output, show, tell
from sitdist.errors import ConfigError, DataError, RunInterrupted, one_line, shortened

FIXED_STEP = ("euler", "midpoint", "heun", "heun3", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
EXPERIMENTS = ("radii", "turntable", "interpolation", "cycle", "solvers", "all")
GENERATORS = (*FIXED_STEP, *ADAPTIVE, "euler_maruyama", "stochastic_heun")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest right word."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)|invalid choice: '([^']*)'", message)
        if unknown:
            word = unknown[1] or unknown[2]
            known = list(self._option_string_actions)
            for action in self._actions:
                known += [str(choice) for choice in action.choices or ()]
            near = difflib.get_close_matches(word, known, 1, 0.5)
            what = "unknown option" if word.startswith("-") else "unknown"
            remedy = f"did you mean '{near[0]}'?" if near else f"see `{self.prog} --help`"
            message = f"{what} '{word}'; {remedy}"
        raise ConfigError(f"{self.prog}: {shortened(message, 400)}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # of --help and --version, where a closed pipe can still be told
        super().exit(status, message)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # here and not in parse_args, so that the command itself knows which options are near
            self.error(f"unrecognized arguments: {rest[0]}")
        return namespace, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    prepare_output()
    code = run(arguments)
    if code == EXIT_RESUME:  # launchers pass on what a terminal has already sent: the answer stays the same
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: Sequence[str] | None = None, parser: Callable[[], Parser] | None = None) -> int:
    """Run a command of the `parser`, by default of sitdist; returns the exit code."""
    try:
        check_launcher()
        options = (parser or make_parser)().parse_args(arguments)
        code = options.command(options) or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt, RunInterrupted) as error:
        return exit_code(error)


def make_parser() -> Parser:
    parser = Parser(
        prog="sitdist", description="Flow models that tie camera poses to pictures: train and evaluate them."
    )
    parser.add_argument("--version", action="version", version=f"sitdist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shards = commands.add_parser("shards", help="build and check datasets").add_subparsers(
        required=True, metavar="ACTION"
    )
    command = shards.add_parser("build", help="render or load views, encode them and pack them into shards")
    command.add_argument("recipe", type=Path, help="dataset recipe (YAML)")
    command.add_argument("--out", type=output, required=True, help="folder of the dataset")
    command.add_argument(
        "--splits", type=names, metavar="A,B", help="build only these splits, train among them (default: all)"
    )
    _add_set(command)
    command.set_defaults(command=_shards_build)
    command = shards.add_parser("cameras", help="write the cameras of a split for nerfstudio to render")
    command.add_argument("recipe", type=Path, help="dataset recipe (YAML)")
    command.add_argument("--split", required=True, help="split of the recipe")
    command.add_argument("--out", type=output, required=True, help="camera path to write (JSON)")
    command.add_argument(
        "--transforms",
        type=output,
        metavar="FILE",
        help="also write the transforms.json of the pictures 00000.png, ...",
    )
    command.add_argument("--overwrite", action="store_true", help="overwrite the output files if they exist")
    _add_set(command)
    command.set_defaults(command=_shards_cameras)
    for name, function, text in (
        ("verify", _shards_verify, "read everything again and report what is damaged"),
        ("info", _shards_info, "say what a dataset holds"),
    ):
        command = shards.add_parser(name, help=text)
        command.add_argument("dataset", help="folder or fsspec URL")
        command.set_defaults(command=function)

    codec = commands.add_parser("codec", help="make codecs").add_subparsers(required=True, metavar="ACTION")
    command = codec.add_parser("fit", help="train an AutoencoderKL on the training views of a recipe")
    command.add_argument("recipe", type=Path, help="dataset recipe (YAML); its codec is not used")
    command.add_argument("--out", type=output, required=True, help="diffusers folder to write")
    command.add_argument("--steps", type=positive, help="(default: 2000)")
    command.add_argument("--batch", type=positive, help="views a step, of all processes together (default: 32)")
    command.add_argument("--views", type=positive, help="fit on at most this many views (default: 4000)")
    command.add_argument("--channels", type=positive, nargs="+", help="channels of every level (default: 16 32 32)")
    command.add_argument("--latent-channels", type=positive, help="(default: 4)")
    command.add_argument("--loss", choices=("mse", "l1"), help="error of the pixels (default: mse)")
    command.add_argument("--lpips-backbone", metavar="FILE", help="torchvision AlexNet or VGG weights: adds LPIPS")
    command.add_argument("--lr", type=positive_number, help="largest learning rate (default: 2e-3)")
    command.add_argument("--precision", choices=("fp32", "bf16"), help="of the network in training (default: fp32)")
    command.add_argument("--seed", type=seed, help="(default: 0)")
    _add_set(command)
    command.set_defaults(command=_codec_fit)

    scene = commands.add_parser("scene", help="make scenes from photos").add_subparsers(required=True, metavar="ACTION")
    command = scene.add_parser("fit", help="fit a radiance field to posed photos of one object")
    command.add_argument("photos", type=Path, help=".npz or a folder of them, transforms.json, or a COLMAP folder")
    command.add_argument("--out", type=output, required=True, help="folder of the scene")
    command.add_argument("--images", type=Path, help="folder of the pictures that a COLMAP model names")
    command.add_argument(
        "--background", type=share, nargs=3, metavar=("R", "G", "B"), help="colour behind the object, 0 to 1 each"
    )
    command.add_argument("--max-views", type=positive, metavar="N", help="fit N photos, evenly spaced (default: all)")
    command.add_argument("--keep-frame", action="store_true", help="give the scene's poses in the capture's own frame")
    command.add_argument("--no-view-dependence", action="store_true", help="one colour from all sides: 3 times smaller")
    command.add_argument("--resolutions", type=positive, nargs="+", metavar="N", help="N^3 voxels at every level")
    command.add_argument("--steps", type=positive, nargs="+", metavar="N", help="steps at every level")
    command.add_argument("--seed", type=seed, default=0)
    add_device(command)
    command.add_argument("--lpips-backbone", metavar="FILE", help="torchvision AlexNet or VGG weights for LPIPS")
    command.set_defaults(command=_scene_fit)

    command = scene.add_parser("render", help="pictures of a scene, with their transforms.json")
    command.add_argument("scene", help="folder of a fitted scene, or built-in")
    command.add_argument("--out", type=output, required=True, help="folder of the pictures")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--turntable", type=positive, metavar="N", help="N views on a closed circle, also as a GIF")
    which.add_argument("--recipe", type=Path, help="the cameras of a recipe's --split")
    command.add_argument("--split", default="train", help="(default: train)")
    command.add_argument("--radius", type=positive_number, default=4.0, help="of the turntable (default: 4)")
    command.add_argument("--elevation", type=elevation, default=20.0, help="of the turntable in degrees (default: 20)")
    command.add_argument("--fov", type=positive_number, default=40.0, help="of the turntable in degrees (default: 40)")
    command.add_argument(
        "--size", type=whole(1, 16384), default=256, help="pixels of the turntable's side (default: 256)"
    )
    command.add_argument(
        "--supersample", type=whole(1, 16), default=2, help="its square is the rays a pixel (default: 2)"
    )
    command.add_argument(
        "--background", type=share, nargs=3, metavar=("R", "G", "B"), help="in the place of the scene's own"
    )
    command.add_argument("--alpha", action="store_true", help="leave the background out, keep the object's share")
    _add_set(command)
    command.set_defaults(command=_scene_render)

    command = commands.add_parser("train", help="train a flow, or go on with a run")
    command.add_argument("config", type=Path, help="experiment config (YAML)")
    command.add_argument("--out", type=output, required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="what happens anyway: go on from the newest checkpoint")
    _add_set(command)
    command.set_defaults(command=_train)

    command = commands.add_parser("doctor", help="what a training run will do, and what would stop it")
    command.add_argument("config", type=Path, help="experiment config (YAML)")
    command.add_argument("--launch", type=Path, metavar="FILE", help="accelerate config that it will be started with")
    command.add_argument("--out", type=output, default=Path("runs"), help="where the run will be (default: runs)")
    _add_set(command)
    command.set_defaults(command=_doctor)

    checkpoint = commands.add_parser("checkpoint", help="look at checkpoints").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, text in (
        ("list", "size, processes and versions of every checkpoint of a run"),
        ("verify", "read all of them again and say which are damaged"),
    ):
        command = checkpoint.add_parser(name, help=text)
        command.add_argument("run", type=Path, help="folder of the run")
        command.set_defaults(command=_checkpoint, verify=name == "verify")

    command = checkpoint.add_parser("convert", help="write a run's weights as one file that other code loads")
    command.add_argument("source", type=Path, metavar="RUN", help="folder of the run, or a file of weights")
    command.add_argument("out", type=output, metavar="FILE", help="file to write: .safetensors, or .pt for torch.load")
    command.add_argument("--step", type=positive, metavar="N", help="checkpoint (default: the newest whole one)")
    command.add_argument("--weights", choices=("ema", "model"), default="ema", help="average or not (default: ema)")
    command.set_defaults(command=_checkpoint_convert)

    command = commands.add_parser("eval", help="measure a run on views it has not seen, and write the report")
    command.add_argument("run", type=Path, help="folder of the run")
    command.add_argument("--split", help="evaluate a split of the dataset (default: test)")
    command.add_argument("--radii", type=radii, metavar="A:B", help="evaluate radii A to B in bins of width 1")
    command.add_argument("--views-per-radius", type=positive, metavar="N", help="views in every bin")
    command.add_argument("--experiment", choices=EXPERIMENTS, default="radii", help="what to measure (default: radii)")
    command.add_argument("--max-views", type=positive, metavar="N", help="at most N views in each experiment")
    command.add_argument("--data", help="folder or URL of a dataset (default: the one trained on)")
    command.add_argument("--out", type=output, help="folder of the results (default: RUN/eval/...)")
    command.add_argument("--estimator", choices=ESTIMATORS)
    command.add_argument("--estimator-steps", type=positive)
    command.add_argument("--readout", choices=READOUTS, help="how a pose is fitted to its sixteen numbers")
    command.add_argument("--refine", metavar="SCENE", help="move poses to where this scene (or built-in) shows them")
    command.add_argument("--generator", choices=GENERATORS)
    command.add_argument("--generator-steps", type=positive)
    command.add_argument("--batch", type=positive)
    command.add_argument("--seed", type=seed)
    command.add_argument("--lpips-backbone", metavar="FILE", help="torchvision AlexNet or VGG weights for LPIPS")
    _add_set(command, "evaluate.guidance=2")
    command.add_argument("--uncalibrated", action="store_true", help="leave out the run's error bars and trust")
    command.set_defaults(command=_eval)

    command = commands.add_parser("calibrate", help="fit error bars and trust on a split that was held out")
    command.add_argument("run", type=Path, help="folder of the run; calibration.json is written there")
    command.add_argument("--split", required=True, help="held-out views, such as val; at least 20, better 500")
    command.add_argument("--data", help="folder or URL of a dataset (default: the one trained on)")
    command.add_argument("--estimator", choices=ESTIMATORS)
    command.add_argument("--estimator-steps", type=positive)
    command.add_argument("--batch", type=positive)
    command.set_defaults(command=_calibrate)

    command = commands.add_parser("likelihood", help="log densities of a split's latents, in bits per dimension")
    command.add_argument("run", type=Path, help="folder of the run")
    command.add_argument("--split", default="test", help="(default: test)")
    command.add_argument("--data", help="folder or URL of a dataset (default: the one trained on)")
    command.add_argument("--views", type=positive, metavar="N", help="the first N views (default: all)")
    command.add_argument("--probes", type=positive, default=4, help="Hutchinson probes a view (default: 4)")
    command.add_argument("--method", choices=(*FIXED_STEP, *ADAPTIVE), default="heun", help="(default: heun)")
    command.add_argument("--steps", type=positive, default=25, help="(default: 25)")
    command.add_argument("--batch", type=positive, default=64)
    command.add_argument("--seed", type=seed, default=0, help="of the probes")
    command.add_argument("--out", type=output, metavar="FILE", help="also write a CSV of every view's")
    add_overwrite(command)
    command.set_defaults(command=_likelihood)

    command = commands.add_parser("sigma", help="predict the noise floor of a dataset's packing, before any training")
    command.add_argument("dataset", type=Path)
    command.add_argument(
        "--target-deg", type=positive_number, required=True, metavar="D", help="rotation error to stay below"
    )
    command.set_defaults(command=_sigma)

    for module in (pose, render, view, export):
        module.add(commands)

    ema = commands.add_parser("ema", help="averages of a run's weights").add_subparsers(required=True, metavar="ACTION")
    command = ema.add_parser("reconstruct", help="the average of any width from the snapshots of train.averages")
    command.add_argument("run", type=Path, help="folder of the run")
    command.add_argument("--sigma-rel", type=positive_number, required=True, metavar="S", help="relative width")
    command.add_argument("--step", type=positive, help="after this many steps (default: the last snapshot)")
    command.add_argument("--out", type=output, help="file of the weights, for --set evaluate.average=FILE")
    add_overwrite(command)
    command.set_defaults(command=_ema_reconstruct)

    command = commands.add_parser("report", help="write plots and report.html of an evaluation again")
    command.add_argument("evaluation", type=Path, nargs="+", help="folder that holds metrics.json and records.csv")
    command.add_argument("--out", type=output, help="page of several, side by side (default: FIRST/comparison.html)")
    add_overwrite(command)
    command.set_defaults(command=_report)
    return parser


def _add_set(command: argparse.ArgumentParser, example: str = "train.steps=100") -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"change one key, such as {example}"
    )


def add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="overwrite the output file if it exists")


# -------------------------------------------------------------------------------------------------------- commands


def _shards_build(options: argparse.Namespace) -> None:
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)  # before what is slow to import
    from sitdist.build.writer import build
    from sitdist.dataset.verify import info
    from sitdist.distributed.accelerator import processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        build(recipe, options.out, options.splits)
    else:
        with processes() as (_, ranks):
            build(recipe, options.out, options.splits, ranks)
    if os.environ.get("RANK", "0") == "0":
        show(info(options.out))


def _shards_cameras(options: argparse.Namespace) -> None:
    from sitdist.build.camera_path import write_camera_path
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)
    count = write_camera_path(recipe, options.split, options.out, options.transforms, options.overwrite)
    tell(f"{options.out}: {count} cameras of {options.split}")


def _shards_verify(options: argparse.Namespace) -> None:
    from sitdist.dataset.verify import info, verify

    problems = verify(options.dataset)
    for problem in problems[1:]:
        print(one_line(problem), file=sys.stderr)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DataError(f"{options.dataset}: {problems[0]}{more}")
    show(info(options.dataset))
    show("verified: every sample and every hash is right")


def _shards_info(options: argparse.Namespace) -> None:
    from sitdist.dataset.verify import info

    show(info(options.dataset))


def _codec_fit(options: argparse.Namespace) -> None:
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)  # before what is slow to import
    from sitdist.build.codec_fit import CodecFitOptions, fit_codec
    from sitdist.evaluate.metrics import Lpips

    given = {name: getattr(options, name) for name in CodecFitOptions.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    backbone = options.lpips_backbone
    result = fit_codec(
        recipe,
        options.out,
        CodecFitOptions(**given | ({"channels": tuple(options.channels)} if options.channels else {})),
        (lambda device: Lpips(backbone, device).distance) if backbone else None,
    )
    if os.environ.get("RANK", "0") == "0":
        text = (
            f"{options.out}: held-out round trip {result.psnr:.2f} dB on {result.held_out} views, scaling factor "
            f"{result.scaling_factor:.4f}; put codec: {{kind: vae, path: {options.out}}} into the recipe"
        )
        tell(text)


def _scene_render(options: argparse.Namespace) -> None:
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


def _scene_fit(options: argparse.Namespace) -> None:
    from sitdist.evaluate import metrics
    from sitdist.io.atomic import check_free
    from sitdist.model.codec import psnr
    from sitdist.scene.fit import FitOptions, fit_scene, turntable
    from sitdist.scene.photos import read_photos
    from sitdist.scene.store import save_scene

    check_free(options.out)
    device = find_device(options.device)
    background = (options.background[0], options.background[1], options.background[2]) if options.background else None
    photos = read_photos(options.photos, background, options.images).thinned(options.max_views)
    measures = {"psnr": psnr}
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
    names = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}"}
    held_out = ", ".join(names[name].format(scene.held_out[name]) for name in measures)
    views = f"{scene.held_out['views']:.0f} of {len(photos)} photos, held out from the fit"
    tell(f"{options.out}: {held_out} on {views}")


def _train(options: argparse.Namespace) -> None:
    from sitdist.config.experiment import Config
    from sitdist.config.load import load_yaml

    config = load_yaml(Config, options.config, options.set)  # before what is slow to import
    from sitdist.train.trainer import train

    train(config, options.out)


def _doctor(options: argparse.Namespace) -> int:
    from sitdist.train.doctor import doctor

    found = doctor(options.config, options.set, options.launch, options.out)
    if os.environ.get("RANK", "0") == "0":
        show(found.report())
    return EXIT_USAGE if found.wrong else 0


def _checkpoint(options: argparse.Namespace) -> int:
    from sitdist.runs.checkpoint import describe_checkpoints

    text, whole = describe_checkpoints(options.run, options.verify)
    show(text)
    return 0 if whole else EXIT_USAGE


def _checkpoint_convert(options: argparse.Namespace) -> None:
    from sitdist.runs.convert import convert

    tell(convert(options.source, options.out, options.step, options.weights))


def _eval(options: argparse.Namespace) -> None:
    from sitdist.evaluate.evaluator import EvalOptions, evaluate

    names = [name for name in EvalOptions.__dataclass_fields__ if name in vars(options)]
    folder = evaluate(options.run, EvalOptions(**{name: getattr(options, name) for name in names}))
    if os.environ.get("RANK", "0") == "0":
        if (folder / "metrics.json").is_file():
            _print_results(folder)
        _print_experiments(folder)


def _print_experiments(folder: Path) -> None:
    from sitdist.evaluate.experiments.tables import format_experiments

    show(format_experiments(folder))


def _calibrate(options: argparse.Namespace) -> None:
    from sitdist.inference.calibration import CalibrateOptions, calibrate, format_calibration

    given = {name: getattr(options, name) for name in CalibrateOptions.__dataclass_fields__}
    show(format_calibration(options.run, calibrate(options.run, CalibrateOptions(**given))))


def _likelihood(options: argparse.Namespace) -> None:
    from sitdist.evaluate.likelihood import split_likelihood

    names = ("run", "split", "data", "views", "probes", "method", "steps", "batch", "seed", "out", "overwrite")
    tell(split_likelihood(**{name: getattr(options, name) for name in names}).line(options.split))


def _sigma(options: argparse.Namespace) -> None:
    from sitdist.evaluate.sigma import sigma_table

    show(sigma_table(options.dataset, options.target_deg))


def _ema_reconstruct(options: argparse.Namespace) -> None:
    from sitdist.runs.averages import reconstruct_to_file

    tell(reconstruct_to_file(options.run, options.sigma_rel, options.step, options.out, options.overwrite))


def _report(options: argparse.Namespace) -> None:
    if len(options.evaluation) > 1:
        from sitdist.evaluate.report.compare import compare

        show(compare(options.evaluation, options.out, options.overwrite))
        return
    if options.out:
        raise ConfigError("--out: only for several evaluations; the report of one is in its own folder")
    from sitdist.evaluate.report import report_again

    (evaluation,) = options.evaluation
    report_again(evaluation)
    _print_results(evaluation)
    _print_experiments(evaluation)


def _print_results(folder: Path) -> None:
    from sitdist.evaluate.report import format_table
    from sitdist.io.json_file import read_json

    show(format_table(read_json(folder / "metrics.json", "run `sitdist eval` again")))
    tell(f"report: {folder / 'report.html'}")
