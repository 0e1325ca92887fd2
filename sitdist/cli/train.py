"""`sitdist train`, `doctor`, `checkpoint` and `ema`: train a run, and look after what it wrote."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sitdist.cli.outcome import EXIT_USAGE, show, tell
from sitdist.cli.parser import (
    Command,
    Parser,
    add_overwrite,
    add_set,
    check_run,
    check_there,
    output,
    positive,
    positive_number,
)


def _train_options(command: Parser) -> None:
    command.add_argument("config", type=Path, help="Experiment config (YAML).")
    command.add_argument("--out", type=output, required=True, help="Folder of the run.")
    command.add_argument("--resume", action="store_true", help="Resume from the newest checkpoint (the default).")
    add_set(command)


def _train(options: argparse.Namespace) -> None:
    from sitdist.config.experiment import Config
    from sitdist.config.load import load_yaml

    config = load_yaml(Config, options.config, options.set)  # before what is slow to import
    from sitdist.train.trainer import train

    train(config, options.out)


def _doctor_options(command: Parser) -> None:
    command.add_argument("config", type=Path, help="Experiment config (YAML).")
    command.add_argument("--launch", type=Path, metavar="FILE", help="Accelerate config to start the run with.")
    command.add_argument("--out", type=output, default=Path("runs"), help="Folder in which the run will be.")
    add_set(command)


def _doctor(options: argparse.Namespace) -> int:
    from sitdist.train.doctor import doctor

    found = doctor(options.config, options.set, options.launch, options.out)
    if os.environ.get("RANK", "0") == "0":
        show(found.report())
    return EXIT_USAGE if found.wrong else 0


def _checkpoint_options(command: Parser) -> None:
    command.add_argument("run", type=Path, help="Folder of the run.")


def _convert_options(command: Parser) -> None:
    command.add_argument("source", type=Path, metavar="RUN", help="Folder of the run, or a file of weights.")
    command.add_argument("out", type=output, metavar="FILE", help="File to write: .safetensors, or .pt for torch.load.")
    command.add_argument("--step", type=positive, metavar="N", help="Step of the checkpoint. Default: the newest.")
    command.add_argument("--weights", choices=("ema", "model"), default="ema", help="The average, or the weights.")


def _list(options: argparse.Namespace, verify: bool = False) -> int:
    from sitdist.runs.checkpoint import describe_checkpoints

    text, whole = describe_checkpoints(options.run, verify)
    show(text)
    return 0 if whole else EXIT_USAGE


def _verify(options: argparse.Namespace) -> int:
    return _list(options, verify=True)


def _convert(options: argparse.Namespace) -> None:
    check_there(options.source)
    from sitdist.runs.checkpoint import convert

    tell(convert(options.source, options.out, options.step, options.weights))


def _ema_options(command: Parser) -> None:
    command.add_argument("run", type=Path, help="Folder of the run.")
    command.add_argument("--sigma-rel", type=positive_number, required=True, metavar="S", help="Relative width.")
    command.add_argument("--step", type=positive, help="Step of the average. Default: the last snapshot.")
    command.add_argument(
        "--out", type=output, help="File of the weights, for --set evaluate.average=FILE. Default: in the run's folder."
    )
    add_overwrite(command)


def _ema(options: argparse.Namespace) -> None:
    check_run(options.run)
    from sitdist.runs.averages import reconstruct_to_file

    tell(reconstruct_to_file(options.run, options.sigma_rel, options.step, options.out, options.overwrite))


COMMANDS: list[Command] = [
    ("train", "Train a flow, or resume a run.", _train_options, _train),
    ("doctor", "Check what a training run will do, and what would stop it.", _doctor_options, _doctor),
    ("checkpoint list", "Print size, processes and versions of a run's checkpoints.", _checkpoint_options, _list),
    ("checkpoint verify", "Read all checkpoints of a run and report what is damaged.", _checkpoint_options, _verify),
    ("checkpoint convert", "Write a run's weights as one file for other code.", _convert_options, _convert),
    ("ema reconstruct", "Compute an average of any width from the snapshots of train.averages.", _ema_options, _ema),
]
