"""A dataset that somebody has edited, writing all hashes anew, is refused by verify, by training, by evaluation."""

import io
import json
import os
import tarfile
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from edited import Edited
from PIL import Image

from sitdist.cli import main as cli
from sitdist.dataset.batches import BatchReader
from sitdist.dataset.format import parse_npy, sample_members
from sitdist.dataset.index import load_index
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.verify import verify
from sitdist.errors import DataError, SitdistError
from sitdist.evaluate.views import SplitViews


def training(folder):
    """Read what an epoch of training reads."""
    BatchReader(ShardReader(folder, "train"), 0, 48).batch(0)


def evaluation(folder):
    """Read what an evaluation reads: the views of a split, and the training poses and latents beside them."""
    views = SplitViews(folder, "test", None, None)
    views.load(tuple(views.references()))
    reader = ShardReader(folder, "train")
    reader.camera_to_world()
    reader.moments(range(len(reader)))


def refusals(folder):
    """Who refuses the dataset, and the lines that say so."""
    lines = {}
    for reads in (training, evaluation):
        try:
            reads(folder)
        except SitdistError as error:
            lines[reads.__name__] = [str(error)]
    try:
        problems = verify(folder)
    except SitdistError as error:
        problems = [str(error)]
    return lines | ({"verify": problems} if problems else {})


@pytest.fixture
def edited(tiny_dataset, tmp_path):
    return Edited(tiny_dataset, tmp_path / "edited")


ALL, VIEWS, VERIFY = ("training", "evaluation", "verify"), ("evaluation", "verify"), ("verify",)


def array(change):
    """A change of the array in the bytes of an .npy file."""

    def apply(data):
        values = np.load(io.BytesIO(data)).copy()
        change(values)
        file = io.BytesIO()
        np.save(file, values)
        return file.getvalue()

    return apply


def put(value):
    return array(lambda values: values.__setitem__((0, 1), value))


def meta(**changes):
    """A change of meta.json that leaves it as long as it was."""

    def apply(data):
        return json.dumps(json.loads(data) | changes).replace(" ", "").encode().ljust(len(data))

    return apply


