"""Jobs that processes share: claimed by one, left whole, merged exactly once."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from pydantic import TypeAdapter, with_config

from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.measures import STRICT, Number
from sitdist.evaluate.tasks import Task, claim, do_left, do_tasks, holder, merge, prepare, unit_path, write_unit
from sitdist.io.arrays import save_arrays


@with_config(STRICT)
@dataclass
class NumberRecord:
    key: str
    value: Number | list[Number]


class Numbers:
    """Six jobs of two records and two pictures each; `done` tells in which order they were done here."""

    record = TypeAdapter(NumberRecord)

    def __init__(self, out):
        self.out, self.done, self.plan = out, [], {"seed": 1}

    def tasks(self):
        return [Task(f"job_{i}", (f"v{i}a", f"v{i}b"), 2 + i) for i in range(6)]

    def measure(self, task):
        self.done.append(task.name)
        records = [{"key": key, "value": float(task.views)} for key in reversed(task.keys)]
        return records, {"picture": np.full((2, 4, 4, 3), task.views, np.uint8)}


class Alone:
    is_main_process = False


class Main:
    is_main_process = True


def finish(*producers):
    pending = [prepare(producer) for producer in producers]
    do_tasks(list(producers), pending, Alone())
    return pending


def test_every_job_is_done_once_and_merged_in_order_of_the_keys(tmp_path):
    numbers = Numbers(tmp_path)
    assert finish(numbers) == [[task.name for task in numbers.tasks()]]
    records, arrays = merge(numbers)
    assert [record["key"] for record in records] == [f"v{i}{letter}" for i in range(6) for letter in "ab"]
    assert sorted(arrays) == [f"job_{i}" for i in range(6)]
    assert finish(numbers) == [[]]
    assert len(numbers.done) == 6


def test_the_dearest_jobs_are_told_by_their_effort_too(tmp_path):
    numbers = Numbers(tmp_path)
    efforts = (1.0, 8.0, 1.0, 1.0, 1.0, 1.0)  # job_1 looks at 3 views, job_5 at 7
    tasks = [replace(task, effort=effort) for task, effort in zip(numbers.tasks(), efforts, strict=True)]
    numbers.tasks = lambda: tasks
    finish(numbers)
    assert numbers.done == ["job_0", "job_1", "job_5", "job_4", "job_3", "job_2"]


def test_the_main_process_shows_views_a_second_and_the_time_left(tmp_path, capsys):
    numbers = Numbers(tmp_path)
    do_tasks([numbers], [prepare(numbers)], Main())
    assert re.search(r"27/27 \[00:0\d<00:00, .*view/s\]", capsys.readouterr().err)


def test_a_job_that_another_process_has_taken_is_left_to_it(tmp_path):
    numbers = Numbers(tmp_path)
    pending = prepare(numbers)
    assert claim(tmp_path, numbers.tasks()[3])
    assert not claim(tmp_path, numbers.tasks()[3])
    do_tasks([numbers], [pending], Alone())
    assert "job_3" not in numbers.done
    with pytest.raises(DataError, match=r"job_3\.jsonl: cannot be read .*; start the evaluation again to measure it"):
        merge(numbers)
    (tmp_path / "claims" / "job_3").unlink()
    assert finish(numbers) == [["job_3"]]
    assert len(merge(numbers)[0]) == 12


def test_a_file_of_no_unit_is_named_and_left_out(tmp_path, caplog):
    numbers = Numbers(tmp_path)
    finish(numbers)
    shutil.copy(tmp_path / "units" / "job_1.jsonl", tmp_path / "units" / "job_9.jsonl")
    with caplog.at_level(logging.WARNING, "sitdist"):
        assert finish(numbers) == [[]]
    assert "job_9.jsonl is no unit of this evaluation" in caplog.text
    assert len(merge(numbers)[0]) == 12


def test_a_write_that_was_cut_off_does_not_count(tmp_path):
    numbers = Numbers(tmp_path)
    prepare(numbers)
    (tmp_path / "units" / ".job_0.jsonl.123.tmp").write_text('{"key": "v0')
    finish(numbers)
    assert len(merge(numbers)[0]) == 12


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], "1", True, 1e300])
def test_a_value_that_nobody_measures_stops_with_the_view_and_its_name(tmp_path, value):
    numbers = Numbers(tmp_path)
    task = numbers.tasks()[0]
    with pytest.raises(DataError, match=r"view v0a: value.*the checkpoint has diverged"):
        write_unit(numbers, task, [{"key": "v0a", "value": value}], {})
    assert not unit_path(tmp_path, task).is_file()


# ---------------------------------------------------------------------------------------------------- units with damage


def lines_of(out, name):
    return (out / "units" / f"{name}.jsonl").read_text().splitlines()


def write_lines(out, name, lines):
    (out / "units" / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def forged(records, arrays=None, plan=None, task=0):
    """Write a unit as a stranger would who knows the format."""

    def damage(out):
        numbers = Numbers(out)
        numbers.plan, numbers.record = plan or numbers.plan, TypeAdapter(dict)
        write_unit(numbers, numbers.tasks()[task], records, arrays or {})

    return damage


def of(*values, keys=("v0a", "v0b")):
    return [{"key": key, "value": value} for key, value in zip(keys, values, strict=True)]


def edited(old, new):
    def damage(out):
        text = (out / "units" / "job_0.jsonl").read_text()
        assert old in text
        (out / "units" / "job_0.jsonl").write_text(text.replace(old, new, 1))

    return damage


def pictures(**arrays):
    return lambda out: save_arrays(out / "units" / "job_0.npz", arrays)


def with_bytes(name, change):
    def damage(out):
        path = out / "units" / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def pickled(out):
    """A unit that hashes as it says, whose arrays are a pickle that leaves a file when it is loaded."""

    class Program:
        def __reduce__(self):
            return (os.mkdir, (str(out / "was_here"),))

    array = np.empty(1, object)
    array[0] = Program()
    numbers = Numbers(out)
    write_unit(numbers, numbers.tasks()[0], of(2.0, 2.0), {"picture": array})


def copied(source, target):
    return lambda out: [
        shutil.copy(out / "units" / f"{source}{end}", out / "units" / f"{target}{end}") for end in (".jsonl", ".npz")
    ]


DAMAGES = {
    "a number changed": edited("2.0", "1.0"),
    "a record of an earlier version": lambda out: write_lines(out, "job_0", lines_of(out, "job_0")[1:]),
    "another version": edited('"version": 1', '"version": 2'),
    "another count": edited('"count": 2', '"count": 3'),
    "a line less": lambda out: write_lines(out, "job_0", lines_of(out, "job_0")[:-1]),
    "a line twice": lambda out: write_lines(out, "job_0", [*lines_of(out, "job_0"), lines_of(out, "job_0")[-1]]),
    "cut off": with_bytes("job_0.jsonl", lambda data: data[:-20]),
    "empty": with_bytes("job_0.jsonl", lambda data: b""),
    "nested deeply": with_bytes("job_0.jsonl", lambda data: b"[" * 100_000),
    "a header that is no object": with_bytes("job_0.jsonl", lambda data: b"[1]\n" + data),
    "a copy of another unit": copied("job_1", "job_0"),
    "of another plan": forged(of(2.0, 2.0), plan={"seed": 2}),
    "NaN": forged(of(float("nan"), 2.0)),
    "infinity as a number": forged(of(2.0, float("inf"))),
    "a text for a number": forged(of("2.0", 2.0)),
    "a number that is too large": forged(of(2.0, 1e13)),
    "a key less": forged(of(2.0, keys=["v0a"])),
    "a key twice": forged(of(2.0, 2.0, keys=["v0a", "v0a"])),
    "another unit's key": forged(of(2.0, 2.0, keys=["v0a", "v1a"])),
    "a name more": forged([each | {"more": 1.0} for each in of(2.0, 2.0)]),
    "pictures changed": pictures(picture=np.zeros((2, 4, 4, 3), np.uint8)),
    "pictures gone": lambda out: (out / "units" / "job_0.npz").unlink(),
    "pictures cut off": with_bytes("job_0.npz", lambda data: data[:-100]),
    "pictures of another kind": forged(of(2.0, 2.0), {"picture": np.zeros((2, 4, 4, 3))}),
    "too few pictures": forged(of(2.0, 2.0), {"picture": np.zeros((1, 4, 4, 3), np.uint8)}),
    "no pixels": forged(of(2.0, 2.0), {"picture": np.zeros((2, 0, 4, 3), np.uint8)}),
    "pictures of other views": forged(
        of(2.0, 2.0), {"key": np.array(["v1a"]), "picture": np.zeros((1, 4, 4, 3), np.uint8)}
    ),
    "a pickle": pickled,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_unit_that_is_not_whole_is_refused_and_measured_again(tmp_path, caplog, damage):
    numbers = Numbers(tmp_path)
    finish(numbers)
    expected = merge(numbers)
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        merge(numbers)
    assert str(tmp_path / "units" / "job_0.") in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "sitdist"):
        assert finish(numbers) == [["job_0"]]
    (said,) = caplog.messages
    assert said.endswith("measured again (1 of 6 units)")
    assert not (tmp_path / "was_here").exists()
    records, arrays = merge(numbers)
    assert records == expected[0]
    assert all((arrays[name]["picture"] == expected[1][name]["picture"]).all() for name in expected[1])


def test_pictures_of_another_size_than_those_of_the_other_units_are_refused(tmp_path):
    numbers = Numbers(tmp_path)
    finish(numbers)
    forged(of(7.0, 7.0, keys=("v5a", "v5b")), {"picture": np.zeros((2, 8, 8, 3), np.uint8)}, task=5)(tmp_path)
    with pytest.raises(DataError, match=r"job_5\.npz: pictures unlike those of the other units"):
        merge(numbers)


# -------------------------------------------------------------------------------------------------------------- claims


@pytest.fixture
def other():
    """A process that lives until it is told to end."""
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.wait()


def claim_as(out, task, pid, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        assert claim(out, task)


def test_a_claim_of_a_living_process_stays_and_its_job_is_waited_for(tmp_path, other, monkeypatch, caplog):
    numbers = Numbers(tmp_path)
    prepare(numbers)
    task = numbers.tasks()[3]
    claim_as(tmp_path, task, other.pid, monkeypatch)
    claimed = (tmp_path / "claims" / "job_3").read_bytes()
    pending = finish(numbers)
    assert pending == [[each.name for each in numbers.tasks()]]
    assert holder(tmp_path, task) == other.pid
    assert (tmp_path / "claims" / "job_3").read_bytes() == claimed
    assert "job_3" not in numbers.done
    slept = []

    def end_it(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            other.communicate(b"\n")

    monkeypatch.setattr("sitdist.evaluate.tasks.time.sleep", end_it)
    with caplog.at_level(logging.INFO, "sitdist"):
        do_left([numbers])
    assert numbers.done[-1] == "job_3"  # only when the other had ended without it
    assert caplog.text.count(f"job_3: process {other.pid}, left by") == 1
    assert len(merge(numbers)[0]) == 12


def test_a_claim_of_a_process_that_ended_or_of_another_one_by_its_number_is_cleared(tmp_path, other, monkeypatch):
    numbers = Numbers(tmp_path)
    prepare(numbers)
    tasks = numbers.tasks()
    claim_as(tmp_path, tasks[0], other.pid, monkeypatch)
    values = json.loads((tmp_path / "claims" / "job_0").read_text())
    for task, change in zip(
        tasks[1:], ({"started": 1}, {"host": "elsewhere"}, {"pid": 1}, {"pid": -1}, {"pid": 10**30}), strict=True
    ):
        (tmp_path / "claims" / task.name).write_text(json.dumps(values | change))
    assert [holder(tmp_path, task) for task in tasks] == [other.pid, *[None] * 5]
    other.communicate(b"\n")
    assert holder(tmp_path, tasks[0]) is None
    (tmp_path / "claims" / "job_0").write_text("[")
    assert finish(numbers) == [[task.name for task in tasks]]
    assert len(numbers.done) == 6


def test_work_of_another_plan_is_refused_with_both_values(tmp_path):
    prepare(Numbers(tmp_path))
    other = Numbers(tmp_path)
    other.plan = {"seed": 2}
    with pytest.raises(ConfigError, match="evaluation with seed 1, not 2; give another --out"):
        prepare(other)
