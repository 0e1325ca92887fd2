"""Calibrating a hardly trained run, and what evaluations do with it."""

import csv
import json
import math
import shutil

import pytest
import torch
from records import record

from sitdist.build.writer import build
from sitdist.cli.main import run as command
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml, parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.manifest import load_manifest
from sitdist.errors import ConfigError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.flow.error_bars import LEVELS, conformal_rank
from sitdist.flow.estimate import EstimateOptions
from sitdist.inference.calibration import (
    CalibrateOptions,
    calibrate,
    coverage,
    coverage_summary,
    load_calibration,
    read_calibration,
)
from sitdist.inference.run import load_run
from sitdist.train.trainer import train


def config_on(data, **flow) -> Config:
    values = {
        "flow": flow,
        "name": "tiny",
        "data": str(data),
        "model": {"patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2},
        "train": {"steps": 2, "global_batch": 4, "optimizer": {"lr": 1e-2}, "ema_decay": 0.0},
        "evaluate": {"batch": 5, "generator": "euler", "generator_steps": 1},
    }
    return parse(Config, values, "tiny")


@pytest.fixture(scope="module", autouse=True)
def few_are_enough():
    """The tiny dataset's test split has 12 views."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitdist.inference.calibration.FEWEST", 12)
        patch.setattr("sitdist.flow.error_bars.FEWEST", 12)
        patch.setattr("sitdist.evaluate.report.write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    train(config_on(tiny_dataset), folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def calibrated(trained, tmp_path_factory):
    """A calibrated run; never write into it."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("fitted") / "run")
    calibrate(folder, CalibrateOptions("test"))
    return folder


def test_an_evaluation_of_a_calibrated_run_has_bars_trust_and_coverage(run, capsys):
    assert command(["calibrate", str(run), "--split", "test"]) == 0
    assert "12 views of test, estimator one_step" in capsys.readouterr().out
    folder = evaluate(run, EvalOptions(split="val"))
    with (folder / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        assert 0 < float(row["rotation_bar_50_deg"]) <= float(row["rotation_bar_90_deg"])
        assert 0 < float(row["translation_bar_50"]) <= float(row["translation_bar_90"])
        assert 0 < float(row["trust"]) <= 1
    metrics = json.loads((folder / "metrics.json").read_text())
    measured = metrics["calibration"]
    inside = [float(row["rotation_error_deg"]) <= float(row["rotation_bar_90_deg"]) for row in rows]
    assert measured["rotation"]["observed"][LEVELS.index(0.9)] == pytest.approx(sum(inside) / 8)
    assert measured["expected"] == list(LEVELS)
    assert measured["fitted_on"]["split"] == "test"
    assert measured["rotation"]["largest_quarter"]["n"] == 2
    assert metrics["why_uncalibrated"] is None


def test_without_a_calibration_there_are_no_bars_and_it_says_why(run):
    metrics = json.loads((evaluate(run, EvalOptions(split="val")) / "metrics.json").read_text())
    assert metrics["calibration"] is None
    assert "sitdist calibrate" in metrics["why_uncalibrated"]


def test_bars_are_never_tested_on_the_views_they_were_fitted_on(run, tiny_dataset, tmp_path):
    calibrate(run, CalibrateOptions("test"))
    renamed = tmp_path / "renamed"
    shutil.copytree(tiny_dataset, renamed)
    for data in (None, renamed):
        folder = evaluate(run, EvalOptions(split="test", data=data, out=tmp_path / f"{data is None}"))
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["calibration"] is None
        assert "fitted on these views" in metrics["why_uncalibrated"]


def test_a_calibration_holds_for_its_weights_and_its_estimator(run, tiny_dataset, tmp_path):
    calibrate(run, CalibrateOptions("test"))
    loaded = load_run(run)
    assert load_calibration(run, loaded, EstimateOptions())[0] is not None
    kept, why_not = load_calibration(run, loaded, EstimateOptions("euler", 2))
    assert kept is None
    assert "euler" in why_not
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1.0)
    kept, why_not = load_calibration(run, loaded, EstimateOptions())
    assert kept is None
    assert "other weights" in why_not
    calibrate(run, CalibrateOptions("test", estimator="euler", estimator_steps=2))
    assert load_calibration(run, load_run(run), EstimateOptions("euler", 2))[0] is not None


def test_a_regressor_is_calibrated_by_what_it_knows(tiny_dataset, tmp_path):
    train(config_on(tiny_dataset, share_at_one=1.0, share_at_zero=0.0), tmp_path / "regressor")
    kept = calibrate(tmp_path / "regressor", CalibrateOptions("test"))
    assert kept.calibration.residual_scale is None
    assert len(kept.calibration.rotation.weights) == 3
    metrics = json.loads((evaluate(tmp_path / "regressor", EvalOptions(split="val")) / "metrics.json").read_text())
    assert metrics["calibration"]["rotation"]["n"] == 8


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train", "the run was trained on these views"),
        ("vall", "no split 'vall'; it has test, train, val"),
        ("val", "split 'val' has 8 views, too few"),
    ],
)
def test_views_that_cannot_serve_are_refused_in_one_line(run, split, message, capsys):
    assert command(["calibrate", str(run), "--split", split]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_calibration_is_named(run, capsys):
    (run / "calibration.json").write_text('{"format": 1, "levels": []}')
    assert command(["eval", str(run), "--split", "val"]) == 2
    assert "calibration.json: not a calibration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("weights", 7),
        ("views", 0),
        ("levels", [0.5]),
        ("unknown", 1),
        ("calibration", None),
        ("calibration.rotation.rms", math.nan),
        ("calibration.rotation.intercept", 10**400),
        ("calibration.rotation.weights", [1.0]),
        ("calibration.rotation.weights", [-1.0] * 4),
        ("calibration.translation.factors", [-1.0] * 9),
        ("calibration.translation.factors", [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]),
        ("calibration.trust.std", [0.0] * 4),
        ("calibration.trust.worst", []),
        ("calibration.trust.worst", [2.0, 1.0]),
        ("calibration.residual_scale", None),
        ("calibration.residual_scale", [[[0.0]]]),
        ("calibration.residual_scale", [[[1.0]]]),
    ],
)
def test_a_calibration_with_absurd_numbers_is_refused_in_one_line(calibrated, tmp_path, key, value):
    values = json.loads((calibrated / "calibration.json").read_text())
    *parents, last = key.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    (tmp_path / "calibration.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"calibration\.json: .*again") as refused:
        load_calibration(tmp_path, load_run(calibrated), EstimateOptions())
    assert "\n" not in str(refused.value)


def test_coverage_counts_overall_and_on_the_quarter_with_the_largest_bars():
    factors = [level / 0.9 for level in LEVELS]  # uniform errors in [0, bar / 0.9]
    n = 4000
    bars = torch.linspace(1.0, 5.0, n, dtype=torch.float64)
    errors = bars / 0.9 * ((torch.arange(n, dtype=torch.float64) * 0.618034) % 1.0)
    errors[-1000:] *= 2.0  # where bars are largest they hold half as often
    measured = coverage(errors.tolist(), bars.tolist(), factors, calibrated_on=500)
    quarter = measured["largest_quarter"]
    assert measured["n"] == n
    assert quarter["n"] == 1000
    for level, all_views, largest in zip(LEVELS, measured["observed"], quarter["observed"], strict=True):
        assert largest == pytest.approx(level / 2, abs=0.01)
        assert all_views == pytest.approx(0.75 * level + 0.25 * level / 2, abs=0.01)
    assert quarter["standard_error"][-1] == pytest.approx(math.sqrt(0.9 * 0.1 * (1 / 1000 + 1 / 500)))


def test_the_error_of_the_coverage_holds_over_calibration_sets_too():
    """By simulation: a bar at the 90% quantile of 200 errors, tested on 800 others."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(400):
        fitted, tested = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (200, 800))
        bar = float(fitted.sort().values[conformal_rank(0.9, 200) - 1])
        measured = coverage(tested.tolist(), [bar] * 800, [1.0] * len(LEVELS), calibrated_on=200)
        shares.append(measured["observed"][-1])
    assert torch.tensor(shares).std() == pytest.approx(measured["standard_error"][-1], rel=0.1)


def test_the_summary_reads_the_records(run):
    kept = calibrate(run, CalibrateOptions("test"))
    bars = dict.fromkeys(("rotation_bar_50_deg", "translation_bar_50", "translation_bar_90"), 1.0)
    records = [
        record(str(i), rotation_error_deg=i, rotation_bar_90_deg=4.5, translation_error=0.0, trust=i / 10, **bars)
        for i in range(10)
    ]
    summary = coverage_summary(kept, records)
    assert summary["rotation"]["observed"][-1] == 0.5
    assert summary["translation"]["observed"] == [1.0] * len(LEVELS)
    assert summary["trust"] == {"mean": pytest.approx(0.45), "share_below_0.05": 0.1}
    assert summary["median_bar"]["rotation_deg"][1] == 4.5


def test_a_run_with_appearances_is_calibrated_on_them(views_dataset, tiny_yaml, tmp_path):
    clean = [f"data={views_dataset}", "train.steps=2"]
    for name, overrides, pictures in (("clean", clean, 12), ("varied", [*clean, "appearance={}"], 12 * 5)):
        train(load_yaml(Config, tiny_yaml, overrides), tmp_path / name)
        kept = calibrate(tmp_path / name, CalibrateOptions("test"))
        assert (kept.views, len(kept.calibration.trust.worst)) == (12, pictures)


def test_training_ends_by_calibrating_on_validation_views(tiny_dataset, tiny_yaml, tmp_path):
    build(parse(Recipe, load_manifest(tiny_dataset).recipe | {"val_views": 12}, "tiny"), tmp_path / "data")
    train(load_yaml(Config, tiny_yaml, [f"data={tmp_path / 'data'}", "train.steps=2"]), tmp_path / "run")
    kept = read_calibration(tmp_path / "run")
    assert kept is not None
    assert (kept.split, kept.views) == ("val", 12)


def test_a_run_without_enough_validation_views_ends_without_bars(tiny_yaml, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sitdist.inference.calibration.FEWEST", 20)
    with caplog.at_level("INFO"):
        train(load_yaml(Config, tiny_yaml, ["train.steps=2"]), tmp_path / "run")
    assert read_calibration(tmp_path / "run") is None
    assert "split 'val' has 8 views, too few to calibrate on" in caplog.text
