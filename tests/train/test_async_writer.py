"""Checkpoints are written beside the training: the steps go on, what is written is of one step, errors come through."""

import errno
import os
import threading

import pytest
import torch

from sitdist.errors import CheckpointError, DataError
from sitdist.runs import checkpoint as checkpoints
from sitdist.runs.checkpoint import TENSOR_FILES, folder_of, list_checkpoints
from sitdist.train import trainer as trainer_module
from sitdist.train.async_writer import AsyncWriter, HostCopy
from sitdist.train.trainer import train


def tensor_bytes(run, step):
    return {path.name: path.read_bytes() for path in sorted(folder_of(run, step).glob("*.safetensors"))}


def test_a_copy_stays_what_it_was_and_its_memory_is_used_again():
    copy, weight = HostCopy(), torch.ones(3)
    first = copy("model", [("weight", weight)])
    weight.zero_()
    assert first["weight"].tolist() == [1.0, 1.0, 1.0]
    second = copy("model", [("weight", weight)])
    assert second["weight"] is first["weight"]
    assert copy("ema", [("weight", weight)])["weight"] is not second["weight"]
    assert copy("model", [("weight", torch.ones(2))])["weight"].tolist() == [1.0, 1.0]


def test_a_job_runs_beside_the_caller_who_waits_before_the_next_one():
    writer, may_end, done = AsyncWriter(asynchronous=True), threading.Event(), []
    writer.begin(lambda: (may_end.wait(30), done.append(1)))
    writer.check()
    assert done == []
    may_end.set()
    writer.begin(lambda: done.append(2))
    assert done[0] == 1
    writer.wait()
    assert done == [1, 2]
    writer.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_a_job_meets_is_raised_once(asynchronous):
    def fail():
        raise CheckpointError("no")

    writer = AsyncWriter(asynchronous)
    with pytest.raises(CheckpointError, match="no"):  # noqa: PT012 - the first of them, or the second
        writer.begin(fail)
        writer.wait()
    writer.wait()
    writer.check()
    writer.close()


def test_checkpoints_written_beside_the_training_are_those_written_at_once(config, tmp_path):
    settings = (
        "train.steps=6",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=6",
        "train.averages={decays: [0.5]}",
    )
    train(config(*settings), tmp_path / "beside")
    train(config(*settings, "train.checkpoint_async=false"), tmp_path / "at_once")
    for step in range(1, 7):
        assert tensor_bytes(tmp_path / "beside", step) == tensor_bytes(tmp_path / "at_once", step)
        average = f"averages/step_{step:08d}.safetensors"
        assert (tmp_path / "beside" / average).read_bytes() == (tmp_path / "at_once" / average).read_bytes()


def test_steps_go_on_while_a_checkpoint_is_written(config, tmp_path, monkeypatch):
    write, may_write, seen = checkpoints.save_file, threading.Event(), []
    rate = trainer_module.learning_rate

    def slow(tensors, path):
        assert may_write.wait(30)
        write(tensors, path)

    def watch(step, **options):
        if not may_write.is_set():
            seen.append(step)
        if step == 3:
            may_write.set()
        return rate(step, **options)

    monkeypatch.setattr(checkpoints, "save_file", slow)
    monkeypatch.setattr(trainer_module, "learning_rate", watch)
    train(config("train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=6"), tmp_path / "slow")
    assert seen == [0, 1, 2, 3]  # steps 2 and 3, counted from 0, came after the save of two steps had begun
    monkeypatch.undo()
    train(config("train.steps=2"), tmp_path / "plain")
    assert tensor_bytes(tmp_path / "slow", 2) == tensor_bytes(tmp_path / "plain", 2)


def test_a_disk_that_is_full_stops_the_run_at_one_of_the_next_steps(config, tmp_path, monkeypatch):
    write, written = checkpoints.save_file, []

    def full(tensors, path):
        if len(written) == len(TENSOR_FILES):  # those of the first checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(tensors, path))

    monkeypatch.setattr(checkpoints, "save_file", full)
    settings = ("train.steps=100000", "train.checkpoint_every=2", "train.log_every=1")
    with pytest.raises(DataError, match=r"step_00000004: cannot be written \(No space left on device\)"):
        train(config(*settings), tmp_path)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_00000002"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) <= 6
