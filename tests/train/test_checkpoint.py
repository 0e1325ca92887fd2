"""Checkpoints: whole or absent whatever happens, checked when read, of this model and no other, never unpickled."""

import errno
import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from sitdist.cli import run as run_command
from sitdist.config import Config, load_yaml
from sitdist.errors import CheckpointError, ConfigError
from sitdist.train import checkpoint as checkpoints
from sitdist.train.checkpoint import (
    TENSOR_FILES,
    check_optimizer,
    check_same_config,
    describe_checkpoints,
    folder_of,
    list_checkpoints,
    load_optimizer,
    load_run,
    load_tensors,
    optimizer_tensors,
    read_checkpoint,
    read_newest,
    save_checkpoint,
)
from sitdist.train.trainer import train


def tensors_at(step):
    return {name: {"weight": torch.full((3, 2), float(step))} for name in TENSOR_FILES}


def save(run, *steps, keep=10):
    for step in steps:
        save_checkpoint(run, {"step": step}, tensors_at(step), keep)


def steps_of(run):
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def alter(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def messages(monkeypatch):
    """What the package warns of."""
    said = []
    monkeypatch.setattr(checkpoints.log, "warning", lambda message, *values: said.append(message % values))
    return said


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path):
    tensors = tensors_at(7) | {"optimizer": {}}  # plain SGD remembers nothing
    folder = save_checkpoint(tmp_path, {"step": 7, "scaler": None}, tensors, keep=1)
    loaded = read_checkpoint(folder)
    assert folder == folder_of(tmp_path, 7) == tmp_path / "checkpoints" / "step_00000007"
    assert loaded.step == 7
    assert loaded.state == {"format_version": 1, "step": 7, "scaler": None}
    assert loaded.tensors["optimizer"] == {}
    torch.testing.assert_close(loaded.tensors["ema"]["weight"], tensors["ema"]["weight"], rtol=0, atol=0)
    assert set(read_checkpoint(folder, ["ema"]).tensors) == {"ema"}


