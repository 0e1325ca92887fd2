"""How fast the data side is: samples a second beside stock webdataset pipelines, and the time to the first batch.

Every measure is the best of ROUNDS, taken in turn, so that other work on the machine meets all of them alike.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor

from sitdist.data.format import ShardEntry
from sitdist.data.order import BlockShuffle
from sitdist.data.prefetch import Prefetch
from sitdist.data.reader import BatchReader, ShardReader
from sitdist.data.resident import ResidentSamples
from sitdist.data.streaming import MEMBERS, collate, decode, stream_batches

ROUNDS = 3
SAMPLES_PER_SHARD = 10_000  # of the synthetic dataset
LATE_STEP = 10**6
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # moments float32, packed poses, labels


@dataclass(frozen=True)
class Measure:
    """Samples a second of one way to read, by how many processes; baselines are what others offer."""

    name: str
    processes: int
    rate: float
    is_baseline: bool


def bench_data(dataset: str, split: str, batch: int, samples: int, synthetic: int | None, views: int) -> str:
    """The report: the machine, every measure, ratios to the fastest baseline; about `samples` samples a measure."""
    lines = [_machine(), ""]
    if synthetic is not None:  # first, as memory is measured by its peak
        lines += [*bench_synthetic(dataset, split, batch, synthetic), ""]
    lines += [*format_table(bench_reading(dataset, split, batch, samples)), ""]
    lines += bench_first_batch(dataset, split, batch)
    if views:
        lines += ["", *bench_views(dataset, views)]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- reading


def bench_reading(dataset: str, split: str, batch: int, samples: int) -> list[Measure]:
    """Samples a second of stock pipelines and of the reader, all in shuffled order unless named otherwise."""
    reader = ShardReader(dataset, split)
    tars = [str(reader.folder / split / name) for name in reader.shard_names]
    steps = max(1, samples // batch)
    ways: list[tuple[str, int, bool, Callable[[], Batches]]] = [
        ("webdataset, decoded one by one", 1, True, lambda: _stock(tars, batch)),
        ("webdataset, decoded by batch", 1, True, lambda: _stock_by_batch(tars, batch)),
        ("webdataset, by batch, in order", 1, True, lambda: _stock_by_batch(tars, batch, shuffle=0)),
        ("webdataset, by batch, 1 worker", 2, True, lambda: _workers(_stock_by_batch(tars, batch), 1)),
        ("webdataset, by batch, 2 workers", 3, True, lambda: _workers(_stock_by_batch(tars, batch), 2)),
        ("sitdist streaming", 1, False, lambda: stream_batches(tars, batch, seed=0)),
        ("sitdist reader, in order", 1, False, lambda: _in_order(reader, batch)),
        ("sitdist reader", 1, False, lambda: _shuffled(BatchReader(reader, 0, batch))),
        ("sitdist reader, 1 thread ahead", 1, False, lambda: _ahead(BatchReader(reader, 0, batch), 1, steps)),
        ("sitdist reader, 2 threads ahead", 1, False, lambda: _ahead(BatchReader(reader, 0, batch), 2, steps)),
    ]
    if len(reader) <= 10**6:
        resident = BatchReader(ResidentSamples(reader), 0, batch)
        ways.append(("sitdist reader, resident", 1, False, lambda: _shuffled(resident)))
    rates = [
        max(column) for column in zip(*([_rate(way[3], steps) for way in ways] for _ in range(ROUNDS)), strict=True)
    ]
    return [
        Measure(name, processes, rate, baseline)
        for (name, processes, baseline, _), rate in zip(ways, rates, strict=True)
    ]


def _rate(begin: Callable[[], Batches], steps: int) -> float:
    """Samples a second over `steps` batches, from the second on; shorter where the stream ends."""
    batches = iter(begin())
    next(batches)  # opens the files and starts the workers
    started, count = time.perf_counter(), 0
    for moments, _, _ in itertools.islice(batches, steps):
        count += len(moments)
    return count / (time.perf_counter() - started)


def _stock_samples(tars: list[str], shuffle: int) -> webdataset.WebDataset:
    """Raw samples by webdataset's own means, of the needed members only, again and again."""
    dataset = webdataset.WebDataset(
        tars, shardshuffle=False, select_files=lambda name: name.partition(".")[2] in MEMBERS
    )
    dataset = dataset.shuffle(shuffle) if shuffle else dataset
    return dataset.repeat()


