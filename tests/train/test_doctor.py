"""The doctor finds what would stop a run, says what it will do, and exits with 2 if anything is wrong."""

import re
import shutil

import pytest
import torch

from sitdist.cli import main as cli
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.dataset.manifest import load_manifest
from sitdist.runs.build import build_model
from sitdist.runs.checkpoint import folder_of
from sitdist.train import doctor as doctor_module
from sitdist.train.doctor import doctor
from sitdist.train.memory import checkpoint_bytes, memory_estimate
from sitdist.train.trainer import train


def test_a_sound_run_is_told_with_its_measured_speed(tiny_yaml, tmp_path, capsys):
    assert cli.run(["doctor", str(tiny_yaml), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "No problems found." in said
    assert re.search(r"dataset +tiny: 48 training samples of 4x4x4, each seen 1\.5 times", said)
    seconds = float(re.search(r"a step +([0-9.]+) s", said)[1])
    assert 0.0 < seconds < 60.0
    assert "an epoch      4.0 steps" in said
    assert not (tmp_path / "run").exists()


def problems(path, *overrides, launch=None, out="runs"):
    return doctor(path, list(overrides), launch, out if not isinstance(out, str) else path.parent / out).wrong


@pytest.fixture
def no_steps(monkeypatch):
    monkeypatch.setattr(doctor_module, "_measure_steps", lambda *_: None)


def test_a_wrong_config_or_dataset_or_model_is_found_and_is_exit_code_2(tiny_yaml, tmp_path, no_steps, capsys):
    assert "unknown key 'train.stepz'" in problems(tiny_yaml, "train.stepz=3")[0]
    assert problems(tiny_yaml, f"data={tmp_path}")[0].startswith("dataset ")
    assert problems(tiny_yaml, "model.patch_size=3")[0].startswith("model ")
    assert cli.run(["doctor", str(tiny_yaml), "--set", "model.patch_size=3"]) == 2
    assert "1 wrong:\nmodel " in capsys.readouterr().out


def test_a_batch_that_the_launch_files_processes_cannot_share_is_found(tiny_yaml, tmp_path, no_steps):
    launch = tmp_path / "launch.yaml"
    launch.write_text("num_processes: 5\n")
    (found,) = problems(tiny_yaml, launch=launch)
    assert "global_batch = 12: cannot be divided by 5 processes; set it to 10 or 15" in found
    launch.write_text("num_processes: 4\n")
    assert problems(tiny_yaml, launch=launch) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "holds list, not a mapping"),
        ("a: 1\n", "num_processes None: expected a whole number from 1"),
        ("num_processes: [2]\n", r"num_processes \[2\]: expected a whole number"),
        ("num_processes: 2\nnum_machines: many\n", "num_machines 'many': expected a whole number"),
        ("num_processes: 2\ndistributed_type: FSDP\nfsdp_config: 3\n", "fsdp_config 3: expected a mapping"),
        ("num_processes: 2\ndistributed_type: FSDP\nfsdp_config: {1: 2}\n", "FSDP_VERSION = 1: not supported"),
        ("num_processes: !!python/object:os.system x\n", "tags, anchors and aliases are not read"),
        ("[" * 10_000, "nested too deeply"),
    ],
)
def test_a_launch_file_that_is_none_is_one_problem(tiny_yaml, tmp_path, no_steps, text, message):
    launch = tmp_path / "launch\n.yaml"
    launch.write_text(text)
    (found,) = problems(tiny_yaml, launch=launch)
    assert found.startswith("launch ")
    assert re.search(message, found)
    assert "\n" not in found


def test_a_full_disk_and_too_little_memory_are_found_with_their_remedies(tiny_yaml, no_steps, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda _: usage._replace(free=100))
    (found,) = problems(tiny_yaml)
    assert found.startswith("disk ")
    assert "free space, or lower train.keep_checkpoints" in found
    monkeypatch.undo()
    monkeypatch.setattr(doctor_module.os, "sysconf", lambda name: 1)
    monkeypatch.setattr(doctor_module, "_measure_steps", lambda *_: pytest.fail("a step was taken"))
    (found,) = problems(tiny_yaml)
    assert found.startswith("memory ")
    assert "set train.max_batch_per_device lower" in found


def test_missing_compilers_trackers_and_validation_views_are_found(tiny_yaml, no_steps, monkeypatch):
    monkeypatch.setattr(doctor_module.shutil, "which", lambda _: None)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    found = problems(tiny_yaml, "train.compile=blocks", "train.tracker=wandb")
    assert [line.split()[0] for line in found] == ["compile", "tracker"]
    assert "install g++, or set train.compile: off" in found[0]
    monkeypatch.undo()


@pytest.mark.parametrize(
    "overrides", [(), ("train.optimizer.kind=sgd",), ("train.averages={sigma_rels: [0.05, 0.1]}",)]
)
def test_the_bytes_of_a_checkpoint_are_those_that_a_run_writes(tiny_yaml, tmp_path, overrides):
    config = load_yaml(Config, tiny_yaml, ["train.steps=1", *overrides])
    train(config, tmp_path)
    files = [*folder_of(tmp_path, 1).glob("*.safetensors"), *tmp_path.glob("averages/*")]
    written = sum(path.stat().st_size for path in files)
    manifest = load_manifest(config.data)
    with torch.device("meta"):
        model = build_model(config.model, manifest)
    assert written == pytest.approx(checkpoint_bytes(config, model), rel=0.15)  # names take a part of so small a file
    more = memory_estimate(config, model, 100) - memory_estimate(config, model, 10)
    assert more == pytest.approx(90 * 4 * 32 * 2 * 34 * 2, abs=1)  # samples, tokens, channels, blocks, bytes
