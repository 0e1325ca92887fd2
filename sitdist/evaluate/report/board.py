"""The same numbers and plots in TensorBoard: scalars, images, a mesh of cameras, hyperparameters."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sitdist.evaluate.experiments.tables import ExperimentTable
from sitdist.evaluate.plots import METRICS
from sitdist.evaluate.report.stored import Evaluation, Metrics, Row
from sitdist.io.atomic import cannot_write, remove_leftovers, temporary_name
from sitdist.io.images import picture_sizes

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRUE, ESTIMATED = (47, 143, 208), (224, 102, 42)  # colours
# A camera: its place, then the corners of its picture; sides, and two triangles that are the picture.
CORNERS = np.array(
    [[0.0, 0.0, 0.0], [-0.45, -0.35, -1.0], [0.45, -0.35, -1.0], [0.45, 0.35, -1.0], [-0.45, 0.35, -1.0]]
)
TRIANGLES = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1], [1, 2, 3], [1, 3, 4]])


def write_tensorboard(folder: Path, evaluation: Evaluation, figures: dict[str, bytes]) -> None:
    """One event file in `folder`, in place of earlier ones: the table's numbers as scalars, the plots as images.

    Unit bins are curves, MEASURE/STATISTIC at the bin's lower edge; ranges and objects have tags of their own,
    radius_A-B/MEASURE/STATISTIC and object_NAME/MEASURE/STATISTIC, at the run's step. Experiments are
    EXPERIMENT/MEASURE, at the turn or the number of function evaluations where there are several. Custom scalars draw
    the metrics beside their baselines.
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
        board.add_custom_scalars(_charts(metrics))
        for table in evaluation.experiments:
            for tag, value, step in _experiment_scalars(table, metrics.step):
                board.add_scalar(tag, value, step)
        cameras = evaluation.cameras()
        if cameras:
            vertices, colours, faces = camera_mesh(cameras)
            board.add_mesh("cameras", vertices, colours, faces, global_step=metrics.step)
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


def _charts(metrics: Metrics) -> dict[str, Any]:
    """The tab of custom scalars: every metric by radius with its baselines, and its mean within its 95% interval."""
    shown = [metric for metric in METRICS if metrics.measured(metric.field)]
    lines, margins = {}, {}
    for metric in shown:
        fields = [metric.field, *(baseline.field for baseline in metric.baselines)]
        lines[metric.title] = ["Multiline", [f"^{field}/mean$" for field in fields]]
        margins[metric.title] = ["Margin", [f"{metric.field}/{end}" for end in ("mean", "low", "high")]]
    return {"By radius, beside the baselines": lines, "By radius, 95% of the mean": margins} if shown else {}


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
        for measure in table.measures:
            value: Any = row.get(measure)
            if value is not None:
                number = value["mean"] if isinstance(value, dict) else value
                yield "/".join([table.name, *names, measure]), float(number), int(at)


def camera_mesh(
    cameras: list[tuple[list[float], list[float] | None]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices [1, 5 N, 3], colours [1, 5 N, 3] and triangles [1, 6 N, 3] of N true and estimated cameras.

    `cameras`: true and estimated poses, each the upper three rows of camera_to_world, row-major.
    """
    coloured = [(true, TRUE) for true, _ in cameras] + [(pose, ESTIMATED) for _, pose in cameras if pose]
    poses = np.array([pose for pose, _ in coloured], dtype=float).reshape(-1, 3, 4)
    length = 0.08 * float(np.abs(poses[:, :, 3]).max())
    vertices = length * CORNERS @ poses[:, :, :3].transpose(0, 2, 1) + poses[:, None, :, 3]  # [N, 5, 3]
    colours = np.repeat(np.array([colour for _, colour in coloured], np.uint8), len(CORNERS), axis=0)
    faces = TRIANGLES + len(CORNERS) * np.arange(len(poses))[:, None, None]
    return vertices.reshape(1, -1, 3).astype(np.float32), colours[None], faces.reshape(1, -1, 3).astype(np.int32)


def _scalars(row: Row) -> dict[str, float]:
    """MEASURE/STATISTIC -> number, for all that the row holds."""
    return {
        f"{measure}/{statistic}": float(value)
        for measure, summary in row.summaries().items()
        for statistic, value in summary.to_dict().items()
    }
