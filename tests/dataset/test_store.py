"""A dataset behind a URL is read as one in a folder: fetched whole, checked, within bounds, or refused in words."""

import json
import os
import shutil
import threading
import time

import fsspec
import pytest
import torch

from sitdist.dataset import store
from sitdist.dataset.batches import BatchReader
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.store import RemoteStore, open_store
from sitdist.dataset.verify import verify
from sitdist.errors import ConfigError, DataError

URL = "memory://bucket/tiny"


@pytest.fixture
def remote(tiny_dataset, monkeypatch):
    """The tiny dataset in fsspec's memory; gives the file system."""
    monkeypatch.setattr(store, "PAUSE", 0.001)
    monkeypatch.setattr(store, "IN_USE", 0.0)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(tiny_dataset), "/bucket/tiny", recursive=True)
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def fetched(cache):
    """The shards in a cache."""
    return sorted(path.name for path in cache.rglob("*.tar"))


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_batches_are_those_of_the_folder(remote, tiny_dataset, tmp_path, scheme):
    url = URL if scheme == "memory" else f"file://{tiny_dataset}"
    far = BatchReader(ShardReader(open_store(url, tmp_path), "train"), 0, 20)
    near = BatchReader(ShardReader(tiny_dataset, "train"), 0, 20)
    for step in (0, 7):
        assert far.batch(step).keys == near.batch(step).keys
        assert torch.equal(far.batch(step).moments, near.batch(step).moments)
        assert torch.equal(far.batch(step).packed_pose, near.batch(step).packed_pose)


def test_opening_fetches_manifest_and_codec_and_reading_only_what_it_needs(remote, tiny_dataset, tmp_path):
    reader = ShardReader(open_store(URL, tmp_path), "train")
    assert fetched(tmp_path) == []
    assert (reader.folder / "codec" / "weights.safetensors").read_bytes() == (
        tiny_dataset / "codec" / "weights.safetensors"
    ).read_bytes()
    reader.moments([17])
    assert fetched(tmp_path) == ["00001.tar"]
    reader.expect([2])
    wait_for(lambda: fetched(tmp_path) == ["00001.tar", "00002.tar"])


def test_a_second_reader_and_a_restart_use_what_is_there(remote, tmp_path):
    ShardReader(open_store(URL, tmp_path), "train").moments(range(48))
    remote.rm("/bucket/tiny/train", recursive=True)
    again = ShardReader(open_store(URL, tmp_path), "train")
    assert torch.isfinite(again.moments(range(48))).all()
    by_folder = ShardReader(again.folder, "train")  # what the cache keeps can be named in the place of the URL
    assert torch.equal(by_folder.moments(range(48)), again.moments(range(48)))


def test_another_dataset_at_the_same_url_is_kept_apart(remote, tmp_path):
    first = open_store(URL, tmp_path).folder
    manifest = json.loads(remote.cat("/bucket/tiny/manifest.json"))
    remote.pipe("/bucket/tiny/manifest.json", json.dumps(manifest | {"name": "other"}).encode())
    second = open_store(URL, tmp_path).folder
    assert second != first
    assert load_manifest(second).name == "other"
    assert load_manifest(first).name == "tiny"


def test_the_cache_stays_within_its_limit_and_the_oldest_goes_first(remote, tmp_path):
    size = remote.size("/bucket/tiny/train/00000.tar")
    reader = ShardReader(open_store(URL, tmp_path, limit=int(2.5 * size)), "train")
    for shard in (0, 1):
        reader.moments([16 * shard])
    for path in tmp_path.rglob("00000.*"):
        os.utime(path, (1, 1))  # used long ago
    reader.moments([32])
    assert fetched(tmp_path) == ["00001.tar", "00002.tar"]
    assert torch.isfinite(reader.moments([1])).all()  # still mapped
    assert torch.isfinite(ShardReader(reader.folder, "train").moments([0, 16, 32])).all()  # fetched again
    total = sum(path.stat().st_size for path in tmp_path.rglob("train/0*"))
    assert total <= 2.5 * size


@pytest.mark.parametrize("part", ["tar", "index.npz"])
def test_a_file_that_differs_from_the_manifest_is_refused_and_never_named(remote, tmp_path, part):
    path = f"/bucket/tiny/train/00001.{part}"
    data = bytearray(remote.cat(path))
    data[700] ^= 1
    remote.pipe(path, bytes(data))
    reader = ShardReader(open_store(URL, tmp_path), "train")
    with pytest.raises(DataError, match=rf"{URL}/train/00001\.{part}: cannot be fetched, 5 attempts failed \(SHA-256"):
        reader.moments([16])
    assert not list(tmp_path.rglob(f"*00001.{part}*tmp"))
    assert not (reader.folder / "train" / f"00001.{part}").exists()


