"""The report of an evaluation: a table for the terminal, plots, one self-contained page, and the same in TensorBoard.

Everything is made from the files that an evaluation leaves, so that it can be made again without the run. The page
fetches nothing: its pictures are part of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitdist.errors import DataError
from sitdist.evaluate import plots
from sitdist.evaluate.experiments.records import ExperimentTable, mean_of
from sitdist.evaluate.measures import MEASURES
from sitdist.evaluate.report.page import page_of
from sitdist.evaluate.report.stored import Evaluation, Metrics, Row, load_evaluation, load_metrics
from sitdist.evaluate.report.tables import format_table
from sitdist.io.atomic import cannot_write, remove_leftovers, temporary_name, write_atomically
from sitdist.io.images import picture_sizes
from sitdist.io.ownership import check_ours, only_writer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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


def write_tensorboard(folder: Path, evaluation: Evaluation, figures: dict[str, bytes]) -> None:
    """One event file in `folder`, in place of earlier ones: the table's numbers as scalars, the plots as images.

    Unit bins are curves, MEASURE/STATISTIC at the bin's lower edge; ranges and objects have tags of their own,
    radius_A-B/MEASURE/STATISTIC and object_NAME/MEASURE/STATISTIC, at the run's step. Experiments are
    EXPERIMENT/MEASURE, at the turn or the number of function evaluations where there are several.
    """
    remove_leftovers(folder.parent)
    unfinished = temporary_name(folder)
    try:
        _write_events(unfinished, evaluation, figures)
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):  # and nothing else that is there
            if old.is_file():
                old.unlink()
        for new in unfinished.iterdir():
            new.rename(folder / new.name)
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_events(folder: Path, evaluation: Evaluation, figures: dict[str, bytes]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    metrics = evaluation.metrics
    with SummaryWriter(str(folder)) as board:
        _write_rows(board, metrics)
        for table in evaluation.experiments:
            for tag, value, step in _experiment_scalars(table, metrics.step):
                board.add_scalar(tag, value, step)
        _write_hyperparameters(board, evaluation)
        writer: Any = board.file_writer
        for name, png in figures.items():
            writer.add_summary(_picture_summary(f"report/{name}", png), metrics.step)


def _picture_summary(tag: str, png: bytes) -> Any:
    """The PNG file as it is; add_image would decode and encode it again."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = picture_sizes(png)[0]
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _write_rows(board: SummaryWriter, metrics: Metrics) -> None:
    for row in metrics.rows:
        low, high = row.radius
        prefix, step = ("", low) if row.is_bin else (f"radius_{low}-{high}/", metrics.step)
        for tag, value in _scalars(row).items():
            board.add_scalar(f"{prefix}{tag}", value, step)
    for row in metrics.labels:
        for tag, value in _scalars(row).items():
            board.add_scalar(f"object_{row.name}/{tag}", value, metrics.step)
    if metrics.rows:
        for name, value in metrics.floors.items():
            board.add_scalar(f"noise_floor/{name}", value, metrics.step)


def _write_hyperparameters(board: SummaryWriter, evaluation: Evaluation) -> None:
    """What tells evaluations apart, beside the means over all views."""
    from torch.utils.tensorboard.summary import hparams

    metrics = evaluation.metrics
    options = {"estimator": metrics.estimator, "generator": metrics.generator, "seed": metrics.seed}
    options |= {"generator_steps": metrics.generator_steps, "sigma": metrics.sigma, "split": metrics.split}
    options |= {"run": metrics.run, "step": metrics.step}
    results = _headline(evaluation)
    writer: Any = board.file_writer
    for part in hparams(options, dict(results)):  # add_hparams would begin a file of its own
        writer.add_summary(part, metrics.step)
    for name, value in results.items():
        board.add_scalar(name, value, metrics.step)


def _headline(evaluation: Evaluation) -> dict[str, float]:
    if evaluation.metrics.rows:
        whole = max(evaluation.metrics.rows, key=lambda row: row.n)
        return {f"hparam/{tag}": value for tag, value in _scalars(whole).items() if tag.endswith("/mean")}
    scalars = [each for table in evaluation.experiments for each in _experiment_scalars(table, 0)]
    return {f"hparam/{tag}": value for tag, value, _ in scalars}  # of several steps the last


def _experiment_scalars(table: ExperimentTable, step: int) -> Iterable[tuple[str, float, int]]:
    """Tag, mean and step of every number of an experiment's table."""
    for row in table.rows:
        names = [str(row[name]) for name in ("task", "solver", "method") if name in row]
        at = row.get("turn", row.get("function_evaluations", step))
        for name in table.measures:
            if name in row:
                yield "/".join([table.name, *names, name]), mean_of(row[name]), int(at)


def _scalars(row: Row) -> dict[str, float]:
    """MEASURE/STATISTIC -> number, for all that the row holds."""
    return {
        f"{name}/{statistic}": float(value)
        for name, summary in row.summaries().items()
        for statistic, value in summary.to_dict().items()
    }
