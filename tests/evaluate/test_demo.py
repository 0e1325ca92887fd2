"""The demo's own commands at a small size: every experiment on its run, and a report of all of them."""

import csv
import json
import shlex
from pathlib import Path

import pytest

from sitdist.cli import main as cli
from sitdist.evaluate.experiments.records import EXPERIMENTS

pytestmark = pytest.mark.distributed  # a whole training run

ROOT = Path(__file__).parents[2]
SMALL = {
    "shards": [
        *("--set", "splits.train.views=80", "--set", "val_views=8", "--set", "codec.fit_views=32"),
        *("--set", "samples_per_shard=36"),
    ],
    "train": [
        *("--set", "train.steps=3", "--set", "train.global_batch=8", "--set", "train.validate_every=3"),
        *("--set", "train.precision=fp32"),
    ],
    "eval": ["--experiment", "all", "--max-views", "3"],
}


def demo_commands():
    """The arguments of every sitdist command of `make demo`."""
    lines = (ROOT / "Makefile").read_text().split("\ndemo: ")[1].split("\n\n")[0].splitlines()
    return [shlex.split(line.partition("/sitdist ")[2]) for line in lines if "/sitdist " in line]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of the demo; never write into it."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sitdist.evaluate.plots.DPI", 50)
        for arguments in demo_commands():
            placed = [argument.replace("$(DEMO)", str(folder)) for argument in arguments]
            assert cli.run([*placed, *SMALL[placed[0]]]) == 0
    return folder


def test_every_experiment_is_measured_on_the_demos_run(demo):
    rows = json.loads((demo / "eval" / "metrics.json").read_text())["rows"]
    assert {row["name"]: row["n"] for row in rows}["r in [1, 4]"] == 3
    expected = {"turntable": 3, "interpolation": 2 * 9, "cycle": 3 * 4, "solvers": 31 * 3, "robustness": 41 * 3}
    assert set(expected) == set(EXPERIMENTS)
    for name, count in expected.items():
        with (demo / "eval" / name / "records.csv").open(newline="") as file:
            keys = [row["key"] for row in csv.DictReader(file)]
        assert len(keys) == len(set(keys)) == count, name


def test_the_demos_report_holds_every_experiment_and_its_numbers(demo):
    page = (demo / "eval" / "report.html").read_text()
    row = max(json.loads((demo / "eval" / "metrics.json").read_text())["rows"], key=lambda each: each["n"])
    assert f'<td class="own first">{row["rotation_error_deg"]["mean"]:.2f}</td>' in page
    for name in EXPERIMENTS:
        result = json.loads((demo / "eval" / name / "results.json").read_text())
        for each in result.get("rows", [result]):
            for measure in ("rotation_error_deg", "rotation_drift_deg", "off_the_way_deg"):
                if measure in each:
                    assert f">{each[measure]['mean']:.2f}</t" in page
    assert "data:image/gif" in page
