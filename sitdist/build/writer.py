"""Build a dataset from a recipe: poses, statistics and codec first, then shard by shard, and the manifest last.

The same recipe on the same hardware and versions gives the same bytes, for any number of processes and threads and
after any number of interruptions.
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, wait
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sitdist.build.shard import BuiltShard, SampleMaker, Split, shards_of, write_shards
from sitdist.build.sources import open_source
from sitdist.config.recipe import DatasetCodecConfig, PcaCodecConfig, Recipe
from sitdist.dataset.manifest import (
    FORMAT_VERSION,
    CameraFacts,
    CodecPsnr,
    DatasetManifest,
    LatentShape,
    ObjectEntry,
    SplitEntry,
    load_manifest,
)
from sitdist.distributed.ranks import Ranks
from sitdist.distributed.threads import helper_threads
from sitdist.errors import CodecError, ConfigError, DataError
from sitdist.flow import draws
from sitdist.geometry.camera import camera_radius, is_upright, looks_at_origin
from sitdist.geometry.packing import PoseStatistics
from sitdist.io.atomic import PREFIX, file_sha256, write_atomically, write_folder
from sitdist.io.files import read_json, require_memory, write_json
from sitdist.io.ownership import check_ours, only_writer
from sitdist.model.codec import Codec, PcaCodec, VaeCodec, load_codec

log = logging.getLogger("sitdist")
PROGRESS_INTERVAL = 0.5  # seconds between two exchanges of progress among the processes


def build(
    recipe: Recipe, out: Path, only: Collection[str] | None = None, ranks: Ranks | None = None
) -> DatasetManifest:
    """Build the dataset `out`, or continue an interrupted build of the same recipe.

    `only`: the splits to build (None: all splits of the recipe, and the views held out as val). `ranks`: the processes
    that share the work (None: only this one); each of them calls this and gets the manifest.
    """
    ranks = ranks or Ranks()
    with one_thread_each() as (pool, depth), ExitStack() as held:
        with ranks.raise_together():
            splits = open_splits(recipe, only)
            _check_memory(recipe, len(splits["train"]))
            _check_focal_lengths(recipe, splits["train"])
            plan = _plan(recipe, splits)
        plans = ranks.gather(plan)
        with ranks.raise_together():
            _check_same_plans(out, plans)
        with ranks.raise_together():
            if ranks.rank == 0:
                held.enter_context(_begin(recipe, out, splits, plan, pool))
        with ranks.raise_together():
            codec = load_codec(out / "codec")  # as any later reader loads it
            train = splits["train"]
            intrinsics = train.intrinsics if recipe.packing == "intrinsics" else None
            statistics = PoseStatistics.from_poses(train.camera_to_world, intrinsics)
            make = SampleMaker(codec, statistics, recipe.encode_batch, recipe.keep_views)
        built = _build_shards(splits, recipe.samples_per_shard, make, out, pool, depth, ranks)
        manifest: DatasetManifest | None = None
        with ranks.raise_together():
            if ranks.rank == 0:
                manifest = _manifest(recipe, out, splits, built, make)
                _finish(out, manifest)
        return ranks.broadcast(manifest)


def _check_focal_lengths(recipe: Recipe, train: Split) -> None:
    """ConfigError where focal lengths vary but poses leave them out: a zoom would look like a step nearer."""
    if recipe.packing != "pose":
        return
    intrinsics, labels = train.intrinsics, train.source.labels[train.indices]
    for label in labels.unique():
        if len(intrinsics[labels == label].unique(dim=0)) > 1:
            raise ConfigError(
                f"packing: pose leaves the intrinsics out, but those of the training views of label {label} differ; "
                "set packing: intrinsics, or give all of them one camera"
            )


def _check_memory(recipe: Recipe, views: int) -> None:
    """OutOfMemoryError if the pictures that are held at once cannot fit into memory; a cautious bound."""
    fitted = min(views, recipe.codec.fit_views) if isinstance(recipe.codec, PcaCodecConfig) else 0
    held = max(2 * fitted, min(views, recipe.encode_batch))
    what = f"{held:,} pictures of {recipe.image_size}x{recipe.image_size} pixels at once"
    require_memory(12 * held * recipe.image_size**2, what, "lower encode_batch, codec.fit_views or image_size")


@contextmanager
def one_thread_each() -> Iterator[tuple[Executor, int]]:
    """A pool of as many threads as torch would use, and its look-ahead; torch itself uses one thread in each.

    The number of threads changes how torch rounds a sum. This way it does not affect the result.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = helper_threads(threads, "samples")
    try:
        yield pool, threads + 1
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------------- splits


