"""From a recipe to a finished dataset: poses, statistics and codec first, then shard by shard, the manifest last.

The same recipe on the same hardware and versions gives the same bytes, also after any number of interruptions.
"""

from __future__ import annotations

import io
import itertools
import json
import platform
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from sitdist.config import PcaCodecConfig, Recipe
from sitdist.data.format import (
    FORMAT_VERSION,
    IMAGE_MEMBER,
    INDEX_FIELDS,
    MEMBERS,
    CodecPsnr,
    DatasetManifest,
    LatentShape,
    ShardEntry,
    SplitEntry,
    cannot_write,
    file_sha256,
    flush_file,
    flush_folder,
    load_index,
    load_manifest,
    write_atomically,
)
from sitdist.data.sources import ViewSource, open_source
from sitdist.errors import DataError
from sitdist.flow import draws
from sitdist.geometry.camera import camera_radius
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.model.codec import Codec, PcaCodec, VaeCodec, latent_mean, load_codec


class _Split:
    """Some views of a source, in order."""

    def __init__(self, name: str, source: ViewSource, indices: Tensor) -> None:
        self.name, self.source, self.indices = name, source, indices
        self.camera_to_world = source.camera_to_world[indices]

    def shards(self, size: int) -> list[list[int]]:
        """The source's indices of every shard."""
        return [chunk.tolist() for chunk in self.indices.split(size)]


def build(recipe: Recipe, out: Path) -> DatasetManifest:
    """Make the dataset `out`, or go on where an interrupted build of the same recipe stopped."""
    if (out / "manifest.json").exists():
        (out / "build.json").unlink(missing_ok=True)
        raise DataError(f"{out}: a finished dataset is there; give another --out, or remove the folder to build again")
    splits = _open_splits(recipe)
    plan = _plan(recipe, splits)
    if not _check_folder(out, plan):
        codec = _make_codec(recipe, splits["train"])  # before anything is written: it may not be there or not fit
        _write_json(out / "build.json", plan)
        _save_codec(codec, out / "codec")
    elif not (out / "codec").is_dir():
        _save_codec(_make_codec(recipe, splits["train"]), out / "codec")
    codec = load_codec(out / "codec")  # always used from there
    statistics = PoseStatistics.from_poses(splits["train"].camera_to_world)
    entries: dict[str, SplitEntry] = {}
    total = sum(len(split.indices) for split in splits.values())
    with tqdm(total=total, desc="views", unit="view", smoothing=0.05) as progress:
        for split in splits.values():
            shards = []
            for number, indices in enumerate(split.shards(recipe.samples_per_shard)):
                first = number * recipe.samples_per_shard
                shards.append(_shard(recipe, split, number, first, indices, statistics, codec, out / split.name))
                progress.update(len(indices))
            radius = camera_radius(split.camera_to_world)
            entries[split.name] = SplitEntry(
                count=len(split.indices), radius=(float(radius.min()), float(radius.max())), shards=shards
            )
    size = recipe.image_size // codec.downsample
    manifest = DatasetManifest(
        format_version=FORMAT_VERSION,
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        sources={name: split.source.fingerprint() for name, split in splits.items()},
        image_size=recipe.image_size,
        statistics=statistics.to_dict(),
        codec=codec.identity(),
        codec_files=_codec_files(out),
        latent=LatentShape(channels=codec.channels, height=size, width=size),
        codec_psnr=_held_out_psnr(out, entries),
        splits=entries,
    )
    _write_json(out / "provenance.json", _environment())
    text = manifest.model_dump_json(indent=1) + "\n"
    write_atomically(out / "manifest.json", lambda path: path.write_text(text))
    (out / "build.json").unlink()
    return manifest


def _open_splits(recipe: Recipe) -> dict[str, _Split]:
    splits = {}
    for name, config in recipe.splits.items():
        source = open_source(config, recipe.image_size)
        splits[name] = _Split(name, source, torch.arange(len(source)))
    if "val" not in splits and recipe.val_views:
        train = splits["train"]
        if recipe.val_views >= len(train.source):
            raise DataError(
                f"val_views {recipe.val_views} leaves none of the {len(train.source)} training views to train on"
            )
        order = draws.permutation(recipe.seed, "val views", len(train.source), 0)
        held_out, kept = order[: recipe.val_views].sort().values, order[recipe.val_views :].sort().values
        splits["train"], splits["val"] = _Split("train", train.source, kept), _Split("val", train.source, held_out)
    return splits


def _plan(recipe: Recipe, splits: dict[str, _Split]) -> dict[str, Any]:
    """What has to be the same when a build goes on."""
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "sources": {name: split.source.fingerprint() for name, split in splits.items()},
        "environment": _environment(),
    }


