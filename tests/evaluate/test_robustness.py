"""Changed views and photos: what is read off them, and that nothing but the named change is made."""

import json

import numpy as np
import pytest
import torch

import sitdist
from sitdist.cli.main import run as command
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.dataset.manifest import load_manifest
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.evaluate.experiments.records import EXPERIMENTS
from sitdist.evaluate.experiments.robustness import CAMERA_CHANGES, PICTURE_CHANGES, VIEW_CHANGES
from sitdist.evaluate.measures import RECORD, read_records
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.pose import rotation_error_deg
from sitdist.scene.field import chair
from sitdist.scene.views import render
from sitdist.train.trainer import train


@pytest.fixture(scope="module")
def run(views_dataset, tiny_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "run"
    train(load_yaml(Config, tiny_yaml, [f"data={views_dataset}", "appearance={}"]), folder)
    return folder


@pytest.mark.parametrize(
    ("change", "neutral"), [("brightness", 1.0), ("gamma", 1.0), ("contrast", 1.0), ("warmth", 0.0), ("noise", 0.0)]
)
def test_a_change_of_neutral_strength_changes_nothing(change, neutral):
    pictures = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(PICTURE_CHANGES[change][0](pictures, neutral), pictures)


def test_blur_keeps_the_mean_and_occluders_hide_the_share_that_they_say():
    pictures = torch.zeros(2, 3, 64, 64)
    pictures[:, :, 32, 32] = 1.0
    blurred = PICTURE_CHANGES["blur"][0](pictures, 2.0)
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(2, 3))
    x = torch.arange(64) - 32.0
    assert (blurred[0, 0].sum(0) * x.square()).sum().sqrt() == pytest.approx(2.0, rel=0.02)
    hidden = PICTURE_CHANGES["occluder"][0](torch.full((2, 3, 64, 64), -1.0), 0.25)
    assert (hidden[0, 0] >= 0).sum() == 16 * 16


def test_every_change_is_measured_and_none_is_what_the_views_give(run, tmp_path):
    evaluate(run, EvalOptions(experiment="robustness", max_views=6, out=tmp_path / "all"))
    rows = json.loads((tmp_path / "all" / "robustness" / "results.json").read_text())["rows"]
    changes = {name: len(values) for name, (_, values) in (PICTURE_CHANGES | VIEW_CHANGES).items()}
    changes |= {name: len(values) for name, values in CAMERA_CHANGES.items()} | {"none": 1}
    assert {name: sum(row["change"] == name for row in rows) for name in changes} == changes
    assert len(rows) == sum(changes.values())
    found = read_records(tmp_path / "all" / "robustness" / "records.csv", EXPERIMENTS["robustness"].schema)
    plain = {record.key.partition("_")[2].partition("_")[2]: record for record in found if record.change == "none"}
    evaluate(run, EvalOptions(out=tmp_path / "views"))
    views = {record.key: record for record in read_records(tmp_path / "views" / "records.csv", RECORD)}
    for key, record in plain.items():
        assert record.rotation_error_deg == pytest.approx(views[key].rotation_error_deg, abs=0.5)  # 8-bit pictures


def test_photos_are_read_as_python_reads_them(run, views_dataset, tmp_path, capsys):
    camera = Intrinsics.from_fov(50.0, 24, 24)  # the training pictures show 40 degrees in 16 pixels
    poses = sitdist.load(run).turntable(5)
    pictures = torch.stack([render(chair(), pose, camera, 2) for pose in poses])
    photos = tmp_path / "photos.npz"
    np.savez(photos, images=pictures.permute(0, 2, 3, 1).numpy(), poses=poses.numpy(), focal=camera.fx)
    assert command(["eval", str(run), "--photos", str(photos), "--out", str(tmp_path / "out")]) == 0
    assert "on photos of" in capsys.readouterr().out
    records = read_records(tmp_path / "out" / "records.csv", RECORD)
    estimate = sitdist.load(run).estimate(list(pictures), camera)
    expected = rotation_error_deg(estimate.camera_to_world[:, :3, :3], poses[:, :3, :3])
    assert [record.rotation_error_deg for record in records] == pytest.approx(expected.tolist(), abs=1e-3)
    assert command(["eval", str(run), "--photos", str(photos), "--split", "test"]) == 2
    assert "leave --split and --radii out" in capsys.readouterr().err
    assert load_manifest(views_dataset).keeps_views
