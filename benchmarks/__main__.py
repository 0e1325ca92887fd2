"""`python -m benchmarks NAME`: programs that measure the package beside named baselines, and print ratios."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sitdist.checks import find_device
from sitdist.cli.arguments import add_device, add_overwrite, count, output, positive
from sitdist.cli.main import run
from sitdist.cli.outcome import show, tell
from sitdist.cli.parser import Parser


def make_parser() -> Parser:
    """The parser of all benchmarks."""
    parser = Parser(prog="python -m benchmarks", description="Measure sitdist beside named baselines.")
    benchmarks = parser.add_subparsers(required=True, metavar="NAME")
    command = benchmarks.add_parser(
        "data", help="reading samples beside stock webdataset; rendering, encoding and building views"
    )
    command.add_argument("dataset", help="folder or URL of a dataset")
    command.add_argument("--split", default="train")
    command.add_argument("--batch", type=positive, default=256)
    command.add_argument("--samples", type=positive, default=20_000, help="samples a measure")
    command.add_argument("--synthetic", type=count, metavar="N", help="also the order of N samples, such as 1e9")
    command.add_argument("--views", type=positive, default=128, metavar="N", help="views to render, encode and build")
    command.add_argument("--scene", metavar="FOLDER", help="fitted scene to render (default: the recipe's, if any)")
    command.set_defaults(command=_bench_data)
    command = benchmarks.add_parser("train", help="training steps beside a plain loop, in pairs")
    command.add_argument("--model", default="SiT-S/2", help="published size (default: SiT-S/2)")
    command.add_argument("--latent", type=positive, default=16, metavar="L", help="4xLxL latents (default: 16)")
    command.add_argument("--batch", type=positive, default=32, help="samples a step (default: 32)")
    command.add_argument(
        "--backends", nargs="+", help="such as bf16-full (default: fp32, and bf16 where the device computes in it)"
    )
    command.add_argument(
        "--baseline", choices=("latents", "vae"), default="latents", help="latents computed before, or in the step"
    )
    command.add_argument("--pairs", type=positive, default=5, help="(default: 5)")
    command.add_argument("--steps", type=positive, default=1, help="steps of either side of a pair (default: 1)")
    command.set_defaults(command=_bench_train)

    command = benchmarks.add_parser("checkpoint", help="what saving costs the steps, beside a save that they wait for")
    command.add_argument("--model", default="SiT-S/2", help="published size (default: SiT-S/2)")
    command.add_argument("--latent", type=positive, default=16, metavar="L", help="4xLxL latents (default: 16)")
    command.add_argument("--batch", type=positive, default=32, help="samples a step (default: 32)")
    command.add_argument("--backend", default="fp32", help="such as bf16-full (default: fp32)")
    command.add_argument("--pairs", type=positive, default=5, help="(default: 5)")
    command.set_defaults(command=_bench_checkpoint)

    command = benchmarks.add_parser("pose", help="errors and speed of every estimator, beside the source's protocol")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    command.add_argument("--split", default="test", help="(default: test)")
    command.add_argument("--views", type=positive, metavar="N", help="its first N views (default: all)")
    command.add_argument("--batch", type=positive, default=64, help="(default: 64)")
    add_device(command)
    command.add_argument("--json", type=output, metavar="FILE", help="also write the numbers to this file")
    add_overwrite(command)
    command.set_defaults(command=_bench_pose)

    command = benchmarks.add_parser("ablate", help="train and evaluate the method's known mistakes, one by one")
    command.add_argument("dataset", type=Path)
    command.add_argument(
        "--out", type=output, required=True, help="folder of the runs and the table; started again, it goes on"
    )
    command.add_argument("--steps", type=positive, default=1500, help="steps of every run")
    command.add_argument("--split", help="split to evaluate (default: the first that is neither train nor val)")
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
    from sitdist.io.json_file import write_json

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
