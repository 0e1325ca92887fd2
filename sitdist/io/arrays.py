"""Named arrays as .npz files: written whole or not at all, and read without trusting who wrote them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from sitdist.errors import DataError, SitdistError
from sitdist.io.atomic import write_atomically


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as an uncompressed .npz file, atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


def read_arrays(path: Path, remedy: str, error: type[SitdistError] = DataError) -> dict[str, np.ndarray]:
    """The arrays in a file of `save_arrays`; `error`, which ends with `remedy`, for anything else.

    Pickles and compressed members are refused, so no array is larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(each.compress_type != zipfile.ZIP_STORED for each in members):
                raise ValueError("compressed")
            if sum(each.file_size for each in members) > path.stat().st_size:
                raise ValueError("members overlap")
            arrays = {}
            for each in members:
                with archive.open(each) as file:
                    arrays[each.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror or failure}); {remedy}") from None
    except Exception as failure:  # numpy and zipfile raise many types on a damaged file
        raise error(f"{path}: damaged ({' '.join(str(failure).split())[:160]}); {remedy}") from None
