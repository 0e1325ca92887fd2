"""The report's page in a browser, its coverage, experiments and provenance; reports side by side."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import Page, look_down, make_records, metrics_of, write_evaluation

from sitdist.cli import main as cli
from sitdist.errors import DataError
from sitdist.evaluate.experiments.common import write_results
from sitdist.evaluate.experiments.records import load_experiments
from sitdist.evaluate.plots import AZIMUTHS, HEIGHTS, cells, sphere_figure
from sitdist.evaluate.report import write_report
from sitdist.evaluate.report.compare import compare, short_names
from sitdist.evaluate.report.page import experiment_pictures
from sitdist.evaluate.statistics import label_rows
from sitdist.io.ownership import only_writer

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """
<script>
const resources = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length;
const wide = document.documentElement.scrollWidth > window.innerWidth;
const rows = [...document.querySelectorAll("table tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
document.title = JSON.stringify({ resources, wide, errors, rows });
</script>
"""
CATCH = """<script>
const errors = [];
window.addEventListener("error", (event) => errors.push(String(event.message)));
console.error = (text) => errors.push(String(text));
</script>"""


@pytest.fixture(scope="module", autouse=True)
def small_plots():
    """Plots of 400 by 328 pixels, which are drawn faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitdist.evaluate.plots.DPI", 80)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    cycle = {"mean": 2.5, "median": 2.0, "n": 3, "q25": 1.0, "q75": 3.0, "low": 2.0, "high": 3.0}
    names = ("rotation_drift_deg", "translation_drift", "rotation_step_deg", "translation_step", "psnr", "psnr_to_last")
    rows = [{"turn": turn, **dict.fromkeys(names, cycle | {"mean": 2.5 * turn})} for turn in (1, 2)]
    write_evaluation(
        folder,
        make_records(),
        provenance={"command": "sitdist eval <run>", "dataset fingerprint": "0123abc"},
        config={"name": "tiny"},
    )
    record = {"key": "v2_0_turn1", "turn": 1, **dict.fromkeys(names, 2.5), "estimated": look_down(2.0)}
    write_results(folder / "cycle", {"experiment": "cycle", "n": 3, "rows": rows}, [record])
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """The report of an evaluation of the turntable alone."""
    folder = tmp_path_factory.mktemp("circle")
    write_evaluation(folder, make_records(), rows=[], function_evaluations=None)
    for name in ("records.csv", "images.npz"):
        (folder / name).unlink()
    (folder / "turntable").mkdir()
    summary = {"mean": 4.25, "median": 2.0, "n": 2, "q25": 1.0, "q75": 3.0, "low": 2.0, "high": 3.0}
    result = {"experiment": "turntable", "n": 2, "rotation_error_deg": summary, "psnr": summary | {"mean": 21.5}}
    (folder / "turntable" / "results.json").write_text(json.dumps(result))
    with (folder / "turntable" / "records.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["key", "rotation_error_deg", "psnr", "estimated", "rendered_estimated", "true"])
        for i in range(2):
            writer.writerow([f"t{i}", 4.0 + i, 21.0 + i, look_down(2.0 + i), "", look_down(2.5 + i)])
    write_report(folder)
    return folder


def look_at_page(page, folder, width):
    """What a browser of this width sees of a page: requests, errors, and rows of cells."""
    text = page.read_text().replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{PROBE}</body>")
    (folder / "page.html").write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    options += [f"--user-data-dir={folder / 'user'}", f"--window-size={width},2000", "--virtual-time-budget=3000"]
    command = [str(BROWSER), *options, (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))


in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.mark.distributed
@in_a_browser
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser_nothing_is_fetched_and_nothing_fails(folder, tmp_path, width):
    seen = look_at_page(folder / "report.html", tmp_path, width)
    assert (seen["errors"], seen["resources"], seen["wide"]) == ([], 0, False)  # the page never scrolls sideways
    for row in metrics_of(folder)["rows"]:
        (pose, _, picture, _) = [cells for cells in seen["rows"] if cells[0] == row["name"]]
        assert pose[2:4] == [f"{row['rotation_error_deg'][which]:.2f}" for which in ("mean", "median")]
        assert picture[2:4] == [f"{row['psnr'][which]:.2f}" for which in ("mean", "median")]


@pytest.mark.distributed
@in_a_browser
def test_the_page_of_evaluations_side_by_side_fits_a_phone(folder, tmp_path):
    other = tmp_path / "a folder of a very long name, which has to be broken"
    write_evaluation(other, make_records(), step=900)
    compare([folder, other], tmp_path / "both.html")
    seen = look_at_page(tmp_path / "both.html", tmp_path, 390)
    assert (seen["errors"], seen["resources"], seen["wide"]) == ([], 0, False)
    assert ["step", "700", "900"] in seen["rows"]


def test_a_report_of_experiments_alone_has_their_plots_and_numbers(circle):
    text = (circle / "report.html").read_text()
    for absent in ("By radius", "Worst views", "Error bars"):
        assert absent not in text
    plots = {path.stem for path in (circle / "plots").iterdir()}
    assert plots == {"cameras"}
    assert Page(circle / "report.html").rows == [["rotation error (deg)", "PSNR (dB)"], ["4.25", "21.50"]]
    board = EventAccumulator(str(circle / "tensorboard"), {"tensors": 0, "scalars": 0}).Reload()
    (event,) = board.Scalars("turntable/rotation_error_deg")
    assert (event.step, event.value) == (700, 4.25)


def test_the_page_holds_experiments_provenance_and_config(folder):
    text = (folder / "report.html").read_text()
    for word in ("Cycle: pose to view", "0123abc", "sitdist eval &lt;run&gt;", "tiny"):
        assert word in text


def test_tensorboard_holds_the_hyperparameters_and_the_experiments_by_turn(folder):
    board = EventAccumulator(str(folder / "tensorboard"), {"tensors": 0, "scalars": 0}).Reload()
    assert [(event.step, event.value) for event in board.Scalars("cycle/psnr")] == [(1, 2.5), (2, 5.0)]
    assert "_hparams_/experiment" in board.summary_metadata
    (event,) = board.Scalars("hparam/rotation_error_deg/mean")
    whole = max(metrics_of(folder)["rows"], key=lambda row: row["n"])
    assert event.value == pytest.approx(whole["rotation_error_deg"]["mean"])


def test_errors_on_the_sphere_are_drawn_where_their_cameras_stand():
    rows, columns = cells(np.array([[1.0, 0.01, 0.0], [0.0, 0.0, 2.0], [0.01, 0.0, -1.0]]))
    assert rows.tolist() == [HEIGHTS // 2, HEIGHTS - 1, 0]
    assert columns[0] == AZIMUTHS // 2
    records = make_records()  # all of them straight above
    error = sphere_figure(records).axes[0].images[0].get_array()
    assert np.nanmax(error) == pytest.approx(np.mean([record.rotation_error_deg for record in records]))


def test_names_of_evaluations_are_where_their_paths_differ():
    assert short_names([Path("runs/a/eval/test"), Path("runs/b/c/eval/test")]) == ["a", "b/c"]
    assert short_names([Path("x/run"), Path("x/run/eval")]) == ["run", "run/eval"]
    assert short_names([Path("x"), Path("x")]) == ["x", "x"]


def test_evaluations_with_nothing_in_common_do_not_stand_side_by_side(folder, circle, tmp_path):
    with pytest.raises(DataError, match="no radii and no experiment in common"):
        compare([folder, circle], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


def test_views_that_all_evaluations_keep_stand_side_by_side(folder, tmp_path):
    write_evaluation(tmp_path / "other", [replace(each, rotation_error_deg=90.0) for each in make_records()])
    compare([folder, tmp_path / "other"], tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert page.count('<div class="pair">') == 8  # two of every bin
    assert page.count("<figcaption>") == 3 * 8
    assert page.count("rotation error 90.00 deg") == 2 * 8  # in a caption and an alternative text


def test_evaluations_stand_side_by_side(folder, tmp_path, capsys):
    write_evaluation(tmp_path, make_records(), step=900)
    assert cli.run(["report", str(folder), str(tmp_path), "--out", str(tmp_path / "both.html")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["step", "700", "900"] in lines
    row = metrics_of(folder)["rows"][0]
    assert ["rotation", "error", "(deg)", "mean", *[f"{row['rotation_error_deg']['mean']:.2f}"] * 2] in lines
    page = (tmp_path / "both.html").read_text()
    assert "<td>700</td><td>900</td>" in page
    (tmp_path / "both.html").write_text("mine")
    command = ["report", str(folder), str(tmp_path), "--out", str(tmp_path / "both.html")]
    assert cli.run(command) == 2
    assert "both.html: already exists; give another name or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "both.html").read_text() == "mine"
    assert cli.run([*command, "--overwrite"]) == 0
    assert (tmp_path / "both.html").read_text() == page
    assert cli.run(["report", str(folder), "--out", str(tmp_path / "x.html")]) == 2


# ----------------------------------------------------------------------------------------------------------- strangers

NASTY = "<script>alert(1)</script><b>'\"&\n\x1b[2J$x^$"


@pytest.mark.distributed  # three pages with all their plots
def test_what_a_stranger_named_is_text_in_pages_tables_and_plots(tmp_path, capsys):
    folders = [tmp_path / "_a$x^$<b>", tmp_path / "b"]
    for folder in folders:
        records = [replace(each, label=i % 2) for i, each in enumerate(make_records())]
        write_evaluation(
            folder,
            records,
            **dict.fromkeys(("run", "dataset", "split", "lpips", "estimator", "generator"), NASTY),
            versions={NASTY: NASTY},
            provenance={"hardware": NASTY, NASTY: NASTY},
            config={NASTY: NASTY},
            labels=label_rows(records, {0: NASTY, 1: "plain"}),
        )
    assert cli.run(["report", str(folders[0])]) == 0
    assert cli.run(["report", *map(str, folders), "--out", str(tmp_path / "both.html")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith("\x1b") or line.startswith("[2J") for line in out.splitlines())
    assert "&#39;&#34;&amp;\\n\\x1b[2J" in (folders[0] / "report.html").read_text()
    page = Page(folders[0] / "report.html")
    assert (page.tags.count("script"), page.tags.count("b")) == (0, 0)
    both = Page(tmp_path / "both.html")
    assert (both.tags.count("script"), both.tags.count("b")) == (0, 0)
    assert "_a$x^$<b>" in both.text


def written(name, change):
    def damage(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def changed_result(**changes):
    def damage(folder):
        path = folder / "cycle" / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def changed_row(**changes):
    def damage(folder):
        path = folder / "cycle" / "results.json"
        result = json.loads(path.read_text())
        result["rows"][1].update(changes)
        path.write_text(json.dumps(result))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        changed_result(experiment="solvers"),
        changed_result(rows=[]),
        changed_result(rows=[1]),
        changed_row(turn="2"),
        changed_row(psnr=None),
        changed_row(psnr={"mean": float("nan"), "median": 1.0, "n": 1, "low": 1.0, "high": 1.0}),
        changed_row(solver={"a": 1}),
        written("cycle/results.json", lambda data: data[:-10]),
        written("cycle/results.json", lambda data: b"[" * 100_000),
        written("cycle/records.csv", lambda data: b""),
        written("cycle/records.csv", lambda data: data.replace(b",2.5", b",nan", 1)),
        written("cycle/records.csv", lambda data: data.replace(b",2.5", b"", 1)),
        written("cycle/records.csv", lambda data: data.replace(b"[1.0, ", b"[" * 100_000, 1)),
    ],
)
def test_results_of_an_experiment_that_nobody_measured_are_refused_in_one_line(folder, tmp_path, damage, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    for command in (["report", str(tmp_path / "copy")], ["report", str(folder), str(tmp_path / "copy")]):
        assert cli.run(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path / 'copy' / 'cycle'}/" in line
        assert len(line) < 600
    assert {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "strip", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.array([{}])]
)
def test_strips_that_are_no_pictures_are_refused(folder, tmp_path, strip):
    shutil.copytree(folder, tmp_path / "copy")
    np.savez(tmp_path / "copy" / "cycle" / "strips.npz", pair000_slerp=strip)
    (table,) = load_experiments(folder)
    with pytest.raises(DataError, match=r"strips\.npz: .*(damaged|object array)"):
        experiment_pictures(tmp_path / "copy", table)


def test_nothing_is_written_into_a_folder_that_is_no_evaluation_of_ours(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "theirs", ignore=shutil.ignore_patterns("sitdist.*"))
    for name in ("", "theirs", "nowhere"):
        before = sorted(tmp_path.rglob("*"))
        for command in ([str(tmp_path / name)], [str(tmp_path / name), str(folder)]):
            assert cli.run(["report", *command]) == 2
            assert capsys.readouterr().err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


def test_a_report_is_not_written_while_another_process_writes_there(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    with only_writer(tmp_path / "copy", "evaluation"):
        assert cli.run(["report", str(tmp_path / "copy")]) == 2
    assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
