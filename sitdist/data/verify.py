"""What a finished dataset holds, and everything that is wrong with it: nothing here changes a file."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch

from sitdist.data.format import IMAGE_MEMBER, MEMBERS, ShardEntry, load_index, load_manifest
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.io.atomic import file_sha256
from sitdist.model.codec import load_codec


def verify(out: Path) -> list[str]:
    """Everything wrong with a dataset, a line each, by shard and sample; an empty list if nothing is."""
    manifest = load_manifest(out)
    statistics = PoseStatistics.from_dict(manifest.statistics)
    problems = []
    for name, expected in manifest.codec_files.items():
        path = out / "codec" / name
        if not path.is_file() or file_sha256(path) != expected:
            problems.append(f"codec/{name}: missing or altered; build the dataset again")
    if not problems:
        identity = load_codec(out / "codec").identity()
        problems += [
            f"manifest.json: codec {key} is {manifest.codec.get(key)} but the codec folder's is {value}; build again"
            for key, value in identity.items()
            if manifest.codec.get(key) != value
        ]
    for name, split in manifest.splits.items():
        if sum(shard.count for shard in split.shards) != split.count:
            problems.append(f"manifest.json: the shards of {name} do not hold {split.count} samples; build again")
        keys = itertools.count()
        for shard in split.shards:
            wanted = [f"{next(keys):09d}" for _ in range(shard.count)]
            problems += [
                f"{name}/{shard.name}: {line}" for line in _verify_shard(out / name, name, shard, wanted, statistics)
            ]
    return problems


def _verify_shard(
    folder: Path, split: str, shard: ShardEntry, keys: list[str], statistics: PoseStatistics
) -> list[str]:
    tar, index_path = folder / shard.name, (folder / shard.name).with_suffix(".index.npz")
    if not tar.is_file() or not index_path.is_file():
        return [f"missing ({'tar' if not tar.is_file() else 'index'}); build the dataset again"]
    if file_sha256(index_path) != shard.index_sha256:
        return ["index altered; build the dataset again"]
    index = load_index(index_path)
    if len(index["start"]) != shard.count:
        return [f"index of {len(index['start'])} samples but the manifest says {shard.count}"]
    data = tar.read_bytes()
    if len(data) < shard.bytes:
        lost = int((index["stop"] > len(data)).sum())
        return [f"truncated: {len(data)} of {shard.bytes} bytes, {lost} of {shard.count} samples lost; build again"]
    problems = []
    for row, key in enumerate(keys):
        start, stop = int(index["start"][row]), int(index["stop"][row])
        if zlib.crc32(data[start:stop]) != index["crc32"][row]:
            problems.append(f"sample {key}: bytes altered (CRC differs); build the dataset again")
            continue
        problems += [
            f"sample {key}: {line}" for line in _verify_sample(data[start:stop], key, split, index, row, statistics)
        ]
    if not problems and file_sha256(tar) != shard.sha256:
        problems.append("bytes outside the samples altered; build the dataset again")
    return problems


def _verify_sample(
    data: bytes, key: str, split: str, index: dict[str, np.ndarray], row: int, statistics: PoseStatistics
) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024)), mode="r:") as file:
        members = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
    names = [*MEMBERS] if split == "train" else sorted([*MEMBERS, IMAGE_MEMBER])
    if sorted(members) != [f"{key}.{name}" for name in names]:
        return [f"members {sorted(members)}; expected {', '.join(names)}"]
    try:
        camera_to_world, packed_pose = (
            torch.from_numpy(np.load(io.BytesIO(members[f"{key}.{name}.npy"]), allow_pickle=False))
            for name in ("camera_to_world", "packed_pose")
        )
        camera = Intrinsics.from_meta(json.loads(members[f"{key}.meta.json"])).normalized()
    except (ValueError, KeyError, TypeError) as error:
        return [f"unreadable array or camera ({error!r})"]
    if not torch.equal(camera_to_world, torch.from_numpy(index["camera_to_world"][row])):
        return ["camera_to_world differs from the index's"]
    expected = standardize(camera_to_world, statistics, torch.tensor(camera, dtype=torch.float64))
    if not torch.allclose(expected.float(), packed_pose, atol=1e-6):
        return ["packed_pose is not camera_to_world standardized with the manifest's statistics"]
    return []


def info(out: Path) -> str:
    """A few lines that say what a dataset holds."""
    manifest = load_manifest(out)
    latent, psnr = manifest.latent, manifest.codec_psnr
    lines = [
        f"{manifest.name}: {manifest.image_size}x{manifest.image_size} pixels, latents "
        f"{latent.channels}x{latent.height}x{latent.width}, codec {manifest.codec['kind']}"
        + (f" (round trip {psnr.mean:.2f} dB on {psnr.n} views of {psnr.split})" if psnr else "")
    ]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards) / 1e6
        low, high = split.radius
        augmented = f" ({split.radius_augmented} of them radius augmented)" if split.radius_augmented else ""
        lines.append(
            f"  {name}: {split.count} views{augmented}, radius {low:.2f} to {high:.2f}, {len(split.shards)} shards, "
            f"{size:.1f} MB"
        )
    return "\n".join(lines)
