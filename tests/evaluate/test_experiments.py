"""Experiments on a hardly trained run: what is measured, over how many views, and that it is what it is called."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sitdist.cli import main as cli
from sitdist.config.experiment import Config
from sitdist.config.load import parse
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.evaluate.experiments.paths import between
from sitdist.evaluate.experiments.records import EXPERIMENTS, format_experiments
from sitdist.geometry.camera import camera_radius, look_at
from sitdist.geometry.pose import rotation_error_deg
from sitdist.io.video import ffmpeg
from sitdist.train.trainer import train


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """The report has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitdist.evaluate.report.write_report", lambda folder: folder / "report.html")
        yield


def make_run(data, folder, **flow):
    values = {
        "name": "tiny",
        "data": str(data),
        "flow": flow,
        "model": {"patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2},
        "train": {"steps": 2, "global_batch": 4, "optimizer": {"lr": 1e-2}, "ema_decay": 0.0},
        "evaluate": {"batch": 4, "generator": "euler", "generator_steps": 2},
    }
    train(parse(Config, values, "tiny"), folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    return make_run(tiny_dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def every(run):
    """All experiments with at most 18 views each; never write into it."""
    return evaluate(run, EvalOptions(experiment="all", max_views=18))


def result(folder, name):
    return json.loads((folder / name / "results.json").read_text())


def records(folder, name):
    with (folder / name / "records.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.distributed
def test_all_experiments_leave_their_results_beside_those_of_the_radii(every):
    assert (every / "metrics.json").is_file()
    assert {path.parent.name for path in every.glob("*/results.json")} == set(EXPERIMENTS)
    text = format_experiments(every)
    assert all(word in text for word in ("Turntable", "Interpolation", "Cycle", "Solvers", "function evaluations"))


def test_the_turntable_is_a_closed_circle_and_a_loop_of_true_beside_rendered(every):
    poses = [np.array(json.loads(row["true"])).reshape(3, 4) for row in records(every, "turntable")]
    places = np.array([pose[:, 3] for pose in poses])
    assert len(places) == 18
    gaps = np.linalg.norm(places - np.roll(places, 1, axis=0), axis=1)
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)  # the last is as near to the first as any two neighbours
    np.testing.assert_allclose(places[:, 2], places[0, 2])
    found = result(every, "turntable")
    assert found["gif"] == "true | rendered"
    assert found["rotation_error_deg"]["n"] == found["psnr"]["n"] == 18
    with Image.open(every / "turntable" / "turntable.gif") as gif:
        assert gif.n_frames == 18
        assert gif.size == (32, 16)
        assert gif.info["loop"] == 0
    assert (every / "turntable" / "turntable.mp4").is_file() == bool(ffmpeg())
    for row in records(every, "turntable"):
        assert json.loads(row["estimated"]) != json.loads(row["rendered_estimated"])


def test_the_turntable_is_written_as_mp4_where_ffmpeg_is_installed(run, tmp_path, monkeypatch):
    """With a stand-in for ffmpeg that keeps the raw frames that it is given."""
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor last; do :; done\nexec cat > "$last"\n')
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = evaluate(run, EvalOptions(experiment="turntable", max_views=2, out=tmp_path / "out"))
    assert (folder / "turntable" / "turntable.mp4").stat().st_size == 2 * 16 * 32 * 3


def test_an_interpolation_goes_from_one_camera_to_the_other_by_both_ways(every):
    found, rows = result(every, "interpolation"), records(every, "interpolation")
    assert [row["method"] for row in found["rows"]] == ["slerp", "blend"]
    assert len(rows) == 2 * 9
    assert found["rows"][0]["psnr_to_last"]["n"] == 8
    for row in found["rows"]:
        smallest = min(float(r["psnr_to_last"]) for r in rows if r["method"] == row["method"] and r["psnr_to_last"])
        assert row["worst_psnr_to_last"] == pytest.approx(smallest)
    with np.load(every / "interpolation" / "strips.npz") as strips:
        assert strips["pair000_slerp"].shape == (16, 9 * 16, 3)
        assert (strips["pair000_slerp"] != strips["pair000_blend"]).any()


def test_between_keeps_radius_and_angle_even_and_looks_at_the_origin():
    ends = look_at(torch.tensor([[2.0, 0.0, 1.0], [0.0, 4.0, 1.5]]))
    way = between(ends[0], ends[1], 5)
    torch.testing.assert_close(way[[0, -1]], ends)
    radii = camera_radius(way)
    torch.testing.assert_close(radii, torch.linspace(float(radii[0]), float(radii[-1]), 5, dtype=torch.float64))
    direction = way[:, :3, 3] / radii[:, None]
    angles = torch.acos((direction[1:] * direction[:-1]).sum(-1))
    torch.testing.assert_close(angles, angles[0].expand(4))
    torch.testing.assert_close(way[:, :3, 2], direction)


def test_between_opposite_cameras_and_rolled_ones_stays_rigid():
    ends = look_at(torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]))
    way = between(ends[0], ends[1], 3)
    assert camera_radius(way) == pytest.approx(2.0)
    turned = ends[1].clone()
    turned[:3, :2] = -turned[:3, :2]  # rolled by half a turn: no longer upright
    way = between(ends[0], turned, 3)
    torch.testing.assert_close(way[-1], turned)
    identity = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    torch.testing.assert_close(way[:, :3, :3] @ way[:, :3, :3].mT, identity)
    half = rotation_error_deg(way[0, :3, :3], way[1, :3, :3])
    assert half == pytest.approx(float(rotation_error_deg(way[1, :3, :3], way[2, :3, :3])), abs=1e-6)


def test_a_cycle_has_every_view_in_every_turn_and_begins_at_the_true_pose(every):
    rows = records(every, "cycle")
    assert len(rows) == 12 * 4
    assert [row["n"] for row in (each["rotation_drift_deg"] for each in result(every, "cycle")["rows"])] == [12] * 4
    for row in rows:
        if row["turn"] == "1":
            assert row["rotation_drift_deg"] == row["rotation_step_deg"]
            assert row["psnr"] == row["psnr_to_last"]


def test_solvers_have_their_function_evaluations_errors_and_times(every):
    rows = result(every, "solvers")["rows"]
    assert {(row["task"], row["solver"]) for row in rows} == {
        ("pose", "one_step"),
        *((task, solver) for task in ("pose", "picture") for solver in ("euler", "midpoint", "heun")),
    }
    assert all(("psnr" in row) == (row["task"] == "picture") and row["ms"]["mean"] > 0 for row in rows)
    by_setting = {(row["task"], row["solver"], row["steps"]): row for row in rows}
    assert by_setting["picture", "heun", 10]["function_evaluations"] == 20
    few, many = (by_setting["picture", "euler", steps]["psnr"]["mean"] for steps in (2, 50))
    assert few != many


def test_max_views_bounds_every_experiment(run, tmp_path):
    folder = evaluate(run, EvalOptions(experiment="all", max_views=2, out=tmp_path / "out"))
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert max(row["n"] for row in rows) == 2
    assert result(folder, "turntable")["n"] == result(folder, "cycle")["n"] == result(folder, "solvers")["n"] == 2
    assert result(folder, "interpolation")["pairs"] == 1


def test_an_experiment_alone_is_started_again_where_it_stopped(run, tmp_path):
    options = EvalOptions(experiment="cycle", max_views=5, out=tmp_path)
    evaluate(run, options)
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == []
    before = (tmp_path / "cycle" / "records.csv").read_text()
    (tmp_path / "cycle" / "units" / "cycle_00000.jsonl").unlink()
    kept = (tmp_path / "cycle" / "units" / "cycle_00004.jsonl").stat().st_mtime_ns
    evaluate(run, options)
    assert (tmp_path / "cycle" / "records.csv").read_text() == before
    assert (tmp_path / "cycle" / "units" / "cycle_00004.jsonl").stat().st_mtime_ns == kept


def test_experiments_of_different_settings_do_not_share_a_folder(run, tmp_path, capsys):
    evaluate(run, EvalOptions(experiment="turntable", max_views=2, out=tmp_path))
    command = ["eval", str(run), "--out", str(tmp_path), "--max-views", "2", "--seed", "3"]
    for experiment in ("cycle", "radii"):
        assert cli.run([*command, "--experiment", experiment]) == 2
        message = f"{tmp_path / 'turntable'}: holds an evaluation with seed 0, not 3; give another --out"
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"turntable"}