def open_splits(recipe: Recipe, only: Collection[str] | None = None) -> dict[str, Split]:
    """The views of all splits, or of those in `only`; `val` is held out of `train` if the recipe says so.

    The training views do not depend on `only`.
    """
    names = [*recipe.splits, *(["val"] if "val" not in recipe.splits and recipe.val_views else [])]
    for name in only or ():
        if name not in names:
            raise ConfigError(f"--splits: the recipe has no split '{name}'; it has {', '.join(names)}")
    if only is not None and "train" not in only:
        raise ConfigError(
            f"--splits {','.join(only)}: 'train' is missing; the pose statistics and the codec come from it"
        )
    splits = {}
    for name, config in recipe.splits.items():
        if only is None or name in only:
            source = open_source(config, recipe.image_size)
            splits[name] = Split(name, source, torch.arange(len(source)))
    if "val" not in recipe.splits and recipe.val_views:
        splits["train"], val = _hold_out(recipe, splits["train"])
        if only is None or "val" in only:
            splits["val"] = val
    return splits


def _hold_out(recipe: Recipe, train: Split) -> tuple[Split, Split]:
    """Divide the training views: those that remain without the held-out views and their copies, and the held-out."""
    views = train.indices[~train.is_zoomed]
    if recipe.val_views >= len(views):
        raise DataError(f"val_views {recipe.val_views} leaves none of the {len(views)} training views to train on")
    order = draws.permutation(recipe.seed, "val views", len(views), 0)
    held_out = views[order[: recipe.val_views]].sort().values
    kept = train.indices[~torch.isin(train.source.original, held_out)]
    return Split("train", train.source, kept), Split("val", train.source, held_out)


# ------------------------------------------------------------------------------------------- starting and resuming


def _plan(recipe: Recipe, splits: dict[str, Split]) -> dict[str, Any]:
    """What must be the same on all processes, and when a build is continued."""
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "sources": {name: split.source.fingerprint() for name, split in splits.items()},
        "environment": _environment(),
    }


def _environment() -> dict[str, Any]:
    """Everything that the bytes of a dataset depend on besides its recipe and its sources."""
    packages = ("diffusers", "numpy", "pillow", "sitdist", "torch", "webdataset")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
    }


def _check_same_plans(out: Path, plans: Sequence[dict[str, Any]]) -> None:
    """DataError if a process has other sources or another environment than process 0, and so would give other bytes."""
    for rank, plan in enumerate(plans):
        for key, value in plans[0]["environment"].items():
            if plan["environment"].get(key) != value:
                raise DataError(
                    f"{out}: process {rank} runs with {key} {plan['environment'].get(key)} but process 0 with {value}, "
                    "which may give other bytes; use machines of one kind and one installation"
                )
        if plan != plans[0]:
            raise DataError(f"{out}: process {rank} sees another recipe or other source files than process 0")


@contextmanager
def _begin(recipe: Recipe, out: Path, splits: dict[str, Split], plan: dict[str, Any], pool: Executor) -> Iterator[None]:
    """Lock the folder for this build, and write its plan and its codec into it."""
    _refuse_finished(out)
    with only_writer(out, "dataset"):
        _refuse_finished(out)  # by a build that has ended meanwhile
        begun = (out / "build.json").exists()
        if begun:
            _check_plan(out, plan)
            for leftover in out.rglob(f"{PREFIX}*.tmp"):  # of a killed build
                if leftover.is_file():
                    leftover.unlink()
        if not (out / "codec").is_dir():
            codec = _make_codec(recipe, splits["train"], pool)  # before the plan is written: it may not fit
            if not begun:
                write_json(out / "build.json", plan)
            write_folder(out / "codec", codec.save)
        yield


