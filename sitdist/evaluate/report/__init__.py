"""The report of an evaluation: a table for the terminal, plots, one self-contained page, and the same in TensorBoard.

Everything is made from the files that an evaluation leaves, so that it can be made again without the run. The page
fetches nothing: its pictures are part of it.
"""

from __future__ import annotations

from pathlib import Path

from sitdist.errors import DataError
from sitdist.evaluate import plots
from sitdist.evaluate.report.board import write_tensorboard
from sitdist.evaluate.report.page import page_of
from sitdist.evaluate.report.stored import Evaluation, Row, load_evaluation, load_metrics
from sitdist.evaluate.report.tables import format_table
from sitdist.io.atomic import write_atomically
from sitdist.io.ownership import check_ours, only_writer

__all__ = ["Row", "format_table", "load_metrics", "report_again", "write_report"]

# All plots that a report may have; those that it has not are removed when it is written again.
PLOTS = (
    *("cameras_side", "cameras_above", "sphere_training", "sphere_error", "views"),
    *("calibration_rotation", "calibration_translation"),
    *(metric.field for metric in plots.METRICS),
    *(f"{name}_{part}" for name, parts in plots.PARTS.items() for part in parts),
)


def report_again(folder: Path) -> Path:
    """`write_report` in a folder that must be an evaluation's, and that no other process writes in meanwhile."""
    folder = Path(folder)
    if not check_ours(folder, "evaluation"):
        raise DataError(f"{folder}: holds no evaluation; run `sitdist eval` first")
    evaluation = load_evaluation(folder)
    with only_writer(folder, "evaluation"):
        return _write(evaluation)


def write_report(folder: Path) -> Path:
    """Write plots/*.png, tensorboard/ and report.html into an evaluation's folder, in place of earlier ones.

    DataError if metrics.json, records.csv or images.npz is missing, damaged or of another evaluation. Returns the path
    of report.html.
    """
    return _write(load_evaluation(Path(folder)))


def _write(evaluation: Evaluation) -> Path:
    folder, figures = evaluation.folder, _figures(evaluation)
    page = page_of(evaluation, figures)
    for name in set(PLOTS) - figures.keys():
        (folder / "plots" / f"{name}.png").unlink(missing_ok=True)
    for name, png in figures.items():
        _write_bytes(folder / "plots" / f"{name}.png", png)
    write_tensorboard(folder / "tensorboard", evaluation, figures)
    _write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def _write_bytes(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _figures(evaluation: Evaluation) -> dict[str, bytes]:
    """PNG files by name."""
    metrics, records = evaluation.metrics, evaluation.records
    figures = {
        metric.field: plots.metric_figure(records, metric, metrics.training_radius, metrics.floors.get(metric.field))
        for metric in plots.METRICS
        if metrics.measured(metric.field)
    }
    if metrics.rows and not metrics.no_pose:
        figures |= {f"cameras_{side}": plots.cameras_figure(records, side) for side in plots.SIDES}
        if metrics.training_coverage:
            figures["sphere_training"] = plots.training_sphere_figure(metrics.training_coverage)
            figures["sphere_error"] = plots.error_sphere_figure(records)
    if metrics.calibration is not None:
        bars = metrics.calibration
        figures |= {f"calibration_{name}": plots.calibration_figure(bars, name) for name in ("rotation", "translation")}
    for table in evaluation.experiments:
        figures |= plots.experiment_figures(table.name, table.result, table.records)
    if evaluation.pictures:
        figures["views"] = plots.views_figure(records, evaluation.pictures)
    return {name: plots.to_png(figure) for name, figure in figures.items()}
