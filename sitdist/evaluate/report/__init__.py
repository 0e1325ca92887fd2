"""The report of an evaluation: a table for the terminal, plots, one self-contained page, and the same in TensorBoard.

Everything is made from the files that an evaluation leaves, so that it can be made again without the run. The page
fetches nothing: its pictures are part of it.
"""

from __future__ import annotations

from pathlib import Path

from sitdist.errors import DataError
from sitdist.evaluate import plots
from sitdist.evaluate.measures import MEASURES
from sitdist.evaluate.report.board import write_tensorboard
from sitdist.evaluate.report.page import page_of
from sitdist.evaluate.report.stored import Evaluation, Row, load_evaluation, load_metrics
from sitdist.evaluate.report.tables import format_table
from sitdist.io.atomic import write_atomically
from sitdist.io.ownership import check_ours, only_writer

__all__ = ["Row", "format_table", "load_metrics", "report_again", "write_report"]

# All plots that a report may have, or had in earlier versions; those that it has not are removed when it is written.
PLOTS = (
    *(name for name, measure in MEASURES.items() if measure.plotted),
    *("calibration", "sphere", "cameras"),
    *("mae", "ssim", "lpips", "views", "cameras_side", "cameras_above", "sphere_training", "sphere_error"),
    *("calibration_rotation", "calibration_translation"),
    *("turntable_circle", "turntable_rotation_error_deg", "turntable_psnr"),
    *("interpolation_psnr_to_last", "interpolation_lpips_to_last", "interpolation_off_the_way_deg"),
    *("cycle_rotation", "cycle_translation", "cycle_psnr"),
    *("solvers_rotation_error_deg", "solvers_translation_error", "solvers_psnr"),
    *("solvers_ms_pose", "solvers_ms_picture"),
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
    """PNG files by name: errors by radius, how well error bars hold or else where errors are large, and cameras."""
    metrics, records = evaluation.metrics, evaluation.records
    figures = {
        name: plots.radius_figure(records, name, metrics.training_radius, metrics.floors.get(name))
        for name, measure in MEASURES.items()
        if measure.plotted and metrics.measured(name)
    }
    if metrics.calibration is not None:
        figures["calibration"] = plots.calibration_figure(metrics.calibration)
    elif metrics.measured("rotation_error_deg"):
        figures["sphere"] = plots.sphere_figure(records)
    cameras = [(true, estimated) for true, estimated in evaluation.cameras() if estimated is not None]
    if cameras:
        figures["cameras"] = plots.cameras_figure(cameras)
    return {name: plots.to_png(figure) for name, figure in figures.items()}
