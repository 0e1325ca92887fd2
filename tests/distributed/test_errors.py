"""What one process meets ends all of them, soon, with a single line that names it."""

import shutil
from pathlib import Path

import pytest
import ranks

from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.dataset.batches import BatchReader
from sitdist.dataset.index import load_index
from sitdist.dataset.reader import ShardReader
from sitdist.distributed.accelerator import make_accelerator
from sitdist.errors import ConfigError
from sitdist.runs.checkpoint import read_newest

GRACE = 20  # seconds after the first failure; all are expected to need less than one


def assert_one_line(started, *parts):
    """All processes end with exit code 2, and one line in all says why."""
    assert started.wait(grace=GRACE) == [2] * len(started.errors_by_rank()), started.errors()
    lines = [line for line in started.errors().splitlines() if "error" in line.lower()]
    assert len(lines) == 1, started.errors()
    for part in parts:
        assert part in lines[0]


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dataset_that_one_process_cannot_see(train, tmp_path, rank):
    from tasks import with_extra_on

    missing = ["--set", f"data={tmp_path / 'nowhere'}"]
    started = train(2, tmp_path / "run", task=with_extra_on, task_arguments=[rank, missing])
    assert_one_line(started, "sitdist: error: rank 1: " if rank else "sitdist: error: ", "no dataset")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_settings_that_are_refused_leave_one_line_and_no_folder(train, tmp_path):
    started = train(2, tmp_path / "run", "train.global_batch=13")
    assert_one_line(started, "train.global_batch = 13: cannot be divided by 2 processes; set it to 12 or 14")
    started = train(2, tmp_path / "run", "model.patch_size=3")
    assert_one_line(started, "model.patch_size = 3: does not divide")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_run_that_is_refused_stays_as_it_was(train, tmp_path):
    run = tmp_path / "run"
    train(2, run, "train.steps=1").run()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert_one_line(train(2, run, "seed=1"), "seed is 1 but", "was trained with 0")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.distributed
def test_an_altered_byte_that_one_process_reads(train, tmp_path, tiny_dataset, tiny_yaml):
    shutil.copytree(tiny_dataset, tmp_path / "data")
    config = load_yaml(Config, tiny_yaml)
    reader = ShardReader(tmp_path / "data", "train")
    batches = BatchReader(reader, config.seed, config.train.global_batch)
    sample = batches.sample_indices(batches.positions(1, rank=1, world=2))[0]  # rank 1 reads it in step 1
    tar = tmp_path / "data" / "train" / reader.shard_names[sample // 16]
    with tar.open("r+b") as file:
        file.seek(int(load_index(tar.with_suffix(".index.npz"))["start"][sample % 16]) + 600)
        file.write(b"altered")
    started = train(2, tmp_path / "run", f"data={tmp_path / 'data'}")
    assert_one_line(started, "sitdist: error: rank 1: ", f"{tar}: sample {sample:09d}: altered bytes")


@pytest.mark.distributed
def test_a_full_disk(train, tmp_path):
    from tasks import train_on_a_full_disk

    run = tmp_path / "run"
    train(2, run, "train.steps=3").run()
    started = train(2, run, task=train_on_a_full_disk)
    assert_one_line(started, "step_00000006: cannot be written (No space left on device); free space")
    assert read_newest(run).step == 3
    assert not any(run.glob("checkpoints/.*"))


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_bug_shows_its_traceback_once_and_ends_all(tmp_path, where):
    from tasks import fail_on

    started = ranks.Ranks(tmp_path, 2, fail_on, 1, where)
    codes = started.wait(grace=GRACE)
    assert codes[1] == 1
    assert codes[0] > 0  # by itself, not killed
    assert "RuntimeError: a bug" in started.errors(1)
    told = "RuntimeError: a bug" if where == "inside" else "rank 1 (process "
    assert f"ProcessError: {told}" in started.errors(0)


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["step", "start"])
def test_a_bug_in_a_command_is_one_line_on_each_process_and_a_traceback_in_a_file(train, tmp_path, where):
    from tasks import train_failing_on

    error = RuntimeError("a bug\nof two lines")
    started = train(2, tmp_path / "run", task=train_failing_on, task_arguments=[1, where, error])
    assert started.wait(grace=GRACE) == [2, 1]
    met, told = (line for line in reversed(started.errors().splitlines()) if "error: " in line)
    assert met.startswith("sitdist: error: rank 1: RuntimeError: a bug; ")
    saved = Path(met.rpartition(" ")[2])
    assert "in fail\n" in saved.read_text()
    saved.unlink()
    assert ("rank 1: RuntimeError: a bug" if where == "start" else "rank 1 (process ") in told
    assert "Traceback" not in started.errors()


@pytest.mark.distributed
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/a/file"), MemoryError("too large")])
def test_what_the_system_refuses_one_process_is_one_line_of_all(train, tmp_path, error):
    from tasks import train_failing_on

    started = train(2, tmp_path / "run", task=train_failing_on, task_arguments=[1, "start", error])
    assert_one_line(started, "sitdist: error: rank 1: ", "/a/file: Permission" if error.args[0] == 13 else "too large")


# ----------------------------------------------------------------------------------------------- what cannot be started


@pytest.mark.distributed
def test_processes_that_do_not_see_each_other_are_noticed(tmp_path):
    from tasks import be_alone

    started = ranks.Ranks(tmp_path, 1, be_alone, tmp_path, WORLD_SIZE="2")
    message = "the launcher started WORLD_SIZE = 2 processes but they form 1; start them as launch/README.md says"
    assert_one_line(started, message)


def test_accumulation_by_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS = 4: accumulation follows from"):
        make_accelerator()
