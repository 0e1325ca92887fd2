"""Start from weights trained elsewhere: published SiT checkpoints, or ours, fitted to a model of other data.

A `.pt` is read without unpickling anything but tensors, containers and the argparse.Namespace of training checkpoints.
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from sitdist.errors import CheckpointError
from sitdist.io.arrays import check_numbers, read_tensors
from sitdist.io.files import open_file
from sitdist.model.sit import SiT

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
REMEDY = "give a SiT checkpoint (.pt or .safetensors)"

WRAPPERS = ("ema", "model")  # where checkpoints of a training keep the weights, the better ones first
POSITIONS, LABELS, PATCHES = "pos_embed", "y_embedder.embedding_table.weight", "x_embedder.proj.weight"
FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")


@dataclass
class Initialization:
    """What became of every tensor: kept as it is, adapted (with how), fresh (of the model alone), or left out."""

    path: Path
    kept: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"kept {len(self.kept)} tensors"]
        for what, names in (("adapted", self.adapted), ("begun anew", self.fresh), ("left out", self.left_out)):
            parts += [f"{what} {', '.join(names)}"] if names else []
        return f"started from {self.path}: {'; '.join(parts)}"


def initialize_from(model: SiT, path: Path) -> Initialization:
    """Copy the weights in `path` into `model`, adapted where the data differ; returns what was done.

    Positions are interpolated, labels taken in order (new ones begin as "no label"), learned variances dropped or
    begun anew. CheckpointError if the file cannot be read, or is of a transformer of another width or depth.
    """
    theirs, report = read_weights(path), Initialization(path)
    ours = model.state_dict()
    _check_same_transformer(ours, theirs, path)
    same_patches = theirs[PATCHES].shape[1:] == ours[PATCHES].shape[1:]
    for name, tensor in ours.items():
        given = theirs.get(name)
        if given is None:
            report.fresh.append(name)
        elif given.dtype != tensor.dtype:
            raise CheckpointError(f"{path}: tensor {name} holds {given.dtype}, not floating point numbers; {REMEDY}")
        elif given.shape == tensor.shape and (same_patches or name not in FINAL):
            ours[name] = given
            report.kept.append(name)
        else:
            fitted = None if name in FINAL and not same_patches else _fit(model, name, given, tensor)
            sizes = f"{name} ({_shape(given)} to {_shape(tensor)})"
            (report.fresh if fitted is None else report.adapted).append(sizes)
            ours[name] = tensor if fitted is None else fitted
    report.left_out = sorted(theirs.keys() - ours.keys())
    model.load_state_dict(ours)
    return report


def _check_same_transformer(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: Path) -> None:
    """CheckpointError naming the first tensor of the embedders and blocks that is missing, in excess or of other size.

    What depends on the data (positions, labels, patches and channels) may differ.
    """
    if PATCHES not in theirs:
        raise CheckpointError(f"{path}: holds no {PATCHES}, so these are no weights of a SiT; give a SiT checkpoint")
    for name in [*ours, *(name for name in theirs if name.startswith("blocks."))]:
        if not name.startswith(("blocks.", "t_embedder.", "final_layer.adaLN", "x_embedder.proj.bias")):
            continue
        sizes = [_shape(tensors[name]) if name in tensors else "absent" for tensors in (theirs, ours)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"{path}: {name} is {sizes[0]} but the model has {sizes[1]}; "
                "give model.preset (or hidden_size, depth, num_heads, mlp_ratio) of the checkpoint"
            )


def _fit(model: SiT, name: str, given: Tensor, tensor: Tensor) -> Tensor | None:
    """`given` in the shape of `tensor`, or None where there is no meaningful way."""
    if name == POSITIONS and given.ndim == 3 and given.shape[::2] == tensor.shape[::2]:
        old, new = (math.isqrt(each.shape[1]) for each in (given, tensor))
        if old**2 == given.shape[1]:
            return resample_abs_pos_embed(given, [new, new], [old, old], num_prefix_tokens=0)
    if given.ndim != tensor.ndim or given.shape[1:] != tensor.shape[1:] or not len(given):
        return None
    if name == LABELS:
        return _fit_labels(model, given, tensor)
    places = model.patch_size**2
    if name in FINAL and len(given) % places == 0 and len(given) >= places * model.in_channels:
        return _fit_final(model, given, tensor)
    return None


def _fit_labels(model: SiT, given: Tensor, tensor: Tensor) -> Tensor:
    """The first labels of a table whose last row is "no label", which also is where further labels begin."""
    classes = model.y_embedder.num_classes
    fitted = given[-1:].repeat(len(tensor), 1)
    shared = min(classes, len(given) - 1)
    fitted[:shared] = given[:shared]
    return fitted


def _fit_final(model: SiT, given: Tensor, tensor: Tensor) -> Tensor:
    """Rows run over (place in the patch, channel), the learned variances being the second half of the channels."""
    places, channels = model.patch_size**2, model.in_channels
    fitted = tensor.clone().unflatten(0, (places, -1))
    fitted[:, :channels] = given.unflatten(0, (places, -1))[:, :channels]
    return fitted.flatten(0, 1)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


# ------------------------------------------------------------------------------------------------------------ reading


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or a .pt, also under "ema" or "model"; CheckpointError otherwise.

    Floating point numbers are finite, and become float32; those of 8 bits, whose scale is not known here, are refused.
    """
    values: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    wrapper = next((name for name in WRAPPERS if isinstance(values.get(name), dict)), None)
    values = values if wrapper is None else values[wrapper]
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{name!r:.80} with a {type(value).__name__}"
            raise CheckpointError(f"{path}: holds {what}, where names with tensors are expected; {REMEDY}")
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized or _is_larger(value):
            raise CheckpointError(f"{path}: tensor {name[:80]} does not hold all its numbers, one by one; {REMEDY}")
    check_numbers(values, path, REMEDY, CheckpointError, DTYPES)
    if not values:
        raise CheckpointError(f"{path}: holds no tensors; {REMEDY}")
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
    check_numbers(tensors, path, REMEDY, CheckpointError, DTYPES)  # float32 may not hold what float64 does
    return tensors


def _is_larger(tensor: Tensor) -> bool:
    """Whether a tensor has more numbers than its storage, as one that is expanded to an absurd size."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Its tensors; those below "ema." or "model." as dictionaries of their own."""
    tensors = read_tensors(path, None, REMEDY, CheckpointError, DTYPES)
    wrapped = {
        wrapper: {
            name.removeprefix(f"{wrapper}."): value for name, value in tensors.items() if name.startswith(f"{wrapper}.")
        }
        for wrapper in WRAPPERS
    }
    return tensors | {name: inner for name, inner in wrapped.items() if inner}


def _read_pt(path: Path) -> dict[str, Any]:
    with open_file(path, REMEDY, error=CheckpointError) as file:
        _check_stored(path, file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, where the file is none
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it would run {foreign[1][:80]}" if foreign else "no PyTorch checkpoint of plain tensors"
        raise CheckpointError(f"{path}: refused: {why}; give one of tensors alone, such as a .safetensors") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, not a state dict; {REMEDY}")
    return values


def _check_stored(path: Path, file: BinaryIO) -> None:
    """CheckpointError for a zip that becomes larger when it is unpacked, as no file of torch.save does."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # of torch's older format, or nothing that it reads
        return
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"{path}: refused: a compressed archive, which becomes {unpacked:,} bytes; {REMEDY}")
