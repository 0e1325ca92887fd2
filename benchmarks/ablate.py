"""Known mistakes of the method, one by one, beside the same run without them, in both directions.

OUT/ablation.json                 dataset, steps, split: a later start must have the same
OUT/VARIANT/data  run  eval       the changed dataset, if any, the trained run, its evaluation
OUT/table.md  table.html  strip.png
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.rewrite import NewMoments, rewrite
from sitdist.config.experiment import Config, ModelConfig
from sitdist.config.load import parse
from sitdist.dataset.manifest import DatasetManifest, load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.evaluate.report.page import data_uri, render
from sitdist.evaluate.report.stored import Metrics, load_evaluation
from sitdist.evaluate.report.tables import Column
from sitdist.flow import draws
from sitdist.geometry.packing import PoseStatistics
from sitdist.io.atomic import write_atomically
from sitdist.io.files import read_json, write_json
from sitdist.io.ownership import check_ours, only_writer
from sitdist.model.codec import Codec, latent_mean, load_codec
from sitdist.runs.checkpoint import dataset_fingerprint
from sitdist.train.trainer import train

log = logging.getLogger("sitdist")
PLAN = "ablation.json"
STEPS = 1500
TOKENS = 4  # a side
FLOW = {"sigma": 0.1, "share_at_one": 0.25, "share_at_zero": 0.15}
STRIP_VIEWS = 8


@dataclass(frozen=True)
class Change:
    """What to change in a dataset; None: nothing."""

    statistics: PoseStatistics | None = None
    moments: NewMoments | None = None


@dataclass(frozen=True)
class Variant:
    """One mistake: `flow` changes the config, `change`(dataset, evaluated split) the dataset."""

    name: str
    what: str
    flow: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path, str], Change] | None = None


# ---------------------------------------------------------------------------------------------------------- the changes


def _flips(dataset: Path, _: str) -> Change:
    """Half of the training views mirrored left to right, with unchanged poses."""
    codec = load_codec(dataset / "codec")

    @torch.no_grad()
    def moments(reader: ShardReader, indices: list[int]) -> Tensor:
        whole = reader.moments(indices).float()
        mirrored = draws.uniform(0, "flips", torch.tensor(indices), 1)[:, 0] < 0.5
        if reader.split != "train" or not mirrored.any():
            return whole
        pictures = codec.decode(latent_mean(whole[mirrored])).flip(-1)
        whole[mirrored] = codec.encode_moments(pictures)
        return whole

    return Change(moments=moments)


def _half_range(dataset: Path, _: str) -> Change:
    """Pictures in [0, 1] fed to a codec that expects [-1, 1], which is x -> (x + 1) / 2 in [0, 1]."""
    codec = load_codec(dataset / "codec")

    @torch.no_grad()
    def moments(reader: ShardReader, indices: list[int]) -> Tensor:
        return codec.encode_moments(0.5 * (_pictures(codec, reader, indices) + 1.0))

    return Change(moments=moments)


def _pictures(codec: Codec, reader: ShardReader, indices: list[int]) -> Tensor:
    """Pictures [B, 3, H, W] of samples; training views store none, so theirs are decoded from the latents."""
    if reader.split == "train":
        return codec.decode(latent_mean(reader.moments(indices).float()))
    return reader.images(indices)


def _test_statistics(dataset: Path, split: str) -> Change:
    """Mean and deviation of the evaluated poses instead of the training poses."""
    reader = ShardReader(dataset, split)
    has_intrinsics = PoseStatistics.from_dict(load_manifest(dataset).statistics).has_intrinsics
    intrinsics = reader.intrinsics(range(len(reader))) if has_intrinsics else None
    return Change(PoseStatistics.from_poses(reader.camera_to_world(), intrinsics))


def _joint_statistics(dataset: Path, _: str) -> Change:
    """One mean and one deviation for all entries of rotation and translation."""
    plain = PoseStatistics.from_dict(load_manifest(dataset).statistics)
    entries = ShardReader(dataset, "train").camera_to_world()[:, :3]
    mean, std = plain.mean.clone(), plain.std.clone()
    mean[:3], std[:3] = entries.mean(), entries.std(correction=0)
    return Change(PoseStatistics(mean, std, plain.has_intrinsics))


VARIANTS = (
    Variant("baseline", "sigma 0.1, no mistake"),
    Variant("sigma_1", "sigma 1", {"sigma": 1.0}),
    Variant("sigma_0.2", "sigma 0.2", {"sigma": 0.2}),
    Variant("sigma_0", "sigma 0: no noise on the pose", {"sigma": 0.0}),
    Variant("gain_10", "packed pose times 10", {"gain": 10.0}),
    Variant("flips", "half of the training views mirrored, poses as they were", change=_flips),
    Variant("half_range", "pictures of [0, 1] fed to a codec that expects [-1, 1]", change=_half_range),
    Variant("test_statistics", "poses standardized by the evaluated views' statistics", change=_test_statistics),
    Variant("joint_statistics", "rotation and translation standardized together", change=_joint_statistics),
)

# ------------------------------------------------------------------------------------------------------------- running


def ablate(
    dataset: Path, out: Path, steps: int = STEPS, split: str | None = None, model: ModelConfig | None = None
) -> str:
    """Train and evaluate every variant that `out` does not hold yet, then write the table; returns it as markdown.

    `split`: the evaluated views, by default the first split other than train and val. `model`: by default that of
    configs/chair.yaml. ConfigError if `out` was begun with other settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("python -m benchmarks ablate: runs in one process; start it without a launcher")
    manifest = load_manifest(dataset)
    split = split or next((name for name in manifest.splits if name not in ("train", "val")), "val")
    if split == "train" or split not in manifest.splits:
        raise ConfigError(f"--split {split}: not to be evaluated; {dataset} has {', '.join(manifest.splits)}")
    plan = {"dataset": dataset_fingerprint(dataset), "steps": steps, "split": split}
    if check_ours(out, "ablation") and (out / PLAN).exists():
        _check_same(out, plan)
    with only_writer(out, "ablation"):
        if not (out / PLAN).exists():
            write_json(out / PLAN, plan)
        _check_same(out, plan)
        for number, variant in enumerate(VARIANTS, 1):
            log.info("%d of %d: %s (%s)", number, len(VARIANTS), variant.name, variant.what)
            _run(variant, dataset, out / variant.name, steps, split, model or _model(manifest))
        return _write_table(out, split, steps)


