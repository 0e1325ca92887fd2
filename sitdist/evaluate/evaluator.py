"""Evaluate a run: the pose read off every view, the view rendered from its pose, and both against their baselines.

The route of one view: picture -> latent -> `estimate_pose` -> pose error; pose -> `generate` -> decode -> MAE, PSNR,
SSIM, LPIPS. Every process takes the next work unit that nobody has taken, and leaves its records on disk when it is
finished; the main process merges them with an exactly-once check. Between the plan and the merge they never meet.
Experiments beside this one (`sitdist.evaluate.experiments`) are work of the same kind.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import platform
import shlex
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

import sitdist
from sitdist import checks
from sitdist.config.experiment import Config, EvaluateConfig, FlowConfig
from sitdist.config.load import parse, set_key
from sitdist.config.recipe import Recipe, SceneSource
from sitdist.dataset.manifest import DatasetManifest, load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.store import store_of
from sitdist.distributed.accelerator import log, processes
from sitdist.errors import ConfigError, DataError
from sitdist.evaluate import metrics
from sitdist.evaluate.baselines import LATENTS_AT_MOST, NoiseFloor, TrainingViews, constant_pose, noise_floor
from sitdist.evaluate.coverage import coverage_counts
from sitdist.evaluate.experiments import EXPERIMENTS
from sitdist.evaluate.summary import label_rows, summary_rows, with_symmetries
from sitdist.evaluate.symmetry import Symmetries, find_symmetries
from sitdist.evaluate.tasks import Producer, Task, do_left, do_tasks, merge, plan_conflict, prepare
from sitdist.evaluate.units import BINS_AT_MOST, RECORD, Unit, ViewRecord, make_units, merge_pictures, pictured, thinned
from sitdist.evaluate.views import VIEWS_PER_BIN_AT_MOST, SceneViews, SplitViews, Views, to_uint8
from sitdist.flow.choices import PICTURE_ESTIMATORS
from sitdist.flow.estimate import PoseEstimate
from sitdist.flow.sample import sample_latents
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.inference import calibration as calibrate
from sitdist.inference.options import build_estimate, build_sampling
from sitdist.inference.pose_reader import PoseReader
from sitdist.inference.run import LoadedRun, check_codec, load_run
from sitdist.io.atomic import write_atomically
from sitdist.io.json_file import write_json
from sitdist.io.npz import save_arrays
from sitdist.io.ownership import check_ours, only_writer
from sitdist.io.tensors import tensors_sha256
from sitdist.model.codec import latent_mean

VIEWS_AT_MOST = 2_000_000


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, and how; None means as the run's config says.

    split: the split to evaluate, by default test.
    radii: evaluate radii a to b in unit bins. Without a split, on a dataset of the built-in scene, `views_per_radius`
        new views of every bin are rendered; otherwise the split is limited to these radii.
    views_per_radius: the views of every bin; those of a split are its first ones by key.
    data: the dataset's folder. out: the folder for the results, by default RUN/eval/<split> or RUN/eval/radii_<a>-<b>.
    experiment: one of EXPERIMENTS, or all of them. max_views: at most this many views in each.
    uncalibrated: leave out the error bars and the trust of the run's calibration.
    set: other keys of the config's `evaluate`, as evaluate.KEY=VALUE.
    """

    split: str | None = None
    radii: tuple[int, int] | None = None
    views_per_radius: int | None = None
    data: str | Path | None = None
    out: Path | None = None
    estimator: str | None = None
    estimator_steps: int | None = None
    readout: str | None = None
    refine: str | None = None
    generator: str | None = None
    generator_steps: int | None = None
    batch: int | None = None
    seed: int | None = None
    lpips_backbone: str | None = None
    uncalibrated: bool = False
    experiment: str = "radii"
    max_views: int | None = None
    set: tuple[str, ...] = ()


