"""A dataset is written again from right bytes only: new hashes must not hide old damage."""

import pytest
from edited import Edited

from benchmarks.rewrite import rewrite
from sitdist.dataset.verify import verify
from sitdist.errors import DataError


def test_a_rewritten_dataset_is_whole(tiny_dataset, tmp_path):
    rewrite(tiny_dataset, tmp_path / "out", "other")
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("file", ["train/00001.tar", "codec/codec.json"])
def test_altered_bytes_are_not_given_new_hashes(tiny_dataset, tmp_path, file):
    altered = Edited(tiny_dataset, tmp_path / "altered").folder
    data = bytearray((altered / file).read_bytes())
    data[len(data) // 3] ^= 1
    (altered / file).write_bytes(data)
    with pytest.raises(DataError, match=f"{file}: altered"):
        rewrite(altered, tmp_path / "out", "other")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_only_files_that_the_manifest_lists_are_copied(tiny_dataset, tmp_path):
    given = Edited(tiny_dataset, tmp_path / "given").folder
    (given / "codec" / "link").symlink_to("/etc/passwd")
    rewrite(given, tmp_path / "out", "other")
    assert not (tmp_path / "out" / "codec" / "link").exists()