def _check_same(out: Path, plan: dict[str, Any]) -> None:
    begun = read_json(out / PLAN, "give another --out", ConfigError)
    for name, value in plan.items():
        if begun.get(name) != value:
            raise ConfigError(
                f"{out}: was begun with {name} {str(begun.get(name))[:80]}, not {value}; give another --out"
            )


def _model(manifest: DatasetManifest) -> ModelConfig:
    patch, labels = max(1, manifest.latent.height // TOKENS), manifest.labels()
    return ModelConfig(patch_size=patch, hidden_size=192, depth=6, num_heads=6, num_classes=labels)


def _run(variant: Variant, dataset: Path, folder: Path, steps: int, split: str, model: ModelConfig) -> None:
    """Do what is missing of a variant; every part can be interrupted."""
    if (folder / "eval" / "report.html").is_file():
        return
    data = dataset
    if variant.change is not None:
        data = folder / "data"
        if not (data / "manifest.json").is_file():
            change = variant.change(dataset, split)
            rewrite(dataset, data, f"{load_manifest(dataset).name}-{variant.name}", change.statistics, change.moments)
    train(_config(variant, data, steps, model), folder / "run")
    evaluate(folder / "run", EvalOptions(split=split, out=folder / "eval"))


def _config(variant: Variant, data: Path, steps: int, model: ModelConfig) -> Config:
    values = {
        "name": variant.name,
        "data": str(data),
        "model": model.model_dump(),
        "flow": FLOW | variant.flow,
        "train": {
            "steps": steps,
            "global_batch": 64,
            "precision": "auto",
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": min(200, steps // 10)},
            "ema_decay": 0.995,
            "log_every": 50,
            "checkpoint_every": 500,
            "keep_checkpoints": 1,
        },
    }
    return parse(Config, values, f"variant {variant.name}")


# --------------------------------------------------------------------------------------------------------------- table

COLUMNS = (
    Column("", "rotation (deg)", "rotation_error_deg"),
    Column("", "median", "rotation_error_deg", "median"),
    Column("", "translation", "translation_error"),
    Column("", "PSNR (dB)", "psnr"),
    Column("", "ceiling", "codec_psnr"),
    Column("", "SSIM", "ssim"),
)
HEADS = ("variant", "what", *(column.head for column in COLUMNS), "noise floor (deg)")


def _write_table(out: Path, split: str, steps: int) -> str:
    found = [load_evaluation(out / variant.name / "eval") for variant in VARIANTS]
    for each in found:
        if not each.metrics.rows or "rendered" not in each.pictures:
            raise DataError(f"{each.folder}: holds no pictures by radius; delete it and run the same command again")
    first = found[0].metrics
    rows = [_row(variant, each.metrics) for variant, each in zip(VARIANTS, found, strict=True)]
    augmented = ", radius augmented" if first.radius_augmented else ""
    count = max(row.n for row in first.rows)
    title = f"Ablation on {first.dataset}{augmented}: {steps} steps each, {count} views of {split}, means"
    lines = [" | ".join(cells) for cells in (HEADS, ["---"] * len(HEADS), *rows)]
    text = "\n".join([title, "", *(f"| {line} |" for line in lines)]) + "\n"
    strip = _strip([each.pictures for each in found])
    names = ["true", *(variant.name for variant in VARIANTS)]
    rendered = render("ablate.html.jinja", title=title, heads=HEADS, rows=rows, strip=data_uri(strip), names=names)
    write_atomically(out / "strip.png", lambda path: path.write_bytes(strip))
    write_atomically(out / "table.html", lambda path: path.write_text(rendered))
    write_atomically(out / "table.md", lambda path: path.write_text(text))
    return text


def _row(variant: Variant, metrics: Metrics) -> list[str]:
    """The cells of a variant: means over all views."""
    row = max(metrics.rows, key=lambda each: each.n)
    floor = metrics.floors.get("rotation_error_deg")
    return [
        variant.name,
        variant.what,
        *(column.cell(row) for column in COLUMNS),
        "n/a" if floor is None else f"{floor:.2f}",
    ]


def _strip(found: list[dict[str, np.ndarray]]) -> bytes:
    """A PNG of rows: the true views, then for every variant the views rendered from their poses."""
    rows: list[np.ndarray] = []
    for pictures in found:
        count = len(pictures["key"])
        chosen = np.linspace(0, count - 1, min(STRIP_VIEWS, count)).round().astype(int)
        rows += [] if rows else [pictures["true"][chosen]]
        rows.append(pictures["rendered"][chosen])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    return buffer.getvalue()
