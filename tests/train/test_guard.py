"""Steps that are not finite change nothing, are named and counted; and no step waits for the device to know."""

import json
import threading

import pytest
import torch

from sitdist.distributed.signals import StopSignal
from sitdist.errors import NonFiniteError, RunInterrupted
from sitdist.runs.averages import Averages, path_of
from sitdist.runs.checkpoint import folder_of, read_newest
from sitdist.train import trainer as trainer_module
from sitdist.train.ema import Ema
from sitdist.train.review import Review
from sitdist.train.saving import Saver
from sitdist.train.trainer import Trainer, train


@pytest.fixture
def poisoned(monkeypatch):
    """From now on samples 1 and 4 of the batches of these steps (from 0) are not numbers; gives their keys."""
    make = trainer_module.make_inputs
    keys = {}

    def arm(*steps, batch_size=12):
        def make_poisoned(batch, *given):
            inputs = make(batch, *given)
            step = int(batch.positions[0]) // batch_size
            if step in steps:
                inputs.x1[[1, 4]] = torch.nan
                keys[step] = [batch.keys[1], batch.keys[4]]
            return inputs

        monkeypatch.setattr(trainer_module, "make_inputs", make_poisoned)
        return keys

    return arm


@pytest.fixture
def skipping(monkeypatch):
    """From now on these steps (from 0) do not call what changes weights, optimizer and averages."""

    def arm(*steps):
        now = {}
        accumulate = Trainer._accumulate_gradients

        def accumulate_and_remember(self, inputs):
            now["step"] = self.step
            return accumulate(self, inputs)

        def unless_skipped(function):
            return lambda *given, **named: None if now["step"] in steps else function(*given, **named)

        monkeypatch.setattr(Trainer, "_accumulate_gradients", accumulate_and_remember)
        for owner, name in (
            (torch.optim.AdamW, "step"),
            (torch.optim.SGD, "step"),
            (Ema, "update"),
            (Averages, "update"),
        ):
            monkeypatch.setattr(owner, name, unless_skipped(getattr(owner, name)))

    return arm


def everything(run, step):
    files = {path.name: path.read_bytes() for path in sorted(folder_of(run, step).glob("*.safetensors"))}
    averages = path_of(run, step)
    return files | ({"averages": averages.read_bytes()} if averages.exists() else {})


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


ADAMW = ("train.averages={decays: [0.5], sigma_rels: [0.1]}",)
SGD = ("train.optimizer.kind=sgd", "train.optimizer.momentum=0.9", "train.max_batch_per_device=5")


@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_sample_that_is_no_number_leaves_its_step_out_and_is_named(
    config, tmp_path, capfd, monkeypatch, poisoned, skipping, settings, bad
):
    keys = poisoned(bad)
    train(config(*settings), tmp_path / "poisoned")
    first, second = keys[bad]
    assert (
        f"sitdist: step {bad} left out: the loss is not finite for samples {first}, {second}\n"
        in capfd.readouterr().err
    )
    assert [line["train/steps_left_out"] for line in lines(tmp_path / "poisoned")] == [float(bad == 0), 1.0]
    assert all(line["train/loss"] > 0 for line in lines(tmp_path / "poisoned"))
    monkeypatch.undo()
    skipping(bad)
    train(config(*settings), tmp_path / "skipped")
    assert everything(tmp_path / "poisoned", 6) == everything(tmp_path / "skipped", 6)
    monkeypatch.undo()
    train(config(*settings), tmp_path / "plain")
    assert everything(tmp_path / "plain", 6) != everything(tmp_path / "skipped", 6)


def test_a_gradient_that_is_not_finite_is_told_without_samples(config, tmp_path, monkeypatch, capfd):
    accumulate = Trainer._accumulate_gradients

    def overflow(self, inputs):
        losses = accumulate(self, inputs)
        if self.step == 1:
            next(each.grad for each in self.state.model.parameters() if each.grad is not None).fill_(torch.inf)
        return losses

    monkeypatch.setattr(Trainer, "_accumulate_gradients", overflow)
    train(config("train.steps=2"), tmp_path)
    assert "step 1 left out: the gradient is not finite, of no single sample" in capfd.readouterr().err


