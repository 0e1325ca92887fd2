"""How fast samples are read, beside stock webdataset; the first batch; and the order of very many samples."""

from __future__ import annotations

import io
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor

from benchmarks.measure import ROUNDS, Measure, Way, measure
from sitdist.dataset.batches import BatchReader
from sitdist.dataset.manifest import MANIFEST, ShardEntry
from sitdist.dataset.order import BlockShuffle
from sitdist.dataset.prefetch import Prefetch
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.resident import ResidentSamples

SAMPLES_PER_SHARD = 10_000  # of the synthetic dataset
LATE_STEP = 10**6
LARGEST_RESIDENT = 10**6  # samples
MEMBERS = ("moments.npy", "packed_pose.npy", "meta.json")
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # moments float32, packed poses, labels


def bench_reading(dataset: str, split: str, batch: int, samples: int) -> list[Measure]:
    """Samples per second of stock pipelines and of the reader, in shuffled order unless the name says otherwise."""
    reader = ShardReader(dataset, split)
    tars = [str(reader.folder / split / name) for name in reader.shard_names]
    steps = max(1, samples // batch)

    def way(name: str, begin: Callable[[], Batches], is_baseline: bool = False, processes: int = 1) -> Way:
        return Way(name, lambda: _rate(begin, steps), is_baseline, processes)

    ways = [
        way("webdataset, decoded one by one", lambda: _stock(tars, batch), True),
        way("webdataset, decoded by batch", lambda: _stock_by_batch(tars, batch), True),
        way("webdataset, by batch, in order", lambda: _stock_by_batch(tars, batch, shuffle=0), True),
        way("webdataset, by batch, 1 worker", lambda: _workers(_stock_by_batch(tars, batch), 1), True, 2),
        way("webdataset, by batch, 2 workers", lambda: _workers(_stock_by_batch(tars, batch), 2), True, 3),
        way("sitdist reader, in order", lambda: _in_order(reader, batch)),
        way("sitdist reader", lambda: _shuffled(BatchReader(reader, 0, batch))),
        way("sitdist reader, 1 thread ahead", lambda: _ahead(BatchReader(reader, 0, batch), 1, steps)),
        way("sitdist reader, 2 threads ahead", lambda: _ahead(BatchReader(reader, 0, batch), 2, steps)),
    ]
    if len(reader) <= LARGEST_RESIDENT:
        resident = BatchReader(ResidentSamples(reader), 0, batch)
        ways.append(way("sitdist reader, resident", lambda: _shuffled(resident)))
    return measure(ways)


def _rate(begin: Callable[[], Batches], steps: int) -> float:
    """Samples per second over `steps` batches, from the second on."""
    batches = iter(begin())
    next(batches)  # opens the files and starts the workers
    started, count = time.perf_counter(), 0
    for moments, _, _ in itertools.islice(batches, steps):
        count += len(moments)
    return count / (time.perf_counter() - started)


def _stock_samples(tars: list[str], shuffle: int) -> webdataset.WebDataset:
    """Raw samples as webdataset reads them, the needed members only, repeated without end."""
    dataset = webdataset.WebDataset(
        tars, shardshuffle=False, select_files=lambda name: name.partition(".")[2] in MEMBERS
    )
    dataset = dataset.shuffle(shuffle) if shuffle else dataset
    return dataset.repeat()


def _stock(tars: list[str], batch: int) -> webdataset.WebDataset:
    return _stock_samples(tars, 1000).map(_decode).batched(batch, collation_fn=_collate)


def _decode(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    moments, pose = (np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in MEMBERS[:2])
    return moments, pose, json.loads(sample["meta.json"])["label"]


def _collate(samples: list[tuple[np.ndarray, np.ndarray, int]]) -> tuple[Tensor, Tensor, Tensor]:
    moments, poses, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(moments)).float(), torch.from_numpy(np.stack(poses)), torch.tensor(labels)


def _stock_by_batch(tars: list[str], batch: int, shuffle: int = 1000) -> webdataset.WebDataset:
    return _stock_samples(tars, shuffle).batched(batch, collation_fn=_decode_batch)


def _decode_batch(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Decode a batch at once: all .npy files of a kind have the same header, so their bytes are rows of one array."""
    moments, poses = (_stack([sample[name] for sample in samples]) for name in MEMBERS[:2])
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
    """Time and memory to open a manifest of that many samples, and to compute their order; no sample is read."""
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
    """Write a manifest like the reader's that lists that many shards, none of which exists."""
    manifest, count = reader.manifest, shards * SAMPLES_PER_SHARD
    size = SAMPLES_PER_SHARD * manifest.sample_bytes()[1]
    entries = [
        ShardEntry(name=f"{n:06d}.tar", count=SAMPLES_PER_SHARD, bytes=size, sha256="0" * 64, index_sha256="0" * 64)
        for n in range(shards)
    ]
    split = manifest.splits[reader.split].model_copy(update={"count": count, "shards": entries})
    first, *others = (entry.model_copy(update={"views": entry.views | {reader.split: 0}}) for entry in manifest.objects)
    first.views[reader.split] = count
    changes = {"splits": manifest.splits | {reader.split: split}, "objects": [first, *others], "codec_psnr": None}
    (folder / MANIFEST).write_text(manifest.model_copy(update=changes).model_dump_json())


def _peak_memory() -> float:
    """The process's largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
