"""Whole evaluations of a hardly trained run on one process: what is measured, over which views, and what is refused."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision
from records import record

from sitdist.build.writer import build
from sitdist.config.experiment import Config, EvaluateConfig
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.errors import CodecError, ConfigError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.evaluate.metrics import LPIPS_NOT_MEASURED
from sitdist.evaluate.report import format_table, write_report
from sitdist.evaluate.statistics import label_rows, summary_rows
from sitdist.flow.estimate import estimate_pose
from sitdist.flow.sample import STOCHASTIC
from sitdist.flow.solve import SOLVERS
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.packing import PoseStatistics
from sitdist.geometry.pose import check_rigid, rotation_error_deg
from sitdist.inference.run import load_run
from sitdist.model.codec import latent_mean
from sitdist.scene.views import open_scene, render
from sitdist.train.trainer import train


def config_on(data: Path, **flow) -> Config:
    values = {
        "flow": flow,
        "name": "tiny",
        "data": str(data),
        "model": {"patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2},
        "train": {"steps": 2, "global_batch": 4, "optimizer": {"lr": 1e-2}, "ema_decay": 0.0},
        "evaluate": {"batch": 2, "generator": "euler", "generator_steps": 2},
    }
    return parse(Config, values, "tiny")


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """The report has its own tests; here only the numbers are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitdist.evaluate.report.write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(config_on(tiny_dataset), folder)
    return folder


@pytest.fixture(scope="module")
def on_split(run):
    return evaluate(run, EvalOptions(split="test"))


