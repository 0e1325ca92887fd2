"""The report's page in a browser, its coverage, experiments and provenance; reports side by side."""

import json
import re
import shutil
import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import make_records, metrics_of, write_evaluation

from sitdist import cli
from sitdist.evaluate.coverage import AZIMUTHS, HEIGHTS, coverage_counts
from sitdist.evaluate.plots import error_sphere_figure
from sitdist.evaluate.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """
<script>
const before = cameras3d_pixels();
const canvas = document.getElementById("cameras3d");
canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
const turned = cameras3d_pixels() !== before;
const resources = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length;
const wide = document.documentElement.scrollWidth > window.innerWidth;
const cells = [...document.querySelectorAll("table.summary")][0].rows[2].cells;
document.title = JSON.stringify({ turned, resources, wide, errors, cells: [...cells].map((cell) => cell.textContent) });
</script>
"""
CATCH = """<script>
const errors = [];
window.addEventListener("error", (event) => errors.push(String(event.message)));
console.error = (text) => errors.push(String(text));
function cameras3d_pixels() { return document.getElementById("cameras3d").toDataURL(); }
</script>"""


@pytest.fixture(scope="module", autouse=True)
def small_plots():
    """Plots of 400 by 328 pixels, which are drawn faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitdist.evaluate.plots.style.DPI", 80)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    cycle = {"mean": 2.5, "median": 2.0, "n": 3, "q25": 1.0, "q75": 3.0, "low": 2.0, "high": 3.0}
    names = ("rotation_drift_deg", "translation_drift", "rotation_step_deg", "translation_step", "psnr", "psnr_to_last")
    rows = [{"turn": turn, **dict.fromkeys(names, cycle | {"mean": 2.5 * turn})} for turn in (1, 2)]
    (folder / "cycle").mkdir()
    (folder / "cycle" / "results.json").write_text(json.dumps({"experiment": "cycle", "n": 3, "rows": rows}))
    (folder / "cycle" / "records.csv").write_text("key,turn\nv2_0_turn1,1\n")
    write_evaluation(
        folder,
        make_records(),
        training_coverage=[[1] * AZIMUTHS] * HEIGHTS,
        provenance={"command": "sitdist eval <run>", "dataset fingerprint": "0123abc"},
        config={"name": "tiny"},
    )
    write_report(folder)
    return folder


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser_nothing_is_fetched_nothing_fails_and_the_cameras_turn(folder, tmp_path, width):
    page = (folder / "report.html").read_text().replace("<head>", f"<head>{CATCH}", 1)
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'user'}", f"--window-size={width},2000", "--virtual-time-budget=3000"]
    command = [str(BROWSER), *options, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    seen = json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == []
    assert seen["resources"] == 0
    assert seen["turned"]
    assert not seen["wide"]  # the page itself never scrolls sideways
    row = metrics_of(folder)["rows"][0]
    assert seen["cells"][0] == row["name"]
    assert float(seen["cells"][2]) == pytest.approx(row["rotation_error_deg"]["mean"], abs=0.005)


def test_the_page_holds_coverage_experiments_provenance_and_config(folder):
    text = (folder / "report.html").read_text()
    for word in ("Coverage", "Cycle: pose to view", "0123abc", "sitdist eval &lt;run&gt;", "tiny"):
        assert word in text
    assert {path.stem for path in (folder / "plots").iterdir()} >= {"sphere_training", "cycle_psnr"}


def test_coverage_counts_cameras_where_they_stand():
    import numpy as np

    counts = np.array(coverage_counts(np.array([[1.0, 0.01, 0.0], [0.0, 0.0, 2.0], [0.01, 0.0, -1.0]])))
    assert counts.sum() == 3
    assert counts[HEIGHTS // 2, AZIMUTHS // 2] == 1
    assert counts[-1].sum() == counts[0].sum() == 1
    records = make_records()  # all of them straight above
    error = error_sphere_figure(records).axes[0].images[0].get_array()
    assert np.nanmax(error) == pytest.approx(np.mean([record.rotation_error_deg for record in records]))


def test_tensorboard_holds_the_cameras_and_the_hyperparameters(folder):
    board = EventAccumulator(str(folder / "tensorboard"), {"tensors": 0, "scalars": 0}).Reload()
    assert any("cameras" in tag for tag in board.Tags()["tensors"])
    assert "_hparams_/experiment" in board.summary_metadata
    (event,) = board.Scalars("hparam/rotation_error_deg/mean")
    whole = max(metrics_of(folder)["rows"], key=lambda row: row["n"])
    assert event.value == pytest.approx(whole["rotation_error_deg"]["mean"])


def test_evaluations_stand_side_by_side(folder, tmp_path, capsys):
    write_evaluation(tmp_path, make_records(), step=900)
    assert cli.run(["report", str(folder), str(tmp_path), "--out", str(tmp_path / "both.html")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["step", "700", "900"] in lines
    row = metrics_of(folder)["rows"][0]
    assert ["rotation", "error", "(deg)", "mean", *[f"{row['rotation_error_deg']['mean']:.2f}"] * 2] in lines
    page = (tmp_path / "both.html").read_text()
    assert "<td>700</td><td>900</td>" in page
    assert cli.run(["report", str(folder), "--out", str(tmp_path / "x.html")]) == 2
