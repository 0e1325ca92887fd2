"""Quickstart goes from photos to a model by real commands, and a second start does nothing again."""

import json

import numpy as np
import pytest
import torch

import sitdist
from sitdist.cli import quickstart
from sitdist.cli.main import run as command
from sitdist.geometry.camera import Intrinsics, full_turn, orbit
from sitdist.scene.field import chair
from sitdist.scene.fit import FitOptions
from sitdist.scene.views import look


@pytest.fixture
def photos(tmp_path):
    """24 pictures of the built-in object on black, from two circles."""
    camera = Intrinsics.from_fov(40.0, 40, 40)
    poses = torch.cat([orbit(full_turn(12), elevation, 4.0) for elevation in (15.0, 50.0)])
    images = torch.stack([look(chair(), pose, camera, 2).light for pose in poses])
    np.savez(tmp_path / "photos.npz", images=images.numpy(), poses=poses.numpy(), focal=camera.fx)
    return tmp_path / "photos.npz"


@pytest.mark.distributed  # it takes half a minute
def test_photos_become_a_measured_and_exported_model_and_nothing_is_done_twice(photos, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(FitOptions, "resolutions", (24,))
    monkeypatch.setattr(FitOptions, "steps", (60,))
    monkeypatch.setattr(quickstart, "VIEWS", (300, 300))
    monkeypatch.setattr(quickstart, "STEPS", (6, 6))
    words = ["quickstart", str(photos), "--out", str(tmp_path / "all"), "--size", "16", "--minutes", "1"]
    assert command([*words, "--hold-out", "6"]) == 0
    out = tmp_path / "all"
    assert "plan: photos, then scene" in caplog.text
    assert len(json.loads((out / "photos/test.json").read_text())["frames"]) == 4
    metrics = json.loads((out / "eval/metrics.json").read_text())
    assert metrics["rows"][-1]["n"] == 4
    assert metrics["calibration"] is not None
    assert json.loads((out / "refined/metrics.json").read_text())["refine"] == str(out / "photos/scene")
    assert (out / "robustness/robustness/results.json").is_file()
    assert sitdist.load(out / "model").estimate([torch.rand(3, 16, 16)]).camera_to_world.shape == (1, 4, 4)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert command([*words, "--hold-out", "6"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_step_that_fails_ends_the_quickstart_with_its_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert command(["quickstart", str(tmp_path / "empty"), "--out", str(tmp_path / "all")]) == 2
    assert "neither a transforms.json, a COLMAP model, a folder of pictures nor a video" in capsys.readouterr().err
    assert not (tmp_path / "all" / "photos").exists()
