"""Errors and speed of every pose estimator over a split, and of one step beside the source's protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitdist import checks
from sitdist.config.experiment import EvaluateConfig
from sitdist.config.load import parse
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.store import store_of
from sitdist.distributed.accelerator import log
from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.views import SplitViews, ViewBatch
from sitdist.flow.estimate import SOURCE_STEPS, EstimateOptions, PoseEstimate, estimate_pose
from sitdist.flow.predict import guided
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.inference.pose_reader import PoseReader
from sitdist.inference.run import LoadedRun, check_codec, load_run
from sitdist.io.files import require_memory
from sitdist.model.codec import latent_mean

WAYS: tuple[dict[str, Any], ...] = (
    {"estimator": "one_step"},
    {"estimator": "one_step", "readout": "look_at"},
    {"estimator": "multi_zoom", "readout": "look_at"},
    {"estimator": "euler", "estimator_steps": 50},
    {"estimator": "heun", "estimator_steps": 10},
    {"estimator": "midpoint", "estimator_steps": 10},
    {"estimator": "exact", "generator": "heun", "generator_steps": 10},
    {"estimator": "euler_249"},
)
PROTOCOL_VIEWS = 8  # read by the source's protocol, one at a time
PIXEL_BYTES = 24  # of a view's pixels while they are loaded
BEST_OF = 3  # rounds of the fast way


@dataclass(frozen=True)
class Errors:
    """Errors over some views: rotation in degrees, translation in the dataset's units."""

    rotation_mean_deg: float
    rotation_median_deg: float
    translation_mean: float
    translation_median: float

    @classmethod
    def of(cls, estimated: Tensor, true: Tensor) -> Errors:
        """The errors of estimated camera_to_world [N, 4, 4]; DataError if one is not finite."""
        if not estimated.isfinite().all():
            raise DataError("a pose that was read is not finite; the checkpoint has diverged, use an earlier one")
        rotation = rotation_error_deg(estimated[:, :3, :3], true[:, :3, :3])
        translation = translation_error(estimated, true)
        return cls(*(float(value) for each in (rotation, translation) for value in (each.mean(), each.quantile(0.5))))


@dataclass(frozen=True)
class Row:
    """One estimator of one run; `converged` is the share of the views."""

    run: str
    sigma: float
    estimator: str
    readout: str
    errors: Errors
    ms_per_picture: float
    function_evaluations: float
    converged: float


@dataclass(frozen=True)
class Protocols:
    """Pictures per second of one step on a batch and of the source's protocol, and errors over the same views."""

    run: str
    views: int
    batch: int
    one_step: float
    source: float
    one_step_errors: Errors
    source_errors: Errors

    @property
    def ratio(self) -> float:
        """How many times faster one step is."""
        return self.one_step / self.source


@dataclass(frozen=True)
class Bench:
    """All results; `skipped` says which estimators a run does not support, and why."""

    split: str
    views: int
    device: str
    rows: list[Row]
    protocols: list[Protocols]
    skipped: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = asdict(self)
        for value, protocols in zip(values["protocols"], self.protocols, strict=True):
            value["ratio"] = protocols.ratio
        return values


def bench_pose(runs: Sequence[Path], split: str, views: int | None, batch: int, device: str) -> Bench:
    """Measure all of WAYS on the first `views` views of a split of every run's own dataset (None: on all of them).

    One step and the source's protocol are also measured on the first PROTOCOL_VIEWS: the protocol reads one picture at
    a time by 249 explicit Euler steps with guidance, which evaluates every step twice.
    """
    for name, value in (("views", views), ("batch", batch)):
        if value is not None:
            checks.whole(f"--{name}", value, 1)
    rows: list[Row] = []
    protocols: list[Protocols] = []
    skipped: list[str] = []
    count = 0
    for run in runs:
        loaded = load_run(run, device)
        why = loaded.config.flow.why_no_pose()
        if why:
            raise ConfigError(f"{run}: {why}; give a run that reads poses")
        picked = _load(loaded, split, views, device)
        count = len(picked.labels)
        for way in WAYS:
            try:
                settings = _settings(loaded, way)
                reader = PoseReader.open(loaded, settings)
            except ConfigError as error:
                skipped.append(f"{run}: {error}")
                continue
            rows.append(_row(run, loaded, reader, settings, picked, batch))
            log.info("%s %s %s", run, rows[-1].estimator, rows[-1].readout)
        if loaded.config.flow.why_no_picture() is None:
            protocols.append(_protocols(run, loaded, picked, batch))
    return Bench(split, count, str(device), rows, protocols, skipped)


def _settings(loaded: LoadedRun, way: dict[str, Any]) -> EvaluateConfig:
    values = loaded.config.evaluate.model_dump() | {"readout": "svd"} | way
    return parse(EvaluateConfig, values, "estimator")


def _load(loaded: LoadedRun, split: str, views: int | None, device: str) -> ViewBatch:
    data = store_of(loaded.config).folder
    check_codec(data, load_manifest(data), loaded)
    of_split = SplitViews(data, split, None, None)
    references = sorted(of_split.references(), key=lambda view: view.position)[:views]
    need = PIXEL_BYTES * len(references) * loaded.manifest.image_size**2
    require_memory(need, f"{len(references):,} views", "give fewer by --views")
    batch = of_split.load(tuple(references))
    return ViewBatch(**{name: value.to(device) for name, value in vars(batch).items()})


