"""Evaluate a run: open it, plan the work, share it among all processes, and merge what they measured.

Every process takes the next task that nobody has taken, and leaves its records on disk when it is finished; the main
process merges them with an exactly-once check. Between the plan and the merge they never meet. The views by radius
(`ViewEvaluator`) and the experiments (`sitdist.evaluate.experiments`) are work of the same kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sitdist import checks
from sitdist.config.experiment import Config, EvaluateConfig, FlowConfig
from sitdist.config.load import parse, set_key
from sitdist.config.recipe import Recipe, SceneSource
from sitdist.dataset.manifest import DatasetManifest, load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.store import store_of
from sitdist.distributed.accelerator import log, processes
from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.experiments.records import EXPERIMENTS
from sitdist.evaluate.measures import BINS_AT_MOST
from sitdist.evaluate.metrics import Lpips
from sitdist.evaluate.tasks import Producer, do_left, do_tasks, merge, plan_conflict, prepare
from sitdist.evaluate.view_evaluator import ViewEvaluator
from sitdist.evaluate.views import (
    VIEWS_PER_BIN_AT_MOST,
    PhotoViews,
    RenderedViews,
    SplitViews,
    Unit,
    Views,
    make_units,
    thinned,
)
from sitdist.flow.choices import PICTURE_ESTIMATORS
from sitdist.geometry.similarity import Similarity
from sitdist.inference import calibration as calibrate
from sitdist.inference.options import build_estimate
from sitdist.inference.pose_reader import PoseReader
from sitdist.inference.preprocess import preprocess_of
from sitdist.inference.run import LoadedRun, check_codec, load_run
from sitdist.io.arrays import tensors_sha256
from sitdist.io.ownership import check_ours, only_writer

VIEWS_AT_MOST = 2_000_000
RADII = "radii"
CAMERAS_READ = 1024  # for the training's field of view, evenly spaced


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, and how; None means as the run's config says.

    split: the split to evaluate, by default test.
    radii: evaluate radii a to b in unit bins. Without a split, on a dataset of the built-in scene, `views_per_radius`
        new views of every bin are rendered; otherwise the split is limited to these radii.
    views_per_radius: the views of every bin; those of a split are its first ones by key.
    photos: posed photos to evaluate instead of views: .npz, a transforms.json or a COLMAP folder.
    data: the dataset's folder. out: the folder for the results, by default RUN/eval/<split> or RUN/eval/radii_<a>-<b>.
    experiment: radii, one of EXPERIMENTS, or all of them. max_views: at most this many views in each.
    uncalibrated: leave out the error bars and the trust of the run's calibration.
    set: other keys of the config's `evaluate`, as evaluate.KEY=VALUE.
    """

    split: str | None = None
    radii: tuple[int, int] | None = None
    views_per_radius: int | None = None
    photos: Path | None = None
    data: str | Path | None = None
    out: Path | None = None
    estimator: str | None = None
    estimator_steps: int | None = None
    readout: str | None = None
    refine: str | None = None
    generator: str | None = None
    generator_steps: int | None = None
    guidance: float | None = None
    zooms: Sequence[float] | None = None
    batch: int | None = None
    seed: int | None = None
    lpips_backbone: str | None = None
    uncalibrated: bool = False
    experiment: str = RADII
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


def _open_all(run: Path, options: EvalOptions, device: torch.device) -> tuple[ViewEvaluator, list[Producer]]:
    """The evaluation, and what is to be measured for it."""
    evaluation = _open(run, options, device)
    chosen = (RADII, *EXPERIMENTS) if options.experiment == "all" else (options.experiment,)
    producers: list[Producer] = [evaluation] if RADII in chosen else []
    flow = evaluation.loaded.config.flow
    for name in (name for name in chosen if name != RADII):
        reason = _why_not(name, flow)
        if reason and options.experiment != "all":
            raise ConfigError(f"--experiment {name}: {reason}; choose another")
        if reason:
            log.info("%s is not measured: %s", name, reason)
        else:
            producers.append(_experiment(name, evaluation, options))
    return evaluation, producers


def _take_folders(evaluation: ViewEvaluator, producers: list[Producer], held: ExitStack) -> None:
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


def _check_beside(evaluation: ViewEvaluator) -> None:
    """ConfigError if results that are there, of this or another experiment, cannot stand in one report with these."""
    shared = evaluation.plan.keys() - {"units", "views", "calibration"}
    for path in sorted(evaluation.out.glob("plan.json")) + sorted(evaluation.out.glob("*/plan.json")):
        problem = plan_conflict(path.parent, evaluation.plan, shared)
        if problem:
            raise ConfigError(problem)


