"""What `the pose benchmark` measures."""

import json

import pytest
import torch

from benchmarks import pose as module
from benchmarks.__main__ import main as sitdist
from benchmarks.pose import Errors, bench_pose, format_bench
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.errors import ConfigError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.train.trainer import train

pytestmark = pytest.mark.distributed  # two whole runs, read by every estimator


@pytest.fixture(scope="module")
def runs(tiny_yaml, tmp_path_factory):
    """A flow and a regressor."""
    folder = tmp_path_factory.mktemp("runs")
    train(load_yaml(Config, tiny_yaml), folder / "flow")
    train(load_yaml(Config, tiny_yaml, ["flow.share_at_one=1.0", "flow.share_at_zero=0.0"]), folder / "regressor")
    return folder


@pytest.fixture(scope="module")
def bench(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROTOCOL_VIEWS", 2)
        return bench_pose([runs / "flow", runs / "regressor"], "test", None, 4, "cpu")


def test_every_run_has_a_row_for_every_estimator_that_it_can_have(runs, bench):
    flow = [row.estimator.split(",")[0] for row in bench.rows if row.run == str(runs / "flow")]
    assert flow == [*["one_step"] * 2, "euler", "heun", "midpoint", "exact", "euler_249"]
    regressor = {row.estimator for row in bench.rows if row.run == str(runs / "regressor")}
    assert regressor == {"one_step"}
    assert any("regressor" in text and "knows no other times" in text for text in bench.skipped)
    assert bench.views == 12
    assert [each.run for each in bench.protocols] == [str(runs / "flow")]


def test_the_errors_are_those_of_an_evaluation(runs, bench, tmp_path):
    for readout in ("svd", "look_at"):
        folder = evaluate(runs / "flow", EvalOptions(split="test", readout=readout, out=tmp_path / readout))
        overall = json.loads((folder / "metrics.json").read_text())["rows"][-1]
        row = next(row for row in bench.rows if row.estimator == "one_step" and row.readout == readout)
        assert overall["n"] == bench.views
        assert row.errors.rotation_mean_deg == pytest.approx(overall["rotation_error_deg"]["mean"], rel=1e-3)
        assert row.errors.translation_median == pytest.approx(overall["translation_error"]["median"], rel=1e-3)


def test_evaluations_are_counted_and_the_protocol_costs_hundreds_of_times_more(bench):
    counts = {row.estimator: row.function_evaluations for row in bench.rows}
    assert counts["one_step"] == 1
    assert counts["heun, 10 steps"] == 20
    assert counts["euler_249"] == 249
    assert counts["exact, of heun, 10 steps"] >= 20
    assert bench.protocols[0].ratio > 249
    assert all(row.ms_per_picture > 0 for row in bench.rows)


def test_the_protocol_reads_the_same_poses_as_the_estimator_of_its_name(runs, bench):
    two = bench_pose([runs / "flow"], "test", 2, 2, "cpu")
    source = next(row for row in two.rows if row.estimator == "euler_249")
    assert two.protocols[0].source_errors.rotation_mean_deg == pytest.approx(source.errors.rotation_mean_deg, rel=1e-3)
    assert (two.views, bench.views) == (2, 12)


def test_the_table_says_what_did_not_converge(bench):
    text = format_bench(bench)
    assert text.count("\n") > len(bench.rows)
    assert "converged" not in text or "exact" in text
    row = bench.rows[0]
    doubtful = module.Row(**{**vars(row), "converged": 0.75})
    assert "25.0% not converged" in format_bench(module.Bench("test", 12, "cpu", [doubtful], [], []))


def test_errors_are_means_and_medians_over_the_views():
    true = torch.eye(4).double().repeat(3, 1, 1)
    estimated = true.clone()
    estimated[:, 0, 3] = torch.tensor([0.0, 1.0, 5.0])
    errors = Errors.of(estimated, true)
    assert (errors.rotation_mean_deg, errors.translation_mean, errors.translation_median) == (0.0, 2.0, 1.0)


def test_the_command_prints_the_table_and_writes_the_numbers(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "WAYS", module.WAYS[:1])
    monkeypatch.setattr(module, "PROTOCOL_VIEWS", 1)
    arguments = ["pose", str(runs / "flow"), "--split", "val", "--views", "3", "--batch", "2"]
    assert sitdist([*arguments, "--device", "cpu", "--json", str(tmp_path / "bench.json")]) == 0
    values = json.loads((tmp_path / "bench.json").read_text())
    assert (values["split"], values["views"], values["device"]) == ("val", 3, "cpu")
    assert values["protocols"][0]["batch"] == 2
    assert values["protocols"][0]["ratio"] > 1
    assert "the source's protocol" in capsys.readouterr().out


def test_a_run_that_reads_no_poses_is_refused(tiny_yaml, tmp_path):
    train(load_yaml(Config, tiny_yaml, ["flow.endpoint=gaussian", "flow.share_at_one=0.0"]), tmp_path)
    with pytest.raises(ConfigError, match="the gaussian endpoint is noise and holds no pose; give a run that reads"):
        bench_pose([tmp_path], "test", 2, 2, "cpu")
