"""Checkpoints: whole or absent whatever happens, checked when read, of this model and no other, never unpickled."""

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

from sitdist.cli.main import run as run_command
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.dataset.manifest import read_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.distributed.optimizer_state import check_optimizer, load_optimizer, optimizer_tensors
from sitdist.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError
from sitdist.flow.estimate import EstimateOptions, estimate_pose
from sitdist.flow.interpolant import get_interpolant
from sitdist.geometry.packing import PoseStatistics
from sitdist.inference.run import load_run
from sitdist.model.codec import latent_mean
from sitdist.runs import checkpoint as checkpoints
from sitdist.runs.build import build_endpoint, build_model
from sitdist.runs.checkpoint import (
    TENSOR_FILES,
    check_same_config,
    describe_checkpoints,
    folder_of,
    list_checkpoints,
    read_checkpoint,
    read_newest,
    save_checkpoint,
)
from sitdist.train.trainer import train


def tensors_at(step):
    return {name: {"weight": torch.full((3, 2), float(step))} for name in TENSOR_FILES}


def state_at(step, config=None):
    return {"step": step, "config": config or {}, "dataset": "0" * 64}


def save(run, *steps, keep=10):
    for step in steps:
        save_checkpoint(run, state_at(step), tensors_at(step), keep)