def test_a_missing_remote_is_an_error_that_names_it_after_bounded_attempts(remote, tmp_path, caplog):
    with pytest.raises(DataError, match=r"memory://bucket/tony/manifest\.json: cannot be fetched, 5 attempts failed"):
        open_store("memory://bucket/tony", tmp_path)
    assert [record.message.split(": ")[1][:12] for record in caplog.records] == [f"attempt {n} of" for n in range(1, 6)]
    reader = ShardReader(open_store(URL, tmp_path), "train")
    remote.rm("/bucket/tiny/train/00002.tar")
    with pytest.raises(DataError, match=rf"{URL}/train/00002\.tar: cannot be fetched, .* check the address"):
        reader.moments([40])


def test_a_remote_that_fails_at_times_is_asked_again(remote, tmp_path, monkeypatch):
    opened, failures = RemoteStore(URL, tmp_path), iter([OSError("connection reset"), OSError("503")])
    real = opened._filesystem.open

    def unsteady(*arguments):
        error = next(failures, None)
        if error:
            raise error
        return real(*arguments)

    monkeypatch.setattr(opened._filesystem, "open", unsteady)
    assert torch.isfinite(ShardReader(opened, "train").moments([3])).all()


def test_a_remote_that_sends_nothing_is_given_up(remote, tmp_path, monkeypatch):
    opened, release = RemoteStore(URL, tmp_path), threading.Event()
    monkeypatch.setattr(store, "PATIENCE", 0.02)
    monkeypatch.setattr(opened._filesystem, "open", lambda *arguments: release.wait(10))
    with pytest.raises(DataError, match=r"5 attempts failed \(no byte for 0\.02 s\)"):
        ShardReader(opened, "train").moments([3])
    release.set()