def _row(
    run: Path, loaded: LoadedRun, reader: PoseReader, settings: EvaluateConfig, views: ViewBatch, batch: int
) -> Row:
    count = len(views.labels)
    columns = (views.images, views.moments, views.labels, views.intrinsics)
    reader.estimate(*(column[:2] for column in columns))  # whatever happens only once

    def read() -> list[PoseEstimate]:
        chunks = zip(*(column.split(batch) for column in columns), strict=True)
        return [reader.estimate(*chunk) for chunk in chunks]

    seconds, estimates = _timed(read, views.labels.device)
    counts = torch.cat([estimate.function_evaluations for estimate in estimates]).double()
    converged = torch.cat([estimate.converged for estimate in estimates]).double()
    estimated = torch.cat([estimate.camera_to_world for estimate in estimates])
    return Row(
        str(run),
        loaded.endpoint.sigma,
        _name(settings),
        settings.readout,
        Errors.of(estimated, views.camera_to_world),
        1000.0 * seconds / count,
        float(counts.mean()),
        float(converged.mean()),
    )


def _name(settings: EvaluateConfig) -> str:
    match settings.estimator:
        case "euler" | "heun" | "midpoint":
            return f"{settings.estimator}, {settings.estimator_steps} steps"
        case "exact":
            return f"exact, of {settings.generator}, {settings.generator_steps} steps"
        case "multi_zoom":
            return f"multi_zoom, {len(settings.zooms)} zooms"
        case name:
            return name


def _protocols(run: Path, loaded: LoadedRun, views: ViewBatch, batch: int) -> Protocols:
    latents, labels, true = latent_mean(views.moments), views.labels, views.camera_to_world
    need = 4 * batch * latents[0].numel()
    require_memory(need, f"a batch of {batch:,} views", "give a smaller --batch")
    repeats = -(-batch // len(labels))  # a whole batch, also of few views
    many, of_many = (each.repeat(repeats, *[1] * (each.ndim - 1))[:batch] for each in (latents, labels))
    device, few = labels.device, min(PROTOCOL_VIEWS, len(labels))

    def one_step(x1: Tensor, y: Tensor) -> PoseEstimate:
        return estimate_pose(loaded.model, loaded.interpolant, x1, y, loaded.statistics, endpoint=loaded.endpoint)

    def source() -> Tensor:
        model, options = guided(loaded.model, 1.0), EstimateOptions("euler_249")  # at scale 1 guidance changes no pose
        one = [
            estimate_pose(model, loaded.interpolant, x1, y, loaded.statistics, options, loaded.endpoint).camera_to_world
            for x1, y in zip(latents[:few].split(1), labels[:few].split(1), strict=True)
        ]
        return torch.cat(one)

    one_step(many, of_many)
    fast = min(_timed(lambda: one_step(many, of_many), device)[0] for _ in range(BEST_OF))
    slow, estimated = _timed(source, device)
    return Protocols(
        str(run),
        few,
        batch,
        batch / fast,
        few / slow,
        Errors.of(one_step(latents[:few], labels[:few]).camera_to_world, true[:few]),
        Errors.of(estimated, true[:few]),
    )


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds, and what came out."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def format_bench(bench: Bench) -> str:
    """The tables as text."""
    head = f"{'estimator':<30}{'read-out':>10}{'mean deg':>10}{'median':>9}{'mean transl.':>14}{'median':>9}"
    head += f"{'ms/picture':>12}{'evaluations':>13}"
    lines = [f"{bench.split}, {bench.views} views, {bench.device}"]
    for run in dict.fromkeys(row.run for row in bench.rows):
        rows = [row for row in bench.rows if row.run == run]
        lines += ["", f"{run}, sigma {rows[0].sigma:g}", head]
        for row in rows:
            errors = row.errors
            flag = "" if row.converged == 1.0 else f"  {100.0 * (1.0 - row.converged):.1f}% not converged"
            lines.append(
                f"{row.estimator:<30}{row.readout:>10}{errors.rotation_mean_deg:>10.3f}"
                f"{errors.rotation_median_deg:>9.3f}{errors.translation_mean:>14.4f}{errors.translation_median:>9.4f}"
                f"{row.ms_per_picture:>12.3g}{row.function_evaluations:>13.4g}{flag}"
            )
    for each in bench.protocols:
        lines += [
            "",
            f"{each.run}: one step, batches of {each.batch}: {each.one_step:.4g} pictures/s; the source's protocol "
            f"(one picture at a time, {SOURCE_STEPS} explicit Euler steps, guidance): {each.source:.4g}; "
            f"ratio {each.ratio:.0f}",
            f"over the same {each.views} views: {_short(each.one_step_errors)} and {_short(each.source_errors)}",
        ]
    return "\n".join(lines + ([""] if bench.skipped else []) + [f"not measured: {text}" for text in bench.skipped])


def _short(errors: Errors) -> str:
    return f"{errors.rotation_mean_deg:.3f} deg / {errors.translation_mean:.4f}"
