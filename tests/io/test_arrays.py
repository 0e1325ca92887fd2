"""What the header of an array claims is checked against the bytes that are there before any memory is taken."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from sitdist.errors import DataError, OutOfMemoryError, PoseError
from sitdist.io import files as memory
from sitdist.io.arrays import load_arrays, read_arrays, read_posed_array, save_arrays
from sitdist.io.pose_files import read_poses

EYE = np.eye(4)[None]


def npy(shape, dtype="<f8", data=b"", version=(1, 0)):
    """A .npy file with any header."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + data


def archive(compression=zipfile.ZIP_DEFLATED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def claimed(data, size):
    """A zip archive of one member whose directory claims that it unpacks to `size` bytes."""
    at = data.index(b"PK\1\2") + 24
    return data[:at] + struct.pack("<I", size) + data[at + 4 :]


def bad_arrays():
    """Files by what is wrong with them."""
    objects = saved(np.array([1, "a", None], dtype=object), allow_pickle=True)
    flat = archive(poses=npy((2**28, 4, 4), "|u1", bytes(64)))
    return {
        "empty": b"",
        "objects in zip": archive(poses=objects),
        "ten terabytes in zip": archive(poses=npy((10**12 // 16, 4, 4))),
        "beyond int64": npy((10**30, 4, 4)),
        "no bytes": npy((10**15, 4, 4), "|V0"),
        "cut in zip": archive(poses=saved(EYE)[:-8]),
        "false size": claimed(flat, 2**32 - 2),
        "header is code": b"\x93NUMPY\1\0" + struct.pack("<H", 20) + b"__import__('os').abc ",
        "text numbers": saved(EYE.astype(str)),
        "NaN": saved(np.full((1, 4, 4), np.nan)),
        "not rigid": saved(EYE * 2),
        "none": saved(EYE[:0]),
        "other name": archive(matrices=saved(EYE)),
        "twice": archive(poses=saved(EYE), posez=saved(EYE)).replace(b"posez", b"poses"),
    }


BAD = bad_arrays()


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_arrays_that_are_no_poses_are_refused_without_taking_memory(tmp_path, what, ending):
    path = tmp_path / f"poses{ending}"
    path.write_bytes(BAD[what])
    tracemalloc.start()
    with pytest.raises((DataError, PoseError), match=rf"poses\{ending}"):
        read_poses(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert what == "false size" or peak < 20e6  # that one takes what is free, and finds the file's end


def test_a_zip_bomb_is_told_by_the_memory_that_it_needs(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    path.write_bytes(archive(images=npy((100, 100, 100, 3), "<f8", bytes(24 * 10**6))))
    assert path.stat().st_size < 50_000
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "_limits", lambda: [(10**7, 10**7)])
    with pytest.raises(OutOfMemoryError, match=r"bomb\.npz: images: .* GB of memory, and 0\.0 are free; split"):
        read_arrays(path, ["images"])
    monkeypatch.undo()
    assert read_arrays(path, ["images"])[0].shape == (100, 100, 100, 3)


@pytest.mark.parametrize("array", [EYE, EYE.astype(">f8"), EYE[0]])
def test_arrays_of_every_kind_of_number_and_order_are_read(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", poses=array)
    np.savez_compressed(tmp_path / "c.npz", poses=array, other=np.zeros(3))
    for name in ("a.npy", "b.npz", "c.npz"):
        assert np.array_equal(read_poses(tmp_path / name).camera_to_world.numpy(), EYE)


CHANGES = {
    "focal": (np.nan, -1.0, np.zeros(0)),
    "images": [np.zeros(shape, np.uint8) for shape in ((1, 0, 4, 3), (4, 4, 3))]
    + [np.zeros((1, 4, 4, 3), kind) for kind in (bool, np.complex64)],
    "poses": (np.repeat(EYE, 2, 0), EYE.astype(complex)),
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name in CHANGES for bad in CHANGES[name]], ids=str)
def test_posed_pictures_out_of_bounds_are_refused(tmp_path, name, bad):
    good = {"images": np.zeros((1, 4, 4, 3), np.uint8), "poses": EYE, "focal": 5.0}
    np.savez(tmp_path / "a.npz", **good)
    assert read_posed_array(tmp_path / "a.npz").intrinsics.fx == 5.0
    np.savez(tmp_path / "a.npz", **(good | {name: bad}))
    with pytest.raises(DataError, match=r"a\.npz"):
        read_posed_array(tmp_path / "a.npz")


def test_our_own_archives_are_read_whole_and_anything_else_is_refused(tmp_path):
    path, arrays = tmp_path / "own.npz", {"a": np.arange(6.0).reshape(2, 3), "b": np.array(["x", "yz"])}
    save_arrays(path, arrays)
    read = load_arrays(path, "write it again")
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)
    whole = path.read_bytes()
    for data, message in (
        (archive(a=saved(EYE)), "compressed"),
        (archive(zipfile.ZIP_STORED, a=saved(EYE) + b"x"), "bytes behind the array a"),
        (archive(zipfile.ZIP_STORED, a=saved(EYE), b=saved(EYE)).replace(b"b.npy", b"a.npy"), "several arrays"),
        (archive(zipfile.ZIP_STORED, a=npy((10**12, 4))), "needs 32,000,000,000,000 bytes"),
        (whole[:150] + b"?" + whole[151:], "Bad CRC-32"),
        (whole[:-30], "damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message) as raised:
            load_arrays(path, "write it again")
        assert str(raised.value).endswith("; write it again")
