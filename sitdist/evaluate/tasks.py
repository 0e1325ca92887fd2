"""Work that processes share: each takes the next job that nobody has taken, so that a slow one holds no other up.

A job is taken by creating its claim, a file that only one process can create, and that names it until the job is done.
What a job leaves, its unit, is written atomically: UNIT.jsonl, whose first line says of which plan and job it is and
what its bytes hash to, and UNIT.npz. After a kill the claims of processes that ended are cleared and the work goes on,
on any number of processes, with the jobs whose units are not on disk, or not whole. Jobs that take longest, as measured
so far, come first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.measures import fault
from sitdist.io.arrays import load_arrays, save_arrays
from sitdist.io.atomic import file_sha256, write_atomically
from sitdist.io.files import MAX_JSON, open_file, parse_json, read_json, write_json

log = logging.getLogger("sitdist")
UNIT_VERSION = 1
Unit = tuple[list[dict[str, Any]], dict[str, np.ndarray]]  # records, each with its key, and arrays


@dataclass(frozen=True)
class Task:
    """A piece of work: its name, the keys of the records that it leaves, and how many views it looks at.

    `effort`: what a view of it takes beside a view of the producer's other jobs.
    """

    name: str
    keys: tuple[str, ...]
    views: int
    effort: float = 1.0


class Producer(Protocol):
    """Something that is measured in jobs: where it leaves its results, what decides them, and how to do a job.

    `record` is the schema of its records. `measure` gives the records of a job and the arrays that are kept beside
    them: pictures [N, H, W, 3] uint8 of all its keys, or of those in `key` [N]. `finish` is called on the main process
    with those of all jobs.
    """

    @property
    def out(self) -> Path: ...

    @property
    def plan(self) -> dict[str, Any]: ...

    @property
    def record(self) -> TypeAdapter[Any]: ...

    def tasks(self) -> list[Task]: ...

    def measure(self, task: Task) -> Unit: ...

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None: ...


def prepare(producer: Producer) -> list[str]:
    """The names of the jobs whose units are not on disk, or not whole; the main process calls it as the only writer.

    Units that are not whole are removed, and claims whose process has ended. ConfigError if the folder cannot take the
    work: it cannot be written, or holds work of another plan.
    """
    out, tasks = producer.out, producer.tasks()
    pending: list[str] = []
    unusable: list[DataError] = []
    try:
        for folder in (out / "units", out / "claims"):
            folder.mkdir(parents=True, exist_ok=True)
        if not (out / "plan.json").exists():
            write_json(out / "plan.json", producer.plan)
        problem = plan_conflict(out, producer.plan)
        if problem:
            raise ConfigError(problem)
        for task in tasks:
            path = unit_path(out, task)
            try:
                if os.path.lexists(path):
                    read_unit(producer, task, "measured again")
                    continue
            except DataError as error:
                unusable.append(error)
                path.unlink()
            if holder(out, task) is None:
                claim_path(out, task).unlink(missing_ok=True)
            pending.append(task.name)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; give another --out") from None
    if unusable:
        log.warning("%s (%d of %d units)", unusable[0], len(unusable), len(tasks))
    strangers = {path.name for path in (out / "units").glob("*.jsonl")} - {f"{task.name}.jsonl" for task in tasks}
    if strangers:
        log.warning(
            "%s: %s is no unit of this evaluation, and left out", out / "units", ", ".join(sorted(strangers)[:8])
        )
    return pending


def plan_conflict(out: Path, plan: dict[str, Any], names: Iterable[str] | None = None) -> str | None:
    """What to tell the user if the folder holds work of another plan: the first difference and the remedy.

    `names`: compare only these entries; None: all that either plan has.
    """
    old = read_json(out / "plan.json", f"delete {out} or give another --out", ConfigError)
    for name in sorted(plan.keys() | old.keys() if names is None else names):
        if plan.get(name) != old.get(name):
            return (
                f"{out}: holds an evaluation with {name[:80]} {str(old.get(name))[:80]}, not {plan.get(name)}; "
                "give another --out, or delete the folder"
            )
    return None


# -------------------------------------------------------------------------------------------------------------- claims


def claim_path(out: Path, task: Task) -> Path:
    """The file that is there while a process does the job."""
    return out / "claims" / task.name


def claim(out: Path, task: Task) -> bool:
    """Take the job; False where another process has."""
    try:
        with claim_path(out, task).open("x") as file:
            json.dump(_identity(os.getpid()), file)
    except FileExistsError:
        return False
    return True


def holder(out: Path, task: Task) -> int | None:
    """The process of this machine that claimed the job and still lives; None where there is none."""
    try:
        claimed = parse_json(claim_path(out, task).read_bytes(), "claim", "")
    except (OSError, DataError):
        return None
    pid = claimed.get("pid")
    return pid if isinstance(pid, int) and claimed == _identity(pid) else None


def _identity(pid: int) -> dict[str, Any] | None:
    """What tells a living process from all others, those that have its number later among them; None if it ended."""
    identity = {"host": socket.gethostname(), "pid": pid, "started": 0}
    try:
        if not Path("/proc/self/stat").exists():
            os.kill(pid, 0)
            return identity
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except PermissionError:
        return identity
    except (OSError, OverflowError):
        return None
    return None if state in "ZX" else identity | {"started": int(numbers[18])}


def do_left(producers: list[Producer]) -> None:
    """Wait for jobs that processes of an evaluation whose main process ended still do, and do what they leave.

    The main process calls it when nothing else is left to do.
    """
    for producer in producers:
        for task in producer.tasks():
            told = False
            while not unit_path(producer.out, task).is_file():
                pid = holder(producer.out, task)
                if pid is None:
                    write_unit(producer, task, *producer.measure(task))
                elif not told:
                    log.info("%s: process %d, left by an evaluation before this one, still measures it", task.name, pid)
                    told = True
                else:
                    time.sleep(0.2)


def do_tasks(producers: list[Producer], pending: list[list[str]], accelerator: Accelerator) -> None:
    """Do pending jobs (names by producer) until all are taken. The main process shows views/s and the time left."""
    work = [
        (producer, task)
        for producer, names in zip(producers, pending, strict=True)
        for task in producer.tasks()
        if task.name in names
    ]
    total = sum(task.views for _, task in work)
    seconds: dict[int, tuple[float, float]] = {}  # spent, and views times effort done, by producer
    left = list(work)
    with tqdm(total=total, desc="evaluate", unit="view", disable=not accelerator.is_main_process) as bar:
        while left:
            left.sort(key=lambda each: -_expected(each, seconds))
            producer, task = left.pop(0)
            if unit_path(producer.out, task).is_file() or not claim(producer.out, task):
                continue
            begun = time.monotonic()
            try:
                if unit_path(producer.out, task).is_file():  # finished since
                    continue
                write_unit(producer, task, *producer.measure(task))
            finally:
                claim_path(producer.out, task).unlink(missing_ok=True)
            spent, done = seconds.get(id(producer), (0.0, 0.0))
            seconds[id(producer)] = (spent + time.monotonic() - begun, done + task.views * task.effort)
            if not bar.disable:
                bar.update(sum(each.views for owner, each in work if unit_path(owner.out, each).is_file()) - bar.n)


def _expected(work: tuple[Producer, Task], seconds: dict[int, tuple[float, float]]) -> float:
    """Seconds that a job will take, by those of its producer so far; where there are none, it goes first."""
    producer, task = work
    if id(producer) not in seconds:
        return float("inf")
    spent, done = seconds[id(producer)]
    return task.views * task.effort * spent / done


# --------------------------------------------------------------------------------------------------------------- units


def unit_path(out: Path, task: Task) -> Path:
    """Where a finished job's records are; its arrays lie beside it and are written first."""
    return out / "units" / f"{task.name}.jsonl"


