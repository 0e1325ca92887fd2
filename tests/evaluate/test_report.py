"""The report against the numbers it is made from: table, page, plots, TensorBoard; and folders that give none."""

import base64
import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sitdist.errors import DataError
from sitdist.evaluate import plots
from sitdist.evaluate.measures import MEASURES, ViewRecord
from sitdist.evaluate.metrics import LPIPS_NOT_MEASURED
from sitdist.evaluate.report import format_table, report_again, write_report
from sitdist.evaluate.statistics import summary_rows
from sitdist.io.arrays import save_arrays
from sitdist.io.atomic import temporary_name
from sitdist.io.ownership import mark

BINS = (2, 3, 4, 6)  # no view has a radius in [5, 6)
VIEWS_PER_BIN = 3
PLOTS = ("rotation_error_deg", "translation_error", "psnr", "sphere", "cameras")
VOID = {"meta", "img", "br", "link", "hr", "input"}


def look_down(radius):
    """Camera above the origin that looks straight down, row-major [3, 4]."""
    return [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, radius]


def make_records(lpips=False):
    """Three views a bin; in bin b the rotation errors are b, 2 b and 6 b degrees: mean 3 b, median 2 b."""
    records = []
    for bin_ in BINS:
        for i, factor in enumerate((1.0, 2.0, 6.0)):
            radius, error = bin_ + 0.25 * (i + 1), 0.01 * factor * bin_
            values = dict.fromkeys(set(MEASURES) & set(ViewRecord.__dataclass_fields__), 0.1 * factor + bin_)
            values |= {"rotation_error_deg": factor * bin_, "translation_error": error, "psnr": 20.0 + factor}
            values |= {"true": look_down(radius), "estimated": look_down(radius + error)}
            values |= {"lpips": 0.125 * factor if lpips else None, "focal_error": None}
            records.append(ViewRecord(key=f"v{bin_}_{i}", label=0, radius=radius, bin=bin_, **values))
    return records


