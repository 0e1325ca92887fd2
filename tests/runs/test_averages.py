"""Averages chosen afterwards: the profiles, what is tracked, and what is put together from snapshots."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from sitdist.cli import main as cli
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.errors import CheckpointError, DataError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.inference.run import load_run
from sitdist.runs.averages import (
    Averages,
    combine,
    exponent_of,
    path_of,
    power_weights,
    prune,
    read_average,
    reconstruct,
    reconstruct_to_file,
    save,
    snapshots,
    step_of,
    use_average,
)
from sitdist.runs.checkpoint import folder_of
from sitdist.train.trainer import train


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(sigma_rel, gamma):
    assert exponent_of(sigma_rel) == pytest.approx(gamma, abs=0.01)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_a_profile_sums_to_one_and_has_its_width(sigma_rel):
    updates = np.arange(1, 5001, dtype=np.float64)
    weights = power_weights(sigma_rel, 4000, updates)
    assert weights.sum() == pytest.approx(1.0)
    assert not weights[4000:].any()
    mean = weights @ updates
    deviation = np.sqrt(weights @ (updates - mean) ** 2)
    assert deviation / 4000 == pytest.approx(sigma_rel, rel=1e-3)


def test_the_tracked_average_is_the_profiles_sum_and_a_decay_follows_its_recurrence():
    model = nn.Linear(1, 1, bias=False)
    averages = Averages(model, decays=[0.5], sigma_rels=[0.1, 0.2])
    values, expected = np.random.default_rng(0).normal(size=200), 0.0
    start = model.weight.item()
    expected = start
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, float(value))
        averages.update(step, torch.tensor(True))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    for width in (0.1, 0.2):
        direct = power_weights(width, 200, np.arange(1, 201.0)) @ values
        assert averages.averages[f"sigma_rel_{width}"][0].item() == pytest.approx(direct, abs=1e-5)
    assert averages.averages["decay_0.5"][0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("target", [(0.15, 1000), (0.03, 700)])
def test_the_coefficients_of_a_combination_add_up_to_one(target):
    """As in EDM2's code; without it, one snapshot and a width of 0.15 gave 0.849, and all weights shrank."""
    stored = [(0.05, 1000), (0.1, 1000)]
    assert sum(combine(stored, target)[0]) == pytest.approx(1.0)


