"""Files and folders are written whole or not at all, and nothing of another's is removed."""

import errno
import os

import pytest

from sitdist.errors import DataError
from sitdist.io import atomic
from sitdist.io.atomic import check_free, remove_leftovers, temporary_name, write_atomically, write_folder


def full(path):
    path.write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(DataError, match=r"a: cannot be written \(No space left on device\)"):
        write_atomically(tmp_path / "a", full)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def write(folder):
        folder.mkdir()
        full(folder / "file")

    with pytest.raises(DataError, match="folder: cannot be written"):
        write_folder(tmp_path / "folder", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "nul\0byte"])
def test_names_that_cannot_be_are_one_line(tmp_path, name):
    for attempt in (
        lambda path: check_free(path),
        lambda path: write_folder(path, lambda folder: folder.mkdir()),
    ):
        with pytest.raises(DataError, match="cannot be written"):
            attempt(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_go_and_all_else_stays(tmp_path, monkeypatch):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        dead = temporary_name(tmp_path / "a")
    living = temporary_name(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_host", lambda: "0" * 8)
        elsewhere = temporary_name(tmp_path / "a")
    others = [tmp_path / ".a.tmp", tmp_path / ".sitdist-notes.tmp", tmp_path / "a.tmp"]
    for folder in (dead, living, elsewhere, *others):
        folder.mkdir()
        (folder / "file").write_text("1")
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {living, elsewhere, *others}


def test_a_link_among_the_leftovers_is_removed_and_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # no process has it
        link = temporary_name(tmp_path / "a")
    link.symlink_to(tmp_path / "precious")
    remove_leftovers(tmp_path)
    assert not link.is_symlink()
    assert (tmp_path / "precious" / "file").read_text() == "1"
