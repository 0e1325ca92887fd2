"""Work that processes share: each takes the next job that nobody has taken, so that a slow one holds no other up.

A job is taken by creating its claim, a file that only one process can create; what it leaves is written atomically
when it is finished. After a kill the claims of unfinished jobs are cleared and the work goes on, on any number of
processes, with the jobs whose results are not on disk. Jobs that take longest, as measured so far, come first.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.units import save_arrays
from sitdist.io.atomic import write_atomically


@dataclass(frozen=True)
class Job:
    """A piece of work: its name, the keys of the records that it leaves, and how many views it looks at.

    `effort`: what a view of it takes beside a view of the producer's other jobs.
    """

    name: str
    keys: tuple[str, ...]
    views: int
    effort: float = 1.0


class Producer(Protocol):
    """Something that is measured in jobs: where it leaves its results, what decides them, and how to do a job.

    `measure` gives the records of a job, each with its key, and arrays that are kept beside them; `finish` is called on
    the main process with all of them.
    """

    @property
    def out(self) -> Path: ...

    @property
    def plan(self) -> dict[str, Any]: ...

    def jobs(self) -> list[Job]: ...

    def measure(self, job: Job) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]: ...

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None: ...


def prepare(producer: Producer) -> list[str]:
    """The names of the jobs that are not on disk yet, with no claims on them; the main process calls it.

    ConfigError if the folder cannot take the work: it cannot be written, or holds work of another plan.
    """
    out = producer.out
    try:
        for folder in (out / "units", out / "claims"):
            folder.mkdir(parents=True, exist_ok=True)
        if not (out / "plan.json").exists():
            text = json.dumps(producer.plan, indent=2) + "\n"
            write_atomically(out / "plan.json", lambda path: path.write_text(text))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; give another --out") from None
    problem = plan_conflict(out, producer.plan)
    if problem:
        raise ConfigError(problem)
    pending = [job for job in producer.jobs() if not result_path(out, job).is_file()]
    for job in pending:
        (out / "claims" / job.name).unlink(missing_ok=True)
    return [job.name for job in pending]


def plan_conflict(out: Path, plan: dict[str, Any], names: Iterable[str] | None = None) -> str | None:
    """What to tell the user if the folder holds work of another plan: the first difference and the remedy.

    `names`: compare only these entries; None: all that either plan has.
    """
    try:
        old = json.loads((out / "plan.json").read_text())
    except ValueError as error:
        return f"{out / 'plan.json'}: not readable ({error}); delete {out} or give another --out"
    for name in sorted(plan.keys() | old.keys() if names is None else names):
        if plan.get(name) != old.get(name):
            return (
                f"{out}: holds an evaluation with {name} {old.get(name)}, not {plan.get(name)}; "
                "give another --out, or delete the folder"
            )
    return None


def result_path(out: Path, job: Job) -> Path:
    """Where a finished job's records are; its arrays lie beside it and are written first."""
    return out / "units" / f"{job.name}.jsonl"


def claim(out: Path, job: Job) -> bool:
    """Take the job; False where another process has."""
    try:
        (out / "claims" / job.name).open("x").close()
    except FileExistsError:
        return False
    return True


def do_jobs(producers: list[Producer], pending: list[list[str]], accelerator: Accelerator) -> None:
    """Do pending jobs (names by producer) until all are taken. The main process shows views/s and the time left."""
    work = [
        (producer, job)
        for producer, names in zip(producers, pending, strict=True)
        for job in producer.jobs()
        if job.name in names
    ]
    total = sum(job.views for _, job in work)
    seconds: dict[int, tuple[float, float]] = {}  # spent, and views times effort done, by producer
    left = list(work)
    with tqdm(total=total, desc="evaluate", unit="view", disable=not accelerator.is_main_process) as bar:
        while left:
            left.sort(key=lambda each: -_expected(each, seconds))
            producer, job = left.pop(0)
            if not claim(producer.out, job):
                continue
            begun = time.monotonic()
            write_result(producer.out, job, *producer.measure(job))
            spent, done = seconds.get(id(producer), (0.0, 0.0))
            seconds[id(producer)] = (spent + time.monotonic() - begun, done + job.views * job.effort)
            if not bar.disable:
                bar.update(sum(each.views for owner, each in work if result_path(owner.out, each).is_file()) - bar.n)


def _expected(work: tuple[Producer, Job], seconds: dict[int, tuple[float, float]]) -> float:
    """Seconds that a job will take, by those of its producer so far; where there are none, it goes first."""
    producer, job = work
    if id(producer) not in seconds:
        return float("inf")
    spent, done = seconds[id(producer)]
    return job.views * job.effort * spent / done


def write_result(out: Path, job: Job, records: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
    """Leave the arrays of a job, if any, then its records, one JSON line each; DataError for one that is not finite."""
    for record in records:
        for name, value in record.items():
            numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, float)]
            if not all(map(math.isfinite, numbers)):
                raise DataError(
                    f"view {record['key']}: {name} is not finite; the checkpoint has diverged, use an earlier one"
                )
    if arrays:
        save_arrays(out / "units" / f"{job.name}.npz", arrays)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomically(result_path(out, job), lambda path: path.write_text(lines))


def merge(producer: Producer) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """The records of all jobs in order of their keys, and the arrays by job.

    DataError if any expected record is missing, or any is there twice or was never asked for.
    """
    folder = producer.out / "units"
    records = [record for path in sorted(folder.glob("*.jsonl")) for record in _read(path)]
    jobs = producer.jobs()
    check_once((key for job in jobs for key in job.keys), (record["key"] for record in records), folder)
    arrays = {}
    for job in jobs:
        if (folder / f"{job.name}.npz").is_file():
            with np.load(folder / f"{job.name}.npz", allow_pickle=False) as loaded:
                arrays[job.name] = {name: loaded[name] for name in loaded.files}
    return sorted(records, key=lambda record: record["key"]), arrays


def check_once(expected: Iterable[str], found: Iterable[str], folder: Path) -> None:
    """DataError, naming keys, unless what was found is what is expected, each once."""
    wanted, there = Counter(expected), Counter(found)
    missing, extra = sorted((wanted - there).keys()), sorted((there - wanted).keys())
    for keys, problem, remedy in (
        (missing, "missing from", "start the evaluation again to finish it"),
        (extra, "there more often than asked for in", "delete the folder and evaluate again"),
    ):
        if keys:
            shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
            raise DataError(f"{len(keys)} views {problem} {folder} ({shown}); {remedy}")


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: not a job's records ({error}); delete the file and evaluate again") from None
