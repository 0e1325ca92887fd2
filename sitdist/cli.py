"""The command line: `sitdist COMMAND`, or `python -m sitdist COMMAND` under a launcher.

Commands are thin; what is heavy is imported when a command runs. A user's mistake is one line on stderr and exit code
2; a run that was asked to stop, saved everything and can be resumed exits with 75.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sitdist import __version__
from sitdist.errors import CodecError, ConfigError, DataError, RunInterrupted, SitdistError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
EXIT_USAGE, EXIT_RESUME, EXIT_INTERRUPTED = 2, 75, 130
ESTIMATORS = ("one_step", "euler", "heun", "midpoint", "source")
GENERATORS = ("euler", "heun", "midpoint")


class _Parser(argparse.ArgumentParser):
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
        raise ConfigError(f"{self.prog}: {message}")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # here and not in parse_args, so that the command itself knows which options are near
            self.error(f"unrecognized arguments: {rest[0]}")
        return namespace, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    code = run(arguments)
    if code == EXIT_RESUME:  # launchers pass on what a terminal has already sent: the answer stays the same
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        return options.command(options) or 0
    except SitdistError as error:
        own = int(os.environ.get("RANK", "0"))
        rank = own if error.of_rank is None else error.of_rank
        if own == 0 or error.of_rank is None:
            print(f"sitdist: error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"sitdist: error: {where}{error.strerror}; free space or name a place you may use", file=sys.stderr)
        return EXIT_USAGE
    except RunInterrupted as stop:  # every process raises it
        if os.environ.get("RANK", "0") == "0":
            print(f"sitdist: {stop}", file=sys.stderr, flush=True)
        return EXIT_RESUME
    except KeyboardInterrupt:
        print("sitdist: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def _parser() -> _Parser:
    parser = _Parser(
        prog="sitdist", description="Flow models that tie camera poses to pictures: train and evaluate them."
    )
    parser.add_argument("--version", action="version", version=f"sitdist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shards = commands.add_parser("shards", help="build and check datasets").add_subparsers(
        required=True, metavar="ACTION"
    )
    command = shards.add_parser("build", help="render or load views, encode them and pack them into shards")
    command.add_argument("recipe", type=Path, help="dataset recipe (YAML)")
    command.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    _add_set(command)
    command.set_defaults(command=_shards_build)
    for name, function, text in (
        ("verify", _shards_verify, "read everything again and report what is damaged"),
        ("info", _shards_info, "say what a dataset holds"),
    ):
        command = shards.add_parser(name, help=text)
        command.add_argument("dataset", type=Path)
        command.set_defaults(command=function)

    codec = commands.add_parser("codec", help="make codecs").add_subparsers(required=True, metavar="ACTION")
    command = codec.add_parser("fit", help="train an AutoencoderKL on the training views of a recipe")
    command.add_argument("recipe", type=Path, help="dataset recipe (YAML); its codec is not used")
    command.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    command.add_argument("--steps", type=_positive, default=2000)
    command.add_argument("--batch", type=_positive, default=32)
    command.add_argument("--views", type=_positive, default=4000, help="fit on at most this many views")
    command.add_argument("--channels", type=_positive, nargs="+", default=[16, 32, 32], help="channels of every level")
    command.add_argument("--latent-channels", type=_positive, default=4)
    command.add_argument("--seed", type=int, default=0)
    _add_set(command)
    command.set_defaults(command=_codec_fit)

    command = commands.add_parser("train", help="train a flow, or go on with a run")
    command.add_argument("config", type=Path, help="experiment config (YAML)")
    command.add_argument("--out", type=Path, required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="go on from the run's newest valid checkpoint, if any")
    _add_set(command)
    command.set_defaults(command=_train)

    command = commands.add_parser("eval", help="measure a run on views it has not seen, and write the report")
    command.add_argument("run", type=Path, help="folder of the run")
    command.add_argument("--split", help="evaluate a split of the dataset (default: test)")
    command.add_argument("--radii", type=_radii, metavar="A:B", help="evaluate radii A to B in bins of width 1")
    command.add_argument("--views-per-radius", type=_positive, metavar="N", help="views in every bin")
    command.add_argument("--data", type=Path, help="dataset (default: the one trained on)")
    command.add_argument("--out", type=Path, help="folder of the results (default: RUN/eval/...)")
    command.add_argument("--estimator", choices=ESTIMATORS)
    command.add_argument("--estimator-steps", type=_positive)
    command.add_argument("--generator", choices=GENERATORS)
    command.add_argument("--generator-steps", type=_positive)
    command.add_argument("--batch", type=_positive)
    command.add_argument("--seed", type=int)
    command.add_argument("--lpips-backbone", metavar="FILE", help="torchvision AlexNet or VGG weights for LPIPS")
    command.set_defaults(command=_eval)

    command = commands.add_parser("report", help="write plots and report.html of an evaluation again")
    command.add_argument("evaluation", type=Path, help="folder that holds metrics.json and records.csv")
    command.set_defaults(command=_report)
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key, such as train.steps=100"
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return value


def _radii(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no range of whole radii; write smaller:larger, such as 1:7")
    return int(match[1]), int(match[2])


# -------------------------------------------------------------------------------------------------------- commands


def _shards_build(options: argparse.Namespace) -> None:
    from sitdist.config import Recipe, load_yaml
    from sitdist.data.writer import build, info

    build(load_yaml(Recipe, options.recipe, options.set), options.out)
    print(info(options.out))


def _shards_verify(options: argparse.Namespace) -> None:
    from sitdist.data.writer import info, verify

    problems = verify(options.dataset)
    for problem in problems[1:]:
        print(problem, file=sys.stderr)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DataError(f"{options.dataset}: {problems[0]}{more}")
    print(info(options.dataset))
    print("verified: every sample and every hash is right")


def _shards_info(options: argparse.Namespace) -> None:
    from sitdist.data.writer import info

    print(info(options.dataset))


def _codec_fit(options: argparse.Namespace) -> None:
    from sitdist.config import Recipe, load_yaml
    from sitdist.data.sources import open_source
    from sitdist.model.codec_fit import fit_vae

    recipe = load_yaml(Recipe, options.recipe, options.set)
    if options.out.exists():  # before views are rendered
        raise CodecError(f"{options.out}: already exists; give another --out, or remove it")
    source = open_source(recipe.splits["train"], recipe.image_size)
    images = source.images(range(min(options.views, len(source))))
    fit_vae(
        images,
        options.out,
        block_out_channels=tuple(options.channels),
        latent_channels=options.latent_channels,
        steps=options.steps,
        batch=options.batch,
        seed=options.seed,
    )


def _train(options: argparse.Namespace) -> None:
    from sitdist.config import Config, load_yaml

    config = load_yaml(Config, options.config, options.set)  # before what is slow to import
    from sitdist.train.trainer import train

    train(config, options.out, options.resume)


def _eval(options: argparse.Namespace) -> None:
    from sitdist.evaluate.evaluator import EvalOptions, evaluate

    names = [name for name in EvalOptions.__dataclass_fields__ if name in vars(options)]
    folder = evaluate(options.run, EvalOptions(**{name: getattr(options, name) for name in names}))
    if os.environ.get("RANK", "0") == "0":
        _print_results(folder)


def _report(options: argparse.Namespace) -> None:
    from sitdist.evaluate.report import write_report

    write_report(options.evaluation)
    _print_results(options.evaluation)


def _print_results(folder: Path) -> None:
    import json

    from sitdist.evaluate.report import format_table

    print(format_table(json.loads((folder / "metrics.json").read_text())))
    print(f"report: {folder / 'report.html'}")
