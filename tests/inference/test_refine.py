"""A scene makes estimates exact, in an evaluation, in Python and on the command line; what it cannot do is said."""

import json
from dataclasses import replace

import pytest
import torch

import sitdist
from sitdist.cli import main as cli
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.flow.estimate import PoseEstimate
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.inference import refine as refinement
from sitdist.inference.refine import SceneRefiner
from sitdist.scene import refine
from sitdist.scene.refine import moved_camera
from sitdist.scene.store import write_png


@pytest.fixture(scope="module")
def flow(tiny_run):
    return sitdist.load(tiny_run)


@pytest.fixture(scope="module")
def views(tiny_dataset):
    """Pictures, intrinsics and poses of four held-out views inside the training radii."""
    reader = ShardReader(tiny_dataset, "test")
    radius = reader.camera_to_world()[:, :3, 3].norm(dim=1)
    chosen = ((radius > 2.5) & (radius < 5.0)).nonzero()[:4, 0].tolist()
    return reader.images(chosen), reader.intrinsics(chosen), reader.camera_to_world()[chosen]


def estimate_near(poses, offset) -> PoseEstimate:
    """An estimate that misses the poses by turns about the object (x, y, z; radians), and by log distance."""
    count, parameters = len(poses), torch.tensor([*offset, 0.0, 0.0], dtype=torch.float64)
    return PoseEstimate(
        camera_to_world=torch.stack([moved_camera(pose, parameters) for pose in poses]),
        packed_pose=torch.zeros(count, 4, 4),
        function_evaluations=torch.ones(count, dtype=torch.int64),
        spread=torch.zeros(count, 4, 4),
        so3_residual=torch.zeros(count),
        converged=torch.ones(count, dtype=torch.bool),
        trust=torch.full((count,), 0.5),
        rotation_bars_deg=torch.ones(count, 2),
        translation_bars=torch.ones(count, 2),
    )


def test_the_scene_of_the_pictures_makes_their_poses_exact(flow, views):
    images, intrinsics, true = views
    estimate = estimate_near(true, [0.05, -0.04, 0.02, 0.04])
    refined = SceneRefiner.open("built-in", flow.run.manifest).refine(estimate, images, intrinsics)
    before = rotation_error_deg(estimate.camera_to_world[:, :3, :3], true[:, :3, :3])
    after = rotation_error_deg(refined.camera_to_world[:, :3, :3], true[:, :3, :3])
    assert float(before.min()) > 2.0
    assert float(after.max()) < 1.0
    assert float(translation_error(refined.camera_to_world, true).max()) < 0.08
    assert bool(refined.converged.all())
    assert float(refined.picture_error.max()) < 0.06
    assert (refined.rotation_std_deg < 1.0).all()
    assert torch.equal(refined.trust, estimate.trust)
    assert refined.rotation_bars_deg is None  # those were of the pose before


def test_pictures_of_another_object_are_flagged(flow, views, ball_scene, monkeypatch):
    said = []
    monkeypatch.setattr(refine, "OTHER_STARTS", ())  # the first start shows it, and the others take seconds
    monkeypatch.setattr(refinement.log, "warning", lambda message, *values: said.append(message % values))
    images, intrinsics, true = views
    refiner = SceneRefiner.open(str(ball_scene), flow.run.manifest)
    refined = refiner.refine(estimate_near(true, [0.02, 0.02, 0.0, 0.02]), images, intrinsics)
    assert not refined.converged.any()
    assert said == [
        f"{ball_scene}: looks like 0 of {len(images)} pictures only; is it the scene of these pictures, and in the "
        "dataset's frame?"
    ]
    assert refiner.fingerprint() != SceneRefiner.open("built-in", flow.run.manifest).fingerprint()


def test_intrinsics_are_read_off_the_picture_only_where_they_are_not_known(flow, views, monkeypatch):
    monkeypatch.setattr(refine, "OTHER_STARTS", ())
    images, intrinsics, true = (each[:2] for each in views)
    estimate = estimate_near(true, [0.02, 0.02, 0.0, 0.02])
    refiner = SceneRefiner.open("built-in", flow.run.manifest)
    wrong = replace(estimate, intrinsics=1.2 * intrinsics.double())
    known = refiner.refine(wrong, images, intrinsics)
    torch.testing.assert_close(known.camera_to_world, refiner.refine(estimate, images, intrinsics).camera_to_world)
    torch.testing.assert_close(known.intrinsics, intrinsics.double())
    unknown = intrinsics.clone()
    unknown[:, :2] = float("nan")
    near = torch.cat([1.03 * intrinsics[:, :2], intrinsics[:, 2:]], dim=1).double()
    found = refiner.refine(replace(estimate, intrinsics=near), images, unknown).intrinsics
    assert ((found / intrinsics - 1.0).abs()[:, 0] < 0.1).all()


@pytest.mark.distributed
def test_an_evaluation_in_python_and_on_the_command_line_refine_alike(
    flow, tiny_run, tiny_dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(refine, "OTHER_STARTS", ())
    options = EvalOptions(split="test", max_views=1, out=tmp_path / "eval", refine="built-in")
    metrics = json.loads((evaluate(tiny_run, options) / "metrics.json").read_text())
    assert metrics["refine"] == "built-in"
    assert metrics["why_uncalibrated"] == "they are of the estimate before it is refined"
    reader = ShardReader(tiny_dataset, "test")
    pictures = reader.images([0])
    with_scene = flow.estimate(pictures, scene="built-in")
    plain = flow.estimate(pictures)
    assert with_scene.picture_error is not None
    assert plain.picture_error is None
    write_png(pictures[0], tmp_path / "0.png")
    assert cli.run(["pose", str(tiny_run), str(tmp_path / "0.png"), "--refine", "built-in"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["picture_error"] == pytest.approx(float(with_scene.picture_error[0]), abs=1e-3)
    with pytest.raises(ConfigError, match="holds an evaluation with refine built-in, not None"):
        evaluate(tiny_run, replace(options, refine=None))


def test_several_zooms_in_python_and_on_the_command_line(flow, tiny_run, tiny_dataset, tmp_path, capsys):
    pictures = ShardReader(tiny_dataset, "test").images([0, 1])
    zoomed = flow.estimate(pictures, zooms=flow.zooms)
    assert zoomed.function_evaluations.tolist() == [5, 5]
    assert torch.equal(flow.estimate(pictures, zooms=[1.0]).function_evaluations, torch.tensor([1, 1]))
    with pytest.raises(ConfigError, match=r"zooms \[0.0\]: give one or more, from"):
        flow.estimate(pictures, zooms=[0.0])
    write_png(pictures[0], tmp_path / "0.png")
    assert cli.run(["pose", str(tiny_run), str(tmp_path / "0.png"), "--estimator", "multi_zoom"]) == 0
    printed = torch.tensor(json.loads(capsys.readouterr().out)["camera_to_world"])
    assert torch.allclose(printed.double(), zoomed.camera_to_world[0], atol=0.05)


def test_what_cannot_be_refined_is_said(flow, tmp_path):
    manifest = flow.run.manifest
    with pytest.raises(DataError, match=r"scene.json: no such file; make a scene with `sitdist scene fit`"):
        SceneRefiner.open(str(tmp_path), manifest)
    two = manifest.model_copy(update={"objects": [*manifest.objects, manifest.objects[0]]})
    with pytest.raises(ConfigError, match="refine 'built-in': a scene shows one object and the model knows 2"):
        SceneRefiner.open("built-in", two)