def write_evaluation(folder, records, size=16, **changes):
    """metrics.json, records.csv and images.npz (two noise pictures a bin), as an evaluation leaves them."""
    mark(folder, "evaluation")
    metrics = {
        "run": "runs/tiny & <b>small</b>",
        "step": 700,
        "dataset": "datasets/tiny",
        "split": "test",
        "estimator": "heun",
        "function_evaluations": 20,
        "generator": "midpoint",
        "generator_steps": 7,
        "seed": 3,
        "sigma": 0.125,
        "noise_floor": {"rotation_deg": 1.25, "translation": 0.0625},
        "lpips": LPIPS_NOT_MEASURED,
        "training_radius": [3.01, 4.99],
        "training_views": {"count": 100, "compared": 50, "stride": 2},
        "versions": {"sitdist": "0.1.0", "python": "3.11.0", "torch": "2.15.0"},
        "rows": summary_rows(records),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    with (folder / "records.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0].row()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(record.row() for record in records)
    shown = [record for record in records if record.key.endswith(("_0", "_1"))]
    generator = np.random.default_rng(0)
    true, rendered = generator.integers(0, 256, (2, len(shown), size, size, 3), np.uint8)
    keys, bins = np.array([record.key for record in shown]), np.array([record.bin for record in shown])
    save_arrays(folder / "images.npz", {"key": keys, "bin": bins, "true": true, "rendered": rendered})


@pytest.fixture(scope="module", autouse=True)
def small_plots():
    """Plots of 400 by 328 pixels, which are drawn faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitdist.evaluate.plots.DPI", 80)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An evaluation with its report; never write into it."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_evaluation(folder, make_records())
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def folder_with_lpips(tmp_path_factory):
    """The same with LPIPS; never write into it."""
    folder = tmp_path_factory.mktemp("with_lpips")
    write_evaluation(folder, make_records(lpips=True), lpips="alex 0123abc")
    write_report(folder)
    return folder


@pytest.fixture
def inputs(folder, tmp_path):
    """A copy of the evaluation without its report, to be damaged."""
    mark(tmp_path, "evaluation")
    for name in ("metrics.json", "records.csv", "images.npz"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def pose_cells(row):
    rotation, translation = row["rotation_error_deg"], row["translation_error"]
    return [
        row["name"],
        f"{row['n']}",
        f"{rotation['mean']:.2f}",
        f"{rotation['median']:.2f}",
        f"{100 * rotation['share_under_5_deg']:.1f}%",
        f"{row['constant_rotation_error_deg']['mean']:.2f}",
        f"{row['nearest_rotation_error_deg']['mean']:.2f}",
        f"{translation['mean']:.3f}",
        f"{translation['median']:.3f}",
        f"{row['constant_translation_error']['mean']:.3f}",
        f"{row['nearest_translation_error']['mean']:.3f}",
    ]


def picture_cells(row):
    columns = [
        *(("psnr", "mean", 2), ("psnr", "median", 2), ("codec_psnr", "mean", 2), ("nearest_psnr", "mean", 2)),
        *(("mae", "mean", 4), ("mae", "median", 4), ("codec_mae", "mean", 4)),
        *(("ssim", "mean", 3), ("ssim", "median", 3), ("codec_ssim", "mean", 3)),
        *((("lpips", "mean", 3), ("lpips", "median", 3)) if "lpips" in row else ()),
    ]
    return [row["name"], f"{row['n']}", *(f"{row[field][which]:.{digits}f}" for field, which, digits in columns)]


def squeeze(cells):
    return re.sub(r"[\s|]+", " ", " ".join(cells)).strip()


# -------------------------------------------------------------------------------------------------------------- table


def test_the_table_states_the_numbers_of_metrics_json(folder):
    metrics = metrics_of(folder)
    lines = [squeeze([line]) for line in format_table(metrics).splitlines()]
    for row in metrics["rows"]:
        assert squeeze(pose_cells(row)) in lines
        assert squeeze(picture_cells(row)) in lines
    assert "noise floor 1.25 0.062" in lines
    (line,) = [line for line in lines if line.startswith("r in [2, 3) 3 6.00")]  # errors of 2, 4 and 12 degrees
    assert line.startswith("r in [2, 3) 3 6.00 4.00 66.7%")


def test_the_table_states_how_it_was_measured_on_lines_that_fit_a_terminal(folder):
    text = format_table(metrics_of(folder))
    assert "step 700, on test of datasets/tiny" in text
    assert "poses by heun (20 function evaluations), pictures by midpoint (7 steps), sigma 0.125, seed 3" in text
    assert "pictures by dopri5 (adaptive steps)," in format_table(metrics_of(folder) | {"generator": "dopri5"})
    assert max(map(len, text.splitlines())) <= 112
    bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in text.splitlines() if "|" in line]
    blocks = {tuple(places) for places in bars}
    assert len(blocks) == 4  # the separators of every table stand below each other


@pytest.mark.distributed
def test_lpips_has_columns_if_measured_and_a_reason_if_not(folder, folder_with_lpips):
    text = format_table(metrics_of(folder))
    assert f"LPIPS {LPIPS_NOT_MEASURED}." in text
    assert "LPIPS -" not in text
    metrics = metrics_of(folder_with_lpips)
    text = format_table(metrics)
    assert "LPIPS backbone: alex 0123abc." in text
    assert squeeze(picture_cells(metrics["rows"][0])) in [squeeze([line]) for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 112
    assert "LPIPS 0.125" in (folder_with_lpips / "report.html").read_text()


def test_a_report_on_a_model_trained_radius_augmented_says_so(folder, tmp_path):
    assert "augmented" not in format_table(metrics_of(folder))
    write_evaluation(tmp_path, make_records(), radius_augmented=40)
    write_report(tmp_path)
    text = format_table(metrics_of(tmp_path))
    assert "seed 3, trained radius augmented" in text
    assert text.count("Radius augmented: 40 of the 100 training views are zoomed copies") == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("Radius augmented: 40 of the 100 training views") == 2
    assert "and 40 are radius augmented" in page


def test_the_focal_lengths_error_has_columns_where_it_was_measured(tmp_path):
    records = [replace(record, focal_error=record.psnr) for record in make_records()]  # 21, 22 and 26
    write_evaluation(tmp_path, records)
    write_report(tmp_path)
    text = format_table(metrics_of(tmp_path))
    assert "focal error (%)" in text
    assert [line for line in text.splitlines() if line.startswith("r in [2, 3)") and line.endswith("23.00  22.00")]
    assert "focal error 21.00 %" in (tmp_path / "report.html").read_text()


def test_metrics_that_state_errors_of_what_was_not_measured_are_damaged(folder):
    with pytest.raises(DataError, match="rotation_error_deg is there"):
        format_table(metrics_of(folder) | {"no_pose": "a reason"})
    metrics = metrics_of(folder)
    for row in metrics["rows"]:
        del row["psnr"]
    with pytest.raises(DataError, match="psnr is missing"):
        format_table(metrics)


# --------------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Tags that close as they opened, the cells of the summary tables, every attribute, and all text."""

    def __init__(self, path):
        super().__init__()
        self.stack, self.rows, self.attributes, self.tags, self.text = [], [], [], [], ""
        self.feed(path.read_text())
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.stack and self.stack[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def sources(self):
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


def decode(uri):
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_page_states_the_numbers_of_metrics_json(folder):
    page = Page(folder / "report.html")
    for row in metrics_of(folder)["rows"]:
        assert pose_cells(row) in page.rows
        assert picture_cells(row) in page.rows
    assert ["noise floor", "", "1.25", *[""] * 4, "0.062", *[""] * 3] in page.rows
    assert LPIPS_NOT_MEASURED in page.text
    facts = ("heun (20 function evaluations)", "midpoint (7 steps)", "0.125", "3.01 to 4.99", "torch 2.15.0", "700")
    for fact in facts:
        assert fact in page.text


def test_the_page_refers_to_nothing_outside_itself(folder):
    text, page = (folder / "report.html").read_text(), Page(folder / "report.html")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|srcset", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert not {"link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources())
    assert [name for _, name, _ in page.attributes if name in ("href", "action", "onload")] == []


def test_the_page_holds_every_true_and_rendered_picture_as_it_is_with_its_errors(folder):
    page = Page(folder / "report.html")  # v3_1: radius 3.5, estimated 0.06 too far, 6 degrees off
    assert "r = 3.50, rotation error 6.00 deg, translation error 0.060" in page.text
    embedded = [decode(source) for source in page.sources()]
    files = [Image.open(folder / "plots" / f"{name}.png") for name in PLOTS]
    for picture, file in zip(embedded, files, strict=False):
        np.testing.assert_array_equal(np.array(picture), np.array(file))
    with np.load(folder / "images.npz") as pictures:
        pairs = dict(
            zip(pictures["key"].tolist(), zip(pictures["true"], pictures["rendered"], strict=True), strict=True)
        )
    errors = {record.key: record.rotation_error_deg for record in make_records() if record.key in pairs}
    worst = sorted(errors, key=lambda key: -errors[key])  # "v6_1", of 12 degrees, is the first
    by_bin = sorted(errors, key=lambda key: (key[1], -errors[key]))
    expected = [picture for key in (*worst, *by_bin) for picture in pairs[key]]
    assert len(embedded) == len(files) + len(expected)
    for picture, pixels in zip(embedded[len(files) :], expected, strict=True):
        np.testing.assert_array_equal(np.array(picture), pixels)


# -------------------------------------------------------------------------------------------------------------- plots


def test_every_plot_is_a_picture_that_is_not_blank(folder):
    assert {path.stem for path in (folder / "plots").iterdir()} == set(PLOTS)
    for name in PLOTS:
        pixels = np.array(Image.open(folder / "plots" / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 300
        assert 0.01 < (pixels < 250).mean() < 0.95


def curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(line.get_ydata(), dtype=float)


def test_a_metric_is_drawn_at_its_means_with_a_gap_where_there_are_no_views():
    (axes,) = plots.radius_figure(make_records(), "rotation_error_deg", (3.0, 5.0), floor=1.25).axes
    np.testing.assert_allclose(curve(axes, "mean"), [6.0, 9.0, 12.0, np.nan, 18.0])
    np.testing.assert_allclose(curve(axes, "constant pose"), [2.3, 3.3, 4.3, np.nan, 6.3])
    np.testing.assert_allclose(curve(axes, "packing noise floor"), 1.25)
    strokes = [segment for segment in axes.collections[0].get_segments() if len(segment)]
    np.testing.assert_allclose([stroke[0, 1] for stroke in strokes], [4.0, 6.0, 8.0, 12.0])  # the medians
    assert axes.patches[0].get_y() == pytest.approx(3.0)  # quartiles of 2, 4, 12
    assert axes.patches[0].get_height() == pytest.approx(5.0)
    assert axes.get_yscale() == "log"


def test_an_error_of_exactly_zero_is_drawn_and_not_dropped_by_a_logarithm():
    records = [replace(record, rotation_error_deg=0.0) for record in make_records()]
    (axes,) = plots.radius_figure(records, "rotation_error_deg", (3.0, 5.0)).axes
    assert axes.get_yscale() == "linear"
    assert np.nanmax(curve(axes, "mean")) == 0.0


# -------------------------------------------------------------------------------------------------------- tensorboard


def row_of(row):
    """The names of its measures."""
    return set(row) - {"name", "radius", "n"}


def read_board(folder):
    board = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0})
    return board.Reload()


def test_tensorboard_holds_the_numbers_of_metrics_json_by_radius(folder):
    board, rows = read_board(folder), metrics_of(folder)["rows"]
    bins = [row for row in rows if row["radius"][1] - row["radius"][0] == 1]
    assert row_of(rows[0]) <= set(MEASURES)
    for measure in row_of(rows[0]):
        for statistic in ("mean", "median", "n"):
            events = board.Scalars(f"{measure}/{statistic}")
            assert [event.step for event in events] == [2, 3, 4, 6]
            expected = [row[measure][statistic] for row in bins]
            assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)
    (event,) = board.Scalars("radius_3-5/rotation_error_deg/share_under_5_deg")
    assert (event.step, event.value) == (700, pytest.approx(1 / 3))  # 3, 6, 18, 4, 8 and 24 degrees
    (event,) = board.Scalars("noise_floor/translation_error")
    assert event.value == 0.0625


def test_tensorboard_holds_the_plots(folder):
    board = read_board(folder)
    names = {path.stem for path in (folder / "plots").iterdir()}
    assert set(board.Tags()["images"]) == {f"report/{name}" for name in names}
    (image,) = board.Images("report/psnr")
    shown = np.array(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    np.testing.assert_array_equal(shown, np.array(Image.open(folder / "plots" / "psnr.png").convert("RGB")))


# --------------------------------------------------------------------------------------------------------- once again


def test_a_second_report_takes_the_place_of_the_first_and_is_the_same_for_the_same_numbers(
    folder, folder_with_lpips, tmp_path
):
    shutil.copytree(folder_with_lpips, tmp_path, dirs_exist_ok=True)
    write_evaluation(tmp_path, make_records())  # with no LPIPS now, as in `folder`
    killed = temporary_name(tmp_path / "tensorboard").name.replace(f"-{os.getpid()}-", f"-{10**9}-")  # no such process
    (tmp_path / killed).mkdir()
    (tmp_path / killed / "events.out.tfevents.cut").write_text("left by a report that was killed")
    write_report(tmp_path)
    for name in ("report.html", *(f"plots/{path.name}" for path in (folder / "plots").iterdir())):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    for inside in ("", "plots"):
        names = [sorted(path.name for path in (top / inside).iterdir()) for top in (tmp_path, folder)]
        assert names[0] == names[1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert "lpips/mean" in read_board(folder_with_lpips).Tags()["scalars"]
    assert "lpips/mean" not in read_board(tmp_path).Tags()["scalars"]


def test_what_a_user_keeps_beside_plots_and_events_stays(folder_with_lpips, tmp_path):
    shutil.copytree(folder_with_lpips, tmp_path, dirs_exist_ok=True)
    write_evaluation(tmp_path, make_records())
    (tmp_path / "tensorboard" / "notes").mkdir()
    for name in ("plots/mine.png", "plots/cycle_mine.png", "tensorboard/notes/a.txt", "tensorboard/b.txt"):
        (tmp_path / name).write_text("mine")
    write_report(tmp_path)
    for name in ("plots/mine.png", "plots/cycle_mine.png", "tensorboard/notes/a.txt", "tensorboard/b.txt"):
        assert (tmp_path / name).read_text() == "mine"
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def change_metrics(change):
    def damage(folder):
        metrics = metrics_of(folder)
        change(metrics)
        (folder / "metrics.json").write_text(json.dumps(metrics))

    return damage


def change_records(old, new, count=-1):
    def damage(folder):
        text = (folder / "records.csv").read_text()
        assert old in text
        (folder / "records.csv").write_text(text.replace(old, new, count))

    return damage


def change_pictures(**changes):
    def damage(folder):
        with np.load(folder / "images.npz") as arrays:
            pictures = dict(arrays)
        for name, change in changes.items():
            pictures[name] = change(pictures[name])
        save_arrays(folder / "images.npz", pictures)

    return damage


def cut(name, share):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return damage


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def compressed(folder):
    """A file of a few kB that would be a GB."""
    np.savez_compressed(folder / "images.npz", true=np.zeros((1, 4096, 4096, 3), np.uint8))


def flip_a_pixel(folder):
    data = bytearray((folder / "images.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "images.npz").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), r"metrics\.json: cannot be read \(No such file"),
        (lambda folder: (folder / "records.csv").unlink(), r"records\.csv: cannot be read \(No such file"),
        (lambda folder: (folder / "images.npz").unlink(), r"images\.npz: cannot be read \(No such file"),
        (cut("metrics.json", 0.5), r"metrics\.json: damaged .*; run `sitdist eval` again"),
        (lambda folder: (folder / "metrics.json").write_text("[]"), r"metrics\.json: holds list, not an object"),
        (lambda folder: (folder / "metrics.json").write_text('{"run":' * 100_000), r"metrics\.json: damaged"),
        (change_metrics(lambda metrics: metrics.update(config=nested(700))), r"metrics\.json: damaged"),
        (change_metrics(lambda metrics: metrics.update(step="7")), r"damaged \(step: "),
        (change_metrics(lambda metrics: metrics.update(seed=-1)), r"damaged \(seed: "),
        (change_metrics(lambda metrics: metrics.update(run="x" * 10**6)), r"damaged \(run: "),
        (change_metrics(lambda metrics: metrics.update(calibration={"rotation": {}})), r"damaged \(calibration\."),
        (change_metrics(lambda metrics: metrics["rows"][0]["psnr"].update(mean=1e300)), r"damaged \(rows\.0\.psnr"),
        (change_metrics(lambda metrics: metrics.pop("sigma")), r"damaged \(sigma: Field required\)"),
        (change_metrics(lambda metrics: metrics.update(rows=[])), r"damaged \(no rows, but there is a records\.csv"),
        (
            change_metrics(lambda metrics: metrics["rows"][0]["mae"].update(mean=np.nan)),
            r"metrics\.json: damaged \(NaN is not a finite number\)",
        ),
        (change_metrics(lambda metrics: metrics["rows"][0]["rotation_error_deg"].pop("share_under_5_deg")), "no share"),
        (cut("records.csv", 0.8), r"records\.csv: damaged \(the last line is cut off\)"),
        (change_records("psnr", "pnsr"), r"records\.csv: damaged \(psnr: Field required"),
        (change_records("22.0", "nan"), r"records\.csv: damaged \(psnr: .*finite"),
        (change_records("22.0", ""), r"records\.csv: damaged \(8 of 12 views have psnr"),
        (change_records("36.0", "181.0"), r"records\.csv: damaged \(rotation_error_deg: "),
        (change_records("v2_1", "v2_0"), r"records\.csv: damaged \(a view is there twice\)"),
        (lambda folder: (folder / "records.csv").write_text(""), r"records\.csv: damaged"),
        (lambda folder: (folder / "records.csv").write_text("key\n"), r"records\.csv: damaged \(no rows\)"),
        (change_records(",3.25,3,", ",3.25,2,"), r"damaged \(4 views r in \[2, 3\), but metrics\.json is over 3\)"),
        (cut("images.npz", 0.5), r"images\.npz: damaged"),
        (flip_a_pixel, r"images\.npz: damaged"),
        (change_pictures(true=lambda true: true / 255.0), r"true is float64 \[8, 16, 16, 3\], not uint8"),
        (
            change_pictures(rendered=lambda rendered: rendered[:3]),
            r"rendered is uint8 \[3, 16, 16, 3\], not uint8 \[8,",
        ),
        (change_pictures(rendered=lambda rendered: rendered[:, :8]), r"rendered \[8, 8, 16, 3\]"),
        (change_pictures(key=lambda key: np.char.add("x", key)), r"view xv2_0 of bin 2 is not in records\.csv"),
        (change_pictures(key=lambda key: np.array("v2_0")), r"damaged \(key is "),
        (change_pictures(bin=lambda bin_: bin_ + 1), r"view v2_0 of bin 3 is not in records\.csv"),
        (change_pictures(bin=lambda bin_: bin_ + 0.5), r"bin float64"),
        (change_pictures(true=lambda true: true[:, :0], rendered=lambda true: true[:, :0]), r"true \[8, 0, 16, 3\]"),
        (change_pictures(key=lambda key: key.astype(object)), r"images\.npz: key: an object array"),
        (compressed, r"images\.npz: damaged \(compressed, "),
        (lambda folder: save_arrays(folder / "images.npz", {"key": np.array(["v2_0"])}), r"damaged \(no bin\)"),
    ],
)
def test_a_folder_that_no_report_can_be_made_of_is_refused_in_one_line(inputs, damage, message):
    damage(inputs)
    before = {path.name: path.read_bytes() for path in inputs.iterdir()}
    with pytest.raises(DataError, match=message) as caught:
        report_again(inputs)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(inputs) in str(caught.value)
    assert {path.name: path.read_bytes() for path in inputs.iterdir()} == before


def test_records_with_and_metrics_without_lpips_do_not_belong_together(inputs):
    rows = metrics_of(inputs)["rows"]
    write_evaluation(inputs, make_records(lpips=True), rows=rows)
    with pytest.raises(DataError, match="12 of 12 views have lpips, unlike metrics"):
        write_report(inputs)


def test_a_table_is_only_made_of_what_an_evaluation_writes():
    with pytest.raises(DataError, match=r"metrics\.json: damaged \(run: Field required\); run `sitdist eval` again"):
        format_table({"step": 3})


def test_results_of_before_open_and_what_is_no_longer_measured_is_left_out(inputs):
    """Columns and summaries up to a symmetry, coverage of the sphere, and plots that the report no longer has."""
    metrics = metrics_of(inputs) | {
        "symmetry": {"examined": 9, "coinciding": 0, "pairs": [], "symmetries": []},
        "training_coverage": [[1] * 12] * 6,
    }
    for row in metrics["rows"]:
        row["symmetric_rotation_error_deg"] = row["rotation_error_deg"]
    (inputs / "metrics.json").write_text(json.dumps(metrics))
    lines = (inputs / "records.csv").read_text().splitlines()
    more = [",symmetric_rotation_error_deg,symmetric_translation_error", ",1.5,", *[",,"] * (len(lines) - 2)]
    (inputs / "records.csv").write_text("".join(f"{line}{end}\n" for line, end in zip(lines, more, strict=True)))
    (inputs / "plots").mkdir()
    (inputs / "plots" / "views.png").write_text("of an earlier version")
    assert "ymmetr" not in report_again(inputs).read_text()
    assert {path.stem for path in (inputs / "plots").iterdir()} == set(PLOTS)


def test_a_measure_has_summaries_columns_plots_and_scalars_by_its_row_in_the_table(folder, tmp_path, monkeypatch):
    extra = replace(MEASURES["object_psnr"], label="sharpness", unit="px", main=("mean",), plotted=True, style=".1f")
    monkeypatch.setitem(MEASURES, "object_psnr", extra)
    write_evaluation(tmp_path, make_records())
    page = Page(write_report(tmp_path))
    assert "sharpness (px)" in format_table(metrics_of(tmp_path))
    assert "sharpness 2.1 px" in page.text
    assert (tmp_path / "plots" / "object_psnr.png").is_file()
    assert "object_psnr/mean" in read_board(tmp_path).Tags()["scalars"]


@pytest.mark.distributed
def test_a_calibrated_evaluation_has_a_plot_of_its_error_bars(tmp_path):
    shares = {"observed": [0.4, 0.9], "standard_error": [0.1, 0.1], "n": 12}
    shares = {**shares, "largest_quarter": shares}
    fitted = {"views": 77, "split": "val", "dataset": "d"}
    calibration = {"fitted_on": fitted, "expected": [0.5, 0.9], "rotation": shares, "translation": shares}
    write_evaluation(tmp_path, make_records(), calibration=calibration)
    page = write_report(tmp_path).read_text()
    assert (tmp_path / "plots" / "calibration.png").is_file()
    assert "Fitted on 77" in page
    write_evaluation(tmp_path, make_records())
    assert "Error bars" not in write_report(tmp_path).read_text()
    assert not (tmp_path / "plots" / "calibration.png").exists()