def _header(producer: Producer, task: Task, lines: bytes, arrays: str | None) -> dict[str, Any]:
    """The first line of a unit, by the lines after it and the SHA-256 of its arrays' file."""
    plan = json.dumps(producer.plan, sort_keys=True).encode()
    return {
        "unit": task.name,
        "version": UNIT_VERSION,
        "plan": hashlib.sha256(plan).hexdigest(),
        "count": len(task.keys),
        "records": hashlib.sha256(lines).hexdigest(),
        "arrays": arrays,
    }


def write_unit(producer: Producer, task: Task, records: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
    """Leave the arrays of a job, if any, then its records, a line each; DataError for one that is not finite."""
    lines = []
    for record in records:
        line = json.dumps(record).encode() + b"\n"
        try:
            producer.record.validate_json(line)
        except ValidationError as error:
            raise DataError(
                f"view {record['key']}: {fault(error)}; the checkpoint has diverged, use an earlier one"
            ) from None
        lines.append(line)
    sha256, beside = None, unit_path(producer.out, task).with_suffix(".npz")
    if arrays:
        save_arrays(beside, arrays)
        sha256 = file_sha256(beside)
    body = b"".join(lines)
    head = json.dumps(_header(producer, task, body, sha256)).encode() + b"\n"
    write_atomically(unit_path(producer.out, task), lambda path: path.write_bytes(head + body))


def read_unit(producer: Producer, task: Task, remedy: str = "start the evaluation again to measure it") -> Unit:
    """What a finished job left; DataError unless it is whole, of this plan and job, and of each of its keys once."""
    path = unit_path(producer.out, task)
    with open_file(path, remedy, MAX_JSON) as file:
        head, _, body = file.read().partition(b"\n")
    header, beside = parse_json(head, str(path), remedy), path.with_suffix(".npz")
    arrays = {} if header.get("arrays") is None else load_arrays(beside, remedy)
    expected = _header(producer, task, body, file_sha256(beside) if arrays else None)
    if "unit" not in header:
        raise DataError(f"{path}: has no checksum, as those of earlier versions; {remedy}")
    for name, value in expected.items():
        if header.get(name) != value:
            raise DataError(f"{path}: altered, or of another evaluation ({name} differs); {remedy}")
    try:
        for line in body.splitlines():
            producer.record.validate_json(line)
    except ValidationError as error:
        raise DataError(f"{path}: {fault(error)}; {remedy}") from None
    records = [json.loads(line) for line in body.splitlines()]
    if Counter(record["key"] for record in records) != Counter(task.keys):
        raise DataError(f"{path}: not the records of its {len(task.keys)} views; {remedy}")
    if not _are_pictures(arrays, task):
        found = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
        raise DataError(f"{beside}: not the pictures of its views ({found}); {remedy}")
    return records, arrays


def _are_pictures(arrays: dict[str, np.ndarray], task: Task) -> bool:
    keys = arrays.get("key", np.array(task.keys))
    known = keys.ndim == 1 and keys.dtype.kind == "U" and set(keys.tolist()) <= set(task.keys)
    return known and all(
        array.dtype == np.uint8
        and array.ndim == 4
        and array.size > 0
        and (len(array), array.shape[3]) == (len(keys), 3)
        for name, array in arrays.items()
        if name != "key"
    )


def merge(producer: Producer) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """The records of all jobs in order of their keys, and the arrays by job; DataError if a unit is not whole."""
    units = {task.name: read_unit(producer, task) for task in producer.tasks()}
    shapes = {
        name: {array: values.shape[1:] for array, values in arrays.items()} for name, (_, arrays) in units.items()
    }
    for name, shape in shapes.items():
        if shape != next(iter(shapes.values())):
            path = producer.out / "units" / f"{name}.npz"
            raise DataError(f"{path}: pictures unlike those of the other units; delete the folder and evaluate again")
    records = [record for records, _ in units.values() for record in records]
    return sorted(records, key=lambda record: record["key"]), {name: arrays for name, (_, arrays) in units.items()}