def evaluate(run: Path, options: EvalOptions) -> Path:
    """Evaluate `run`: write records.csv, metrics.json, images.npz and the report; returns the folder they are in.

    Started again it goes on with the units that are not on disk yet, on any number of processes; a folder that holds
    units of another checkpoint, dataset or option is a ConfigError, one that is another's or in use a DataError. Every
    process calls it; the main one is the folder's only writer meanwhile, and merges.
    """
    with processes() as (accelerator, ranks), ExitStack() as held:
        main = accelerator.is_main_process
        with ranks.raise_together():
            evaluation, producers = _open_all(Path(run), options, accelerator.device)
        with ranks.raise_together():
            if main:
                _take_folders(evaluation, producers, held)
            pending = [prepare(producer) for producer in producers] if main else []
        pending = ranks.broadcast(pending)
        tasks = [len(producer.tasks()) for producer in producers]
        log.info("%d of %d work units to evaluate, into %s", sum(map(len, pending)), sum(tasks), evaluation.out)
        if evaluation.why_uncalibrated:
            log.info("no error bars: %s", evaluation.why_uncalibrated)
        do_tasks(producers, pending, accelerator)
        ranks.barrier()
        with ranks.raise_together():
            if main:
                do_left(producers)
                _write_all(evaluation, producers)
    return evaluation.out


def _open_all(run: Path, options: EvalOptions, device: torch.device) -> tuple[_Evaluation, list[Producer]]:
    """The evaluation, and what is to be measured for it."""
    evaluation = _open(run, options, device)
    chosen = EXPERIMENTS if options.experiment == "all" else (options.experiment,)
    producers: list[Producer] = [evaluation] if "radii" in chosen else []
    flow = evaluation.loaded.config.flow
    for name in chosen[1:] if "radii" in chosen else chosen:
        reason = _why_not(name, flow)
        if reason and options.experiment != "all":
            raise ConfigError(f"--experiment {name}: {reason}; choose another")
        if reason:
            log.info("%s is not measured: %s", name, reason)
        else:
            producers.append(_experiment(name, evaluation, options))
    return evaluation, producers


def _take_folders(evaluation: _Evaluation, producers: list[Producer], held: ExitStack) -> None:
    """Become the only writer in the folders of the evaluation and its producers until `held` ends.

    Nothing is written unless all of them are ours or new, and hold nothing that disagrees.
    """
    folders = dict.fromkeys([evaluation.out, *(producer.out for producer in producers)])
    for folder in folders:
        check_ours(folder, "evaluation")
    _check_beside(evaluation)
    for folder in folders:
        held.enter_context(only_writer(folder, "evaluation"))
    _check_beside(evaluation)  # again, as another process may have written there meanwhile


def _check_beside(evaluation: _Evaluation) -> None:
    """ConfigError if results that are there, of this or another experiment, cannot stand in one report with these."""
    shared = evaluation.plan.keys() - {"units", "views", "calibration"}
    for path in sorted(evaluation.out.glob("plan.json")) + sorted(evaluation.out.glob("*/plan.json")):
        problem = plan_conflict(path.parent, evaluation.plan, shared)
        if problem:
            raise ConfigError(problem)


def _why_not(name: str, flow: FlowConfig) -> str | None:
    """Why the model cannot do an experiment; None if it can."""
    no_picture, no_pose = flow.why_no_picture(), flow.why_no_pose()
    needs_both = {"cycle": no_picture or no_pose, "interpolation": no_picture}
    return needs_both.get(name)


def _experiment(name: str, evaluation: _Evaluation, options: EvalOptions) -> Producer:
    """The experiment called `name`, with its results in a folder of that name in the evaluation's."""
    from sitdist.evaluate.experiments.common import Tools
    from sitdist.evaluate.experiments.cycle import Cycle
    from sitdist.evaluate.experiments.interpolation import Interpolation
    from sitdist.evaluate.experiments.solvers import Solvers
    from sitdist.evaluate.experiments.turntable import Turntable

    recipe = parse(Recipe, load_manifest(evaluation.data).recipe, f"{evaluation.data / 'manifest.json'}: recipe")
    source = recipe.splits["train"]
    tools = Tools(
        loaded=evaluation.loaded,
        settings=evaluation.settings,
        statistics=evaluation.statistics,
        views=evaluation.views,
        scene=source if isinstance(source, SceneSource) else None,
        training_poses=evaluation.training.camera_to_world(),
        focal=evaluation.training.intrinsics([0])[0],
        lpips=evaluation.lpips,
        device=evaluation.device,
    )
    kinds = {kind.name: kind for kind in (Turntable, Interpolation, Cycle, Solvers)}
    return kinds[name](tools, evaluation.out / name, evaluation.plan, options.max_views)


