"""Files with a recorded hash, and tensors from anyone: nothing is unpickled, types are as expected, numbers finite."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from sitdist.errors import DataError, SitdistError
from sitdist.io.files import open_file
from sitdist.io.memory import require_memory

FLOAT32 = (torch.float32,)


def read_hashed(path: Path, sha256: str | None, remedy: str, error: type[SitdistError] = DataError) -> bytes:
    """The bytes of a file; `error`, which ends with `remedy`, if they cannot be read, or their SHA-256 is another."""
    with open_file(path, remedy, error=error) as file:
        require_memory(os.fstat(file.fileno()).st_size, str(path), remedy)
        data = file.read()
    found = hashlib.sha256(data).hexdigest() if sha256 is not None else None
    if found != sha256:
        raise error(f"{path}: damaged or altered: SHA-256 is {found}, not {sha256} as recorded; {remedy}")
    return data


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
