"""`sitdist eval`, `calibrate`, `report`, `likelihood` and `sigma`: measure a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from sitdist.cli.outcome import show, tell
from sitdist.cli.parser import (
    Command,
    Parser,
    add_device,
    add_evaluate_keys,
    add_overwrite,
    add_set,
    check_run,
    check_there,
    output,
    positive,
    positive_number,
    radii,
    seed,
)
from sitdist.errors import ConfigError


def _add_data(command: Parser) -> None:
    command.add_argument("--data", help="Folder or URL of a dataset. Default: the one trained on.")


def _eval_options(command: Parser) -> None:
    from sitdist.evaluate.experiments import EXPERIMENT_NAMES

    command.add_argument("run", type=Path, help="Folder of the run.")
    command.add_argument("--split", help="Split of the dataset to evaluate. Default: test.")
    command.add_argument("--radii", type=radii, metavar="A:B", help="Evaluate radii A to B in bins of width 1.")
    command.add_argument("--views-per-radius", type=positive, metavar="N", help="Number of views in each bin.")
    command.add_argument(
        "--photos", type=Path, metavar="PATH", help="Evaluate posed photos: .npz, transforms.json or a COLMAP folder."
    )
    command.add_argument("--experiment", choices=(*EXPERIMENT_NAMES, "all"), default="radii", help="What to measure.")
    command.add_argument("--max-views", type=positive, metavar="N", help="Largest number of views per experiment.")
    _add_data(command)
    command.add_argument("--out", type=output, help="Folder of the results. Default: RUN/eval/...")
    add_evaluate_keys(
        command,
        *("estimator", "estimator_steps", "readout", "zooms", "refine", "generator", "generator_steps", "guidance"),
        *("batch", "seed", "lpips_backbone"),
    )
    add_set(command, "evaluate.tolerance=1e-5")
    command.add_argument("--uncalibrated", action="store_true", help="Leave out the run's error bars and trust.")


def _calibrate_options(command: Parser) -> None:
    command.add_argument("run", type=Path, help="Folder of the run. calibration.json is written there.")
    command.add_argument("--split", required=True, help="Held-out split of 20 views or more; 500 are better.")
    _add_data(command)
    add_evaluate_keys(command, "estimator", "estimator_steps", "batch")


def _likelihood_options(command: Parser) -> None:
    from sitdist.flow.choices import Solver

    command.add_argument("run", type=Path, help="Folder of the run.")
    command.add_argument("--split", default="test", help="Split of the dataset.")
    _add_data(command)
    command.add_argument("--views", type=positive, metavar="N", help="Use only the first N views. Default: all.")
    command.add_argument("--probes", type=positive, default=4, help="Number of Hutchinson probes per view.")
    command.add_argument("--method", choices=get_args(Solver), default="heun", help="Solver.")
    command.add_argument("--steps", type=positive, default=25, help="Number of steps of the solver.")
    command.add_argument("--batch", type=positive, default=64, help="Number of views per batch.")
    command.add_argument("--seed", type=seed, default=0, help="Seed of the probes.")
    add_device(command)
    command.add_argument("--out", type=output, metavar="FILE", help="Also write a CSV with a row for each view.")
    add_overwrite(command)


def _sigma_options(command: Parser) -> None:
    command.add_argument("dataset", type=Path, help="Folder of the dataset.")
    command.add_argument(
        "--target-deg", type=positive_number, required=True, metavar="D", help="Largest rotation error in degrees."
    )


def _report_options(command: Parser) -> None:
    command.add_argument("evaluation", type=Path, nargs="+", help="Folder with metrics.json and records.csv.")
    command.add_argument("--out", type=output, help="Page that compares several. Default: FIRST/comparison.html.")
    add_overwrite(command)


def _eval(options: argparse.Namespace) -> None:
    check_run(options.run)
    from sitdist.evaluate.evaluator import EvalOptions, evaluate

    names = [name for name in EvalOptions.__dataclass_fields__ if name in vars(options)]
    folder = evaluate(options.run, EvalOptions(**{name: getattr(options, name) for name in names}))
    if os.environ.get("RANK", "0") == "0":
        if (folder / "metrics.json").is_file():
            _show_results(folder)
        _show_experiments(folder)


def _calibrate(options: argparse.Namespace) -> None:
    check_run(options.run)
    from sitdist.inference.calibration import CalibrateOptions, calibrate, format_calibration

    given = {name: getattr(options, name) for name in CalibrateOptions.__dataclass_fields__}
    show(format_calibration(options.run, calibrate(options.run, CalibrateOptions(**given))))


def _likelihood(options: argparse.Namespace) -> None:
    check_run(options.run)
    from sitdist.evaluate.likelihood import split_likelihood

    given = {name: value for name, value in vars(options).items() if name not in ("command", "main")}
    tell(split_likelihood(**given).line(options.split))


def _sigma(options: argparse.Namespace) -> None:
    check_there(options.dataset)
    from sitdist.evaluate.baselines import sigma_table

    show(sigma_table(options.dataset, options.target_deg))


def _report(options: argparse.Namespace) -> None:
    check_there(*options.evaluation)
    if len(options.evaluation) > 1:
        from sitdist.evaluate.report.compare import compare

        show(compare(options.evaluation, options.out, options.overwrite))
        return
    if options.out:
        raise ConfigError("--out: only for several evaluations; the report of one is in its own folder")
    from sitdist.evaluate.report import report_again

    (evaluation,) = options.evaluation
    report_again(evaluation)
    _show_results(evaluation)
    _show_experiments(evaluation)


def _show_results(folder: Path) -> None:
    from sitdist.evaluate.measures import AGAIN
    from sitdist.evaluate.report import format_table
    from sitdist.io.files import read_json

    show(format_table(read_json(folder / "metrics.json", AGAIN)))
    tell(f"report: {folder / 'report.html'}")


def _show_experiments(folder: Path) -> None:
    from sitdist.evaluate.experiments.records import format_experiments

    show(format_experiments(folder))


COMMANDS: list[Command] = [
    ("eval", "Measure a run on unseen views, and write the report.", _eval_options, _eval),
    ("calibrate", "Fit error bars and trust on a held-out split.", _calibrate_options, _calibrate),
    (
        "likelihood",
        "Compute log densities of latents given their poses, in bits per dimension.",
        _likelihood_options,
        _likelihood,
    ),
    ("sigma", "Predict the noise floor of a dataset's packing before any training.", _sigma_options, _sigma),
    ("report", "Write plots and report.html of an evaluation again.", _report_options, _report),
]
