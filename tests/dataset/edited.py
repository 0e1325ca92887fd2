"""A copy of a dataset, edited by somebody who then writes all checksums and hashes anew."""

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np


class Edited:
    """Every method changes one thing, in shard 0 of a split, and leaves a dataset whose hashes are all right."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.folder = Path(shutil.copytree(dataset, folder))

    def manifest(self, change) -> None:
        """Let `change` edit the manifest's values."""
        path = self.folder / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    def index(self, split, change) -> None:
        """Let `change` edit the index's arrays; the checksums of the samples are then written anew."""
        tar, path = self._paths(split)
        with np.load(path) as arrays:
            index = {name: arrays[name].copy() for name in arrays}
        change(index)
        data = tar.read_bytes()
        spans = zip(index["start"].tolist(), index["stop"].tolist(), strict=True)
        index["crc32"] = np.array([zlib.crc32(data[max(0, a) : max(0, b)]) for a, b in spans], np.uint32)
        np.savez(path, **index)
        self._write_hashes(split)

    def member(self, split, name, change, sample=3) -> None:
        """Let `change` edit the bytes of a member of one sample, to as many as there were."""
        tar, _ = self._paths(split)
        with tarfile.open(tar) as file:
            member = file.getmember(f"{sample:09d}.{name}")
        data = bytearray(tar.read_bytes())
        place = slice(member.offset_data, member.offset_data + member.size)
        data[place] = change(bytes(data[place]))
        assert len(data) == tar.stat().st_size
        tar.write_bytes(data)
        self.index(split, lambda _: None)

    def tar(self, split, change) -> None:
        """Let `change` edit the list of the tar's members and their bytes; the index is then made for what is there."""
        tar, _ = self._paths(split)
        with tarfile.open(tar) as file:
            members = [(member, file.extractfile(member).read()) for member in file]
        changed = change(members)
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
            for member, data in changed:
                member.mtime, member.size, member.pax_headers = 0, len(data) if member.isreg() else 0, {}
                file.addfile(member, io.BytesIO(data) if member.isreg() else None)
        places = {}
        with tarfile.open(tar) as file:
            for member in file:
                key, _, name = member.name.lstrip("./").partition(".")
                places.setdefault(key, {}).setdefault(name, member)

        def follow(index):
            for row, mine in enumerate(list(places.values())[: len(index["start"])]):
                index["start"][row] = min(each.offset for each in mine.values())
                index["stop"][row] = max(each.offset_data + -(-each.size // 512) * 512 for each in mine.values())
                for field, name in (("moments", "moments.npy"), ("packed_pose", "packed_pose.npy")):
                    index[field][row] = mine[name].offset_data
                if "image.png" in mine:
                    index["image"][row], index["image_bytes"][row] = (
                        mine["image.png"].offset_data,
                        mine["image.png"].size,
                    )
            index["stop"][:-1] = index["start"][1:]

        self.index(split, follow)

    def _paths(self, split) -> tuple[Path, Path]:
        return self.folder / split / "00000.tar", self.folder / split / "00000.index.npz"

    def _write_hashes(self, split) -> None:
        tar, index = (path.read_bytes() for path in self._paths(split))

        def write(values):
            values["splits"][split]["shards"][0] |= {
                "bytes": len(tar),
                "sha256": hashlib.sha256(tar).hexdigest(),
                "index_sha256": hashlib.sha256(index).hexdigest(),
            }

        self.manifest(write)