def _refuse_finished(out: Path) -> None:
    """DataError if the folder holds a finished dataset, or is not ours."""
    if check_ours(out, "dataset") and (out / "manifest.json").exists():
        (out / "build.json").unlink(missing_ok=True)  # of a build that was killed at its very end
        raise DataError(f"{out}: a finished dataset is there; give another --out, or remove the folder to build again")


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    """DataError unless the unfinished build in the folder was started with this plan."""
    begun = read_json(out / "build.json", "remove the folder and build again")
    here, there = plan["environment"], begun.pop("environment", {})
    if begun != {key: value for key, value in plan.items() if key != "environment"}:
        raise DataError(
            f"{out}: holds an unfinished build of another recipe, of other splits or other source files; "
            "give another --out, or remove the folder"
        )
    for key in here:
        if there.get(key) != here[key]:
            raise DataError(
                f"{out}: the unfinished build was begun with {key} {there.get(key)} but here it is {here[key]}, which "
                "may give other bytes; go on as it was begun, or remove the folder"
            )


# --------------------------------------------------------------------------------------------------------------- codec


def _make_codec(recipe: Recipe, train: Split, pool: Executor) -> Codec:
    """Fit or load the recipe's codec; DataError if its latents cannot hold a pose."""
    codec: Codec
    if isinstance(recipe.codec, PcaCodecConfig):
        chunks = train.indices[: recipe.codec.fit_views].split(recipe.encode_batch)
        images = torch.cat(list(pool.map(lambda chunk: train.source.images(chunk.tolist()), chunks)))
        codec = PcaCodec.fit(images, recipe.codec.patch, recipe.codec.channels)
    elif isinstance(recipe.codec, DatasetCodecConfig):
        codec = _codec_of(Path(recipe.codec.path))
    else:
        codec = VaeCodec(recipe.codec.path, recipe.codec.dtype)
    if recipe.image_size % (2 * codec.downsample) or codec.channels % 4:
        raise DataError(
            f"image_size {recipe.image_size} with a codec of {codec.channels} channels that shrinks by "
            f"{codec.downsample}: the latent needs an even size and a multiple of 4 channels to hold a pose"
        )
    return codec


def _codec_of(dataset: Path) -> Codec:
    """The codec of a finished dataset; DataError if there is none, CodecError if the manifest names another."""
    identity, codec = load_manifest(dataset).codec, load_codec(dataset / "codec")
    if codec.identity() != identity:
        raise CodecError(f"{dataset}/codec: is not the codec that the manifest names; build that dataset again")
    return codec


# -------------------------------------------------------------------------------------------------------------- shards


def _build_shards(
    splits: dict[str, Split],
    size: int,
    make: SampleMaker,
    out: Path,
    pool: Executor,
    depth: int,
    ranks: Ranks,
) -> dict[str, list[BuiltShard]]:
    """Write all shards, each on one of the processes; the result by split, in order.

    Each process writes in a thread of its own while the processes exchange their progress. All of them stop soon after
    one has failed, and none waits long without hearing from the others.
    """
    shards = [shard for split in splits.values() for shard in shards_of(split, size)]
    missing = ranks.broadcast({shard.name for shard in shards if not shard.index(out).exists()})
    order = sorted(shards, key=lambda shard: shard.name not in missing)  # divide the missing ones evenly
    mine = order[ranks.rank :: ranks.world]
    total, before = sum(map(len, shards)), sum(len(shard) for shard in shards if shard.name not in missing)
    counts: list[int] = []
    stop = threading.Event()
    with (
        tqdm(total=total, initial=before, desc="views", unit="view", smoothing=0.05, disable=ranks.rank > 0) as bar,
        helper_threads(1, "shards") as writer,
    ):
        work = writer.submit(write_shards, mine, make, out, pool, depth, counts.append, stop)
        try:
            while True:
                wait([work], timeout=PROGRESS_INTERVAL)
                ended = work.done()
                failed = ended and work.exception() is not None
                views, working, failures = ranks.sum(torch.tensor([sum(counts), not ended, failed])).tolist()
                bar.update(before + views - bar.n)
                if failures or not working:
                    break
        finally:
            stop.set()
    built: dict[str, BuiltShard] = {}
    with ranks.raise_together():
        built = work.result()
    everything = {name: shard for part in ranks.gather(built) for name, shard in part.items()}
    return {name: [everything[shard.name] for shard in shards_of(split, size)] for name, split in splits.items()}