def _write_all(evaluation: _Evaluation, producers: list[Producer]) -> None:
    """Merge everything with the exactly-once check, and write the tables and the report."""
    from sitdist.evaluate.report import write_report

    for producer in producers:
        producer.finish(*merge(producer))
    if not (evaluation.out / "metrics.json").is_file():
        evaluation.write_summary([])  # no radii were measured: the rest of it is still what the report tells
    write_report(evaluation.out)


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Evaluation:
    """Everything an evaluation needs, the same on every process; `title` is the split, or the radii rendered for it."""

    run: Path
    out: Path
    data: Path
    title: str
    loaded: LoadedRun
    calibration: calibrate.RunCalibration | None
    why_uncalibrated: str
    settings: EvaluateConfig
    statistics: PoseStatistics
    poses: PoseReader
    views: Views
    units: list[Unit]
    training: ShardReader
    lpips: metrics.Lpips | None
    background: Tensor | None
    plan: dict[str, Any]
    device: torch.device
    record: ClassVar[TypeAdapter[Any]] = RECORD

    @cached_property
    def training_views(self) -> TrainingViews:
        """At most LATENTS_AT_MOST training views by stride; loaded by the first unit that a process measures."""
        indices = list(range(0, len(self.training), self._training_stride))
        chunks = [indices[start : start + 1024] for start in range(0, len(indices), 1024)]
        latents = torch.cat([latent_mean(self.training.moments(chunk).float()) for chunk in chunks])
        camera_to_world, labels = self.training.camera_to_world()[indices], self.training.labels()[indices]
        return TrainingViews(latents.to(self.device), camera_to_world.to(self.device), labels.to(self.device))

    @property
    def _training_stride(self) -> int:
        return math.ceil(len(self.training) / LATENTS_AT_MOST)

    @cached_property
    def constant_pose(self) -> Tensor:
        return constant_pose(self.training.camera_to_world()).to(self.device)

    def tasks(self) -> list[Task]:
        """One of every unit."""
        return [Task(unit.name, tuple(view.key for view in unit.views), len(unit.views)) for unit in self.units]

    def measure(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Records of a unit's views, and key, true and rendered of its first and its worst ones."""
        unit = self.units[int(task.name.removeprefix("unit_"))]
        records, true, rendered = self._measure(unit)
        shown = pictured(unit, records)
        pictures = {"key": np.array([task.keys[i] for i in shown]), "true": true[shown]}
        return [asdict(record) for record in records], (
            pictures if rendered is None else pictures | {"rendered": rendered[shown]}
        )

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None:
        """Write the results."""
        self.write_results([ViewRecord(**record) for record in records], merge_pictures(arrays, self.units))

    @torch.no_grad()
    def _measure(self, unit: Unit) -> tuple[list[ViewRecord], np.ndarray, np.ndarray | None]:
        """Records of the unit's views, and true and rendered pictures [B, H, W, 3] uint8.

        What the model cannot do is not measured.
        """
        codec = self.loaded.codec
        views = self.views.load(unit.views)
        images, moments = views.images.to(self.device), views.moments.to(self.device)
        true, labels = views.camera_to_world.to(self.device), views.labels.to(self.device)
        intrinsics, latents = views.intrinsics.to(self.device), latent_mean(moments)

        ceiling = codec.decode(latents)
        nearest = self.training_views.nearest_by_latent(latents, labels)
        nearest_images = codec.decode(self.training_views.nearest_by_camera(true, labels))
        values: dict[str, Tensor | list[float | None]] = {
            "codec_mae": metrics.mean_absolute_error(ceiling, images),
            "codec_psnr": metrics.psnr(ceiling, images),
            "codec_ssim": metrics.ssim(ceiling, images),
            "constant_rotation_error_deg": rotation_error_deg(self.constant_pose[:3, :3], true[:, :3, :3]),
            "constant_translation_error": translation_error(self.constant_pose, true),
            "nearest_rotation_error_deg": rotation_error_deg(nearest[:, :3, :3], true[:, :3, :3]),
            "nearest_translation_error": translation_error(nearest, true),
            "nearest_psnr": metrics.psnr(nearest_images, images),
            "codec_object_psnr": self._object_psnr(ceiling, images),
            "label": labels,
            "true": true[:, :3].flatten(1),
        }
        flow, rendered = self.loaded.config.flow, None
        if flow.why_no_pose() is None:
            values |= self._pose_errors(self._estimate(images, moments, labels, intrinsics), true, intrinsics)
        if flow.why_no_picture() is None:
            rendered = codec.decode(self._generate(unit, true, intrinsics, labels, latents.shape[1:]))
            values |= self._picture_errors(rendered, images)
        columns: dict[str, list[Any]] = {field.name: [None] * len(labels) for field in fields(ViewRecord)}
        columns |= {name: value if isinstance(value, list) else value.tolist() for name, value in values.items()}
        columns |= {name: [getattr(view, name) for view in unit.views] for name in ("key", "radius", "bin")}
        records = [ViewRecord(**{name: column[i] for name, column in columns.items()}) for i in range(len(unit.views))]
        return records, to_uint8(images), None if rendered is None else to_uint8(rendered)

    def _estimate(self, images: Tensor, moments: Tensor, labels: Tensor, intrinsics: Tensor) -> PoseEstimate:
        estimate = self.poses.estimate(images, moments, labels, intrinsics)
        if self.calibration is None:
            return estimate
        return self.calibration.fill(self.loaded, estimate, latent_mean(moments), labels)

    def _pose_errors(self, estimate: PoseEstimate, true: Tensor, intrinsics: Tensor) -> dict[str, Tensor]:
        estimated = estimate.camera_to_world
        values = {
            "rotation_error_deg": rotation_error_deg(estimated[:, :3, :3], true[:, :3, :3]),
            "translation_error": translation_error(estimated, true),
            "estimated": estimated[:, :3].flatten(1),
            "function_evaluations": estimate.function_evaluations,
            "converged": estimate.converged,
        }
        if estimate.trust is not None:
            values |= calibrate.bar_columns(estimate)
        if estimate.intrinsics is not None:
            values["focal_error"] = 100.0 * (estimate.intrinsics[:, 0] / intrinsics[:, 0] - 1.0).abs()
        return values

    def _object_psnr(self, rendered: Tensor, images: Tensor) -> list[float | None]:
        if self.background is None:
            return [None] * len(images)
        return metrics.object_psnr(rendered, images, self.background)

    def _picture_errors(self, rendered: Tensor, images: Tensor) -> dict[str, Tensor | list[float | None]]:
        values: dict[str, Tensor | list[float | None]] = {
            "mae": metrics.mean_absolute_error(rendered, images),
            "psnr": metrics.psnr(rendered, images),
            "object_psnr": self._object_psnr(rendered, images),
            "ssim": metrics.ssim(rendered, images),
        }
        return values if self.lpips is None else values | {"lpips": self.lpips(rendered, images)}

    def _generate(
        self, unit: Unit, camera_to_world: Tensor, intrinsics: Tensor, labels: Tensor, shape: torch.Size
    ) -> Tensor:
        """Latents generated from the true poses, with noise keyed by (seed, position of the view)."""
        return sample_latents(
            self.loaded.model,
            self.loaded.interpolant,
            self.loaded.endpoint,
            standardize(camera_to_world, self.statistics, intrinsics),
            labels,
            shape,
            build_sampling(self.settings),
            self.settings.seed,
            "eval",
            self._positions(unit),
        )

    def _positions(self, unit: Unit) -> Tensor:
        return torch.tensor([view.position for view in unit.views], device=self.device)

    # ------------------------------------------------------------------------------------------------------ results

    def write_results(self, records: list[ViewRecord], pictures: dict[str, np.ndarray]) -> None:
        """records.csv (one row a view, sorted by key), images.npz and metrics.json."""
        symmetries = self._symmetries()
        if symmetries is not None:
            records = with_symmetries(records, symmetries.symmetries)
        table = io.StringIO()
        writer = csv.DictWriter(table, list(records[0].row()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(record.row() for record in records)
        write_atomically(self.out / "records.csv", lambda path: path.write_text(table.getvalue()))
        save_arrays(self.out / "images.npz", pictures)
        self.write_summary(records, symmetries)

    def _symmetries(self) -> Symmetries | None:
        if self.loaded.config.flow.why_no_pose() is not None:
            return None
        return find_symmetries(self.training_views, torch.arange(0, len(self.training), self._training_stride))

    def write_summary(self, records: list[ViewRecord], symmetries: Symmetries | None = None) -> None:
        """metrics.json, without rows where there are no records."""
        write_json(self.out / "metrics.json", self._summary(records, symmetries))

    def _summary(self, records: list[ViewRecord], symmetries: Symmetries | None) -> dict[str, Any]:
        settings, flow, endpoint = self.settings, self.loaded.config.flow, self.loaded.endpoint
        compared = math.ceil(len(self.training) / self._training_stride)
        return {
            "run": str(self.run),
            "step": self.loaded.step,
            "dataset": str(self.data),
            "split": self.title,
            "estimator": settings.estimator,
            "readout": settings.readout,
            "refine": settings.refine,
            "function_evaluations": max((record.function_evaluations or 0 for record in records), default=None),
            "not_converged": sum(record.converged is False for record in records),
            "generator": settings.generator,
            "generator_steps": settings.generator_steps,
            "guidance": settings.guidance,
            "seed": settings.seed,
            "sigma": endpoint.sigma,
            "noise_floor": None if endpoint.kind == "gaussian" else asdict(self._noise_floor()),
            "calibration": calibrate.coverage_summary(self.calibration, records)
            if self.calibration and records
            else None,
            "why_uncalibrated": self.why_uncalibrated or None,
            "no_pose": flow.why_no_pose(),
            "no_picture": flow.why_no_picture(),
            "lpips": metrics.LPIPS_NOT_MEASURED if self.lpips is None else self.lpips.identity(),
            "training_radius": list(self.loaded.manifest.splits["train"].radius),
            "radius_augmented": self.loaded.manifest.splits["train"].radius_augmented,
            "training_views": {"count": len(self.training), "compared": compared, "stride": self._training_stride},
            "versions": {
                "sitdist": sitdist.__version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
            },
            "training_coverage": coverage_counts(self.training.camera_to_world()[:, :3, 3].numpy()),
            "provenance": self._provenance(),
            "config": self.loaded.config.model_dump(mode="json"),
            "background": None if self.background is None else self.background.tolist(),
            "symmetry": None if symmetries is None else symmetries.to_dict(),
            "rows": summary_rows(records) if records else [],
            "labels": label_rows(records, {entry.label: entry.name for entry in self.loaded.manifest.objects}),
        }

    def _provenance(self) -> dict[str, str]:
        """What was run on what."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return {
            "command": shlex.join(["sitdist", *sys.argv[1:]]),
            "dataset fingerprint": self.plan["dataset"],
            "weights": self.plan["weights"],
            "hardware": f"{self.device.type}, {device}, {os.cpu_count()} processors",
            "system": platform.platform(),
        }

    def _noise_floor(self) -> NoiseFloor:
        shape, endpoint = self.loaded.manifest.latent, self.loaded.endpoint
        latent, sigma = (shape.channels, shape.height, shape.width), endpoint.sigma / endpoint.gain
        return noise_floor(self.training.camera_to_world(), self.statistics, sigma, latent, self.settings.seed)


# ------------------------------------------------------------------------------------------------------------ opening


def _open(run: Path, options: EvalOptions, device: torch.device) -> _Evaluation:
    loaded = load_run(run, device)
    settings = _settings(options, loaded)
    if settings.average != loaded.config.evaluate.average:
        loaded = load_run(run, device, average=settings.average)
    data = store_of(loaded.config, options.data).folder
    manifest = load_manifest(data)
    check_codec(data, manifest, loaded)
    poses = PoseReader.open(loaded, settings)
    views, title = _choose_views(data, manifest, loaded, options, settings, device)
    units = make_units(thinned(views.references(), options.max_views), settings.batch)
    lpips = metrics.Lpips(settings.lpips_backbone, device) if settings.lpips_backbone else None
    calibration, why_uncalibrated = _calibration(run, loaded, options, settings, manifest)
    return _Evaluation(
        run=run,
        out=Path(options.out) if options.out else run / "eval" / title,
        data=data,
        title=title,
        loaded=loaded,
        calibration=calibration,
        why_uncalibrated=why_uncalibrated,
        settings=settings,
        statistics=PoseStatistics.from_dict(loaded.manifest.statistics),
        poses=poses,
        views=views,
        units=units,
        training=ShardReader(_training_folder(loaded, data), "train"),
        lpips=lpips,
        background=views.background(),
        plan=_plan(loaded, settings, title, data, units, lpips)
        | {
            "calibration": None if calibration is None else calibration.sha256(),
            "refine": None if poses.refiner is None else poses.refiner.fingerprint(),
        },
        device=device,
    )


def _settings(options: EvalOptions, loaded: LoadedRun) -> EvaluateConfig:
    """The run's evaluation settings, with every option that is given in their place."""
    values = loaded.config.model_dump()
    for override in options.set:
        if not override.startswith("evaluate."):
            raise ConfigError(
                f"--set {override}: an evaluation changes keys of evaluate only, such as evaluate.guidance=2"
            )
        set_key(values, override)
    for name in EvaluateConfig.model_fields:
        if getattr(options, name, None) is not None:
            values["evaluate"][name] = getattr(options, name)
    return parse(Config, values, "evaluation options").evaluate


def _calibration(
    run: Path, loaded: LoadedRun, options: EvalOptions, settings: EvaluateConfig, manifest: DatasetManifest
) -> tuple[calibrate.RunCalibration | None, str]:
    """The run's calibration, or None and why not; ConfigError if it was fitted on the views to evaluate."""
    if options.uncalibrated or loaded.config.flow.why_no_pose():
        return None, "--uncalibrated" if options.uncalibrated else ""
    if settings.refine is not None:
        return None, "they are of the estimate before it is refined"
    if settings.estimator in PICTURE_ESTIMATORS:
        return None, f"error bars are for estimators that read one latent, and {settings.estimator} reads several"
    calibration, why_not = calibrate.load_calibration(run, loaded, build_estimate(settings))
    if calibration is None:
        return None, why_not
    if options.split is not None or options.radii is None:
        calibration.refuse_views_of(manifest, "test" if options.split is None else options.split)
    return calibration, why_not


def _training_folder(loaded: LoadedRun, data: Path) -> Path:
    """Where the run's training split is: the folder of its config, or `data` if that dataset has moved there."""
    if load_manifest(data) == loaded.manifest:
        return data
    with suppress(DataError):  # it may have moved
        folder = store_of(loaded.config).folder
        if load_manifest(folder) == loaded.manifest:
            return folder
    raise DataError(
        f"{loaded.config.data}: not the dataset that the run was trained on, whose training views are the baselines; "
        "put it back, or give its folder by --data"
    )


def _choose_views(
    data: Path,
    manifest: DatasetManifest,
    loaded: LoadedRun,
    options: EvalOptions,
    settings: EvaluateConfig,
    device: torch.device,
) -> tuple[Views, str]:
    """The views and their name: those of a split, or rendered ones where radii of a scene are asked for, no split."""
    count, limits = options.views_per_radius, None
    if options.radii is not None:
        low, high = (checks.whole("--radii", radius, 1) for radius in options.radii)
        limits = low, high
        if not 0 < high - low <= BINS_AT_MOST:
            raise ConfigError(f"--radii {low}:{high}: expected A:B of 1 to {BINS_AT_MOST:,} bins, such as 1:7")
    if count is not None:
        checks.whole("--views-per-radius", count, 1, VIEWS_PER_BIN_AT_MOST)
    if options.max_views is not None:
        checks.whole("--max-views", options.max_views, 1)
    split = "test" if options.split is None else options.split
    name = f"radii_{limits[0]}-{limits[1]}" if limits else split
    source = parse(Recipe, manifest.recipe, f"{data / 'manifest.json'}: recipe").splits["train"]
    if limits and options.split is None and isinstance(source, SceneSource):
        if count is None:
            raise ConfigError(
                f"--radii {limits[0]}:{limits[1]} renders new views; say how many by --views-per-radius N"
            )
        if (limits[1] - limits[0]) * count > VIEWS_AT_MOST:
            raise ConfigError(
                f"--radii {limits[0]}:{limits[1]} with --views-per-radius {count}: at most {VIEWS_AT_MOST:,} views are "
                "rendered; give fewer"
            )
        codec = loaded.codec
        return SceneViews(source, manifest.image_size, codec, limits, count, settings.seed, device), name
    if split not in manifest.splits:
        raise ConfigError(f"{data}: no split '{split}'; it has {', '.join(sorted(manifest.splits))}")
    return SplitViews(data, split, limits, count), name if options.split is None or not limits else f"{split}_{name}"


def _plan(
    loaded: LoadedRun, settings: EvaluateConfig, title: str, data: Path, units: list[Unit], lpips: metrics.Lpips | None
) -> dict[str, Any]:
    """What decides every number of an evaluation; units on disk are used again only under an equal plan."""
    views = "\n".join(f"{unit.number} {view.key}" for unit in units for view in unit.views)
    return {
        "format": 2,
        "step": loaded.step,
        "weights": tensors_sha256(loaded.model.state_dict()),
        "dataset": hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest(),
        "split": title,
        "units": len(units),
        "views": hashlib.sha256(views.encode()).hexdigest(),
        **settings.model_dump(mode="json", exclude={"lpips_backbone"}),
        "lpips": None if lpips is None else lpips.identity(),
    }
