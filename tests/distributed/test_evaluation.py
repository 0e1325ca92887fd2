"""Evaluation on several processes: every view exactly once, whatever happens, and the same numbers."""

import csv
import json
import re
import signal
import time

import pytest
import ranks

from sitdist.dataset.reader import ShardReader

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(tiny_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    ranks.sitdist(folder / "log", 1, "train", tiny_yaml, "--out", folder / "run").run(120)
    return folder / "run"


@pytest.fixture
def evaluate(run, tmp_path):
    """Start `sitdist eval` of the run's 12 test views, one a unit, into `out` on some processes."""

    def start(world, out, *options):
        return ranks.sitdist(
            tmp_path / "log", world, *("eval", run, "--split", "test", "--batch", 1, "--out", out, *options)
        )

    return start


@pytest.fixture(scope="module")
def on_one(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_one")
    arguments = ["eval", run, "--split", "test", "--batch", 1, "--out", folder / "out"]
    ranks.sitdist(folder / "log", 1, *arguments).run(120)
    return folder / "out"


def rows(folder):
    with (folder / "records.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(found, expected):
    found, expected = rows(found), rows(expected)
    assert [row["key"] for row in found] == [row["key"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if name == "key" or value in ("", "True", "False"):
                assert ours[name] == value, name
            else:
                assert float(ours[name]) == pytest.approx(float(value), abs=1e-4), name


def units(folder):
    return list((folder / "units").glob("unit_*.jsonl"))


def test_two_processes_measure_what_one_measures(evaluate, on_one, tmp_path, tiny_dataset):
    started = evaluate(2, tmp_path / "out")
    started.run()
    assert [row["key"] for row in rows(on_one)] == ShardReader(tiny_dataset, "test").keys()
    assert_same(tmp_path / "out", on_one)
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (on_one, tmp_path / "out"))
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        assert (ours["name"], ours["n"]) == (theirs["name"], theirs["n"])
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=1e-4)
    assert (tmp_path / "out" / "report.html").is_file()
    assert started.errors().count("12 of 12 work units to evaluate") == 1
    assert (tmp_path / "log" / "rank_1.out").read_text() == ""  # the main process alone shows the table
    assert "report: " in (tmp_path / "log" / "rank_0.out").read_text()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_killed_half_way_it_goes_on_with_another_number_of_processes(evaluate, on_one, tmp_path, before, after):
    out = tmp_path / "out"
    started = evaluate(before, out)
    started.wait(60, until=lambda: len(units(out)) >= 2)
    started.kill()
    kept = {path: path.stat().st_mtime_ns for path in units(out)}
    assert 2 <= len(kept) < 12
    assert not (out / "records.csv").exists()
    again = evaluate(after, out)
    again.run()
    assert f"{12 - len(kept)} of 12 work units to evaluate" in again.errors(0)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same(out, on_one)


def test_fewer_units_than_processes(evaluate, tmp_path):
    for world, out in ((1, tmp_path / "one"), (3, tmp_path / "three")):
        evaluate(world, out, "--views-per-radius", 1, "--radii", "3:4").run()
    assert len(rows(tmp_path / "one")) == 1
    assert_same(tmp_path / "three", tmp_path / "one")


def test_a_refused_evaluation_ends_on_all_processes_with_one_line(evaluate, on_one):
    started = evaluate(2, on_one, "--seed", 1)
    assert started.wait(grace=20) == [2, 2]
    assert started.errors() == (
        f"sitdist: error: {on_one}: holds an evaluation with seed 0, not 1; give another --out, or delete the folder\n"
    )


def test_what_only_one_process_cannot_read_ends_all_with_one_line(run, tmp_path):
    from tasks import with_extra_on

    arguments = ["eval", str(run), "--split", "test", "--out", str(tmp_path / "out")]
    started = ranks.Ranks(tmp_path / "log", 2, with_extra_on, 1, ["--data", "nowhere"], *arguments)
    assert started.wait(grace=20) == [2, 2]
    assert started.errors().startswith("sitdist: error: rank 1: nowhere: no dataset: manifest.json is missing")
    assert started.errors().count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_process_does_not_leave_the_others_waiting(evaluate, tmp_path):
    out = tmp_path / "out"
    started = evaluate(2, out)
    started.wait(60, until=lambda: len(units(out)) >= 1)
    started.send(signal.SIGKILL, [1])
    begun = time.monotonic()
    codes = started.wait(60, grace=40)
    assert time.monotonic() - begun < 40
    assert codes == [2, -signal.SIGKILL]
    assert "ended or no longer answers" in started.errors(0)


def claims(folder):
    return {path.name: path.read_bytes() for path in (folder / "claims").glob("*")}


def test_of_two_evaluators_one_works_and_the_other_names_it(run, on_one, tmp_path):
    out = tmp_path / "out"
    arguments = ("eval", run, "--split", "test", "--batch", 1, "--out", out)
    both = [ranks.sitdist(tmp_path / name, 1, *arguments) for name in ("a", "b")]
    codes = [started.wait(120)[0] for started in both]
    assert sorted(codes) == [0, 2], [started.errors() for started in both]
    stopped, worked = both[codes.index(2)], both[codes.index(0)]
    assert re.fullmatch(
        rf"sitdist: error: {out}: in use by process {worked.pids()[0]} on \S+, since [-0-9]+ [:0-9]+\+00:00; "
        "wait until it ends, or give another --out\n",
        stopped.errors(),
    )
    assert "12 of 12 work units to evaluate" in worked.errors()
    assert_same(out, on_one)


def test_the_next_start_leaves_a_unit_to_a_process_that_still_measures_it(run, on_one, tmp_path):
    """Rank 0 is killed while rank 1 measures; the next start measures all else at once, and then waits for it."""
    from tasks import evaluate_and_wait

    out, go = tmp_path / "out", tmp_path / "go"
    arguments = ["eval", str(run), "--split", "test", "--batch", "1", "--out", str(out)]
    started = ranks.Ranks(tmp_path / "log", 2, evaluate_and_wait, go, *arguments)
    try:
        started.wait(60, until=lambda: go.with_suffix(".waits").exists())
        left = started.pids()[1]
        (held,) = (name for name, data in claims(out).items() if data and json.loads(data)["pid"] == left)
        started.send(signal.SIGKILL, [0])
        again = ranks.sitdist(tmp_path / "again", 1, *arguments)
        log = tmp_path / "again" / "rank_0.err"
        again.wait(60, until=lambda: log.is_file() and "still measures it" in log.read_text())
        assert f"{held}: process {left}, left by an evaluation before this one, still measures it" in again.errors()
        assert {path.stem for path in units(out)} == {f"unit_{i:05d}" for i in range(12)} - {held}
        assert json.loads(claims(out)[held])["pid"] == left
        go.touch()
        again.run(60)
        assert started.wait(60, grace=60)[1] == 2  # its main process had ended
    finally:
        started.kill()
    assert_same(out, on_one)


EVERY = ("--experiment", "all", "--max-views", 9)


def results(folder):
    """The records of every experiment by key, without what a clock says."""
    found = {}
    for path in sorted(folder.glob("*/records.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                row.pop("ms", None)
                assert (path.parent.name, row["key"]) not in found
                found[path.parent.name, row["key"]] = row
    return found


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 50
    for key, row in theirs.items():
        for name, value in row.items():
            found = ours[key][name]
            if name in ("key", "method", "task", "solver", "change") or not value:
                assert found == value
            else:
                assert json.loads(found) == pytest.approx(json.loads(value), abs=1e-3), (key, name)


@pytest.fixture(scope="module")
def every_on_one(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("every_on_one")
    arguments = ["eval", run, "--split", "test", "--batch", 1, "--out", folder / "out", *EVERY]
    ranks.sitdist(folder / "log", 1, *arguments).run(240)
    return folder / "out"


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_find_in_every_experiment_what_one_finds(evaluate, every_on_one, tmp_path, world):
    evaluate(world, tmp_path / "out", *EVERY).run(240)
    assert_close(results(tmp_path / "out"), results(every_on_one))


def test_experiments_of_which_a_process_was_killed_go_on_and_have_every_view_once(evaluate, every_on_one, tmp_path):
    out = tmp_path / "out"
    started = evaluate(2, out, *EVERY)
    started.wait(120, until=lambda: len(list(out.glob("**/units/*.jsonl"))) >= 9)
    started.send(signal.SIGKILL, [1])
    assert started.wait(120, grace=60) == [2, -signal.SIGKILL]
    kept = {path: path.stat().st_mtime_ns for path in out.glob("**/units/*.jsonl")}
    evaluate(1, out, *EVERY).run(240)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_close(results(out), results(every_on_one))
