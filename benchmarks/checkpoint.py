"""The cost of saving: how long a save in the background pauses the training, and a save at once.

Both write, hash and flush the same files, in turn, in one process, so that other work on the machine affects both.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import machine, seconds_of
from benchmarks.step import BenchOptions, make_config, make_recipe
from sitdist.build.writer import build
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.distributed.accelerator import processes
from sitdist.distributed.signals import StopSignal
from sitdist.train.async_writer import AsyncWriter
from sitdist.train.trainer import Trainer


@dataclass(frozen=True)
class SaveCost:
    """Seconds, one entry per pair: the pause of both kinds of saving, an undisturbed step, and by how much the steps
    after a background save were slower, in total, until it was on disk.
    """

    at_once: list[float]
    beside: list[float]
    step: list[float]
    slowdown: list[float]
    bytes: int

    @property
    def stall(self) -> float:
        """The pause of a background save relative to a save at once: the median over the pairs."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.beside, self.at_once, strict=True))


def bench_checkpoint(options: BenchOptions) -> str:
    """The report of `measure_saves`, in one process, with the first of the options' backends."""
    with tempfile.TemporaryDirectory() as folder:
        cost = measure_saves(options, Path(folder))
    once, beside, step, slower = (
        statistics.median(values) for values in (cost.at_once, cost.beside, cost.step, cost.slowdown)
    )
    backend = options.backends[0]
    return "\n".join(
        [
            machine(),
            "",
            f"{options.model}, batch {options.batch}, {backend}: checkpoints of {cost.bytes / 1e6:,.0f} MB, "
            f"a step of {step:.3f} s; medians of {options.pairs} pairs",
            f"{'written, hashed and flushed at once':<44}{once:>8.3f} s stall",
            f"{'from a copy, beside the training':<44}{beside:>8.3f} s stall, {cost.stall:.1%} of it",
            f"{'what steps took longer until it was on disk':<44}{slower:>8.3f} s in all, "
            f"{(beside + slower) / once:.1%} with the stall",
        ]
    )


def measure_saves(options: BenchOptions, place: Path) -> SaveCost:
    """Train in the folder `place` and save in both ways `pairs` times; the first save of each does not count."""
    config = make_config(options, options.backends[0], place)
    build(parse(Recipe, make_recipe(options), "bench"), place / "data")
    settings = config.train
    with processes(settings.precision, settings.deterministic) as (accelerator, ranks):
        trainer, stop = Trainer(config, place / "run", accelerator, ranks), StopSignal()
        writers = {"beside": AsyncWriter(asynchronous=True), "at once": AsyncWriter(asynchronous=False)}
        device = accelerator.device

        def step() -> float:
            return seconds_of(lambda: trainer.run_steps(stop, until=trainer.step + 1), device)

        def save(how: str) -> float:
            trainer.saver.writer = writers[how]
            return seconds_of(trainer.saver.save, device)

        step()
        times: dict[str, list[float]] = {"at once": [], "beside": [], "step": [], "slowdown": []}
        for pair in range(options.pairs + 1):
            alone = statistics.median(step() for _ in range(3))
            at_once = save("at once")
            step()
            beside, later = save("beside"), []
            while writers["beside"].runs:
                later.append(step())
            writers["beside"].wait()
            if pair:
                slower = sum(each - alone for each in later)
                for name, value in zip(times, (at_once, beside, alone, slower), strict=True):
                    times[name].append(value)
        trainer.close()
    newest = max((place / "run" / "checkpoints").glob("step_*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    return SaveCost(times["at once"], times["beside"], times["step"], times["slowdown"], size)
