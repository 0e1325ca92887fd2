"""Tar shards without an index, as a stream of batches by webdataset's own pipeline stages.

For shards that nobody indexed. Unlike `reader` it cannot resume exactly: a resumed run begins a new epoch's stream. A
truncated tar only looks shorter, altered bytes are not noticed, and ranks may get different numbers of batches unless
the stream is resampled. Only the members that are needed are read, by explicit decoders; nothing is unpickled, and no
URL runs a command.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset

from sitdist.errors import DataError
from sitdist.io.json_file import parse_json

MEMBERS = ("moments.npy", "packed_pose.npy", "meta.json")
Streamed = tuple[Tensor, Tensor, Tensor]  # moments [B, 2C, h, w] float32, packed poses [B, 4, 4] float32, labels [B]


def stream_batches(
    urls: Sequence[str],
    batch: int,
    seed: int,
    epoch: int = 0,
    resample: bool = False,
    shuffle_buffer: int = 2000,
) -> webdataset.DataPipeline:
    """An iterable of batches from tars by path or fsspec URL, in an order by (seed, epoch).

    Shards are split over ranks, then over DataLoader workers: without `resample` each is read once, with it they are
    drawn without end, by a generator of (seed, epoch, rank, worker). DataError where a sample is not of the format.
    """
    splitting = () if resample else (webdataset.split_by_node, webdataset.split_by_worker)
    return webdataset.DataPipeline(
        ShardUrls(urls, seed, epoch, resample),
        *splitting,
        _opened,
        webdataset.pipelinefilter(webdataset.tariterators.tar_file_expander)(_refuse, select_files=_is_needed),
        webdataset.pipelinefilter(webdataset.tariterators.group_by_keys)(handler=_refuse),
        webdataset.shuffle(shuffle_buffer, initial=shuffle_buffer, seed=_hash(seed, epoch)),
        webdataset.map(decode),
        webdataset.batched(batch, collation_fn=collate, partial=not resample),
    )


class ShardUrls(IterableDataset):
    """The shards of an epoch: all of them in an order by (seed, epoch), or draws without end, others for every worker.

    webdataset's own resampling takes its seed from the clock, whatever seed it is given.
    """

    def __init__(self, urls: Sequence[str], seed: int, epoch: int, resample: bool) -> None:
        if not urls:
            raise DataError("no shards to stream; give the paths or URLs of .tar files")
        self._urls, self._seed, self._epoch, self._resample = list(urls), seed, epoch, resample

    def __iter__(self) -> Iterator[dict[str, str]]:
        if self._resample:
            rank, _, worker, _ = webdataset.utils.pytorch_worker_info()
            generator = random.Random(_hash(self._seed, self._epoch, rank, worker))
            yield from ({"url": generator.choice(self._urls)} for _ in itertools.count())
        order = random.Random(_hash(self._seed, self._epoch)).sample(self._urls, len(self._urls))
        yield from ({"url": url} for url in order)


def _hash(*numbers: int) -> str:
    """What seeds Python's generator by its text, the same in every process."""
    return "/".join(map(str, numbers))


def _opened(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Opens tars through fsspec, which knows no URL that runs a command (webdataset's own opener does)."""
    import fsspec

    for shard in shards:
        try:
            with fsspec.open(shard["url"], "rb") as stream:
                yield shard | {"stream": stream}
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{shard['url']}: cannot be read ({error}); check the address and its package") from None


def _is_needed(name: str) -> bool:
    return name.partition(".")[2] in MEMBERS


def _refuse(error: Exception) -> NoReturn:
    """What webdataset calls for a tar that it cannot read; it adds the stream and the URL to the error's arguments."""
    if isinstance(error, DataError):  # called before, further inside
        error.args = error.args[:1]
        raise error
    where = error.args[-1] if len(error.args) > 1 and isinstance(error.args[-1], str) else "a shard"
    reason = str(error.args[0])[:160] if error.args else type(error).__name__
    raise DataError(f"{where}: no readable tar ({reason}); see shards/README.md") from None


def decode(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Moments [2C, h, w] float16, packed pose [4, 4] float32 and label of a sample's bytes.

    DataError if one is missing, not finite, or not of the format.
    """
    where = f"{sample['__url__']}: sample {sample['__key__']}"
    try:
        moments, pose = (
            np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in ("moments.npy", "packed_pose.npy")
        )
        label = parse_json(sample["meta.json"], f"{where}: meta.json", "see shards/README.md")["label"]
        if moments.dtype != np.float16 or moments.ndim != 3 or moments.shape[0] % 2:
            raise ValueError(f"moments {moments.dtype} {list(moments.shape)}")
        if pose.dtype != np.float32 or pose.shape != (4, 4):
            raise ValueError(f"packed_pose {pose.dtype} {list(pose.shape)}")
        if not (np.isfinite(moments).all() and np.isfinite(pose).all()):
            raise ValueError("NaN or infinity")
        if type(label) is not int or not 0 <= label < 2**63:
            raise ValueError(f"label {label!r:.40}")
    except (KeyError, ValueError, TypeError, MemoryError, EOFError) as error:
        raise DataError(f"{where}: not of the format ({error!r:.200}); see shards/README.md") from None
    return moments, pose, label


def collate(samples: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> Streamed:
    """Decoded samples as a batch; DataError if their latents differ in shape."""
    moments, poses, labels = zip(*samples, strict=True)
    if len({each.shape for each in moments}) > 1:
        raise DataError("the shards hold latents of several shapes; stream those of one dataset")
    return torch.from_numpy(np.stack(moments)).float(), torch.from_numpy(np.stack(poses)), torch.tensor(labels)
