"""Rates and times beside named baselines in the same run, and the table that shows them.

Every rate is the best of ROUNDS, taken in turn, so that other work on the machine affects all of them alike.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROUNDS = 3


@dataclass(frozen=True)
class Way:
    """One way to do a task, with the number of processes it uses; `rate` does it once and returns the rate per second.

    Baselines are other libraries' ways, or earlier ones.
    """

    name: str
    rate: Callable[[], float]
    is_baseline: bool = False
    processes: int = 1


@dataclass(frozen=True)
class Measure:
    """The best rate of one way."""

    name: str
    rate: float
    is_baseline: bool = False
    processes: int = 1


def measure(ways: Sequence[Way]) -> list[Measure]:
    """The rates of several ways to do the same thing."""
    rounds = [[way.rate() for way in ways] for _ in range(ROUNDS)]
    rates = [max(column) for column in zip(*rounds, strict=True)]
    return [Measure(way.name, rate, way.is_baseline, way.processes) for way, rate in zip(ways, rates, strict=True)]


def format_table(title: str, unit: str, measures: Sequence[Measure]) -> list[str]:
    """One line per measurement, with ratios to the fastest baseline of one process and of any number of processes."""
    baselines = sorted((each for each in measures if each.is_baseline), key=lambda each: each.rate)
    references = [[each for each in baselines if each.processes == 1][-1]]
    if baselines[-1] != references[0]:
        references.append(baselines[-1])
    numbers = range(1, len(references) + 1)
    lines = [f"{title:<44}{'processes':>10}{unit:>12}" + "".join(f"{f'ratio ({n})':>11}" for n in numbers)]
    for each in measures:
        ratios = "".join(f"{each.rate / reference.rate:>11.2f}" for reference in references)
        lines.append(f"  {each.name:<42}{each.processes:>10}{each.rate:>12,.{0 if each.rate >= 1000 else 2}f}{ratios}")
    of = ("the fastest baseline of one process", "the fastest baseline of any number of processes")
    return lines + [f"  ({n}) to '{references[n - 1].name}', {of[n - 1]}" for n in numbers]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, with the work that it leaves to the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def machine() -> str:
    """Hardware, load, versions and command."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    packages = ", ".join(f"{name} {version(name)}" for name in ("sitdist", "torch", "numpy", "webdataset"))
    return (
        f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads\n"
        f"Python {platform.python_version()}, {packages}\n"
        f"command: {' '.join(['python -m benchmarks', *sys.argv[1:]])}"
    )