def test_threads_that_need_the_same_shard_fetch_it_once(remote, tmp_path, monkeypatch):
    opened, asked = RemoteStore(URL, tmp_path), []
    real = opened._filesystem.open

    def counted(path, mode):
        asked.append(path)
        time.sleep(0.02)
        return real(path, mode)

    monkeypatch.setattr(opened._filesystem, "open", counted)
    readers = [ShardReader(opened, "train") for _ in range(4)]  # as processes of a node would
    threads = [threading.Thread(target=reader.moments, args=([0],)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == ["/bucket/tiny/train/00000.index.npz", "/bucket/tiny/train/00000.tar"]


def test_a_url_of_an_unknown_kind_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"nosuch://x: cannot be read here \(.*\); install fsspec's package for it"):
        open_store("nosuch://x", tmp_path)


def test_a_manifest_that_names_files_elsewhere_is_refused(remote, tmp_path):
    manifest = json.loads(remote.cat("/bucket/tiny/manifest.json"))
    manifest["codec_files"]["../../../outside"] = "0" * 64
    remote.pipe("/bucket/tiny/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match=rf"{URL}/manifest\.json: damaged \(codec_files"):
        open_store(URL, tmp_path / "cache")
    assert not (tmp_path / "outside").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sitdist.json"]  # what cannot be used is not kept


# ------------------------------------------------------------------------------------- whose files are whose


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def bystanders(folder):
    """Put what looks like shards where a cache's shards are; returns what is there."""
    for name in ("data/train/00000.tar", "data/train/00000.index.npz", "more/a.b.tar", "0123456789abcdef/train/x.npz"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"somebody's work")
        os.utime(path, (1, 1))  # used long ago
    return contents(folder)


def fill(cache, limit=150_000):
    """Read a whole dataset through a cache that has room for one of its shards."""
    reader = ShardReader(open_store(URL, cache, limit), "train")
    for shard in range(3):
        reader.moments([16 * shard])
    return reader.folder


def test_a_folder_of_somebodys_files_is_no_cache_and_stays_as_it_is(remote, tmp_path):
    theirs = bystanders(tmp_path)
    with pytest.raises(DataError, match=r"not empty, and no cache of sitdist's; give another reader\.cache"):
        fill(tmp_path)
    assert contents(tmp_path) == theirs


def test_a_cache_removes_only_the_shards_that_its_manifests_list(remote, tmp_path):
    folder = fill(tmp_path)
    theirs = {name: data for name, data in bystanders(tmp_path).items() if data == b"somebody's work"}
    for name in ("train/other.tar", "train/other.npz", "train/00000.tar.npz", "other/00000.tar", "codec/00000.tar"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"somebody's work")
        os.utime(folder / name, (1, 1))
        theirs[f"{folder.name}/{name}"] = b"somebody's work"
    fill(tmp_path)
    left = contents(tmp_path)
    assert {name: data for name, data in left.items() if data == b"somebody's work"} == theirs
    assert [name for name in left if name.endswith(".tar") and name not in theirs] == [f"{folder.name}/train/00002.tar"]


def test_links_in_a_cache_are_not_followed(remote, tmp_path):
    folder = fill(tmp_path / "cache", 10**9)
    theirs = tmp_path / "theirs"
    (folder / "train").rename(theirs)
    (folder / "train").symlink_to(theirs)
    (folder / "val").mkdir()
    (folder / "val" / "00000.tar").symlink_to(theirs / "00000.tar")
    before = contents(theirs)
    ShardReader(open_store(URL, tmp_path / "cache", 150_000), "test").moments([0])
    assert contents(theirs) == before
    assert (folder / "val" / "00000.tar").is_symlink()
    with pytest.raises(DataError, match="leads out of the cache by a link"):
        ShardReader(open_store(URL, tmp_path / "cache"), "train").moments([0])


def test_a_dataset_in_the_place_of_anothers_name_is_not_believed(remote, tiny_dataset, tmp_path):
    """A subfolder of a cache is named by the hash of URL and manifest; in one that is not, nothing is removed."""
    folder = fill(tmp_path)
    other = shutil.copytree(tiny_dataset, tmp_path / "0123456789abcdef")
    (other / "remote.json").write_bytes((folder / "remote.json").read_bytes())
    for path in other.rglob("0*"):
        os.utime(path, (1, 1))
    before = contents(other)
    fill(tmp_path)
    assert contents(other) == before
    with pytest.raises(DataError, match=r"remote\.json"):
        open_store(other)


def test_a_cache_of_before_is_taken_over_as_it_is(remote, tmp_path):
    folder = fill(tmp_path, 10**9)
    (tmp_path / "sitdist.json").unlink()
    (tmp_path / ".manifest.json.lock").touch()
    before = contents(folder)
    remote.rm("/bucket/tiny/train", recursive=True)
    assert fill(tmp_path, 10**9) == folder  # nothing is fetched again
    assert contents(folder) == before
    assert json.loads((tmp_path / "sitdist.json").read_text())["kind"] == "cache"


def test_the_default_cache_is_ours_by_its_place(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "DEFAULT_CACHE", str(tmp_path / "sitdist"))
    (tmp_path / "sitdist").mkdir()
    (tmp_path / "sitdist" / "log.txt").write_text("of something else that we keep there")
    assert open_store(URL).folder.parent == tmp_path / "sitdist"


def test_processes_that_make_a_cache_at_the_same_moment_all_have_it(remote, tmp_path):
    for attempt in range(5):
        folders, cache = [], tmp_path / str(attempt)
        threads = [threading.Thread(target=lambda c=cache, f=folders: f.append(open_store(URL, c))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({each.folder for each in folders}) == 1
        assert len(folders) == 4


ORIGINS = [{"url": URL}, {"url": URL, "limit": 1}, {"url": URL, "limit": 1, "cache": "/"}, {"url": 5}, [1], "NaN"]


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
def test_what_a_strangers_dataset_says_of_its_origin_is_not_acted_on(remote, tiny_dataset, tmp_path, origin):
    """Beside it lie other datasets, whose shards a cache would remove."""
    given = shutil.copytree(tiny_dataset, tmp_path / "given")
    (given / "remote.json").write_text(json.dumps(origin) if origin != "NaN" else '{"url": NaN}')
    shutil.rmtree(given / "train")
    theirs = bystanders(tmp_path)
    with pytest.raises(DataError) as raised:
        ShardReader(open_store(given, limit=1), "train").moments([0])
    assert str(raised.value).startswith(f"{given}/remote.json: only in a cache of sitdist's")
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == theirs


@pytest.mark.parametrize("origin", ORIGINS[2:], ids=str)
def test_a_damaged_origin_in_a_cache_is_one_line(remote, tmp_path, origin):
    folder = fill(tmp_path)
    (folder / "remote.json").write_text(json.dumps(origin))
    with pytest.raises(DataError, match=r"remote\.json: only in a cache") as raised:
        open_store(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_that_a_cache_keeps_is_read_as_it_is_whatever_the_url_holds_now(remote, tmp_path):
    folder = fill(tmp_path, 10**9)
    manifest = json.loads(remote.cat("/bucket/tiny/manifest.json"))
    remote.pipe("/bucket/tiny/manifest.json", json.dumps(manifest | {"name": "other"}).encode())
    reader = ShardReader(folder, "test")
    assert reader.manifest.name == "tiny"
    assert torch.isfinite(reader.moments([0])).all()  # fetched from there
    assert reader.store.limit == 10**9


def test_a_remote_without_an_end_is_given_up_at_the_size_that_the_manifest_says(remote, tmp_path, monkeypatch):
    class Endless:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            return bytes(size)

    opened = RemoteStore(URL, tmp_path)
    monkeypatch.setattr(opened, "_largest", 3 * store.CHUNK)
    monkeypatch.setattr(opened._filesystem, "open", lambda *arguments: Endless())
    with pytest.raises(DataError, match=r"00000\.index\.npz: more than 3,145,728 bytes; do not use it"):
        ShardReader(opened, "train").moments([0])
    assert not list(opened.folder.rglob("*.tmp"))


def test_verify_reads_what_training_would_read(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "DEFAULT_CACHE", str(tmp_path / "cache"))
    assert verify(URL) == []
    folder = open_store(URL).folder
    tar = folder / "train" / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)  # the cached file, and not the remote one
    expected = ["train/00001.tar: sample 000000016: bytes altered (CRC differs); build the dataset again"]
    assert verify(URL) == expected
    assert verify(folder) == expected
    tar.unlink()
    remote.rm("/bucket/tiny/train/00001.tar")
    (problem,) = verify(URL)
    assert problem.startswith(f"{URL}/train/00001.tar: cannot be fetched")