ROWS = ("train.steps=12", "train.checkpoint_every=2", "train.log_every=3", "train.non_finite.in_a_row=3", *ADAMW)


@pytest.mark.parametrize("stopped", [False, True])
def test_after_a_row_of_them_the_run_goes_back_to_the_weights_of_the_checkpoint_before(
    config, tmp_path, capfd, monkeypatch, poisoned, skipping, stopped
):
    poisoned(6, 7, 8)
    if stopped:  # in the middle of the row, and it goes on
        stop = StopSignal()
        accumulate = Trainer._accumulate_gradients

        def ask(self, inputs):
            if self.step == 7:
                stop.requested = 15
            return accumulate(self, inputs)

        monkeypatch.setattr(Trainer, "_accumulate_gradients", ask)
        monkeypatch.setattr(trainer_module, "StopSignal", lambda: stop)
        with pytest.raises(RunInterrupted, match="stopped after step 8 of 12"):
            train(config(*ROWS), tmp_path / "poisoned")
        monkeypatch.setattr(Trainer, "_accumulate_gradients", accumulate)
        stop.requested = None
    train(config(*ROWS), tmp_path / "poisoned")
    told = "3 steps in a row were left out: back to the weights after step 4, and on with step 9"
    assert told in capfd.readouterr().err
    assert read_newest(tmp_path / "poisoned").state["left_out"] == {"total": 3, "in_a_row": 0, "rollbacks": 1}
    monkeypatch.undo()
    skipping(4, 5, 6, 7, 8)
    train(config(*ROWS), tmp_path / "skipped")
    assert everything(tmp_path / "poisoned", 12) == everything(tmp_path / "skipped", 12)


def test_a_run_that_cannot_be_helped_stops_and_says_what_was_left_out(config, tmp_path, poisoned):
    poisoned(1, 2, 4, 5)
    budget = ("train.log_every=1", "train.non_finite.budget=2", "train.non_finite.in_a_row=9")
    with pytest.raises(
        NonFiniteError, match=r"step 5: 3 steps were left out, and train.non_finite.budget is 2; look at"
    ):
        train(config(*budget), tmp_path / "a")
    row = ("train.log_every=1", "train.non_finite.in_a_row=2")
    message = (
        "step 3: 2 steps in a row were left out, and there is no checkpoint before them; look at the samples named"
    )
    with pytest.raises(NonFiniteError, match=message):
        train(config(*row), tmp_path / "b")


def test_no_step_waits_for_the_device_but_at_the_logging_steps(config, tmp_path, monkeypatch, poisoned):
    poisoned(3, batch_size=12)
    train_thread, waits, reviewing = threading.get_ident(), [], []
    review, make = Review.after_step, trainer_module.make_inputs

    def counted(name, function):
        def call(tensor, *given, **named):
            if threading.get_ident() == train_thread and tensor.is_floating_point() | (tensor.dtype == torch.bool):
                waits.append((name, bool(reviewing)))
            return function(tensor, *given, **named)

        return call

    def mark_review(self, done):
        reviewing.append(True)
        review(self, done)
        reviewing.clear()

    def begin_to_count(batch, *given):
        if int(batch.positions[0]) == 12:  # what is done once is done
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"):
                monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        return make(batch, *given)

    monkeypatch.setattr(trainer_module, "make_inputs", begin_to_count)
    monkeypatch.setattr(Review, "after_step", mark_review)
    monkeypatch.setattr(Saver, "save", lambda self: None)
    settings = ("train.steps=9", "train.log_every=4", "train.optimizer.clip_norm=0.1", *ADAMW)
    train(config(*settings), tmp_path)
    assert [name for name, in_review in waits if not in_review] == []
    assert [name for name, in_review in waits if in_review]  # it does count
