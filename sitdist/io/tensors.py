"""Files with a recorded hash, and tensors from anyone: nothing is unpickled, types are as expected, numbers finite."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from sitdist.errors import DataError, SitdistError
from sitdist.io.files import read_hashed

FLOAT32 = (torch.float32,)


def read_tensors(
    path: Path,
    sha256: str | None,
    remedy: str,
    error: type[SitdistError] = DataError,
    dtypes: Collection[torch.dtype] = FLOAT32,
) -> dict[str, Tensor]:
    """The tensors in a safetensors file; `error`, which ends with `remedy`, for what `check_numbers` refuses, or if
    the file is missing, damaged, or has another SHA-256.
    """
    data = read_hashed(path, sha256, remedy, error)
    try:
        tensors = load(data)
    except Exception as failure:  # of many types, where the header is not one
        raise error(f"{path}: no safetensors file ({str(failure)[:160] or type(failure).__name__}); {remedy}") from None
    check_numbers(tensors, path, remedy, error, dtypes)
    return tensors


def check_numbers(
    tensors: Mapping[str, Tensor],
    where: Path,
    remedy: str,
    error: type[SitdistError] = DataError,
    dtypes: Collection[torch.dtype] = FLOAT32,
) -> None:
    """`error`, which names the first tensor that is of none of `dtypes`, or that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in list(dtypes)[:4])
            found = str(tensor.dtype).removeprefix("torch.")
            raise error(f"{where}: tensor {name[:80]} is {found}, expected {expected}; {remedy}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise error(f"{where}: tensor {name[:80]} holds NaN or infinity; {remedy}")


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and the bytes of tensors, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
