"""Fit error bars and trust on a held-out split, store them in the run, and measure how well they hold.

RUN/calibration.json: what was fitted (`sitdist.flow.error_bars`), and on what: the weights, the estimator, the split.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitdist import checks
from sitdist.config.load import parse
from sitdist.config.schema import Positive, Schema
from sitdist.dataset.appearance import Appearance
from sitdist.dataset.manifest import DatasetManifest, load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.store import store_of
from sitdist.errors import ConfigError, DataError, SitdistError
from sitdist.flow.choices import PICTURE_ESTIMATORS, RENAMED_ESTIMATORS
from sitdist.flow.error_bars import BAR_LEVELS, FEWEST, LEVELS, Calibration, fit_calibration, rendered_mean
from sitdist.flow.estimate import EstimateOptions, PoseEstimate
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.inference.options import build_estimate
from sitdist.inference.run import LoadedRun, check_codec, load_run
from sitdist.io.arrays import tensors_sha256
from sitdist.io.files import read_json, write_json
from sitdist.io.ownership import check_ours
from sitdist.model.codec import latent_mean

FILE = "calibration.json"
APPEARANCES = 4  # of each view
NEVER_TRAINED = 2**48  # global positions from here on are beyond those of any training
FORMAT = 1
FLAGGED = 0.05  # trust below which a picture looks like nothing that the model knows


def split_fingerprint(manifest: DatasetManifest, split: str) -> str:
    """Hash of a split's shards, which identifies its views."""
    shards = [shard.sha256 for shard in manifest.splits[split].shards]
    return hashlib.sha256("\n".join(shards).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class RunCalibration:
    """A calibration with its weights, its estimator, and the views it was fitted on."""

    calibration: Calibration
    weights: str
    estimator: dict[str, Any]
    dataset: str
    split: str
    split_sha256: str
    views: int

    def to_dict(self) -> dict[str, Any]:
        """As calibration.json holds it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"format": FORMAT, **values, "levels": LEVELS, "calibration": self.calibration.to_dict()}

    def sha256(self) -> str:
        """Hash that identifies this calibration."""
        return hashlib.sha256(json.dumps(self.to_dict(), allow_nan=False).encode()).hexdigest()

    def fill(self, loaded: LoadedRun, estimate: PoseEstimate, latents: Tensor, labels: Tensor) -> PoseEstimate:
        """The estimate of latents [B, C, h, w], labels [B], with its error bars and its trust."""
        scores = self.calibration.scores(
            loaded.model, loaded.interpolant, loaded.endpoint, loaded.statistics, estimate, latents, labels
        )
        return self.calibration.filled(estimate, scores)

    def was_fitted_on(self, manifest: DatasetManifest, split: str) -> bool:
        """Whether these are the views that the calibration was fitted on."""
        return split in manifest.splits and split_fingerprint(manifest, split) == self.split_sha256


def load_calibration(run: Path, loaded: LoadedRun, options: EstimateOptions) -> tuple[RunCalibration | None, str]:
    """The run's calibration for these options, or None and the reason. ConfigError if the file is damaged."""
    path = Path(run) / FILE
    again = f"`sitdist calibrate {run} --split SPLIT`"
    kept = read_calibration(run)
    if kept is None:
        return None, f"not calibrated; fit error bars with {again}"
    if kept.weights != tensors_sha256(loaded.model.state_dict()):
        return None, f"{path} is of other weights than those of step {loaded.step}; calibrate again with {again}"
    if kept.estimator != _plain(options):
        return None, f"{path} is of the estimator {kept.estimator}, not {_plain(options)}; calibrate again for it"
    scale, latent = kept.calibration.residual_scale, loaded.manifest.latent
    if scale is not None and scale.shape != (latent.channels, latent.height, latent.width):
        raise ConfigError(
            f"{path}: residual_scale {list(scale.shape)} is not of the latents; calibrate again by {again}"
        )
    return kept, ""


def _plain(options: EstimateOptions) -> dict[str, Any]:
    """The options as JSON gives them back."""
    return json.loads(json.dumps(asdict(options), allow_nan=False))


def _current(estimator: dict[str, Any]) -> dict[str, Any]:
    """What an older file says of the estimator, without options that are gone and by the name of today."""
    kept = {name: value for name, value in estimator.items() if name not in ("draws", "time", "seed")}
    name = kept.get("estimator")
    return kept | {"estimator": RENAMED_ESTIMATORS.get(name, name)} if isinstance(name, str) else kept


class _File(Schema):
    """calibration.json."""

    format: int
    weights: str
    estimator: dict[str, Any]
    dataset: str
    split: str
    split_sha256: str
    views: Positive
    levels: list[float]
    calibration: dict[str, Any]


def read_calibration(run: Path) -> RunCalibration | None:
    """What `calibrate` wrote, or None where there is nothing; ConfigError if it is damaged."""
    path, remedy = Path(run) / FILE, "delete it and run `sitdist calibrate` again"
    if not path.exists():
        return None
    values = read_json(path, remedy, ConfigError)
    try:
        kept = dict(parse(_File, values, str(path)))
        if (kept.pop("format"), tuple(kept.pop("levels"))) != (FORMAT, LEVELS):
            raise ValueError(f"not of format {FORMAT}, or of other levels")
        kept["estimator"] = _current(kept["estimator"])
        return RunCalibration(**kept | {"calibration": Calibration.from_dict(kept["calibration"])})
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = str(error).removeprefix(f"{path}: ")[:160]
        raise ConfigError(f"{path}: not a calibration ({reason}); {remedy}") from None


# ------------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class CalibrateOptions:
    """What to calibrate on: `split` of the dataset `data`. None means as the run's config says."""

    split: str
    data: str | Path | None = None
    estimator: str | None = None
    estimator_steps: int | None = None
    batch: int | None = None


def calibrate(run: Path, options: CalibrateOptions) -> RunCalibration:
    """Fit the run's error bars and trust on a split, and write RUN/calibration.json, replacing any other.

    Each view counts as it is and, where the run's config varies appearances, in APPEARANCES of those, too.
    ConfigError for the training split, whose errors are smaller than others', and for a model that reads no poses.
    """
    run = Path(run)
    if options.batch is not None:
        checks.whole("--batch", options.batch, 1)
    if not check_ours(run, "run"):
        raise DataError(f"{run}: no run; give the --out of `sitdist train`")
    loaded = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    settings = loaded.config.evaluate
    why_not = loaded.config.flow.why_no_pose()
    if why_not:
        raise ConfigError(f"{run}: {why_not}; there is nothing to calibrate")
    data = store_of(loaded.config, options.data).folder
    manifest = load_manifest(data)
    _check_split(data, manifest, loaded, options.split)
    given = {"estimator": options.estimator, "estimator_steps": options.estimator_steps}
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    if settings.estimator in PICTURE_ESTIMATORS:
        raise ConfigError(
            f"estimator '{settings.estimator}': error bars are for estimators that read one latent; calibrate one_step"
        )
    how = build_estimate(settings)
    varied = loaded.config.appearance is not None and manifest.keeps_views
    fitted = _fit(loaded, ShardReader(data, options.split, views=varied), how, options.batch or settings.batch)
    kept = RunCalibration(
        calibration=fitted,
        weights=tensors_sha256(loaded.model.state_dict()),
        estimator=_plain(how),
        dataset=str(data),
        split=options.split,
        split_sha256=split_fingerprint(manifest, options.split),
        views=manifest.splits[options.split].count,
    )
    write_json(run / FILE, kept.to_dict())
    return kept


def calibrate_if_possible(run: Path) -> str:
    """Calibrate a trained run on its validation views; what was fitted, or why there is nothing to fit."""
    try:
        return format_calibration(run, calibrate(run, CalibrateOptions(split="val")))
    except SitdistError as error:
        return f"No error bars: {error}"


def _check_split(data: Path, manifest: DatasetManifest, loaded: LoadedRun, split: str) -> None:
    if split not in manifest.splits:
        raise ConfigError(f"{data}: no split '{split}'; it has {', '.join(sorted(manifest.splits))}")
    if split_fingerprint(manifest, split) == split_fingerprint(loaded.manifest, "train"):
        raise ConfigError(
            f"--split {split}: the run was trained on these views, so that their errors are smaller than others'; "
            "calibrate on a split that was held out"
        )
    check_codec(data, manifest, loaded)
    if manifest.splits[split].count < FEWEST:
        raise DataError(
            f"{data}: split '{split}' has {manifest.splits[split].count} views, too few to calibrate on; "
            f"give one of at least {FEWEST}, better 500"
        )


@torch.no_grad()
def _fit(loaded: LoadedRun, reader: ShardReader, options: EstimateOptions, batch: int) -> Calibration:
    statistics = loaded.statistics
    renders = loaded.config.flow.why_no_picture() is None
    device = next(loaded.model.parameters()).device
    estimates, residuals, seen = [], [], []
    for start in range(0, len(reader), batch):
        indices = list(range(start, min(start + batch, len(reader))))
        labels = reader.labels()[indices].to(device)
        for latents in _latents(loaded, reader, indices):
            estimate = loaded.estimate(latents, labels, options)
            estimates.append(estimate)
            seen.append(reader.camera_to_world()[indices])
            if renders:
                rendered = rendered_mean(
                    loaded.model, loaded.interpolant, loaded.endpoint, statistics, estimate, latents, labels
                )
                residuals.append(latents - rendered)
    whole, true = PoseEstimate.concatenated(estimates), torch.cat(seen).to(device)
    return fit_calibration(
        whole,
        statistics,
        rotation_error_deg(whole.camera_to_world[:, :3, :3], true[:, :3, :3]),
        translation_error(whole.camera_to_world, true),
        torch.cat(residuals) if renders else None,
    )


def _latents(loaded: LoadedRun, reader: ShardReader, indices: list[int]) -> Iterator[Tensor]:
    """Latents [B, C, h, w] of some views: as they are, then in several appearances if the reader has the views."""
    device = next(loaded.model.parameters()).device
    samples = reader.samples(np.asarray(indices))
    if samples.faults:
        raise DataError(samples.faults[min(samples.faults)])
    yield latent_mean(samples.moments.float()).to(device)
    manifest, config = reader.manifest, loaded.config.appearance
    if samples.view is None or config is None:
        return
    appearance = Appearance(config, loaded.config.seed, manifest.image_size, manifest.backgrounds())
    for number in range(APPEARANCES):
        positions = NEVER_TRAINED + number * len(reader) + torch.tensor(indices)
        pictures = appearance(samples.view, samples.label, positions).to(device)
        yield latent_mean(loaded.codec.encode_moments(pictures))


# ------------------------------------------------------------------------------------------------------------ coverage


def bar_columns(estimate: PoseEstimate) -> dict[str, Tensor]:
    """Bars and trust [B] of a calibrated estimate, by the names of a view's record."""
    assert estimate.rotation_bars_deg is not None
    assert estimate.translation_bars is not None
    assert estimate.trust is not None
    rotation, translation = estimate.rotation_bars_deg, estimate.translation_bars
    return {
        "rotation_bar_50_deg": rotation[:, 0],
        "rotation_bar_90_deg": rotation[:, 1],
        "translation_bar_50": translation[:, 0],
        "translation_bar_90": translation[:, 1],
        "trust": estimate.trust,
    }


def coverage(
    errors: Sequence[float], bars_90: Sequence[float], factors: Sequence[float], calibrated_on: int
) -> dict[str, Any]:
    """How often errors [N] are within the bars of every one of LEVELS, given their 90% bars and LEVELS' `factors`.

    `largest_quarter` is the same over the quarter of the views with the largest bars. `standard_error` is that of the
    expected share: both the N views and the `calibrated_on` ones that the bars were fitted on are samples.
    """
    error, bar = (torch.tensor(list(values), dtype=torch.float64) for values in (errors, bars_90))
    quarter = bar.argsort(descending=True, stable=True)[: max(1, round(len(bar) / 4))]
    within = error[:, None] <= bar[:, None] * (torch.tensor(factors, dtype=torch.float64) / factors[-1])
    return {**_shares(within, calibrated_on), "largest_quarter": _shares(within[quarter], calibrated_on)}


def _shares(within: Tensor, calibrated_on: int) -> dict[str, Any]:
    n = len(within)
    return {
        "observed": within.double().mean(0).tolist(),
        "standard_error": [math.sqrt(level * (1.0 - level) * (1.0 / n + 1.0 / calibrated_on)) for level in LEVELS],
        "n": n,
    }


def coverage_summary(kept: RunCalibration, records: Sequence[Any]) -> dict[str, Any]:
    """`calibration` in metrics.json: what was fitted on which views, and how well it holds on these records."""
    rotation, translation = (
        coverage(
            [getattr(record, error) for record in records],
            [getattr(record, bar) for record in records],
            bars.factors,
            kept.views,
        )
        for error, bar, bars in (
            ("rotation_error_deg", "rotation_bar_90_deg", kept.calibration.rotation),
            ("translation_error", "translation_bar_90", kept.calibration.translation),
        )
    )
    trust = torch.tensor([record.trust for record in records], dtype=torch.float64)
    return {
        "fitted_on": {"dataset": kept.dataset, "split": kept.split, "views": kept.views},
        "expected": list(LEVELS),
        "observed": rotation["observed"],
        "rotation": rotation,
        "translation": translation,
        "median_bar": {
            "levels": list(BAR_LEVELS),
            "rotation_deg": [_median(records, f"rotation_bar_{name}_deg") for name in ("50", "90")],
            "translation": [_median(records, f"translation_bar_{name}") for name in ("50", "90")],
        },
        "trust": {"mean": float(trust.mean()), "share_below_0.05": float((trust < FLAGGED).double().mean())},
    }


def _median(records: Sequence[Any], name: str) -> float:
    return float(torch.tensor([getattr(record, name) for record in records], dtype=torch.float64).quantile(0.5))


def format_calibration(run: Path, kept: RunCalibration) -> str:
    """What was fitted, for the terminal: the error bars of a picture whose scores are the mean ones."""
    fitted = kept.calibration
    scores = torch.tensor([fitted.trust.mean], dtype=torch.float64)
    rotation, translation = (bars.at(scores, BAR_LEVELS)[0].tolist() for bars in (fitted.rotation, fitted.translation))
    return (
        f"{run / FILE}: {kept.views} views of {kept.split}, estimator {kept.estimator['estimator']}; for a typical "
        f"picture, 50% of rotation errors are below {rotation[0]:.3g} deg and 90% below {rotation[1]:.3g} deg; of "
        f"translation errors, 50% are below {translation[0]:.3g} and 90% below {translation[1]:.3g}"
    )
