"""Verify a finished dataset, without changing a file.

Hashes and checksums find accidents. They do not prove who made a dataset: whoever alters one can write new hashes. So
verifying also reads every array, label, pose, camera and picture as training and evaluation would.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.format import (
    BUILD_AGAIN,
    IMAGE_MEMBER,
    RADIUS_TOLERANCE,
    parse_meta,
    parse_npy,
    sample_key,
    sample_members,
)
from sitdist.dataset.manifest import MANIFEST, CameraFacts, DatasetManifest, ShardEntry, load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.store import Store, open_store
from sitdist.errors import DataError, SitdistError
from sitdist.geometry.camera import Intrinsics, camera_radius, is_upright, looks_at_origin
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.io.atomic import file_sha256
from sitdist.model.codec import load_codec

CHUNK = 1 << 20


def verify(dataset: str | Path) -> list[str]:
    """The problems of a dataset, one line each, with shard and sample; an empty list if there are none.

    `dataset`: a folder, or an fsspec URL, whose cached files are read as in training. DataError for a manifest that
    cannot be used at all.
    """
    store = open_store(dataset)
    manifest = load_manifest(store.folder)
    problems = [*_verify_codec(store, manifest)]
    try:
        parse(Recipe, manifest.recipe, f"{MANIFEST}: recipe")
    except SitdistError as error:
        problems.append(str(error))
    for split in manifest.splits:
        problems += _verify_split(ShardReader(store, split))
    return [problem.removeprefix(f"{store.folder}/") for problem in problems]


def _verify_codec(store: Store, manifest: DatasetManifest) -> Iterator[str]:
    folder = store.folder / "codec"
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_dir() and name not in manifest.codec_files and not path.name.startswith("."):
            yield f"codec/{name}: not in the manifest; remove it"
    whole = True
    for name, expected in manifest.codec_files.items():
        path = store.path(f"codec/{name}", expected)
        if not path.is_file() or file_sha256(path) != expected:
            yield f"codec/{name}: missing or altered; {BUILD_AGAIN}"
            whole = False
    if not whole:
        return
    try:
        identity = load_codec(folder).identity()
    except SitdistError as error:
        yield str(error)
        return
    for key in identity | manifest.codec:
        ours, theirs = manifest.codec.get(key), identity.get(key)
        if ours != theirs:
            yield f"{MANIFEST}: codec {key} is {ours!r:.80} but the codec folder's is {theirs!r:.80}; {BUILD_AGAIN}"


def _verify_split(reader: ShardReader) -> Iterator[str]:
    samples, whole, first = _Samples(reader), True, 0
    for number, shard in enumerate(reader.shards):
        try:
            index = reader.index(number)
            with reader.open_tar(number) as file:
                for problem in _verify_tar(file, shard, index, samples, first):
                    yield f"{reader.split}/{shard.name}: {problem}"
                    whole = False
        except DataError as error:
            yield str(error)
            whole = False
        first += shard.count
    if not whole:
        return
    try:
        poses = reader.camera_to_world()
    except DataError as error:
        yield str(error)
        return
    facts = reader.manifest.splits[reader.split].cameras
    found = CameraFacts(
        looks_at_origin=bool(looks_at_origin(poses).all()),
        upright=bool(is_upright(poses).all()),
        same_intrinsics=samples.same_camera,
    )
    if facts not in (None, found):
        yield f"{MANIFEST}: splits.{reader.split}.cameras is {facts} but its views have {found}; {BUILD_AGAIN}"


def _verify_tar(
    file: BinaryIO, shard: ShardEntry, index: dict[str, np.ndarray], samples: _Samples, first: int
) -> Iterator[str]:
    """Read a tar once, from its first byte to its last, sample by sample; `first` is the number of its first one."""
    size = os.fstat(file.fileno()).st_size
    if size < shard.bytes:
        lost = int((index["stop"] > size).sum())
        yield f"truncated: {size} of {shard.bytes} bytes, {lost} of {shard.count} samples lost; build again"
        return
    digest, whole = hashlib.sha256(), True
    for row in range(shard.count):
        data = file.read(int(index["stop"][row] - index["start"][row]))
        digest.update(data)
        problem = samples.problem(data, first + row, {name: column[row] for name, column in index.items()})
        if problem is not None:
            yield f"sample {sample_key(first + row)}: {problem}"
            whole = False
    padding = True
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        padding = padding and not any(chunk)
    if not padding or size != shard.bytes or (whole and digest.hexdigest() != shard.sha256):
        yield f"bytes outside the samples altered; {BUILD_AGAIN}"


class _Samples:
    """Checks the samples of a split one by one; `same_camera`: all so far have the same intrinsics."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader, self._arrays = reader, reader.manifest.arrays()
        self._statistics = PoseStatistics.from_dict(reader.manifest.statistics)
        self._camera: Intrinsics | None = None
        self.same_camera = True

    def problem(self, data: bytes, number: int, row: dict[str, Any]) -> str | None:
        """What is wrong with a sample, given its part of the tar and its row of the index."""
        if zlib.crc32(data) != row["crc32"]:
            return f"bytes altered (CRC differs); {BUILD_AGAIN}"
        try:
            members = sample_members(data, sample_key(number), self._reader.members)
            arrays = {name: parse_npy(members[f"{name}.npy"][1], *kind) for name, kind in self._arrays.items()}
            meta = parse_meta(members["meta.json"][1], self._reader.manifest.image_size, "meta.json")
            if IMAGE_MEMBER in members:
                self._reader.images([number])
        except (DataError, ValueError) as error:
            return str(error).rpartition(f"sample {sample_key(number)}: ")[2]
        self._camera = self._camera or meta.camera
        self.same_camera = self.same_camera and meta.camera == self._camera
        where = {name.partition(".")[0]: int(row["start"]) + at for name, (at, _) in members.items()}
        size = len(members[IMAGE_MEMBER][1]) if IMAGE_MEMBER in members else 0
        for field in ("moments", "packed_pose", "image", "view"):
            said, found = row.get(field, 0), where.get(field, 0)
            if said != found:
                return f"the index says that {field} begins at byte {said}, and it does at {found}"
        if row["image_bytes"] != size:
            return f"the index says that the picture has {row['image_bytes']} bytes, and it has {size}"
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                return f"{name} holds NaN or infinity; {BUILD_AGAIN}"
        if meta.label != row["label"]:
            return f"meta.json has label {meta.label} and the index {row['label']}; {BUILD_AGAIN}"
        pose = torch.from_numpy(arrays["camera_to_world"])
        if not np.array_equal(arrays["camera_to_world"], row["camera_to_world"]):
            return "camera_to_world differs from the index's"
        if "intrinsics" in row and row["intrinsics"].tolist() != meta.camera.normalized():
            return f"meta.json has intrinsics {meta.camera.normalized()} and the index {row['intrinsics'].tolist()}"
        if not math.isclose(meta.radius, float(camera_radius(pose)), rel_tol=RADIUS_TOLERANCE):
            return f"meta.json has radius {meta.radius} and the pose {float(camera_radius(pose))}; {BUILD_AGAIN}"
        expected = standardize(pose, self._statistics, torch.tensor(meta.camera.normalized(), dtype=torch.float64))
        if not torch.allclose(expected.float(), torch.from_numpy(arrays["packed_pose"]), atol=1e-6):
            return "packed_pose is not camera_to_world standardized with the manifest's statistics"
        return None