def steps_of(run):
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def alter(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forge(folder, name, content):
    """Put other bytes in the place of a checkpoint's file, and their size and hash into its manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge_state(folder, **changes):
    state = json.loads((folder / "state.json").read_text()) | changes
    forge(folder, "state.json", json.dumps(state).encode())


@pytest.fixture
def messages(monkeypatch):
    """What the package warns of."""
    said = []
    monkeypatch.setattr(checkpoints.log, "warning", lambda message, *values: said.append(message % values))
    return said


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path):
    tensors = tensors_at(7) | {"optimizer": {}}  # plain SGD remembers nothing
    state = state_at(7) | {"scaler": None}
    folder = save_checkpoint(tmp_path, state, tensors, keep=1)
    loaded = read_checkpoint(folder)
    assert folder == folder_of(tmp_path, 7) == tmp_path / "checkpoints" / "step_00000007"
    assert loaded.step == 7
    assert loaded.state == {"format_version": 1} | state
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
    """Let the process die just before its `call`-th touch of the disk (from 0), after which it touches nothing."""
    count = iter(range(10**6))

    def mortal(function):
        def wrapped(*arguments, **options):
            if next(count) >= call:
                raise Killed
            return function(*arguments, **options)

        return wrapped

    for module, name in (
        (checkpoints, "save_file"),
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(module, name, mortal(getattr(module, name)))


@pytest.mark.parametrize("call", range(24))  # three files written, five flushed, renames, the oldest hidden and removed
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


def test_a_full_disk_is_one_clear_error_and_the_earlier_checkpoints_stay(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    before = contents(tmp_path)
    write = checkpoints.save_file

    def write_until_full(tensors, path):
        if path.name == "optimizer.safetensors":
            path.write_bytes(b"cut o")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", write_until_full)
    with pytest.raises(DataError, match=r"step_00000003: cannot be written \(No space left on device\); free space"):
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


def test_only_what_is_a_checkpoint_or_was_left_by_one_is_removed(tmp_path):
    """What merely has a similar name, and what a user put into a checkpoint, stays."""
    save(tmp_path, 1, 2, 3)
    checkpoint, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (checkpoint / "step_00000002").rename(elsewhere / "step_00000002")
    (checkpoint / "step_00000002").symlink_to(elsewhere / "step_00000002")
    theirs = (".step_backup", "step_old", "step_1", "step_00000001.bak", "step_00000003 (copy)", ".step_00000003.mine")
    for name in theirs:
        (checkpoint / name).mkdir()
        (checkpoint / name / "notes").write_text(name)
    (folder_of(tmp_path, 1) / "notes").write_text("of a checkpoint")
    left = (".step_00000001.old-7", ".step_00000009.tmp-12", ".sitdist-0123abcd-99-89abcdef.tmp")
    for name in left:
        (checkpoint / name).mkdir()
        (checkpoint / name / "model.safetensors").write_text("")
    (checkpoint / ".step_00000009.damaged-3").symlink_to(elsewhere)
    save(tmp_path, 4, keep=1)
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {*theirs, "step_00000001", "step_00000004"}
    assert (folder_of(tmp_path, 1) / "notes").read_text() == "of a checkpoint"
    assert {path.name for path in elsewhere.iterdir()} == {"precious", "step_00000002"}
    assert len(contents(elsewhere / "step_00000002")) == 5


def test_milestones_stay_beside_the_newest_ones(tmp_path):
    for step in range(1, 10):
        save_checkpoint(tmp_path, state_at(step), tensors_at(step), keep=2, keep_every=3)
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
    assert "step_00000001  damaged: ema.safetensors: damaged or altered: SHA-256" in text
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
        (alter, "optimizer.safetensors", r"optimizer.safetensors: damaged or altered: SHA-256 is [0-9a-f]{64}, not"),
        (truncate, "model.safetensors", r"model.safetensors has \d+ bytes but its manifest says \d+"),
        (alter, "state.json", "state.json: damaged or altered"),
        (remove, "ema.safetensors", "ema.safetensors is missing"),
        (remove, "manifest.json", "has no manifest.json, so it was never finished"),
        (lambda path: path.write_text("{"), "manifest.json", "manifest.json: damaged"),
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


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b'{"step": 2, "config": ' + b"[" * 100_000,
        b'{"step": 2, "step2": NaN}',
        *(json.dumps(state_at(2) | change).encode() for change in ({"step": 1}, {"config": []}, {"world_size": 0})),
    ],
)
def test_a_state_of_another_shape_is_refused_in_one_line(tmp_path, messages, state):
    save(tmp_path, 1, 2)
    forge(folder_of(tmp_path, 2), "state.json", state)
    with pytest.raises(CheckpointError, match=r"state\.json.*; use an earlier checkpoint$") as refused:
        read_checkpoint(folder_of(tmp_path, 2))
    assert "\n" not in str(refused.value)
    assert read_newest(tmp_path, []).step == 1
    text, whole = describe_checkpoints(tmp_path)
    assert not whole
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"state.json": {"bytes": 10**4000, "sha256": "0" * 64}}},
        {"files": {"../../precious": {"bytes": 1, "sha256": "0" * 64}}},
        {"more": 1},
    ],
)
def test_a_manifest_of_another_shape_is_refused_in_one_line(tmp_path, change):
    save(tmp_path, 1)
    path = folder_of(tmp_path, 1) / "manifest.json"
    values = json.loads(path.read_text())
    files = change.get("files", {})
    path.write_text(json.dumps(values | change | {"files": values["files"] | files if files else files}))
    with pytest.raises(CheckpointError, match=r"manifest\.json.*; use an earlier checkpoint$") as refused:
        read_checkpoint(folder_of(tmp_path, 1))
    assert "\n" not in str(refused.value)
    assert list_checkpoints(tmp_path) == []


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "no safetensors file"),
        (header(weight={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}) + b"0000", "no safetensors file"),
        *(
            (serialized({"weight": torch.tensor([value])}), "tensor weight holds NaN or infinity")
            for value in (math.nan, math.inf)
        ),
        *(
            (
                serialized({"weight": torch.zeros(2).to(dtype)}),
                f"tensor weight is {dtype}, expected float32".replace("torch.", ""),
            )
            for dtype in (torch.float8_e4m3fn, torch.int64)
        ),
    ],
)
def test_tensors_that_are_none_or_not_finite_are_refused_in_one_line(tmp_path, content, message):
    save(tmp_path, 1)
    forge(folder_of(tmp_path, 1), "ema.safetensors", content)
    with pytest.raises(CheckpointError, match=rf"ema\.safetensors: {message}") as refused:
        read_checkpoint(folder_of(tmp_path, 1))
    assert "\n" not in str(refused.value)
    assert "damaged: ema.safetensors" in describe_checkpoints(tmp_path, verify=True)[0]


def test_a_file_that_memory_cannot_hold_is_refused_before_it_is_read(tmp_path):
    save(tmp_path, 1)
    folder = folder_of(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["ema.safetensors"]["bytes"] = 2**43
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(folder / "ema.safetensors", 2**43)  # 8 TiB, of which nothing is on the disk
    with pytest.raises(OutOfMemoryError, match=r"ema\.safetensors: about 8,796\.1 GB of memory"):
        read_checkpoint(folder)


def test_links_in_a_checkpoint_are_followed_to_files_with_the_right_hash_only(tmp_path):
    save(tmp_path, 1)
    ema = folder_of(tmp_path, 1) / "ema.safetensors"
    ema.rename(tmp_path / "blob")
    ema.symlink_to(tmp_path / "blob")
    assert read_newest(tmp_path).step == 1
    for target in (tmp_path, ema, tmp_path / "nowhere", Path("/dev/zero")):
        ema.unlink()
        ema.symlink_to(target)
        with pytest.raises(CheckpointError, match=r"ema\.safetensors is missing|cannot be read"):
            read_checkpoint(folder_of(tmp_path, 1))


# ----------------------------------------------------------------------------------------------- does it belong here?


class Malicious:
    """Unpickled it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("disguise", ["manifest too", "pickled metadata"])
def test_a_pickle_planted_in_a_checkpoint_is_never_run(tmp_path, messages, disguise):
    """In the place of the weights; with the manifest to match; as the file that torch's own format unpickles."""
    save(tmp_path, 1, 2)
    folder, victim = folder_of(tmp_path, 2), tmp_path / "victim"
    planted = folder / (".metadata" if disguise == "pickled metadata" else "model.safetensors")
    torch.save({"weight": Malicious(victim)}, planted, _use_new_zipfile_serialization=False)
    if disguise == "manifest too":
        forge(folder, planted.name, planted.read_bytes())
        with pytest.raises(CheckpointError, match=r"model\.safetensors: no safetensors file"):
            read_checkpoint(folder)
    assert read_newest(tmp_path).step == (2 if disguise == "pickled metadata" else 1)
    assert not victim.exists()
    with planted.open("rb") as file:  # it is what it says: whoever unpickles it runs it
        pickle.load(file)
        pickle.load(file)
        pickle.load(file)
        pickle.load(file)
    assert victim.exists()


def test_optimizer_state_that_does_not_fit_is_refused(tmp_path):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    tensors = optimizer_tensors(named(model), optimizer)
    assert check_optimizer(named(model), tensors, tmp_path).keys() == {"weight", "bias"}
    for changed, message in (
        (tensors | {"scale/exp_avg": torch.zeros(2)}, "optimizer state scale/exp_avg belongs to no trained parameter"),
        (tensors | {"weight/exp_avg": torch.zeros(2)}, r"weight/exp_avg is \(2,\) but the parameter is \(3, 2\)"),
        ({name: value for name, value in tensors.items() if name != "bias/exp_avg_sq"}, "no bias/exp_avg_sq, which"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_optimizer(named(model), changed, tmp_path)


def test_a_changed_config_is_refused_with_the_key_and_both_values(tmp_path, tiny_yaml):
    def config(*overrides):
        return load_yaml(Config, tiny_yaml, list(overrides))

    state = state_at(1, config().model_dump(mode="json"))
    loaded = read_checkpoint(save_checkpoint(tmp_path, state, tensors_at(1), keep=1))
    harmless = ("train.steps=50", "train.checkpoint_every=1", "train.max_batch_per_device=2", "data=moved")
    check_same_config(loaded, config(*harmless, "evaluate.seed=4", "name=other"))
    for override, message in {
        "train.optimizer.lr=0.5": "train.optimizer.lr is 0.5 but .*step_00000001 was trained with 0.01; set it back",
        "model.depth=3": "model.depth is 3 but .* was trained with 2",
        "train.optimizer.betas=[0.9, 0.95]": r"train.optimizer.betas is \[0.9, 0.95\] but .* with \[0.9, 0.999\]",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_same_config(loaded, config(override))
    averaging = state_at(2, config("train.averages={decays: [0.5]}").model_dump(mode="json"))
    loaded = read_checkpoint(save_checkpoint(tmp_path, averaging, tensors_at(2), keep=1))
    with pytest.raises(ConfigError, match=r"train\.averages\.decays is None but .* was trained with \[0\.5\]"):
        check_same_config(loaded, config())


def test_a_key_that_did_not_exist_when_the_run_began_had_its_default(tmp_path, tiny_yaml):
    def config(*overrides):
        return load_yaml(Config, tiny_yaml, list(overrides))

    old = config().model_dump(mode="json")
    del old["model"]["mlp"]
    del old["flow"]["gain"]
    loaded = read_checkpoint(save_checkpoint(tmp_path, state_at(1, old), tensors_at(1), keep=1))
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
    loaded = read_checkpoint(save_checkpoint(tmp_path, state_at(3), tensors, keep=1))
    again = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer_again = make(again.parameters())
    again.load_state_dict(loaded.tensors["model"])
    load_optimizer(named(again), optimizer_again, check_optimizer(named(again), loaded.tensors["optimizer"], tmp_path))
    for expected, found in zip(stepped(model, optimizer), stepped(again, optimizer_again), strict=True):
        assert torch.equal(expected, found)


# ------------------------------------------------------------------------------------------------- for the evaluation


@pytest.fixture(scope="module")
def run(tiny_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(load_yaml(Config, tiny_yaml, ["train.steps=2", "train.checkpoint_every=1"]), folder)
    return folder


def test_a_folder_that_is_no_usable_run_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no whole checkpoint; give the --out"):
        load_run(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"step_00000009: has no manifest.json"):
        load_run(tmp_path / "run", step=9)
    manifest = json.loads((tmp_path / "run" / "dataset.json").read_text())
    (tmp_path / "run" / "dataset.json").write_text(json.dumps(manifest | {"name": "other"}))
    with pytest.raises(
        CheckpointError, match=r"dataset.json: damaged or altered: SHA-256 .*; copy the manifest.json of .* there"
    ):
        load_run(tmp_path / "run")


# ----------------------------------------------------------------------------------------------- the checkpoint decides


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def edit_config(run, **changes):
    """Set keys of config.yaml such as flow__sigma."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(values))


def test_poses_are_those_of_the_weights_the_config_and_the_card_read_by_hand(run, tiny_dataset):
    """As the first versions loaded a run: config.yaml, dataset.json and ema.safetensors, with nothing checked."""
    config, manifest = load_yaml(Config, run / "config.yaml"), read_manifest(run / "dataset.json")
    endpoint, flow_path = build_endpoint(config.flow), get_interpolant(config.flow.path, config.flow.prediction)
    model = build_model(config.model, manifest, endpoint)
    model.load_state_dict(load_file(folder_of(run, 2) / "ema.safetensors"))
    loaded, reader = load_run(run), ShardReader(tiny_dataset, "test")
    latents, labels = latent_mean(reader.moments(range(12)).float()), reader.labels()
    statistics, options = PoseStatistics.from_dict(manifest.statistics), EstimateOptions("heun", steps=2)
    ours, theirs = (
        estimate_pose(network, path, latents, labels, statistics, options, end)
        for network, path, end in (
            (model.eval().requires_grad_(False), flow_path, endpoint),
            (loaded.model, loaded.interpolant, loaded.endpoint),
        )
    )
    assert torch.equal(ours.camera_to_world, theirs.camera_to_world)
    assert torch.equal(ours.spread, theirs.spread)
    assert loaded.config == config
    assert (loaded.step, loaded.model.training, load_run(run, step=1).step) == (2, False, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow__sigma": 0.2}, "flow.sigma is 0.2 but .*step_00000002 was trained with 0.1"),
        ({"flow__unknown": 1}, "unknown key 'flow.unknown'"),
    ],
)
def test_a_config_beside_the_checkpoint_that_disagrees_is_refused_with_both_values(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {message}"):
        load_run(copy)


def test_the_checkpoint_is_enough_without_the_config_beside_it(copy):
    expected = load_run(copy)
    (copy / "config.yaml").unlink()
    loaded = load_run(copy)
    assert loaded.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), expected.model.parameters(), strict=True))


def test_keys_of_another_version_are_left_out_where_the_weights_do_not_depend_on_them(copy, messages):
    edit_config(copy, train__fast=True, evaluate__colour="red", train__optimizer__foreach=None)
    expected, folder = load_run(copy).config, folder_of(copy, 2)
    forge_state(folder, config=yaml.safe_load((copy / "config.yaml").read_text()))
    for told in (messages, []):
        assert load_run(copy).config == expected
        told.clear()
        (copy / "config.yaml").unlink(missing_ok=True)
    assert len(messages) == 3
    forge_state(folder, config=expected.model_dump(mode="json") | {"flow": {"sharpness": 2.0}})
    with pytest.raises(ConfigError, match=r"state\.json: unknown key 'flow\.sharpness'"):
        load_run(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2_000_000},
        {"patch_size": 4},
        {"num_heads": 1, "hidden_size": 64},
    ],
)
def test_weights_are_compared_with_the_config_before_a_model_takes_memory(copy, changes):
    (copy / "config.yaml").unlink()
    config = json.loads((folder_of(copy, 2) / "state.json").read_text())["config"]
    config["model"] |= changes
    forge_state(folder_of(copy, 2), config=config)
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        load_run(copy)
    assert "\n" not in str(refused.value)