def test_a_stored_profile_is_found_again_and_others_within_the_error_told():
    stored = [(width, t) for t in range(100, 1601, 100) for width in (0.05, 0.1)]
    assert combine(stored, (0.1, 800))[1] < 1e-6
    coefficients, error = combine(stored, (0.07, 1600))
    assert error < 0.01
    assert combine(stored[::4], (0.07, 1600))[1] > error  # fewer snapshots
    updates = np.arange(1, 1601, dtype=np.float64)
    made = sum(c * power_weights(w, t, updates) for c, (w, t) in zip(coefficients, stored, strict=True))
    wanted = power_weights(0.07, 1600, updates)
    assert np.linalg.norm(made - wanted) / np.linalg.norm(wanted) == pytest.approx(error, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- of runs

AVERAGES = "train.averages={decays: [0.5], sigma_rels: [0.05, 0.1], snapshot_every: 2}"


@pytest.fixture(scope="module")
def run(tiny_yaml, tmp_path_factory):
    """24 steps with snapshots every second one, and the profile of width 0.07 tracked in another run."""
    folder = tmp_path_factory.mktemp("averages")
    settings = ["train.steps=24", "train.checkpoint_every=9", "train.keep_checkpoints=1", "train.schedule.kind=cosine"]
    train(load_yaml(Config, tiny_yaml, [*settings, AVERAGES]), folder / "run")
    direct = "train.averages={sigma_rels: [0.07]}"
    train(load_yaml(Config, tiny_yaml, [*settings, direct]), folder / "direct")
    return folder / "run"


def test_a_reconstruction_is_what_direct_tracking_gives(run):
    direct = read_average(run.parent / "direct", 24, "sigma_rel_0.07")
    tensors, step, error = reconstruct(run, 0.07)
    assert step == 24
    assert 0.0 < error < 0.02
    assert set(tensors) == set(direct)
    narrow, wide = (read_average(run, 24, f"sigma_rel_{width}") for width in (0.05, 0.1))
    difference, scale = (
        sum(float((a[name] - b[name]).square().sum()) for name in direct) ** 0.5
        for a, b in ((tensors, direct), (narrow, wide))
    )
    assert difference < 0.02 * scale


def test_averages_change_nothing_in_the_training_and_old_ones_go_with_their_checkpoints(run):
    a, b = (folder_of(folder, 24) / "model.safetensors" for folder in (run, run.parent / "direct"))
    assert a.read_bytes() == b.read_bytes()
    assert [step_of(path) for path in snapshots(run)] == list(range(2, 25, 2))  # 9 and 18 are no checkpoints any more
    assert [step_of(path) for path in snapshots(run.parent / "direct")] == [24]


def test_a_resumed_run_ends_in_the_same_averages(tiny_yaml, tmp_path):
    settings = ["train.schedule.kind=constant", AVERAGES]
    train(load_yaml(Config, tiny_yaml, [*settings, "train.steps=5"]), tmp_path / "a")
    train(load_yaml(Config, tiny_yaml, [*settings, "train.steps=3"]), tmp_path / "b")
    train(load_yaml(Config, tiny_yaml, [*settings, "train.steps=5"]), tmp_path / "b")
    assert path_of(tmp_path / "a", 5).read_bytes() == path_of(tmp_path / "b", 5).read_bytes()
    path_of(tmp_path / "b", 5).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000005.safetensors: cannot be read .*; put it back"):
        train(load_yaml(Config, tiny_yaml, [*settings, "train.steps=6"]), tmp_path / "b")


@pytest.mark.distributed
def test_an_evaluation_uses_the_average_it_is_told(run, capsys):
    loaded = load_run(run)
    use_average(loaded.model, run, 24, "decay_0.5")
    expected = read_average(run, 24, "decay_0.5")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    with pytest.raises(CheckpointError, match=r"keeps no average 'decay_0.6'; choose one of decay_0.5, sigma_rel_0.05"):
        use_average(loaded.model, run, 24, "decay_0.6")
    assert cli.run(["ema", "reconstruct", str(run), "--sigma-rel", "0.05", "--out", str(run / "w.safetensors")]) == 0
    assert "w.safetensors: sigma_rel 0.05 after step 24, relative error of the profile" in capsys.readouterr().out
    errors = {}
    for name in (None, "sigma_rel_0.05", str(run / "w.safetensors")):
        options = EvalOptions(
            split="test", out=run / f"eval_{len(errors)}", set=(f"evaluate.average={name or 'null'}",)
        )
        errors[name] = (evaluate(run, options) / "metrics.json").read_text()
    assert errors[None] != errors["sigma_rel_0.05"]


def test_only_the_averages_of_checkpoints_are_removed(tmp_path):
    folder = tmp_path / "averages"
    for step in (1, 2, 10**8):
        save(tmp_path, step, {"decay_0.5/weight": torch.ones(2)})
    theirs = ("step_00000001_mine.safetensors", "step_old.safetensors", "step_1.safetensors", "notes")
    for name in theirs:
        (folder / name).write_text("mine")
    prune(tmp_path, keep=[2], every=None)
    assert {path.name for path in folder.iterdir()} == {*theirs, "step_00000002.safetensors"}
    assert snapshots(tmp_path) == [path_of(tmp_path, 2)]


def test_a_reconstruction_replaces_no_file_that_is_there(run, tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(DataError, match="already exists; give another name"):
        reconstruct_to_file(run, 0.07, None, tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_an_altered_byte_of_an_average_is_seen(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    path = snapshots(copy)[-1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # of a number that stays finite
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or altered"):
        reconstruct(copy, 0.15)
