"""Estimators as an evaluation uses them: those that need the picture, and what does not fit the run."""

import json
from dataclasses import replace

import pytest
import torch

from sitdist.config.experiment import Config, EvaluateConfig
from sitdist.config.load import load_yaml, parse
from sitdist.dataset.manifest import CameraFacts
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ConfigError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.estimate import read_pose
from sitdist.flow.solve import invert_exactly
from sitdist.geometry.packing import PoseStatistics
from sitdist.inference.pose_reader import PoseReader, combined
from sitdist.inference.run import load_run
from sitdist.model.codec import latent_mean
from sitdist.train.trainer import train


@pytest.fixture(scope="module")
def run(tiny_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(load_yaml(Config, tiny_yaml), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run)


@pytest.fixture(scope="module")
def views(tiny_dataset):
    """Pictures, moments, labels and intrinsics of four views."""
    reader, four = ShardReader(tiny_dataset, "test"), range(4)
    return (
        reader.images(four),
        reader.moments(four).float(),
        reader.labels()[:4],
        reader.intrinsics(four),
    )


def settings(**values) -> EvaluateConfig:
    return parse(EvaluateConfig, {"generator": "euler", "generator_steps": 2} | values, "settings")


def estimate(loaded, views, **values):
    return PoseReader.open(loaded, settings(**values)).estimate(*views)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"estimator": "one_step"}, {"readout": "look_at"}),
        ({"estimator": "one_step"}, {"estimator": "exact"}),
        ({"estimator": "exact"}, {"estimator": "exact", "generator_steps": 3}),
        ({"estimator": "exact"}, {"estimator": "exact", "generator": "heun"}),
        ({"estimator": "multi_zoom", "zooms": [1.0]}, {"estimator": "multi_zoom", "zooms": [1.5]}),
        (
            {"estimator": "multi_zoom", "zooms": [0.5], "background": [1.0, 0.0, 0.0]},
            {"estimator": "multi_zoom", "zooms": [0.5], "background": [0.0, 0.0, 1.0]},
        ),
    ],
)
def test_every_key_changes_the_poses(loaded, views, one, other):
    first, second = estimate(loaded, views, **one), estimate(loaded, views, **other)
    assert (first.camera_to_world - second.camera_to_world).abs().max() > 1e-6


def test_the_exact_estimator_undoes_the_generator_of_the_settings(loaded, views):
    found = estimate(loaded, views, estimator="exact", generator="midpoint", generator_steps=3)
    x0 = invert_exactly(loaded.model, loaded.interpolant, latent_mean(views[1]), views[2], "midpoint", 3).x0
    torch.testing.assert_close(found.packed_pose, loaded.endpoint.packed_pose(x0.double()))
    guided = estimate(loaded, views, estimator="exact", generator="midpoint", generator_steps=3, guidance=3.0)
    assert (guided.packed_pose - found.packed_pose).abs().max() > 1e-6


def read(loaded, poses, spread=0.1):
    statistics = PoseStatistics.from_dict(loaded.manifest.statistics)
    plain = read_pose(torch.zeros(len(poses), 4, 4, 4), statistics, Endpoint(), torch.ones(len(poses)).long())
    return replace(plain, camera_to_world=poses, spread=torch.full((len(poses), 4, 4), spread).double())


def test_a_zoomed_picture_is_that_of_a_nearer_camera(loaded, views, monkeypatch):
    """A model that sees r / z in a picture zoomed by z is right at every zoom."""
    poses = ShardReader(loaded.config.data, "test").camera_to_world()[:4]
    zooms = [0.5, 1.0, 2.0]
    reader = PoseReader.open(loaded, settings(estimator="multi_zoom", zooms=zooms, background=[0.0, 0.0, 0.0]))

    def seen(zoom):
        moved = poses.clone()
        moved[:, :3, 3] /= zoom
        return read(loaded, moved)

    answers = iter([seen(zoom) for zoom in zooms])
    monkeypatch.setattr(PoseReader, "_of_moments", lambda *_: next(answers))
    found = reader.estimate(*views)
    torch.testing.assert_close(found.camera_to_world, poses)
    assert found.function_evaluations.tolist() == [3] * 4
    assert found.so3_residual.max() < 1e-9


def test_of_several_estimates_the_one_of_a_small_spread_counts_most_and_disagreement_shows(loaded):
    poses = ShardReader(loaded.config.data, "test").camera_to_world()[:8]
    statistics = PoseStatistics.from_dict(loaded.manifest.statistics)
    first, second = read(loaded, poses[:4], 0.1), read(loaded, poses[4:], 0.2)
    found = combined([first, second], statistics, "svd")
    expected = (16.0 * poses[:4, :3, 3] + poses[4:, :3, 3]) / 17.0
    torch.testing.assert_close(found.camera_to_world[:, :3, 3], expected)
    assert found.so3_residual.min() > 1e-3
    alone = combined([first, replace(second, spread=1e3 * second.spread)], statistics, "svd")
    torch.testing.assert_close(alone.camera_to_world, poses[:4], atol=1e-6, rtol=0)


def test_a_generator_without_steps_cannot_be_undone(loaded):
    with pytest.raises(ConfigError, match="dopri5 has no steps of its own"):
        PoseReader.open(loaded, settings(estimator="exact", generator="dopri5"))


def with_cameras(loaded, **facts):
    cameras = CameraFacts(**{"looks_at_origin": True, "upright": True, "same_intrinsics": True} | facts)
    split = loaded.manifest.splits["train"].model_copy(update={"cameras": cameras if facts else None})
    splits = {**loaded.manifest.splits, "train": split}
    return replace(loaded, manifest=loaded.manifest.model_copy(update={"splits": splits}))


def test_cameras_that_do_not_look_at_the_origin_upright_have_no_look_at_readout(loaded):
    PoseReader.open(with_cameras(loaded, upright=False), settings(estimator="multi_zoom", zooms=[1.0]))
    with pytest.raises(ConfigError, match="'look_at': not all training cameras look at the origin upright"):
        PoseReader.open(with_cameras(loaded, upright=False), settings(readout="look_at"))
    with pytest.raises(ConfigError, match="'multi_zoom': a zoom is a camera moved towards the origin only where"):
        PoseReader.open(with_cameras(loaded, looks_at_origin=False), settings(estimator="multi_zoom"))
    with pytest.raises(ConfigError, match="'look_at': the manifest, of an older format, does not say"):
        PoseReader.open(with_cameras(loaded), settings(readout="look_at"))


def test_a_smaller_picture_needs_a_background(loaded):
    with pytest.raises(ConfigError, match=r"zooms = \[0.5\] make pictures smaller.*set evaluate.background"):
        PoseReader.open(loaded, settings(estimator="multi_zoom", zooms=[0.5]))


@pytest.mark.distributed
def test_an_evaluation_says_how_poses_were_read_and_whether_they_converged(run, tmp_path):
    options = EvalOptions(split="test", estimator="exact", readout="look_at", out=tmp_path)
    metrics = json.loads((evaluate(run, options) / "metrics.json").read_text())
    assert (metrics["estimator"], metrics["readout"], metrics["not_converged"]) == ("exact", "look_at", 0)
    assert metrics["function_evaluations"] > 2
