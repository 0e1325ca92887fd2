"""Folders are written in only where they are ours, and by one process at a time."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from sitdist.errors import DataError
from sitdist.io import ownership
from sitdist.io.ownership import LOCK, MARK, check_ours, mark, only_writer


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["run", "cache"])
def test_a_folder_of_another_is_refused_and_left_as_it_was(tmp_path, kind):
    (tmp_path / "thesis.tex").write_text("four years of work")
    before = contents(tmp_path)
    for attempt in (check_ours, mark):
        with pytest.raises(DataError, match="not empty"):
            attempt(tmp_path, kind)
    with pytest.raises(DataError, match="not empty"), only_writer(tmp_path, kind):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"kind": "evaluation"}', "holds a sitdist evaluation, not a run"),
        ("{", "damaged"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_mark_of_another_kind_or_a_damaged_one_is_refused(tmp_path, content, complaint):
    (tmp_path / MARK).write_text(content)
    with pytest.raises(DataError, match=complaint) as caught:
        mark(tmp_path, "run")
    assert "\n" not in str(caught.value)
    assert (tmp_path / MARK).read_text() == content


def test_new_and_empty_folders_become_ours_and_stay_so(tmp_path):
    for folder in (tmp_path / "deep" / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert not check_ours(folder, "run")
        mark(folder, "run")
        (folder / "anything").write_text("")
        assert check_ours(folder, "run")


def test_runs_and_datasets_from_before_there_was_a_mark_are_ours(tiny_run, tiny_dataset, tmp_path):
    for folder, kind in ((tiny_run, "run"), (tiny_dataset, "dataset")):
        names = [name for names in ownership.UNMARKED[kind] for name in names if (folder / name).exists()]
        old = tmp_path / kind
        for name in names:
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).write_bytes((folder / name).read_bytes())
        assert check_ours(old, kind)


@pytest.mark.parametrize("existed", [False, True])
def test_a_block_that_fails_before_it_writes_leaves_the_folder_as_it_was(tmp_path, existed):
    folder = tmp_path / "run"
    if existed:
        folder.mkdir()
    with pytest.raises(ValueError, match="early"), only_writer(folder, "run"):
        raise ValueError("early")
    assert folder.exists() == existed
    assert not existed or not list(folder.iterdir())


def test_a_block_that_fails_after_it_wrote_leaves_what_it_wrote(tmp_path):
    with suppress(ZeroDivisionError), only_writer(tmp_path / "run", "run"):
        (tmp_path / "run" / "result").write_text(str(1 // 1))
        1 // 0  # noqa: B018
    assert (tmp_path / "run" / "result").read_text() == "1"
    assert check_ours(tmp_path / "run", "run")


HOLD = """
import sys, time
from pathlib import Path
from sitdist.io.ownership import only_writer
with only_writer(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold the lock of tmp_path / "run"."""
    started = []

    def start():
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_writer_is_told_who_the_first_is(tmp_path, holder):
    first = holder()
    with pytest.raises(DataError) as caught, only_writer(tmp_path / "run", "run"):
        pass
    named = rf"in use by process {first.pid} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d"
    assert re.search(named, str(caught.value))


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    first = holder()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert str(first.pid) in (tmp_path / "run" / LOCK).read_text()  # it had no time to clear its name
    begun = time.monotonic()
    with only_writer(tmp_path / "run", "run"):
        assert time.monotonic() - begun < 1.0


def as_of_another_machine(folder, count):
    record = {"host": "another-machine", "pid": 7, "since": "2026-01-01 00:00:00+00:00", "count": count}
    path = folder / LOCK
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(json.dumps(record).encode().ljust(ownership.RECORD_BYTES))


def _beat_elsewhere(folder):
    for count in range(1000):
        as_of_another_machine(folder, count)
        time.sleep(0.1)


def test_where_machines_share_no_locks_a_holder_that_lives_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE", 5.0)
    mark(tmp_path / "run", "run")
    as_of_another_machine(tmp_path / "run", 0)
    other = multiprocessing.get_context("fork").Process(target=_beat_elsewhere, args=(tmp_path / "run",), daemon=True)
    other.start()
    try:
        with (
            pytest.raises(DataError, match="in use by process 7 on another-machine"),
            only_writer(tmp_path / "run", "run"),
        ):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    monkeypatch.setattr(ownership, "PATIENCE", 0.5)
    with only_writer(tmp_path / "run", "run"):  # it counts no more, so it has ended
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    mark(tmp_path / "run", "run")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match="cannot be written"), only_writer(tmp_path / "run", "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_racing_starts_on_a_new_folder_give_one_writer(tmp_path):
    script = """
import sys
from pathlib import Path
from sitdist.errors import DataError
from sitdist.io.ownership import only_writer
print("ready", flush=True)
sys.stdin.readline()
try:
    with only_writer(Path(sys.argv[1]), "run"):
        print("worked", flush=True)
        sys.stdin.read()
except DataError as error:
    print(error, flush=True)
"""
    for attempt in range(3):
        command = [sys.executable, "-c", script, str(tmp_path / str(attempt))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        racing = [subprocess.Popen(command, **pipes) for _ in range(3)]
        assert [process.stdout.readline() for process in racing] == ["ready\n"] * 3
        for process in racing:
            process.stdin.write("go\n")
        said = sorted(process.stdout.readline().strip() for process in racing)
        for process in racing:
            process.communicate()
        assert said[-1] == "worked", said
        assert all("in use by process" in line for line in said[:2]), said