def _why_not(name: str, flow: FlowConfig) -> str | None:
    """Why the model cannot do an experiment; None if it can."""
    no_picture, no_pose = flow.why_no_picture(), flow.why_no_pose()
    needs_both = {"cycle": no_picture or no_pose, "interpolation": no_picture, "robustness": no_pose}
    return needs_both.get(name)


def _experiment(name: str, evaluation: ViewEvaluator, options: EvalOptions) -> Producer:
    """The experiment called `name`, with its results in a folder of that name in the evaluation's."""
    from sitdist.evaluate.experiments.common import Tools, spread
    from sitdist.evaluate.experiments.paths import Cycle, Interpolation, Turntable
    from sitdist.evaluate.experiments.robustness import Robustness
    from sitdist.evaluate.experiments.solvers import Solvers

    recipe = parse(Recipe, load_manifest(evaluation.data).recipe, f"{evaluation.data / 'manifest.json'}: recipe")
    source = recipe.splits["train"]
    tools = Tools(
        loaded=evaluation.loaded,
        settings=evaluation.settings,
        views=evaluation.views,
        scene=source if isinstance(source, SceneSource) else None,
        training_poses=evaluation.training.camera_to_world(),
        focal=evaluation.training.intrinsics(spread(range(len(evaluation.training)), CAMERAS_READ)).median(0).values,
        lpips=evaluation.lpips,
        calibration=evaluation.calibration,
        device=evaluation.device,
    )
    kinds = {kind.name: kind for kind in (Turntable, Interpolation, Cycle, Solvers, Robustness)}
    return kinds[name](tools, evaluation.out / name, evaluation.plan, options.max_views)


def _write_all(evaluation: ViewEvaluator, producers: list[Producer]) -> None:
    """Merge everything with the exactly-once check, and write the tables and the report."""
    from sitdist.evaluate.report import write_report

    for producer in producers:
        producer.finish(*merge(producer))
    if not (evaluation.out / "metrics.json").is_file():
        evaluation.write_summary([])  # no radii were measured: the rest of it is still what the report tells
    write_report(evaluation.out)


# ------------------------------------------------------------------------------------------------------------ opening


def _open(run: Path, options: EvalOptions, device: torch.device) -> ViewEvaluator:
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
    lpips = Lpips(settings.lpips_backbone, device) if settings.lpips_backbone else None
    calibration, why_uncalibrated = _calibration(run, loaded, options, settings, manifest)
    return ViewEvaluator(
        run=run,
        out=Path(options.out) if options.out else run / "eval" / title,
        data=data,
        title=title,
        loaded=loaded,
        calibration=calibration,
        why_uncalibrated=why_uncalibrated,
        settings=settings,
        poses=poses,
        views=views,
        units=units,
        training=ShardReader(_training_folder(loaded, data), "train"),
        lpips=lpips,
        background=views.background(),
        plan=_plan(loaded, settings, title, data, units, lpips)
        | ({"photos": views.photos.fingerprint} if isinstance(views, PhotoViews) else {})
        | ({"cameras": "varied"} if isinstance(views, RenderedViews) and views.varied else {})
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
    """The run's calibration, or None and why not."""
    if options.uncalibrated or loaded.config.flow.why_no_pose():
        return None, "--uncalibrated" if options.uncalibrated else ""
    if settings.refine is not None:
        return None, "they are of the estimate before it is refined"
    if settings.estimator in PICTURE_ESTIMATORS:
        return None, f"error bars are for estimators that read one latent, and {settings.estimator} reads several"
    calibration, why_not = calibrate.load_calibration(run, loaded, build_estimate(settings))
    if calibration is None:
        return None, why_not
    split = options.split or ("test" if options.radii is None and options.photos is None else None)
    if split is not None and calibration.was_fitted_on(manifest, split):
        return None, f"they were fitted on these views of {split}; evaluate another split to test them"
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
    if options.photos is not None:
        if options.split is not None or options.radii is not None:
            raise ConfigError("--photos: evaluates photos alone; leave --split and --radii out")
        label = manifest.objects[0].label
        similarity = manifest.objects[0].similarity
        frame = Similarity.identity() if similarity is None else Similarity.from_dict(similarity)
        preprocess = preprocess_of(loaded.manifest, data)
        if preprocess.camera is None:
            raise ConfigError("--photos: the cameras of the training pictures differ, so photos fit none of them")
        return PhotoViews(Path(options.photos), preprocess, frame, label, loaded.codec, device), "photos"
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
        return RenderedViews(source, manifest.image_size, codec, limits, count, settings.seed, device), name
    if split not in manifest.splits:
        raise ConfigError(f"{data}: no split '{split}'; it has {', '.join(sorted(manifest.splits))}")
    return SplitViews(data, split, limits, count), name if options.split is None or not limits else f"{split}_{name}"


def _plan(
    loaded: LoadedRun, settings: EvaluateConfig, title: str, data: Path, units: list[Unit], lpips: Lpips | None
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