def _check_folder(out: Path, plan: dict[str, Any]) -> bool:
    """Whether an unfinished build of this plan is there, tidied up; DataError if something else is."""
    if (out / "build.json").is_file():
        _check_plan(out, plan)
        for leftover in out.rglob(".*.tmp"):  # what a killed build was writing
            if leftover.is_file():
                leftover.unlink()
        return True
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; give another --out")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty and no unfinished build; give another --out")
    return False


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    """DataError unless the unfinished build in the folder was begun with this plan."""
    try:
        begun = dict(json.loads((out / "build.json").read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{out}/build.json: damaged ({error}); remove the folder and build again") from None
    here, there = plan["environment"], begun.pop("environment", {})
    if begun != {key: value for key, value in plan.items() if key != "environment"}:
        raise DataError(
            f"{out}: holds an unfinished build of another recipe or other source files; "
            "give another --out, or remove the folder"
        )
    for key in here:
        if there.get(key) != here[key]:
            raise DataError(
                f"{out}: the unfinished build was begun with {key} {there.get(key)} but here it is {here[key]}, which "
                "may give other bytes; go on as it was begun (OMP_NUM_THREADS sets threads), or remove the folder"
            )


def _environment() -> dict[str, Any]:
    """What the bytes of a dataset depend on besides its recipe and its sources."""
    packages = ("diffusers", "numpy", "pillow", "sitdist", "torch", "webdataset")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write_text(json.dumps(values, indent=1) + "\n"))


def _make_codec(recipe: Recipe, train: _Split) -> Codec:
    """The recipe's codec, fitted or loaded; DataError if its latents could not hold a pose."""
    codec: Codec
    if isinstance(recipe.codec, PcaCodecConfig):
        images = train.source.images(train.indices[: recipe.codec.fit_views].tolist())
        codec = PcaCodec.fit(images, recipe.codec.patch, recipe.codec.channels)
    else:
        codec = VaeCodec(recipe.codec.path, recipe.codec.dtype)
    if recipe.image_size % (2 * codec.downsample) or codec.channels % 4:
        raise DataError(
            f"image_size {recipe.image_size} with a codec of {codec.channels} channels that shrinks by "
            f"{codec.downsample}: the latent needs an even size and a multiple of 4 channels to hold a pose"
        )
    return codec


def _save_codec(codec: Codec, folder: Path) -> None:
    temporary = folder.with_name(".codec.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        codec.save(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                flush_file(path)
        temporary.rename(folder)
        flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _codec_files(out: Path) -> dict[str, str]:
    files = sorted(path for path in (out / "codec").rglob("*") if path.is_file())
    return {str(path.relative_to(out / "codec")): file_sha256(path) for path in files}


def _shard(
    recipe: Recipe,
    split: _Split,
    number: int,
    first: int,
    indices: list[int],
    statistics: PoseStatistics,
    codec: Codec,
    folder: Path,
) -> ShardEntry:
    """Write one shard and its index, unless an earlier run of the same build has."""
    tar, index_path = folder / f"{number:05d}.tar", folder / f"{number:05d}.index.npz"
    if not index_path.exists():  # the index gets its name after the tar
        keep_images = split.name != "train"
        samples, psnr = [], []
        for start in range(0, len(indices), recipe.encode_batch):
            chunk = indices[start : start + recipe.encode_batch]
            images = split.source.images(chunk)
            moments = _encode(codec, images, recipe.encode_batch, f"{split.name} view {chunk[0]} to {chunk[-1]}")
            psnr += _psnr(codec, moments, images, recipe.encode_batch) if keep_images else [float("nan")] * len(chunk)
            for row, view in enumerate(chunk):
                key = f"{first + start + row:09d}"
                samples.append(
                    _sample(key, split, view, moments[row], images[row] if keep_images else None, statistics)
                )
        write_atomically(tar, lambda path: _write_tar(path, samples))
        index = _index(tar, samples, split, indices, psnr)
        write_atomically(index_path, lambda path: _save_index(path, index))
    return ShardEntry(
        name=tar.name,
        count=len(indices),
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        index_sha256=file_sha256(index_path),
    )


def _padded(batch: Tensor, size: int) -> Tensor:
    """`batch` filled up to `size` rows by repeating the last: arithmetic then does not depend on the batch's length."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])


@torch.no_grad()
def _encode(codec: Codec, images: Tensor, batch: int, name: str) -> Tensor:
    moments = codec.encode_moments(_padded(images, batch))[: len(images)].to(torch.float16)
    if not torch.isfinite(moments).all():
        raise DataError(
            f"{name}: latent is not finite in float16; check the codec (codec.dtype: fp32) and the pictures"
        )
    return moments


@torch.no_grad()
def _psnr(codec: Codec, moments: Tensor, images: Tensor, batch: int) -> list[float]:
    """PSNR in dB of every image against its decoded, stored latent mean."""
    decoded = codec.decode(_padded(latent_mean(moments.float()), batch))[: len(images)]
    return (-10.0 * (decoded - images).square().flatten(1).mean(1).double().clamp_min(1e-10).log10()).tolist()


def _sample(
    key: str, split: _Split, view: int, moments: Tensor, image: Tensor | None, statistics: PoseStatistics
) -> dict[str, Any]:
    camera_to_world = split.source.camera_to_world[view]
    intrinsics = split.source.intrinsics(view)
    meta = {
        "fx": intrinsics.fx,
        "fy": intrinsics.fy,
        "cx": intrinsics.cx,
        "cy": intrinsics.cy,
        "width": intrinsics.width,
        "height": intrinsics.height,
        "label": split.source.label,
        "radius": float(camera_radius(camera_to_world)),
    }
    sample = {
        "__key__": key,
        "camera_to_world.npy": _npy(camera_to_world),
        "meta.json": json.dumps(meta).encode(),
        "moments.npy": _npy(moments),
        "packed_pose.npy": _npy(standardize(camera_to_world, statistics).float()),
    }
    if image is not None:
        pixels = (image.permute(1, 2, 0) * 255.0).round().to(torch.uint8).numpy()
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, format="PNG")
        sample[IMAGE_MEMBER] = png.getvalue()
    return sample


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _write_tar(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file, user="sitdist", group="sitdist", mode=0o644, mtime=0.0, encoder=False)
        for sample in samples:
            writer.write(sample)
        writer.close()


def _index(
    tar: Path, samples: Sequence[dict[str, Any]], split: _Split, indices: list[int], psnr: list[float]
) -> dict[str, np.ndarray]:
    """Where every sample lies, read back from the finished tar."""
    index: dict[str, list[Any]] = {name: [] for name in INDEX_FIELDS}
    members = read_members(tar)
    data = tar.read_bytes()
    for sample, view, value in zip(samples, indices, psnr, strict=True):
        mine = members[sample["__key__"]]
        start, stop = sample_range(mine)
        image = mine.get(IMAGE_MEMBER)
        row = {
            "start": start,
            "stop": stop,
            "crc32": zlib.crc32(data[start:stop]),
            "moments": mine["moments.npy"].offset_data,
            "packed_pose": mine["packed_pose.npy"].offset_data,
            "image": image.offset_data if image else 0,
            "image_bytes": image.size if image else 0,
            "label": split.source.label,
            "camera_to_world": split.source.camera_to_world[view].numpy(),
            "codec_psnr": value,
        }
        for name, field in row.items():
            index[name].append(field)
    return {name: np.asarray(index[name], dtype=dtype) for name, dtype in INDEX_FIELDS.items()}


def _save_index(path: Path, index: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **index)  # type: ignore[arg-type]


def read_members(tar: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """key -> extension -> where it is, of all whole members of a tar, in order."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(tar, "r:") as file:
        for member in file:
            key, _, extension = member.name.partition(".")
            members.setdefault(key, {})[extension] = member
    return members


def sample_range(members: dict[str, tarfile.TarInfo]) -> tuple[int, int]:
    """First byte of the first header and one past the padding of the last member."""
    start = min(member.offset for member in members.values())
    stop = max(member.offset_data + -(-member.size // 512) * 512 for member in members.values())
    return start, stop


def _held_out_psnr(out: Path, entries: dict[str, SplitEntry]) -> CodecPsnr | None:
    for split in ("val", *sorted(set(entries) - {"train", "val"})):
        if split in entries:
            values = np.concatenate(
                [
                    load_index((out / split / shard.name).with_suffix(".index.npz"))["codec_psnr"]
                    for shard in entries[split].shards
                ]
            )
            return CodecPsnr(mean=float(values.mean()), n=len(values), split=split)
    return None


# ------------------------------------------------------------------------------------------------------- verifying


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
    except ValueError as error:
        return [f"unreadable array ({error})"]
    if not torch.equal(camera_to_world, torch.from_numpy(index["camera_to_world"][row])):
        return ["camera_to_world differs from the index's"]
    if not torch.allclose(standardize(camera_to_world, statistics).float(), packed_pose, atol=1e-6):
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
        lines.append(
            f"  {name}: {split.count} views, radius {low:.2f} to {high:.2f}, {len(split.shards)} shards, {size:.1f} MB"
        )
    return "\n".join(lines)