MEMBERS = {  # a member of sample 3 of both splits: change, who refuses
    "moments NaN": ("moments.npy", put(np.nan), ALL),
    "moments minus infinity": ("moments.npy", put(-np.inf), ALL),
    "moments minus NaN": ("moments.npy", put(np.copysign(np.nan, -1.0)), ALL),
    "moments big-endian": ("moments.npy", lambda data: data.replace(b"<f2", b">f2"), ALL),
    "moments pickled": ("moments.npy", lambda data: data.replace(b"'<f2'", b"'|O' "), ALL),
    "moments of another shape": ("moments.npy", lambda data: data.replace(b"(8, 4, 4)", b"(4, 8, 4)"), ALL),
    "moments of more than there is": ("moments.npy", lambda data: data.replace(b"(8, 4, 4)", b"(8, 4, 9)"), ALL),
    "packed_pose NaN": ("packed_pose.npy", put(np.nan), ALL),
    "packed_pose infinity": ("packed_pose.npy", put(np.inf), ALL),
    "packed_pose of another camera": ("packed_pose.npy", put(0.5), VERIFY),
    "camera_to_world NaN": ("camera_to_world.npy", put(np.nan), VERIFY),
    "camera_to_world of another camera": ("camera_to_world.npy", put(0.5), VERIFY),
    "camera_to_world float32": ("camera_to_world.npy", lambda data: data.replace(b"<f8", b"<f4"), VERIFY),
    "focal length 0": ("meta.json", meta(fx=0.0), VERIFY),
    "focal length negative": ("meta.json", meta(fy=-1), VERIFY),
    "focal length NaN": ("meta.json", meta(fy=float("nan")), VERIFY),
    "principal point infinite": ("meta.json", meta(cx=float("inf")), VERIFY),
    "camera of another size": ("meta.json", meta(width=8), VERIFY),
    "camera of text": ("meta.json", meta(fx="1"), VERIFY),
    "a key too many": ("meta.json", lambda data: data.replace(b'"cx"', b'"cz"'), VERIFY),
    "no JSON": ("meta.json", lambda data: data[:-1] + b",", VERIFY),
    "label of another object": ("meta.json", meta(label=1), VERIFY),
    "radius of another camera": ("meta.json", meta(radius=3), VERIFY),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_an_edited_member_is_refused_with_its_sample(edited, name):
    member, change, who = MEMBERS[name]
    for split in ("train", "test"):
        edited.member(split, member, change)
    lines = refusals(edited.folder)
    assert lines.keys() == set(who)
    for text in [lines["verify"][0], *(lines[each][0] for each in lines)]:
        assert "\n" not in text
        assert "00000.tar" in text
    assert "sample 000000003" in lines["verify"][0]
    if who == VERIFY:
        assert len(lines["verify"]) == 2  # of no other sample


def row(field, value, at=3):
    return lambda index: index[field].__setitem__(at, value)


def scaled(index):
    index["camera_to_world"][3, :3, :3] *= 1.01


def mirrored(index):
    index["camera_to_world"][3, :3, 0] *= -1


def swapped(index):
    index["moments"][[3, 4]] = index["moments"][[4, 3]]


def at(field):
    return lambda index: index["moments"].__setitem__(3, index[field][3])


INDEXES = {  # an index of both splits: change, who refuses
    "label that no object has": (row("label", 1), ALL),
    "label negative": (row("label", -1), ALL),
    "pose scaled": (scaled, ALL),
    "pose mirrored": (mirrored, ALL),
    "pose NaN": (row("camera_to_world", np.nan), ALL),
    "pose far away": (lambda index: index["camera_to_world"][3].__setitem__((0, 3), 1e3), ALL),
    "empty span": (lambda index: index["stop"].__setitem__(3, index["start"][3]), ALL),
    "backward span": (lambda index: index["stop"].__setitem__(3, index["start"][3] - 512), ALL),
    "spans that overlap": (lambda index: index["start"].__setitem__(4, index["start"][4] - 512), ALL),
    "span from before the tar": (row("start", -512, 0), ALL),
    "span beyond the tar": (row("stop", 10**12, -1), ALL),
    "span beyond all numbers": (row("stop", 2**63 - 1, -1), ALL),
    "moments of another sample": (swapped, ALL),
    "moments beyond the tar": (row("moments", 2**62), ALL),
    "moments negative": (row("moments", -512), ALL),
    "moments between blocks": (lambda index: index["moments"].__setitem__(3, index["moments"][3] + 1), ALL),
    "moments at a header": (lambda index: index["moments"].__setitem__(3, index["moments"][3] - 512), ALL),
    "moments at the pose": (at("packed_pose"), ALL),
    "picture where none is": (row("image", 1 << 40), ALL),
    "round trip infinite": (row("codec_psnr", np.inf), ALL),
    "round trip known for some": (lambda index: index["codec_psnr"].__setitem__(slice(3), [1.0, np.nan, 1.0]), ALL),
    "round trip negative": (row("codec_psnr", -3.0), ALL),
    "intrinsics NaN": (row("intrinsics", np.nan), ALL),
    "intrinsics of no camera": (row("intrinsics", -1.0), ALL),
    "intrinsics of another camera": (row("intrinsics", 0.7), VERIFY),
    "float labels": (lambda index: index.__setitem__("label", index["label"].astype(np.float64)), ALL),
    "short labels": (lambda index: index.__setitem__("label", index["label"][:-1]), ALL),
    "a field too many": (lambda index: index.__setitem__("more", index["label"]), ALL),
    "no labels": (lambda index: index.pop("label"), ALL),
    "pickled labels": (lambda index: index.__setitem__("label", index["label"].astype(object)), ALL),
    "no samples": (lambda index: index.update({name: index[name][:0] for name in index}), ALL),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_edited_index_is_refused(edited, name):
    change, who = INDEXES[name]
    for split in ("train", "test"):
        edited.index(split, change)
    lines = refusals(edited.folder)
    assert lines.keys() == set(who)
    assert all("\n" not in line and "00000." in line for each in lines.values() for line in each)


PICTURES = {
    "of another size": lambda: Image.new("RGB", (8, 8)),
    "grey": lambda: Image.new("L", (16, 16)),
    "with alpha": lambda: Image.new("RGBA", (16, 16)),
}


def encoded(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def with_member(name, data, sample=3):
    """A change of a tar: the data of a member of one sample."""

    def change(members):
        return [(each, data if each.name == f"{sample:09d}.{name}" else old) for each, old in members]

    return change


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_not_as_the_manifest_says_is_refused(edited, name):
    edited.tar("test", with_member("image.png", encoded(PICTURES[name]())))
    lines = refusals(edited.folder)
    assert lines.keys() == set(VIEWS)
    assert len(lines["verify"]) == 1
    assert "sample 000000003: its picture is no 8-bit RGB PNG of 16x16" in lines["verify"][0]


def test_pixels_that_cannot_be_decoded_are_refused(edited):
    edited.member("test", "image.png", lambda data: data[:45] + bytes(len(data) - 45))
    lines = refusals(edited.folder)
    assert lines.keys() == set(VIEWS)
    assert len(lines["verify"]) == 1
    assert "sample 000000003" in lines["verify"][0]


def link(kind):
    """A change of a tar: a member of one sample becomes a link to another, or a device."""

    def change(members):
        for each, _ in members:
            if each.name == "000000003.meta.json":
                each.type, each.linkname = kind, "000000002.meta.json"
        return members

    return change


def added(name, kind=tarfile.REGTYPE, after="000000003.packed_pose.npy"):
    """A change of a tar: another member behind one that is there."""

    def change(members):
        more = tarfile.TarInfo(name)
        more.type = kind
        place = [each.name for each, _ in members].index(after) + 1
        return [*members[:place], (more, b"extra"), *members[place:]]

    return change


def named(name):
    """A change of a tar: another name of a member."""

    def change(members):
        for each, _ in members:
            if each.name == "000000003.meta.json":
                each.name = name
        return members

    return change


TARS = {
    "a symbolic link": link(tarfile.SYMTYPE),
    "a hard link": link(tarfile.LNKTYPE),
    "a device": link(tarfile.CHRTYPE),
    "a FIFO": link(tarfile.FIFOTYPE),
    "a folder": link(tarfile.DIRTYPE),
    "an unknown member": added("000000003.pkl"),
    "a member twice": added("000000003.meta.json"),
    "an absolute path": named("/000000003.meta.json"),
    "a path upwards": named("../000000003.meta.json"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_tar_with_members_that_no_sample_has_is_refused(edited, name):
    edited.tar("test", TARS[name])
    lines = refusals(edited.folder)
    assert lines.keys() == set(VERIFY)
    assert "sample 000000003" in lines["verify"][0]
    assert len(lines["verify"]) == 1


def test_members_behind_the_last_sample_are_found(edited):
    edited.tar("test", added("000000012.pkl", after="000000011.packed_pose.npy"))
    assert verify(edited.folder) == ["test/00000.tar: bytes outside the samples altered; build the dataset again"]


def test_a_sparse_member_is_no_plain_file(edited):
    header = tarfile.TarInfo("0.meta.json")
    header.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": "1000", "GNU.sparse.numblocks": "0"}
    header.pax_headers["GNU.sparse.map"] = "0,2"
    header.size = 2
    data = header.tobuf(tarfile.PAX_FORMAT) + b"{}".ljust(512, b"\0")
    with pytest.raises(ValueError, match="sparse"):
        sample_members(data, "0", ["meta.json"])


def change_at(*keys, to):
    """A change of the manifest: the value at some keys."""

    def change(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return change


SHARD = ("splits", "train", "shards", 0)
MANIFESTS = {  # a change of the manifest, and what the line says of it
    "count 10^12": (change_at("splits", "train", "count", to=10**12), "GB of memory"),
    "count 10^400": (change_at("splits", "train", "count", to=10**400), "count = 1000"),
    "count negative": (change_at("splits", "train", "count", to=-1), "count = -1"),
    "count of text": (change_at("splits", "train", "count", to="48"), "count = '48'"),
    "count a fraction": (change_at("splits", "train", "count", to=48.0), "count = 48.0"),
    "count of a shard": (change_at(*SHARD, "count", to=17), "shards of 49 samples but count 48"),
    "shard of 10^9 samples": (change_at(*SHARD, "count", to=10**9), "count = 1000000000"),
    "shard of too few bytes": (change_at(*SHARD, "bytes", to=512), "cannot hold 16 samples"),
    "shard of 10^30 bytes": (change_at(*SHARD, "bytes", to=10**30), "bytes = 1"),
    "latent 10^6 x 10^6": (change_at("latent", to={"channels": 4, "height": 10**6, "width": 10**6}), "16,000.0 GB"),
    "latent of another codec": (change_at("latent", "channels", to=8), "a codec of 4 channels"),
    "latent of another size": (change_at("latent", "height", to=8), "makes of 16x16"),
    "picture size 10^6": (change_at("image_size", to=10**6), "image_size = 1000000"),
    "picture size of another recipe": (change_at("recipe", "image_size", to=32), "image_size 16 but"),
    "shard elsewhere": (change_at(*SHARD, "name", to="../../00000.tar"), "name = '../../00000.tar'"),
    "shard by absolute path": (change_at(*SHARD, "name", to="/etc/00000.tar"), "name = '/etc/00000.tar'"),
    "shard with a line break": (change_at(*SHARD, "name", to="0\n.tar"), "name = '0\\n.tar'"),
    "shard of a long name": (change_at(*SHARD, "name", to="0" * 300 + ".tar"), "at most 100"),
    "no shards": (change_at("splits", "val", "shards", to=[]), "lists no shards"),
    "shard twice": (change_at(*SHARD, "name", to="00001.tar"), "listed twice"),
    "hash of text": (change_at(*SHARD, "sha256", to="x" * 64), "sha256"),
    "split elsewhere": (lambda values: values["splits"].update({"../x": values["splits"]["val"]}), "'../x'"),
    "no train": (lambda values: values["splits"].pop("train"), "train"),
    "codec file elsewhere": (change_at("codec_files", "../../weights", to="0" * 64), "'../../weights'"),
    "codec without kind": (lambda values: values["codec"].pop("kind"), "no kind"),
    "radius backwards": (change_at("splits", "train", "radius", to=[5.0, 3.0]), "no range"),
    "radius infinite": (change_at("splits", "train", "radius", to=[3.0, 1e999]), "not a finite number"),
    "radius of three": (change_at("splits", "train", "radius", to=[3.0, 4.0, 5.0]), "radius"),
    "more augmented than there are": (change_at("splits", "train", "radius_augmented", to=49), "49 of 48"),
    "round trip of 10^9 dB": (change_at("codec_psnr", "mean", to=1e9), "mean = 1000000000.0"),
    "round trip of no split": (change_at("codec_psnr", "split", to="none"), "not there"),
    "no objects": (change_at("objects", to=[]), "objects"),
    "label 10^9": (change_at("objects", 0, "label", to=10**9), "label = 1000000000"),
    "label twice": (lambda values: values["objects"].append(values["objects"][0]), "twice"),
    "views of another number": (change_at("objects", 0, "views", "test", to=11), "11 views in test"),
    "views of no split": (change_at("objects", 0, "views", "none", to=1), "a split that is not there"),
    "similarity of text": (change_at("objects", 0, "similarity", to={"scale": "1"}), "not scale and rotation"),
    "similarity that shears": (
        change_at("objects", 0, "similarity", to={"scale": 1, "rotation": [[1, 1, 0]] * 3, "translation": [0, 0, 0]}),
        "no rotation",
    ),
    "statistics with NaN": (change_at("statistics", "translation", "mean", to=[float("nan"), 0, 0]), "NaN"),
    "statistics of one number": (change_at("statistics", "rotation", "std", to=1.0), "std is not [3, 3]"),
    "statistics of text": (change_at("statistics", "translation", "std", to=["1", "1", "1"]), "std is not [3]"),
    "statistics of booleans": (change_at("statistics", "translation", "std", to=[True] * 3), "std is not [3]"),
    "statistics of more": (change_at("statistics", "scale", to=1.0), "scale"),
    "recipe without sources": (change_at("recipe", "splits", "train", to=[]), "splits.train"),
    "a key too many": (change_at("more", to=1), "more"),
    "version of text": (change_at("format_version", to="2"), "format_version"),
    "version with no end": (change_at("format_version", to=10**400), "format_version"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_edited_manifest_is_refused_before_anything_is_allocated(edited, name):
    change, said = MANIFESTS[name]
    edited.manifest(change)
    lines = refusals(edited.folder)
    assert lines.keys() == set(ALL)
    for (line,) in lines.values():
        assert said in line
        assert len(line) < 800
        assert "\n" not in line


def two_objects(values):
    values["objects"] = [values["objects"][0], values["objects"][0] | {"label": 1, "views": {}}]
    for split, views in (("train", 48), ("test", 12)):
        values["objects"][0]["views"][split] -= views // 2
        values["objects"][1]["views"][split] = views // 2


FACTS = {  # true of every sample for itself, but not of the split
    "a codec of more": (change_at("codec", "more", to=1), VERIFY),
    "radius too wide": (change_at("splits", "test", "radius", to=[0.5, 9.0]), VIEWS),
    "views of two objects": (two_objects, VIEWS),
    "another round trip": (change_at("codec_psnr", "mean", to=20.0), VERIFY),
    "cameras that are not upright": (change_at("splits", "test", "cameras", "upright", to=False), VERIFY),
    "cameras that differ": (change_at("splits", "test", "cameras", "same_intrinsics", to=False), VERIFY),
    "a recipe of another kind": (change_at("recipe", "splits", "test", to={"kind": "none"}), VERIFY),
    "another deviation": (change_at("statistics", "translation", "std", to=[3.0, 3.0, 3.0]), VERIFY),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_the_manifest_says_of_a_split_is_measured_again(edited, name):
    change, who = FACTS[name]
    edited.manifest(change)
    assert refusals(edited.folder).keys() == set(who)


def test_labels_of_the_index_are_those_of_the_samples(edited):
    edited.manifest(two_objects)
    for split, half in (("train", 8), ("test", 6)):
        edited.index(split, lambda index, half=half: index["label"].__setitem__(slice(half), 1))
    assert "meta.json has label 0 and the index 1" in verify(edited.folder)[0]


# ------------------------------------------------------------------------------------------------------ odd files


def test_an_index_that_would_unpack_to_more_than_it_is_refuses(tiny_dataset, tmp_path):
    index = dict(np.load(tiny_dataset / "train" / "00000.index.npz"))
    np.savez_compressed(tmp_path / "bomb.npz", **index)
    with pytest.raises(DataError, match="compressed"):
        load_index(tmp_path / "bomb.npz")
    np.savez(tmp_path / "long.npz", **index)
    with zipfile.ZipFile(tmp_path / "long.npz") as whole, zipfile.ZipFile(tmp_path / "lied.npz", "w") as file:
        for name in whole.namelist():
            file.writestr(name, whole.read(name).replace(b"(16,)", b"(99,)"))
    with pytest.raises(DataError, match=r"shape \[99\] of int64 needs 792 bytes"):
        load_index(tmp_path / "lied.npz")
    with pytest.raises(DataError, match=r"start is int64 \[16\], not of 17 samples"):
        load_index(tiny_dataset / "train" / "00000.index.npz", 17)


def test_an_array_of_another_type_or_length_is_none():
    file = io.BytesIO()
    np.save(file, np.zeros((4, 4), np.float32))
    assert parse_npy(file.getvalue(), "<f4", (4, 4)).shape == (4, 4)
    for data, dtype, shape in (
        (file.getvalue()[:-1], "<f4", (4, 4)),
        (file.getvalue() + b"0", "<f4", (4, 4)),
        (file.getvalue(), "<f8", (4, 4)),
        (file.getvalue(), "<f4", (4, 2)),
        (b"", "<f4", (4, 4)),
    ):
        with pytest.raises(ValueError, match="array of"):
            parse_npy(data, dtype, shape)


@pytest.mark.parametrize("file", ["train/00000.tar", "train/00000.index.npz"])
@pytest.mark.timeout(20)
def test_a_fifo_in_the_place_of_a_file_is_refused_at_once(edited, file):
    (edited.folder / file).unlink()
    os.mkfifo(edited.folder / file)
    lines = refusals(edited.folder)
    assert lines.keys() == set(ALL)
    assert all("not a regular file" in line for each in lines.values() for line in each)


def test_files_in_the_codec_folder_that_no_hash_covers_are_named(edited):
    (edited.folder / "codec" / "more.json").write_text("{}")
    (edited.folder / "codec" / "link").symlink_to("/etc/passwd")
    assert verify(edited.folder) == [
        "codec/link: not in the manifest; remove it",
        "codec/more.json: not in the manifest; remove it",
    ]


def test_a_tar_is_not_read_at_once(edited, monkeypatch):
    sizes, real = [], ShardReader.open_tar

    class Counted(io.BytesIO):
        def fileno(self):
            return self.file.fileno()

        def read(self, size):
            sizes.append(size)
            return super().read(size)

    @contextmanager
    def counted(reader, number):
        with real(reader, number) as file:
            wrapped = Counted(file.read())
            wrapped.file = file
            wrapped.name = file.name
            yield wrapped

    monkeypatch.setattr(ShardReader, "open_tar", counted)
    assert verify(edited.folder) == []
    assert 0 < min(sizes) <= max(sizes) <= 2**20


# ----------------------------------------------------------------------------------------------------- the command


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["moments", "label", "pose", "manifest", "picture"])
def test_the_commands_refuse_in_one_line_with_exit_code_2(edited, tiny_run, tmp_path, capsys, monkeypatch, case):
    edits = {
        "moments": lambda: [edited.member(split, "moments.npy", put(np.nan)) for split in ("train", "test")],
        "label": lambda: [edited.index(split, row("label", 7)) for split in ("train", "test")],
        "pose": lambda: [edited.index(split, scaled) for split in ("train", "test")],
        "manifest": lambda: edited.manifest(change_at("latent", "height", to=10**6)),
        "picture": lambda: edited.tar("test", with_member("image.png", encoded(Image.new("L", (16, 16))))),
    }
    edits[case]()
    config = yaml.safe_load((tiny_run / "config.yaml").read_text()) | {"data": str(edited.folder)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    commands = {
        "train": ["train", tmp_path / "config.yaml", "--out", tmp_path / "run"],
        "eval": ["eval", tiny_run, "--data", edited.folder, "--out", tmp_path / "eval"],
        "verify": ["shards", "verify", edited.folder],
    }
    for name, command in commands.items():
        code = cli.run([str(word) for word in command])
        error = [line for line in capsys.readouterr().err.splitlines() if str(edited.folder) in line]
        if (case, name) == ("picture", "train"):
            continue  # training reads no pictures
        assert code == 2, name
        assert len(error) == 1, name


def test_what_is_whole_is_read_by_all(edited):
    assert refusals(edited.folder) == {}
    assert load_manifest(edited.folder).splits["train"].count == 48