def test_equal_states_are_equal_bytes(tmp_path):
    save(tmp_path / "a", 3)
    save(tmp_path / "b", 3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the code may catch it."""


def killed_at(call, monkeypatch):
    """Let the process die at its `call`-th touch of the disk (from 0), just before it."""
    count = iter(range(10**6))

    def mortal(function):
        def wrapped(*arguments, **options):
            if next(count) == call:
                raise Killed
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(checkpoints, "_write", mortal(checkpoints._write))
    monkeypatch.setattr(checkpoints, "_flush_folder", mortal(checkpoints._flush_folder))
    monkeypatch.setattr(checkpoints.os, "rename", mortal(os.rename))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", mortal(shutil.rmtree))


@pytest.mark.parametrize("call", range(10))  # five files, a flush, the rename, a flush, the oldest hidden and removed
def test_killed_at_any_moment_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch, call):
    save(tmp_path, 1, 2)
    before = contents(folder_of(tmp_path, 2))
    with monkeypatch.context() as patch:
        killed_at(call, patch)
        with pytest.raises(Killed):
            save(tmp_path, 3, keep=2)
    assert steps_of(tmp_path) in ([1, 2], [1, 2, 3], [2, 3])
    assert contents(folder_of(tmp_path, 2)) == before
    newest = read_newest(tmp_path)
    assert newest.tensors["model"]["weight"].unique().tolist() == [newest.step]
    save(tmp_path, 3, keep=2)
    assert steps_of(tmp_path) == [2, 3]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000002", "step_00000003"]


def test_the_manifest_is_written_last_and_then_the_folder_is_renamed(tmp_path, monkeypatch):
    done = []
    write, rename = checkpoints._write, os.rename
    monkeypatch.setattr(checkpoints, "_write", lambda path, content: (write(path, content), done.append(path.name)))
    monkeypatch.setattr(checkpoints.os, "rename", lambda old, new: (rename(old, new), done.append(new.name)))
    save(tmp_path, 1)
    assert sorted(done[:4]) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert done[4:] == ["manifest.json", "step_00000001"]


def test_a_full_disk_is_one_clear_error_and_the_earlier_checkpoints_stay(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    before = contents(tmp_path)
    write = checkpoints._write

    def write_until_full(path, content):
        if path.name == "optimizer.safetensors":
            path.write_bytes(b"cut o")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(checkpoints, "_write", write_until_full)
    with pytest.raises(CheckpointError, match=r"step_00000003: cannot be written: No space left on device; free space"):
        save(tmp_path, 3, keep=1)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000002"]


def test_the_newest_are_kept_and_damaged_ones_do_not_count(tmp_path):
    save(tmp_path, 1, 2, 3)
    (folder_of(tmp_path, 3) / "ema.safetensors").unlink()
    save(tmp_path, 4, keep=2)
    assert steps_of(tmp_path) == [2, 4]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    save(tmp_path, 1, 2)
    alter(folder_of(tmp_path, 2) / "model.safetensors")
    save(tmp_path, 2)
    assert read_newest(tmp_path).step == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000002"]


def test_milestones_stay_beside_the_newest_ones(tmp_path):
    for step in range(1, 10):
        save_checkpoint(tmp_path, {"step": step}, tensors_at(step), keep=2, keep_every=3)
    assert steps_of(tmp_path) == [3, 6, 8, 9]


def test_checkpoints_are_listed_and_verified_one_by_one(tmp_path, capsys):
    save(tmp_path, 1, 2, 3)
    alter(folder_of(tmp_path, 1) / "ema.safetensors")
    (folder_of(tmp_path, 2) / "model.safetensors").unlink()
    assert run_command(["checkpoint", "list", str(tmp_path)]) == 2
    first, second, third = capsys.readouterr().out.splitlines()
    assert "whole by its sizes" in first
    assert second == "step_00000002  damaged: model.safetensors is missing"
    assert "whole by its sizes" in third
    text, whole = describe_checkpoints(tmp_path, verify=True)
    assert not whole
    assert "step_00000001  damaged: ema.safetensors: SHA-256" in text
    assert text.splitlines()[2].endswith("every hash is right")
    assert run_command(["checkpoint", "verify", str(tmp_path / "none")]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ reading


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (alter, "optimizer.safetensors", r"optimizer.safetensors: SHA-256 [0-9a-f]{12}... but its manifest says"),
        (truncate, "model.safetensors", r"model.safetensors has \d+ bytes but its manifest says \d+"),
        (alter, "state.json", "state.json: SHA-256"),
        (remove, "ema.safetensors", "ema.safetensors is missing"),
        (remove, "manifest.json", "has no manifest.json, so it was never finished"),
        (lambda path: path.write_text("{"), "manifest.json", "manifest.json is damaged"),
        (lambda path: path.write_text('{"format_version": 9, "files": {}}'), "manifest.json", "format_version 9"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path, messages, damage, name, message):
    save(tmp_path, 1, 2)
    damage(folder_of(tmp_path, 2) / name)
    assert read_newest(tmp_path).step == 1
    (said,) = messages
    assert said.startswith("passed over: ")
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(folder_of(tmp_path, 2))
    assert str(error.value) in said


def test_without_a_whole_checkpoint_there_is_none(tmp_path, messages):
    assert read_newest(tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert read_newest(tmp_path) is None
    assert "step_00000004: has no manifest.json" in messages[0]


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    tensors = all_tensors(model, optimizer)
    folder = save_checkpoint(tmp_path, {"step": 1}, tensors, keep=1)
    for content in contents(folder).values():
        assert not content.startswith((b"PK", b"\x80"))  # a zip of torch.save, a pickle

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    loaded = read_newest(tmp_path)
    load_tensors(model, loaded.tensors["model"], folder)
    load_optimizer(named(model), optimizer, check_optimizer(named(model), loaded.tensors["optimizer"], folder))


# ----------------------------------------------------------------------------------------------- does it belong here?


class Malicious:
    """Unpickled it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("disguise", ["safetensors", "manifest too", "pickled metadata"])
def test_a_pickle_planted_in_a_checkpoint_is_never_run(tmp_path, messages, disguise):
    """In the place of the weights; with the manifest to match; as the file that torch's own format unpickles."""
    save(tmp_path, 1, 2)
    folder, victim = folder_of(tmp_path, 2), tmp_path / "victim"
    planted = folder / (".metadata" if disguise == "pickled metadata" else "model.safetensors")
    torch.save({"weight": Malicious(victim)}, planted, _use_new_zipfile_serialization=False)
    if disguise == "manifest too":
        manifest = json.loads((folder / "manifest.json").read_text())
        content = planted.read_bytes()
        manifest["files"][planted.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: no safetensors file .* nothing else is read"):
            read_checkpoint(folder)
    assert read_newest(tmp_path).step == (2 if disguise == "pickled metadata" else 1)
    assert not victim.exists()
    with planted.open("rb") as file:  # it is what it says: whoever unpickles it runs it
        pickle.load(file)
        pickle.load(file)
        pickle.load(file)
        pickle.load(file)
    assert victim.exists()


def test_a_checkpoint_of_another_model_is_refused_by_the_first_tensor_that_does_not_fit(tmp_path):
    wide, narrow = nn.Linear(4, 2), nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"weight is \(2, 3\) but the model of the config has \(2, 4\)"):
        load_tensors(wide, narrow.state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"bias is absent but the model of the config has \(2,\)"):
        load_tensors(wide, nn.Linear(4, 2, bias=False).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"extra is \(1,\) but the model of the config has absent"):
        load_tensors(wide, wide.state_dict() | {"extra": torch.zeros(1)}, tmp_path)


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model = nn.Linear(3, 2, bias=False)
    with pytest.raises(CheckpointError, match="optimizer state bias/exp_avg belongs to no trained parameter"):
        check_optimizer(named(model), {"bias/exp_avg": torch.zeros(2)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"weight/exp_avg is \(2,\) but the parameter is \(2, 3\)"):
        check_optimizer(named(model), {"weight/exp_avg": torch.zeros(2)}, tmp_path)


def test_a_changed_config_is_refused_with_the_key_and_both_values(tmp_path, tiny_yaml):
    def config(*overrides):
        return load_yaml(Config, tiny_yaml, list(overrides))

    folder = save_checkpoint(tmp_path, {"step": 1, "config": config().model_dump(mode="json")}, tensors_at(1), keep=1)
    loaded = read_checkpoint(folder)
    harmless = ("train.steps=50", "train.checkpoint_every=1", "train.max_batch_per_device=2", "data=moved")
    check_same_config(loaded, config(*harmless, "evaluate.seed=4", "name=other"))
    for override, message in {
        "train.optimizer.lr=0.5": "train.optimizer.lr is 0.5 but .*step_00000001 was trained with 0.01; set it back",
        "seed=1": "seed is 1 but .* was trained with 0",
        "model.depth=3": "model.depth is 3 but .* was trained with 2",
        "train.global_batch=24": "train.global_batch is 24 but .* was trained with 12",
        "train.precision=bf16": "train.precision is 'bf16' but .* was trained with 'fp32'",
        "train.optimizer.betas=[0.9, 0.95]": r"train.optimizer.betas is \[0.9, 0.95\] but .* with \[0.9, 0.999\]",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_same_config(loaded, config(override))


def test_a_key_that_did_not_exist_when_the_run_began_had_its_default(tmp_path, tiny_yaml):
    def config(*overrides):
        return load_yaml(Config, tiny_yaml, list(overrides))

    old = config().model_dump(mode="json")
    del old["model"]["mlp"]
    del old["flow"]["gain"]
    loaded = read_checkpoint(save_checkpoint(tmp_path, {"step": 1, "config": old}, tensors_at(1), keep=1))
    check_same_config(loaded, config())
    with pytest.raises(ConfigError, match=r"flow.gain is 2.0 but .* was trained with 1.0"):
        check_same_config(loaded, config("flow.gain=2"))


# ---------------------------------------------------------------------------------------------------- optimizer state


def named(model):
    return dict(model.named_parameters())


def all_tensors(model, optimizer):
    optimizer_state = optimizer_tensors(named(model), optimizer)
    return {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": optimizer_state}


def stepped(model, optimizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 2, generator=generator)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ],
)
def test_an_optimizer_goes_on_bit_for_bit_from_its_tensors(tmp_path, make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = make(model.parameters())
    stepped(model, optimizer)
    tensors = all_tensors(model, optimizer)
    loaded = read_checkpoint(save_checkpoint(tmp_path, {"step": 3}, tensors, keep=1))
    again = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer_again = make(again.parameters())
    load_tensors(again, loaded.tensors["model"], tmp_path)
    load_optimizer(named(again), optimizer_again, check_optimizer(named(again), loaded.tensors["optimizer"], tmp_path))
    for expected, found in zip(stepped(model, optimizer), stepped(again, optimizer_again), strict=True):
        assert torch.equal(expected, found)


# ------------------------------------------------------------------------------------------------- for the evaluation


@pytest.fixture(scope="module")
def run(tiny_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(load_yaml(Config, tiny_yaml, ["train.steps=2", "train.checkpoint_every=1"]), folder)
    return folder


def test_a_run_is_loaded_with_its_averaged_weights_in_eval_mode(run):
    loaded = load_run(run)
    expected = read_checkpoint(folder_of(run, 2)).tensors["ema"]
    assert loaded.step == 2
    assert not loaded.model.training
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected[name])
    assert load_run(run, step=1).step == 1


def test_a_folder_that_is_no_usable_run_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config.yaml, so it is no run; give the --out"):
        load_run(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"step_00000009: has no manifest.json"):
        load_run(tmp_path / "run", step=9)
    manifest = json.loads((tmp_path / "run" / "dataset.json").read_text())
    (tmp_path / "run" / "dataset.json").write_text(json.dumps(manifest | {"name": "other"}))
    with pytest.raises(CheckpointError, match=r"dataset.json: missing or altered since step_00000002 was saved"):
        load_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="has no whole checkpoint; train first"):
        load_run(tmp_path / "run")
