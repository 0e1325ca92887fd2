"""`python -m benchmarks NAME`: programs that measure the package beside named baselines, and print ratios."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sitdist.checks import find_device
from sitdist.cli.main import run
from sitdist.cli.outcome import show, tell
from sitdist.cli.parser import Parser, add_device, add_overwrite, output, positive, whole


def make_parser() -> Parser:
    """The parser of all benchmarks."""
    parser = Parser(prog="python -m benchmarks", description="Measure sitdist beside named baselines.")
    benchmarks = parser.add_subparsers(required=True, metavar="NAME")
    command = benchmarks.add_parser(
        "data", help="Read samples beside stock webdataset; render, encode and build views."
    )
    command.add_argument("dataset", help="Folder or URL of a dataset.")
    command.add_argument("--split", default="train", help="Split of the dataset.")
    command.add_argument("--batch", type=positive, default=256, help="Samples per batch.")
    command.add_argument("--samples", type=positive, default=20_000, help="Number of samples per measurement.")
    command.add_argument("--synthetic", type=whole(1, 10**12), metavar="N", help="Also time the order of N samples.")
    command.add_argument("--views", type=positive, default=128, metavar="N", help="Number of views to build.")
    command.add_argument("--scene", metavar="FOLDER", help="Fitted scene to render. Default: the recipe's.")
    command.set_defaults(command=_bench_data)
    command = benchmarks.add_parser("train", help="Time training steps beside a plain loop, in pairs.")
    command.add_argument("--model", default="SiT-S/2", help="Published size.")
    command.add_argument("--latent", type=positive, default=16, metavar="L", help="4 x L x L latents.")
    command.add_argument("--batch", type=positive, default=32, help="Samples per step.")
    command.add_argument(
        "--backends", nargs="+", help="Such as bf16-full. Default: fp32, and bf16 where the device computes in it."
    )
    command.add_argument(
        "--baseline",
        choices=("latents", "vae"),
        default="latents",
        help="Latents from before, or made in the step.",
    )
    command.add_argument("--pairs", type=positive, default=5, help="Number of pairs.")
    command.add_argument("--steps", type=positive, default=1, help="Steps of either side of a pair.")
    command.set_defaults(command=_bench_train)

    command = benchmarks.add_parser("checkpoint", help="Measure what saving costs, beside a save that steps wait for.")
    command.add_argument("--model", default="SiT-S/2", help="Published size.")
    command.add_argument("--latent", type=positive, default=16, metavar="L", help="4 x L x L latents.")
    command.add_argument("--batch", type=positive, default=32, help="Samples per step.")
    command.add_argument("--backend", default="fp32", help="Such as bf16-full.")
    command.add_argument("--pairs", type=positive, default=5, help="Number of pairs.")
    command.set_defaults(command=_bench_checkpoint)

    command = benchmarks.add_parser("pose", help="Measure every estimator beside the source's protocol.")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="Folder of a run.")
    command.add_argument("--split", default="test", help="Split of the dataset.")
    command.add_argument("--views", type=positive, metavar="N", help="Use only its first N views. Default: all.")
    command.add_argument("--batch", type=positive, default=64, help="Views per batch.")
    add_device(command)
    command.add_argument("--json", type=output, metavar="FILE", help="Also write the numbers to this file.")
    add_overwrite(command)
    command.set_defaults(command=_bench_pose)

    command = benchmarks.add_parser("ablate", help="Train and evaluate the method's known mistakes, one by one.")
    command.add_argument("dataset", type=Path, help="Folder of the dataset.")
    command.add_argument(
        "--out", type=output, required=True, help="Folder of the runs and the table. Started again, it goes on."
    )
    command.add_argument("--steps", type=positive, default=1500, help="Steps of every run.")
    command.add_argument("--split", help="Split to evaluate. Default: the first that is neither train nor val.")
    command.set_defaults(command=_ablate)
    return parser


def _ablate(options: argparse.Namespace) -> None:
    from benchmarks.ablate import ablate

    show(ablate(options.dataset, options.out, options.steps, options.split))
    tell(f"pictures: {options.out / 'table.html'}")


def _bench_data(options: argparse.Namespace) -> None:
    from benchmarks.data import bench_data

    names = ("dataset", "split", "batch", "samples", "synthetic", "views", "scene")
    show(bench_data(**{name: getattr(options, name) for name in names}))


def _bench_train(options: argparse.Namespace) -> None:
    from benchmarks.step import BenchOptions, bench_train

    names = ("model", "latent", "batch", "baseline", "pairs", "steps")
    values = {name: getattr(options, name) for name in names}
    if options.backends:
        values["backends"] = tuple(options.backends)
    show(bench_train(BenchOptions(**values)))


def _bench_checkpoint(options: argparse.Namespace) -> None:
    from benchmarks.checkpoint import bench_checkpoint
    from benchmarks.step import BenchOptions

    named = {name: getattr(options, name) for name in ("model", "latent", "batch", "pairs")}
    show(bench_checkpoint(BenchOptions(backends=(options.backend,), **named)))


def _bench_pose(options: argparse.Namespace) -> None:

    from benchmarks.pose import bench_pose, format_bench
    from sitdist.io.atomic import check_free
    from sitdist.io.files import write_json

    if options.json:
        check_free(options.json, options.overwrite)
    bench = bench_pose(options.runs, options.split, options.views, options.batch, str(find_device(options.device)))
    if options.json:
        write_json(options.json, bench.to_dict())
    show(format_bench(bench))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit code."""
    return run(arguments, make_parser)


if __name__ == "__main__":
    sys.exit(main())