def _stock(tars: list[str], batch: int) -> webdataset.WebDataset:
    return _stock_samples(tars, 1000).map(decode).batched(batch, collation_fn=collate)


def _stock_by_batch(tars: list[str], batch: int, shuffle: int = 1000) -> webdataset.WebDataset:
    return _stock_samples(tars, shuffle).batched(batch, collation_fn=_decode_batch)


def _decode_batch(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Decode a batch at once: all .npy of a kind have one header, so their bytes are the rows of one array."""
    moments, poses = (_stack([sample[name] for sample in samples]) for name in ("moments.npy", "packed_pose.npy"))
    labels = torch.tensor([json.loads(sample["meta.json"])["label"] for sample in samples])
    return torch.from_numpy(moments).float(), torch.from_numpy(poses), labels


def _stack(files: list[bytes]) -> np.ndarray:
    first = np.load(io.BytesIO(files[0]), allow_pickle=False)
    rows = np.frombuffer(b"".join(files), np.uint8).reshape(len(files), -1)
    return np.ascontiguousarray(rows[:, -first.nbytes :]).view(first.dtype).reshape(-1, *first.shape)


def _workers(dataset: webdataset.WebDataset, workers: int) -> Batches:
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def _in_order(reader: ShardReader, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for step in itertools.count():
        samples = reader.samples(np.arange(step * batch, (step + 1) * batch) % len(reader))
        yield samples.moments.float(), samples.packed_pose, samples.label


def _shuffled(batches: BatchReader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for step in itertools.count():
        batch = batches.batch(step)
        yield batch.moments, batch.packed_pose, batch.label


def _ahead(batches: BatchReader, workers: int, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    prefetch = Prefetch(batches, 0, 1, steps + 1, workers)
    try:
        for step in range(steps + 1):
            batch, _ = prefetch.batch(step)
            yield batch.moments, batch.packed_pose, batch.label
    finally:
        prefetch.close()


# ----------------------------------------------------------------------------------------- first batch, large scale


def bench_first_batch(dataset: str, split: str, batch: int) -> list[str]:
    """Seconds from nothing to the first batch, at step 0 and at a late step."""
    times = {step: min(_first_batch(dataset, split, batch, step) for _ in range(ROUNDS)) for step in (0, LATE_STEP)}
    return [f"time to the first batch at step {step}: {1e3 * seconds:.1f} ms" for step, seconds in times.items()]


def _first_batch(dataset: str, split: str, batch: int, step: int) -> float:
    started = time.perf_counter()
    BatchReader(ShardReader(dataset, split), 0, batch).batch(step)
    return time.perf_counter() - started


def bench_synthetic(dataset: str, split: str, batch: int, samples: int) -> list[str]:
    """Time and memory of opening a manifest of so many samples, and of their order at any step; no sample is read."""
    shards = max(1, samples // SAMPLES_PER_SHARD)
    with tempfile.TemporaryDirectory() as folder:
        _write_synthetic(ShardReader(dataset, split), shards, Path(folder))
        before = _peak_memory()
        started = time.perf_counter()
        reader = ShardReader(folder, split)
        lines = [
            f"synthetic: {len(reader)} samples in {shards} shards",
            f"  opening its manifest: {time.perf_counter() - started:.2f} s, {_peak_memory() - before:.0f} MB",
        ]
    before = _peak_memory()
    last = 2 * len(reader) // batch - 1
    for name, step in (("0", 0), (f"{LATE_STEP}", LATE_STEP), (f"{last}, the last of the second epoch", last)):
        seconds = min(_order_from_nothing(reader, batch, step) for _ in range(ROUNDS))
        lines.append(f"  order from nothing at step {name}: {1e3 * seconds:.1f} ms")
    return [*lines, f"  order, memory above the manifest: {_peak_memory() - before:.0f} MB"]


def _order_from_nothing(reader: ShardReader, batch: int, step: int) -> float:
    started = time.perf_counter()
    BlockShuffle(reader.shard_counts, 0).samples(np.arange(step * batch, (step + 1) * batch))
    return time.perf_counter() - started


def _write_synthetic(reader: ShardReader, shards: int, folder: Path) -> None:
    """A manifest like the reader's, of so many shards that are not there."""
    manifest = reader.manifest
    entries = [
        ShardEntry(name=f"{number:06d}.tar", count=SAMPLES_PER_SHARD, bytes=0, sha256="0" * 64, index_sha256="0" * 64)
        for number in range(shards)
    ]
    split = manifest.splits[reader.split].model_copy(update={"count": shards * SAMPLES_PER_SHARD, "shards": entries})
    text = manifest.model_copy(update={"splits": {reader.split: split}}).model_dump_json()
    (folder / "manifest.json").write_text(text)


def _peak_memory() -> float:
    """The process's largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


# ----------------------------------------------------------------------------------------------------------- views


def bench_views(dataset: str, views: int) -> list[str]:
    """Views a second of rendering the built-in scene at the dataset's size, and of the dataset's codec on one batch."""
    from sitdist.data.store import open_store
    from sitdist.flow import draws
    from sitdist.geometry.camera import Intrinsics, shell_cameras
    from sitdist.model.codec import load_codec
    from sitdist.scene.volume import render_views

    folder = open_store(dataset).folder
    size, codec = ShardReader(dataset, "train").manifest.image_size, load_codec(folder / "codec")
    cameras = shell_cameras(draws.uniform(0, "bench", torch.arange(views), 3), (3.0, 5.0), "upper")
    started = time.perf_counter()
    images = render_views(cameras, Intrinsics.from_fov(40.0, size, size), 2)
    rendered = time.perf_counter()
    codec.encode_moments(images)
    encoded = time.perf_counter()
    return [
        f"rendering the built-in scene at {size}x{size}: {views / (rendered - started):.1f} views/s",
        f"encoding by the dataset's codec, {codec.identity()['kind']}: {views / (encoded - rendered):.1f} views/s",
    ]


# ---------------------------------------------------------------------------------------------------------- report


def format_table(measures: list[Measure]) -> list[str]:
    """A line a measure, with its ratios to the fastest baseline of one process and to the fastest of any number."""
    baselines = sorted((measure for measure in measures if measure.is_baseline), key=lambda measure: measure.rate)
    best, alone = baselines[-1], [measure for measure in baselines if measure.processes == 1][-1]
    lines = [f"{'way to read':<34}{'processes':>10}{'samples/s':>12}{'ratio (1)':>11}{'ratio (2)':>11}"]
    for measure in measures:
        ratios = f"{measure.rate / alone.rate:>11.2f}{measure.rate / best.rate:>11.2f}"
        lines.append(f"{measure.name:<34}{measure.processes:>10}{measure.rate:>12,.0f}{ratios}")
    return [
        *lines,
        f"(1) to '{alone.name}', the fastest baseline of one process",
        f"(2) to '{best.name}', the fastest baseline of any number of processes",
    ]


def _machine() -> str:
    """Hardware, load, versions and command."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    packages = ", ".join(f"{name} {version(name)}" for name in ("sitdist", "torch", "numpy", "webdataset"))
    return (
        f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads\n"
        f"Python {platform.python_version()}, {packages}\n"
        f"command: {' '.join(['sitdist', *sys.argv[1:]])}"
    )