# ------------------------------------------------------------------------------------------------------------ manifest


def _manifest(
    recipe: Recipe, out: Path, splits: dict[str, Split], built: dict[str, list[BuiltShard]], make: SampleMaker
) -> DatasetManifest:
    size = recipe.image_size // make.codec.downsample
    codec_files = sorted(path for path in (out / "codec").rglob("*") if path.is_file())
    return DatasetManifest(
        format_version=FORMAT_VERSION,
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        sources={name: split.source.fingerprint() for name, split in splits.items()},
        image_size=recipe.image_size,
        objects=_objects(recipe, splits),
        statistics=make.statistics.to_dict(),
        codec=make.codec.identity(),
        codec_files={str(path.relative_to(out / "codec")): file_sha256(path) for path in codec_files},
        latent=LatentShape(channels=make.codec.channels, height=size, width=size),
        codec_psnr=_held_out_psnr(built),
        splits={name: _split_entry(split, built[name]) for name, split in splits.items()},
    )


def _split_entry(split: Split, shards: Sequence[BuiltShard]) -> SplitEntry:
    radius = camera_radius(split.camera_to_world)
    first = split.source.intrinsics(int(split.indices[0]))
    return SplitEntry(
        count=len(split),
        radius=(float(radius.min()), float(radius.max())),
        radius_augmented=int(split.is_zoomed.sum()),
        cameras=CameraFacts(
            looks_at_origin=bool(looks_at_origin(split.camera_to_world).all()),
            upright=bool(is_upright(split.camera_to_world).all()),
            same_intrinsics=all(split.source.intrinsics(view) == first for view in split.indices.tolist()),
        ),
        shards=[shard.entry for shard in shards],
    )


def _objects(recipe: Recipe, splits: dict[str, Split]) -> list[ObjectEntry]:
    """All objects that have views in the dataset, by label."""
    sources = [source for name in recipe.splits for source in recipe.sources(name)]
    names = {source.label: source.name for source in sources if source.name is not None}
    labels = {name: split.source.labels[split.indices] for name, split in splits.items()}
    similarities = {label: value for split in splits.values() for label, value in split.source.similarities().items()}
    entries = []
    for label in torch.cat(list(labels.values())).unique().tolist():
        counts = {name: int((mine == label).sum()) for name, mine in labels.items()}
        views = {name: count for name, count in counts.items() if count}
        name = names.get(label, f"object {label}")
        similarity, background = similarities.get(label), _background_of(label, splits) if recipe.keep_views else None
        entries.append(ObjectEntry(label=label, name=name, views=views, similarity=similarity, background=background))
    return entries


def _background_of(label: int, splits: dict[str, Split]) -> tuple[float, float, float] | None:
    """The colour behind an object in the first of its views."""
    for split in splits.values():
        mine = split.indices[split.source.labels[split.indices] == label]
        colour = split.source.background(int(mine[0])) if len(mine) else None
        if colour is not None:
            red, green, blue = colour.clamp(0.0, 1.0).tolist()
            return red, green, blue
    return None


def _held_out_psnr(built: dict[str, list[BuiltShard]]) -> CodecPsnr | None:
    """The codec's PSNR on val, or else on the first other split by name; None if there are only training views."""
    for split in ("val", *sorted(set(built) - {"train", "val"})):
        if split in built:
            values = np.array([value for shard in built[split] for value in shard.codec_psnr])
            return CodecPsnr(mean=float(values.mean()), n=len(values), split=split)
    return None


def _finish(out: Path, manifest: DatasetManifest) -> None:
    """Write the provenance and the manifest, which make the folder a dataset."""
    write_json(out / "provenance.json", _environment())
    text = manifest.model_dump_json(indent=1) + "\n"
    write_atomically(out / "manifest.json", lambda path: path.write_text(text))
    (out / "build.json").unlink(missing_ok=True)
