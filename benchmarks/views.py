"""How fast views are rendered, encoded and built into shards, at the size and with the codec of a dataset.

Threads are torch's: as many as a build would use.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch import Tensor

from benchmarks.measure import Way, format_table, measure
from sitdist.build.sources import open_source
from sitdist.build.writer import build, one_thread_each
from sitdist.config.load import parse
from sitdist.config.recipe import DatasetCodecConfig, PcaCodecConfig, Recipe, SceneSource
from sitdist.dataset.manifest import DatasetManifest, load_manifest
from sitdist.dataset.store import open_store
from sitdist.errors import DataError
from sitdist.model.autoencoder import make_vae
from sitdist.model.codec import Codec, PcaCodec, VaeCodec, latent_mean, load_codec
from sitdist.scene.store import load_scene
from sitdist.scene.views import render


def bench_views(dataset: str, views: int, scene: str | None) -> list[str]:
    """Rates of rendering, encoding and building `views` views.

    They are of the built-in object, and of the scene in the folder `scene`, or else of the one in the dataset's recipe.
    """
    folder = open_store(dataset).folder
    manifest = load_manifest(folder)
    recipe = parse(Recipe, manifest.recipe, f"{folder / 'manifest.json'}: recipe")
    builtin = SceneSource(kind="scene", views=views)
    fitted = builtin.model_copy(update={"scene": scene}) if scene else _scene_of(recipe, views)
    lines = bench_rendering(builtin, recipe.image_size)
    if fitted is not None:
        try:
            lines += ["", *bench_rendering(fitted, recipe.image_size)]
        except DataError as error:
            if scene:
                raise
            lines += ["", f"rendering the recipe's scene: not measured ({error})"]
            fitted = None
    lines += ["", *bench_encoding(folder, recipe, builtin)]
    return [*lines, "", *bench_building(folder, manifest, recipe, fitted or builtin)]


def _scene_of(recipe: Recipe, views: int) -> SceneSource | None:
    """The first fitted scene among the training sources, with that many views."""
    for source in recipe.sources("train"):
        if isinstance(source, SceneSource) and source.scene is not None:
            return source.model_copy(update={"views": views, "radius_bins": None})
    return None


# ----------------------------------------------------------------------------------------------------------- rendering


def bench_rendering(config: SceneSource, size: int) -> list[str]:
    """Views per second with one thread and with all; for a fitted scene, also without skipping empty space."""
    source, views = open_source(config, size), list(range(config.views))
    few = views[: max(1, len(views) // 8)]  # for what is slow
    with one_thread_each() as (pool, depth):
        threads = depth - 1
        ways = [Way("one thread", lambda: _rate(len(views), lambda: source.images(views)), config.scene is None)]
        if config.scene is not None:
            slow = _without_skipping(config, size)
            ways.insert(0, Way("one thread, empty space not skipped", lambda: _rate(len(few), lambda: slow(few)), True))
        if threads > 1:
            one = [[view] for view in views]
            ways.append(Way(f"{threads} threads", lambda: _rate(len(one), lambda: list(pool.map(source.images, one)))))
        measures = measure(ways)
    name = "the built-in object" if config.scene is None else config.scene
    return format_table(f"rendering {name}, {size}x{size}", "views/s", measures)


def _without_skipping(config: SceneSource, size: int) -> Callable[[list[int]], list[Tensor]]:
    """A function that renders views of a fitted scene without skipping empty cells."""
    assert config.scene is not None
    source, scene = open_source(config, size), load_scene(Path(config.scene))
    scene = dataclasses.replace(scene, field=dataclasses.replace(scene.field, cells=None))

    def images(views: list[int]) -> list[Tensor]:
        return [
            render(scene, source.camera_to_world[view], source.intrinsics(view), config.supersample, config.background)
            for view in views
        ]

    return images


def _rate(count: float, do: Callable[[], object]) -> float:
    """`count` divided by the seconds that `do` takes."""
    started = time.perf_counter()
    do()
    return count / (time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------------------ encoding


def bench_encoding(folder: Path, recipe: Recipe, config: SceneSource) -> list[str]:
    """Views a second of one thread: an AutoencoderKL in fp32 and in bf16, and the dataset's codec where it is another.

    The AutoencoderKL is the dataset's, or else one with random weights, which takes as long as any of its size.
    """
    source = open_source(config, recipe.image_size)
    images = source.images([view % config.views for view in range(recipe.encode_batch)])
    batches = -(-config.views // len(images))
    codec = load_codec(folder / "codec")
    with tempfile.TemporaryDirectory() as temporary, one_thread_each():
        if isinstance(codec, PcaCodec):
            vae, name = Path(temporary), "random AutoencoderKL"
            make_vae(recipe.image_size).save_pretrained(vae)
        else:
            vae, name = folder / "codec" / "vae", "the dataset's AutoencoderKL"
        full, half = VaeCodec(str(vae), "fp32"), VaeCodec(str(vae), "bf16")
        ways = [
            Way(f"{name}, fp32", lambda: _encoding_rate(full, images, batches), True),
            Way(f"{name}, bf16", lambda: _encoding_rate(half, images, batches)),
        ]
        if isinstance(codec, PcaCodec):
            ways.append(Way("the dataset's codec, pca", lambda: _encoding_rate(codec, images, batches)))
        exact, rounded = (latent_mean(each.encode_moments(images)) for each in (full, half))
        table = format_table(f"encoding, {len(images)} views at a time, one thread", "views/s", measure(ways))
    difference = (rounded - exact).square().mean().sqrt() / exact.std()
    return [*table, f"  bf16 latents differ from those of fp32 by {100 * difference:.2f}% of their deviation"]


def _encoding_rate(codec: Codec, images: Tensor, batches: int) -> float:
    return _rate(batches * len(images), lambda: [codec.encode_moments(images) for _ in range(batches)])


# ------------------------------------------------------------------------------------------------------------ building


def bench_building(folder: Path, manifest: DatasetManifest, recipe: Recipe, config: SceneSource) -> list[str]:
    """MB of tars per second of a whole build, and of stock webdataset that only writes finished samples."""
    small = Recipe(
        name="bench",
        image_size=recipe.image_size,
        codec=_codec_config(folder, recipe),
        splits={"train": config.model_copy(update={"label": 0})},
        val_views=0,
        samples_per_shard=recipe.samples_per_shard,
        encode_batch=recipe.encode_batch,
    )
    with tempfile.TemporaryDirectory() as temporary:
        numbers = itertools.count()
        first = build(small, Path(temporary) / "first")
        megabytes = sum(shard.bytes for shard in first.splits["train"].shards) / 1e6
        tars = [str(Path(temporary) / "first" / "train" / shard.name) for shard in first.splits["train"].shards]
        samples = list(webdataset.WebDataset(tars, shardshuffle=False))

        def build_again() -> object:
            return build(small, Path(temporary) / str(next(numbers)))

        def write_again() -> None:
            _write_stock(samples, Path(temporary) / f"stock{next(numbers)}", recipe.samples_per_shard)

        ways = [
            Way("webdataset, writing finished samples", lambda: _rate(megabytes, write_again), True),
            Way("sitdist shards build", lambda: _rate(megabytes, build_again)),
        ]
        measures = measure(ways)
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    views_rate = measures[1].rate * config.views / megabytes
    return [
        *format_table(f"building, {manifest.codec['kind']} codec, {threads}", "MB/s", measures),
        f"  {views_rate:.2f} views/s of {config.scene or 'the built-in object'} are rendered, encoded and written, "
        f"{1e3 * megabytes / config.views:.1f} kB each",
    ]


def _codec_config(folder: Path, recipe: Recipe) -> PcaCodecConfig | DatasetCodecConfig:
    """The recipe's codec if it is closed-form, to be fitted again; else the one in the dataset."""
    if isinstance(recipe.codec, PcaCodecConfig):
        return recipe.codec
    return DatasetCodecConfig(kind="dataset", path=str(folder.resolve()))


def _write_stock(samples: list[dict[str, Any]], folder: Path, size: int) -> None:
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=size, encoder=False, verbose=0) as writer:
        for sample in samples:
            writer.write({name: value for name, value in sample.items() if name == "__key__" or name[0] != "_"})
