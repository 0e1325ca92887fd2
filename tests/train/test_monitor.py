"""What a run writes about itself: averages by time bin, lines that survive a resume, TensorBoard read back."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.distributed.accelerator import make_accelerator
from sitdist.distributed.ranks import Ranks
from sitdist.train import monitor as monitoring
from sitdist.train.hooks import StepResult
from sitdist.train.monitor import BIN_NAMES, Monitor, keep_lines_until, time_bin


@pytest.fixture
def open_monitor(tmp_path, tiny_yaml):
    def open_at(start: int) -> Monitor:
        accelerator = make_accelerator()
        config = load_yaml(Config, tiny_yaml, ["train.steps=100", "train.global_batch=4"])
        return Monitor(tmp_path, accelerator, Ranks(accelerator), config, start)

    return open_at


def seen(losses, t, norm=1.0, waited=0.0):
    """A step with these losses at times `t`; its number and rate are told by `write_line`."""
    norm = torch.tensor(norm)
    return StepResult(0, False, [], torch.tensor(losses), torch.tensor(t), norm, norm.isfinite(), 0.0, waited)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def board(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_times_fall_into_quarters_and_the_two_ends_are_bins_of_their_own():
    t = torch.tensor([0.0, 1e-6, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999999, 1.0])
    names = [BIN_NAMES[i].removeprefix("loss_by_t/") for i in time_bin(t).tolist()]
    assert names == ["0", "0-0.25", "0-0.25", "0.25-0.5", "0.5-0.75", "0.5-0.75", "0.75-1", "0.75-1", "1"]


@pytest.fixture
def clock(monkeypatch):
    """The time as the monitor sees it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("sitdist.train.monitor.time.perf_counter", lambda: Clock.now)
    return Clock


def test_numbers_that_are_not_finite_are_null(open_monitor, tmp_path):
    monitor = open_monitor(0)
    monitor.write_scalars(1, {"good": 0.5, "bad": math.nan, "worse": -math.inf}, "validation")
    monitor.close()
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, "validation/good": 0.5, "validation/bad": None, "validation/worse": None}


def test_a_line_holds_means_over_all_samples_since_the_last_one(open_monitor, tmp_path, clock):
    monitor = open_monitor(0)
    monitor.after_step(seen([1.0, 2.0, 3.0, 6.0], [0.0, 0.1, 0.2, 1.0], norm=2.0, waited=0.5))
    clock.now += 8.0
    monitor.after_step(seen([3.0, 3.0, 3.0, 3.0], [0.0, 0.9, 0.9, 0.9], norm=4.0, waited=0.5))
    monitor.observe_checkpoint(seconds=3.0)
    monitor.observe_validation(seconds=1.0)
    monitor.write_line(2, lr=0.1, loss_scale=None)
    monitor.after_step(seen([7.0, 7.0, torch.nan, torch.inf], [0.3] * 4, norm=torch.inf))  # a step that is left out
    clock.now += 1.0
    monitor.write_line(3, lr=0.2, loss_scale=1024.0, left_out=1)
    monitor.close()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert 0.05 < first.pop("train_speed/memory_gb") < 100.0
    assert first.pop("train_speed/checkpoint_share") == pytest.approx(
        3 / 7
    )  # beside 4 seconds of steps, 1 of validation
    assert second["train_speed/checkpoint_share"] == 0.0
    assert first == {
        "step": 2,
        "train/loss": 3.0,
        "train/lr": 0.1,
        "train/loss_by_t/0": 2.0,
        "train/loss_by_t/0-0.25": 2.5,
        "train/loss_by_t/0.75-1": 3.0,
        "train/loss_by_t/1": 6.0,
        "train/gradient_norm": 3.0,
        "train/steps_left_out": 0.0,
        "train/loss_spikes": 0.0,
        "train/samples_per_second": 2.0,
        "train/data_wait_share": 0.25,
    }
    assert second["train/loss"] == second["train/loss_by_t/0.25-0.5"] == 7.0
    assert second["train/loss_scale"] == 1024.0
    assert second["train/steps_left_out"] == 1.0
    assert "train/gradient_norm" not in second


def test_lines_after_the_resumed_step_and_a_cut_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "trai')
    keep_lines_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_lines_until(path, 0)
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_holds_the_same_values_and_no_step_twice_after_a_resume(open_monitor, tmp_path):
    monitor = open_monitor(0)
    for step in (1, 2, 3, 4):
        monitor.write_scalars(step, {"loss": 10.0 * step}, "train")
    monitor.close()
    monitor = open_monitor(2)  # killed after step 4, its newest checkpoint was of step 2
    monitor.write_scalars(3, {"loss": 0.5}, "train")
    monitor.write_picture(3, "validation/views", torch.rand(3, 8, 6))
    monitor.close()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        *((1, 10.0), (2, 20.0), (3, 0.5))
    ]
    read = board(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 10.0), (2, 20.0), (3, 0.5)]
    (picture,) = read.Images("validation/views")
    assert (picture.step, picture.width, picture.height) == (3, 6, 8)


def test_a_loss_far_above_the_lines_before_is_told_and_counted(tmp_path, tiny_yaml, monkeypatch):
    said = []
    monkeypatch.setattr(monitoring.log, "warning", lambda message, *values: said.append(message % values))
    accelerator = make_accelerator()
    monitor = Monitor(tmp_path, accelerator, Ranks(accelerator), load_yaml(Config, tiny_yaml))
    for step, loss in enumerate((8.0, 1.0, 1.1, 0.9, 4.0, 4.0, 1.0), 1):
        monitor.after_step(seen([loss] * 4, [0.5] * 4))
        monitor.write_line(step, 0.1, None)
    monitor.close()
    assert [line["train/loss_spikes"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 0, 0, 0, 1, 2, 2]
    assert said[0].startswith("step 5: loss 4.0000 is 3.8 times the median of the last 4 lines (1.0500); a lower")
    assert len(said) == 2  # two spikes do not make a third usual