def test_what_a_regressor_cannot_do_is_left_out_or_refused(tiny_dataset, tmp_path, capsys):
    make_run(tiny_dataset, tmp_path / "run", share_at_one=1.0, share_at_zero=0.0)
    options = ["eval", str(tmp_path / "run"), "--max-views", "2", "--out", str(tmp_path / "out")]
    assert cli.run([*options, "--experiment", "cycle"]) == 2
    assert "--experiment cycle: the model was trained at t = 1 alone" in capsys.readouterr().err
    folder = evaluate(tmp_path / "run", EvalOptions(experiment="all", max_views=2, out=tmp_path / "out"))
    assert {path.parent.name for path in folder.glob("*/results.json")} == {"robustness", "solvers", "turntable"}
    assert result(folder, "turntable")["gif"] == "true"
    assert [row["solver"] for row in result(folder, "solvers")["rows"]] == ["one_step"]


def test_a_gaussian_endpoint_renders_and_has_no_blend(tiny_dataset, tmp_path):
    make_run(tiny_dataset, tmp_path / "run", endpoint="gaussian", share_at_one=0.0)
    folder = Path(evaluate(tmp_path / "run", EvalOptions(experiment="all", max_views=2, out=tmp_path / "out")))
    assert {path.parent.name for path in folder.glob("*/results.json")} == {"turntable", "interpolation", "solvers"}
    assert [row["method"] for row in result(folder, "interpolation")["rows"]] == ["slerp"]
    assert "rotation_error_deg" not in result(folder, "turntable")