def rows(folder):
    with (folder / "records.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_view_of_the_split_has_one_row_with_its_true_and_estimated_pose(run, tiny_dataset, on_split):
    reader, loaded = ShardReader(tiny_dataset, "test"), load_run(run)
    table = rows(on_split)
    assert on_split == run / "eval" / "test"
    assert [row["key"] for row in table] == sorted(reader.keys())
    latents = latent_mean(reader.moments(range(len(reader))).float())
    statistics = PoseStatistics.from_dict(loaded.manifest.statistics)
    poses = estimate_pose(loaded.model, loaded.interpolant, latents, reader.labels(), statistics).camera_to_world
    true = reader.camera_to_world()
    for i, row in enumerate(table):
        for name, expected in (("true", true[i]), ("estimated", poses[i])):
            matrix = torch.eye(4, dtype=torch.float64)
            entries = [float(row[f"{name}_{r}{c}"]) for r in range(3) for c in range(4)]
            matrix[:3] = torch.tensor(entries, dtype=torch.float64).reshape(3, 4)
            check_rigid(matrix, name)
            torch.testing.assert_close(matrix, expected, atol=1e-4, rtol=0)
        angle = rotation_error_deg(poses[i, :3, :3], true[i, :3, :3]).item()
        assert float(row["rotation_error_deg"]) == pytest.approx(angle, abs=1e-2)


def test_the_codec_ceiling_is_what_was_measured_when_the_shards_were_built(tiny_dataset, on_split):
    built = ShardReader(tiny_dataset, "test").codec_psnr().tolist()
    assert [float(row["codec_psnr"]) for row in rows(on_split)] == pytest.approx(built, abs=0.02)


def test_metrics_name_what_was_not_measured_and_over_how_many_views(tiny_dataset, on_split):
    metrics = json.loads((on_split / "metrics.json").read_text())
    table = rows(on_split)
    assert metrics["lpips"] == LPIPS_NOT_MEASURED
    assert {row["lpips"] for row in table} == {""}
    assert metrics["dataset"] == str(tiny_dataset)
    assert metrics["training_radius"] == list(load_manifest(tiny_dataset).splits["train"].radius)
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["training_views"] == {"count": 48, "compared": 48, "stride": 1}
    bins = [row for row in metrics["rows"] if row["radius"][1] - row["radius"][0] == 1]
    assert sum(row["n"] for row in bins) == len(table)
    assert any(row["n"] == len(table) for row in metrics["rows"])
    for row in metrics["rows"]:
        inside = [float(r["psnr"]) for r in table if row["radius"][0] <= float(r["radius"]) <= row["radius"][1]]
        assert row["psnr"]["mean"] == pytest.approx(np.mean(inside))
        assert row["psnr"]["n"] == len(inside) == row["n"]
        assert "lpips" not in row


def test_a_second_start_goes_on_with_the_missing_units_only(run, on_split, monkeypatch):
    before = (on_split / "records.csv").read_text()
    kept, lost = on_split / "units" / "unit_00000.jsonl", on_split / "units" / "unit_00001.jsonl"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    evaluate(run, EvalOptions(split="test"))
    assert (on_split / "records.csv").read_text() == before
    assert kept.stat().st_mtime_ns == stamp


def test_every_solver_of_the_flow_can_generate_the_pictures(run, on_split, tmp_path):
    assert set(get_args(EvaluateConfig.model_fields["generator"].annotation)) == {*SOLVERS, *STOCHASTIC}
    folder = evaluate(run, EvalOptions(split="test", views_per_radius=1, generator="dopri5", out=tmp_path / "out"))
    euler = {row["key"]: float(row["psnr"]) for row in rows(on_split)}
    assert any(abs(float(row["psnr"]) - euler[row["key"]]) > 1e-4 for row in rows(folder))


def test_keys_of_evaluate_are_set_one_by_one(run, on_split, tmp_path):
    folder = evaluate(run, EvalOptions(split="test", set=("evaluate.guidance=3",), out=tmp_path / "out"))
    assert json.loads((folder / "metrics.json").read_text())["guidance"] == 3
    plain = {row["key"]: float(row["psnr"]) for row in rows(on_split)}
    assert any(abs(float(row["psnr"]) - plain[row["key"]]) > 1e-4 for row in rows(folder))
    for override, message in (
        ("train.steps=3", "changes keys of evaluate only"),
        ("evaluate.guidence=3", "did you mean 'guidance'"),
        ("evaluate.generator=euler_maruyama", "flow.endpoint is pose; set evaluate.generator to heun"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(run, EvalOptions(split="test", set=(override,), out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_model_of_the_score_is_trained_and_evaluated_by_an_sde(tiny_dataset, tmp_path):
    flow = {"endpoint": "gaussian", "prediction": "score", "share_at_one": 0.0, "share_at_zero": 0.0}
    train(config_on(tiny_dataset, **flow), tmp_path / "run")
    outs = [
        evaluate(tmp_path / "run", EvalOptions(split="test", generator=name, generator_steps=3, out=tmp_path / name))
        for name in ("euler", "euler_maruyama", "stochastic_heun")
    ]
    psnr = [[float(row["psnr"]) for row in rows(out)] for out in outs]
    assert all(math.isfinite(value) for values in psnr for value in values)
    assert psnr[0] != psnr[1] != psnr[2]


def test_another_evaluation_in_the_same_folder_is_refused_with_both_values(run, on_split):
    with pytest.raises(ConfigError, match="evaluation with seed 0, not 1; give another --out"):
        evaluate(run, EvalOptions(split="test", seed=1))


def test_rendered_views_are_the_first_ones_of_a_larger_evaluation(run, tmp_path):
    few = evaluate(run, EvalOptions(radii=(2, 4), views_per_radius=2, out=tmp_path / "few"))
    more = evaluate(run, EvalOptions(radii=(1, 4), views_per_radius=3, batch=3, out=tmp_path / "more"))
    few_rows, more_rows = rows(few), {row["key"]: row for row in rows(more)}
    assert [row["bin"] for row in few_rows] == ["2", "2", "3", "3"]
    assert len(more_rows) == 9
    for row in few_rows:
        assert int(row["bin"]) <= float(row["radius"]) <= int(row["bin"]) + 1
        for name in ("true_00", "psnr", "rotation_error_deg"):  # same camera, same picture, same noise
            assert float(row[name]) == pytest.approx(float(more_rows[row["key"]][name]), abs=1e-3)
    with np.load(more / "images.npz") as pictures:
        assert pictures["true"].shape == (9, 16, 16, 3)
        assert pictures["bin"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        error = np.abs(pictures["true"].astype(float) - pictures["rendered"]).mean(axis=(1, 2, 3)) / 255
    assert error.tolist() == pytest.approx([float(more_rows[k]["mae"]) for k in pictures_keys(more)], abs=3e-3)


def pictures_keys(folder):
    with np.load(folder / "images.npz") as pictures:
        return pictures["key"].tolist()


def test_radii_and_views_per_radius_limit_a_split(run, on_split, tmp_path):
    folder = evaluate(run, EvalOptions(split="test", radii=(1, 7), views_per_radius=1, out=tmp_path / "out"))
    first = {}
    for row in rows(on_split):
        first.setdefault(row["bin"], row["key"])
    assert len(first) > 1
    assert {row["bin"]: row["key"] for row in rows(folder)} == first


@pytest.mark.distributed
def test_lpips_is_measured_with_a_local_backbone(tmp_path):
    recipe = {
        "name": "larger",
        "image_size": 32,
        "codec": {"kind": "pca", "patch": 4, "fit_views": 8},
        "encode_batch": 4,
        "val_views": 2,
        "splits": {"train": {"kind": "scene", "views": 10}},
    }
    build(parse(Recipe, recipe, "larger"), tmp_path / "data")
    train(config_on(tmp_path / "data"), tmp_path / "run")
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    options = EvalOptions(split="val", lpips_backbone=str(tmp_path / "alexnet.pth"))
    folder = evaluate(tmp_path / "run", options)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["lpips"].startswith("alex ")
    values = [float(row["lpips"]) for row in rows(folder)]
    assert min(values) > 0
    assert metrics["rows"][-1]["lpips"]["mean"] == pytest.approx(np.mean(values))


def test_a_dataset_of_another_codec_is_refused_with_both_values(run, tiny_dataset, tmp_path):
    shutil.copytree(tiny_dataset, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["codec"]["weights_sha256"] = "0" * 64
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    ours = load_run(run).codec.identity()["weights_sha256"]
    with pytest.raises(CodecError, match=f"weights_sha256 {'0' * 64} but the run's is {ours}"):
        evaluate(run, EvalOptions(split="test", data=tmp_path / "data", out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "keeps no pictures"),
        ({"split": "tset"}, "no split 'tset'; it has test, train, val"),
        ({"radii": (5, 3)}, "--radii 5:3: expected A:B"),
        ({"radii": (1, 3)}, "say how many by --views-per-radius"),
        ({"radii": (1, 3), "views_per_radius": 0}, "--views-per-radius 0"),
        ({"estimator": "rk45"}, "estimator = 'rk45'"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(run, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(run, EvalOptions(**options, out=tmp_path))


# ---------------------------------------------------------------------------------- one direction, and other endpoints


@pytest.fixture
def evaluated(tiny_dataset, tmp_path):
    """Train two steps with another endpoint or other times, evaluate a view of every bin; gives metrics and rows."""

    def run(**flow):
        train(config_on(tiny_dataset, **flow), tmp_path / "run")
        folder = evaluate(tmp_path / "run", EvalOptions(split="test", views_per_radius=1))
        return json.loads((folder / "metrics.json").read_text()), rows(folder), folder

    return run


def test_a_regressor_has_pose_errors_and_no_pictures_and_the_table_says_why(evaluated):
    metrics, table, folder = evaluated(share_at_one=1.0, share_at_zero=0.0)
    assert metrics["no_picture"] == "the model was trained at t = 1 alone, as a regressor of the pose"
    assert all(row["rotation_error_deg"] and row["estimated_00"] and not row["psnr"] for row in table)
    assert all("psnr" not in row and "codec_psnr" in row for row in metrics["rows"])
    with np.load(folder / "images.npz") as pictures:
        assert sorted(pictures.files) == ["bin", "key", "true"]
    text = format_table(metrics)
    assert "No picture is rendered: the model was trained at t = 1 alone" in text
    assert "pictures by" not in text
    write_report(folder)
    assert "No picture is rendered" in (folder / "report.html").read_text()
    assert not (folder / "plots" / "psnr.png").exists()


def test_a_regressor_is_not_integrated(run, evaluated, tmp_path):
    evaluated(share_at_one=1.0, share_at_zero=0.0)
    with pytest.raises(ConfigError, match=r"estimator 'euler': the model was trained at t = 1 alone.*one_step"):
        evaluate(tmp_path / "run", EvalOptions(split="test", estimator="euler", out=tmp_path / "out"))


def test_a_model_with_a_gaussian_endpoint_renders_and_reads_no_poses(evaluated):
    metrics, table, folder = evaluated(endpoint="gaussian", share_at_one=0.0)
    assert metrics["no_pose"] == "the gaussian endpoint is noise and holds no pose"
    assert metrics["noise_floor"] is None
    assert all(row["psnr"] and row["nearest_rotation_error_deg"] and not row["rotation_error_deg"] for row in table)
    text = format_table(metrics)
    assert "No pose is read off a picture: the gaussian endpoint is noise and holds no pose." in text
    assert "noise floor" not in text
    assert "poses by" not in text
    write_report(folder)
    assert not (folder / "plots" / "cameras.png").exists()
    assert (folder / "plots" / "psnr.png").exists()


def test_pictures_of_a_gaussian_endpoint_depend_on_the_pose_that_they_are_conditioned_on(tiny_dataset, tmp_path):
    train(config_on(tiny_dataset, endpoint="gaussian"), tmp_path)
    loaded = load_run(tmp_path)
    noise = torch.randn(1, 4, 4, 4).expand(2, -1, -1, -1)
    poses = torch.randn(2, 4, 4)
    model = loaded.endpoint.conditioned(loaded.model, poses)
    out = model(noise, torch.full((2,), 0.5), torch.zeros(2).long())
    assert (out[0] - out[1]).abs().max() > 1e-6


def test_the_noise_floor_is_that_of_sigma_over_the_gain(evaluated, on_split):
    floor = evaluated(gain=10.0, sigma=1.0, layout="interleaved")[0]["noise_floor"]
    plain = json.loads((on_split / "metrics.json").read_text())["noise_floor"]  # of sigma 0.1
    assert floor["translation"] == pytest.approx(plain["translation"], rel=0.05)


def test_new_views_of_a_fitted_scene_are_rendered_where_the_dataset_came_from_one(ball_scene, tmp_path):
    recipe = {
        "name": "ball",
        "image_size": 16,
        "codec": {"kind": "pca", "fit_views": 8},
        "val_views": 3,
        "splits": {"train": {"kind": "scene", "scene": str(ball_scene), "views": 10, "supersample": 1}},
    }
    build(parse(Recipe, recipe, "ball"), tmp_path / "data")
    train(config_on(tmp_path / "data"), tmp_path / "run")
    options = {"radii": (2, 4), "views_per_radius": 1, "max_views": 2}
    folder = evaluate(tmp_path / "run", EvalOptions(**options))
    assert evaluate(tmp_path / "run", EvalOptions(**options, experiment="turntable")) == folder
    scene = open_scene(str(ball_scene))
    camera = Intrinsics.from_fov(40.0, 16, 16)
    with np.load(folder / "images.npz") as pictures:
        shown = dict(zip(pictures["key"].tolist(), pictures["true"], strict=True))
    assert len(shown) == len(rows(folder)) == 2
    for row in rows(folder):
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3] = torch.tensor([[float(row[f"true_{i}{j}"]) for j in range(4)] for i in range(3)])
        picture = 255.0 * render(scene, pose, camera, 1, None).permute(1, 2, 0).numpy()
        assert np.ptp(picture[..., 0]) > 50  # a grey ball on white, and not the chair
        np.testing.assert_allclose(picture[..., 0], picture[..., 1])
        np.testing.assert_allclose(shown[row["key"]], picture, atol=0.51)
    assert json.loads((folder / "turntable" / "results.json").read_text())["gif"] == "true | rendered"


def test_the_focal_length_is_estimated_where_the_dataset_packs_it(tmp_path):
    recipe = {
        "name": "zoom",
        "image_size": 16,
        "packing": "intrinsics",
        "codec": {"kind": "pca", "fit_views": 8},
        "val_views": 3,
        "splits": {"train": {"kind": "scene", "views": 10, "supersample": 1, "fov_range_deg": [20.0, 60.0]}},
    }
    build(parse(Recipe, recipe, "zoom"), tmp_path / "data")
    train(config_on(tmp_path / "data"), tmp_path / "run")
    folder = evaluate(tmp_path / "run", EvalOptions(split="val"))
    loaded, reader = load_run(tmp_path / "run"), ShardReader(tmp_path / "data", "val")
    statistics = PoseStatistics.from_dict(loaded.manifest.statistics)
    latents = latent_mean(reader.moments(range(3)).float())
    estimate = estimate_pose(loaded.model, loaded.interpolant, latents, reader.labels(), statistics)
    expected = 100 * (estimate.intrinsics[:, 0] / reader.intrinsics(range(3))[:, 0] - 1).abs()
    assert [float(row["focal_error"]) for row in rows(folder)] == pytest.approx(expected.tolist(), rel=1e-2)
    text = format_table(json.loads((folder / "metrics.json").read_text()))
    assert "focal error (%)" in text


def test_the_turntable_has_the_field_of_view_of_the_training(tmp_path):
    source = {"kind": "scene", "views": 9, "supersample": 1, "fov_range_deg": [20.0, 60.0]}
    recipe = {"name": "zoom", "image_size": 16, "codec": {"kind": "pca", "fit_views": 8}, "val_views": 3}
    recipe |= {"packing": "intrinsics", "splits": {"train": source}}
    build(parse(Recipe, recipe, "zoom"), tmp_path / "data")
    train(config_on(tmp_path / "data"), tmp_path / "run")
    folder = evaluate(tmp_path / "run", EvalOptions(split="val", experiment="turntable", max_views=1)) / "turntable"
    reader = ShardReader(tmp_path / "data", "train")
    fx, fy, cx, cy = (16 * reader.intrinsics(range(len(reader))).median(0).values).tolist()
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.tensor(json.loads(rows(folder)[0]["true"])).reshape(3, 4)
    picture = 255.0 * render(open_scene(None), pose, Intrinsics(fx, fy, cx, cy, 16, 16), 1, None).permute(1, 2, 0)
    with np.load(folder / "units" / "turntable_00000.npz") as arrays:
        np.testing.assert_allclose(arrays["true"][0], picture.numpy(), atol=0.51)


def test_rows_of_the_table_hold_exactly_the_views_they_name():
    records = [record(f"v{i}", radius=radius, bin=int(radius)) for i, radius in enumerate([1.5, 3.5, 4.0, 4.5, 6.2])]
    records.append(record("edge", radius=5.0, bin=5))
    names = [(row["name"], row["n"]) for row in summary_rows(records)]
    assert names == [
        *(("r in [1, 2)", 1), ("r in [3, 4)", 1), ("r in [4, 5)", 2), ("r in [5, 6)", 1), ("r in [6, 7]", 1)),
        ("r in [3, 5]", 4),  # the view at radius 5 too
        ("r in [1, 7]", 6),  # all of them; no view has a radius in [2, 3), so it is not the range's own row
    ]
    inside = [replace(value, rotation_error_deg=angle) for value, angle in zip(records[1:4], (2, 4, 9), strict=True)]
    row = next(row for row in summary_rows(inside) if row["radius"] == [3, 5])
    summary = row["rotation_error_deg"]
    assert (summary["mean"], summary["median"], summary["n"]) == (5.0, 4.0, 3)
    assert summary["share_under_5_deg"] == pytest.approx(2 / 3)
    assert row["translation_share"]["mean"] == pytest.approx(np.mean([1 / 3.5, 1 / 4.0, 1 / 4.5]))


def test_several_objects_have_rows_of_their_own_with_their_names():
    records = [record(f"v{i}", label=i % 2, rotation_error_deg=float(i)) for i in range(4)]
    rows_ = label_rows(records, {0: "chair", 1: "table"})
    assert [(row["name"], row["n"], row["rotation_error_deg"]["mean"]) for row in rows_] == [
        ("chair", 2, 1.0),
        ("table", 2, 2.0),
    ]
    assert label_rows(records[::2], {0: "chair"}) == []


def test_the_object_of_a_split_is_told_from_its_background(on_split):
    metrics = json.loads((on_split / "metrics.json").read_text())
    assert metrics["background"] == pytest.approx([0.5] * 3, abs=0.01)
    row = metrics["rows"][-1]
    assert row["object_psnr"]["mean"] < row["psnr"]["mean"]
