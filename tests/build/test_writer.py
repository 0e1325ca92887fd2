"""Builds end in the same bytes whatever happens on the way, refuse what they cannot honour, and verify finds damage."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sitdist.build import shard as shard_module
from sitdist.build import writer
from sitdist.build.sources import open_source
from sitdist.build.writer import build, open_splits
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.index import load_index
from sitdist.dataset.info import info
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.verify import verify
from sitdist.errors import CodecError, ConfigError, DataError
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.io.ownership import LOCK, mark
from sitdist.model.autoencoder import latent_sums, make_vae, scaling_factor
from sitdist.model.codec import PcaCodec, VaeCodec, latent_mean, load_codec

RECIPE = {
    "name": "small",
    "image_size": 16,
    "codec": {"kind": "pca", "patch": 4, "fit_views": 12},
    "samples_per_shard": 6,
    "encode_batch": 4,
    "val_views": 3,
    "splits": {
        "train": {"kind": "scene", "views": 20, "supersample": 1},
        "test": {"kind": "scene", "views": 7, "radius": [1.5, 6.0], "seed": 1, "supersample": 1, "label": 2},
    },
}
SHARDS = {"train": [6, 6, 5], "test": [6, 1], "val": [3]}


def recipe(**changes):
    return parse(Recipe, {**RECIPE, **changes}, "small")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer") / "small"
    build(recipe(), folder)
    return folder


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the dataset that a test may damage."""
    return shutil.copytree(dataset, tmp_path / "damaged")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def raise_at_call(monkeypatch, name, number, error):
    """Let the `number`th call of a function of the builder fail, before it does anything; count its calls."""
    module = writer if hasattr(writer, name) else shard_module
    function, calls = getattr(module, name), []

    def failing(*arguments, **named):
        calls.append(name)
        if len(calls) == number:
            raise error
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, failing)
    return calls


# ---------------------------------------------------------------------------------------------------- what is built


def test_the_manifest_says_what_was_built(dataset):
    manifest = load_manifest(dataset)
    assert {name: [shard.count for shard in split.shards] for name, split in manifest.splits.items()} == SHARDS
    assert (manifest.latent.channels, manifest.latent.height, manifest.latent.width) == (4, 4, 4)
    assert manifest.labels() == 3
    assert manifest.codec == load_codec(dataset / "codec").identity()
    assert manifest.recipe == recipe().model_dump(mode="json")
    low, high = manifest.splits["test"].radius
    assert 1.5 <= low < high <= 6.0
    for split, counts in SHARDS.items():
        for shard, count in zip(manifest.splits[split].shards, counts, strict=True):
            tar = dataset / split / shard.name
            assert tar.stat().st_size == shard.bytes
            assert len(load_index(tar.with_suffix(".index.npz"))["start"]) == count
    assert not (dataset / "build.json").exists()


def test_statistics_are_those_of_the_training_views_alone(dataset):
    poses = ShardReader(dataset, "train").camera_to_world().numpy()
    values = load_manifest(dataset).statistics
    assert np.allclose(values["translation"]["mean"], poses[:, :3, 3].mean(0), atol=1e-12)
    assert np.allclose(values["translation"]["std"], poses[:, :3, 3].std(0), atol=1e-12)
    assert np.allclose(values["rotation"]["mean"], poses[:, :3, :3].mean(0), atol=1e-12)
    deviation = poses[:, :3, :3].std(0)
    deviation[2, 0] = 1.0  # an upright camera's x axis is horizontal: constant
    assert np.allclose(values["rotation"]["std"], deviation, atol=1e-12)


def test_val_views_are_held_out_of_the_training_views(dataset):
    source = open_source(recipe().splits["train"], 16)
    train, val = (ShardReader(dataset, split).camera_to_world() for split in ("train", "val"))
    everything = sorted(pose[:3, 3].tolist() for pose in torch.cat([train, val]))
    assert everything == sorted(pose[:3, 3].tolist() for pose in source.camera_to_world)


def test_moments_and_pictures_are_those_of_the_views(dataset):
    source, reader = open_source(recipe().splits["test"], 16), ShardReader(dataset, "test")
    everything = list(range(7))
    images = source.images(everything)
    assert torch.equal(reader.images(everything), images)
    assert torch.equal(reader.camera_to_world(), source.camera_to_world)
    moments, packed = reader.moments_and_poses(everything)
    expected = load_codec(dataset / "codec").encode_moments(images)
    torch.testing.assert_close(moments.float(), expected, rtol=1e-3, atol=1e-3)  # float16 holds three digits
    statistics = PoseStatistics.from_dict(load_manifest(dataset).statistics)
    assert torch.equal(packed, standardize(source.camera_to_world, statistics).float())
    assert reader.labels().tolist() == [2] * 7


def test_the_codec_is_fitted_on_the_first_training_views_and_measured_on_val(dataset):
    source = open_source(recipe().splits["train"], 16)
    training = ShardReader(dataset, "train").camera_to_world()[:12]
    views = [int((source.camera_to_world == pose).all(-1).all(-1).nonzero()) for pose in training]
    codec = PcaCodec.fit(source.images(views), 4, 4)
    assert codec.identity() == load_manifest(dataset).codec
    reader = ShardReader(dataset, "val")
    images, moments = reader.images(range(3)), reader.moments(range(3))
    error = (codec.decode(latent_mean(moments.float())) - images).square().mean((1, 2, 3))
    expected = -10.0 * error.double().log10()
    torch.testing.assert_close(reader.codec_psnr(), expected, rtol=0, atol=1e-4)
    psnr = load_manifest(dataset).codec_psnr
    assert (psnr.n, psnr.split) == (3, "val")
    assert psnr.mean == pytest.approx(float(expected.mean()), abs=1e-4)


def test_the_codec_of_another_dataset_encodes_as_it_did_there(dataset, damaged, tmp_path):
    codec = {"kind": "dataset", "path": str(dataset)}
    splits = RECIPE["splits"] | {"train": {"kind": "scene", "views": 20, "supersample": 1, "seed": 7}}  # other pictures
    build(recipe(codec=codec, splits=splits), tmp_path / "out")
    assert load_manifest(tmp_path / "out").codec == load_manifest(dataset).codec
    theirs, ours = ShardReader(dataset, "test"), ShardReader(tmp_path / "out", "test")
    assert torch.equal(theirs.moments(range(7)), ours.moments(range(7)))
    assert verify(tmp_path / "out") == []

    with pytest.raises(DataError, match="no dataset"):
        build(recipe(codec=codec | {"path": str(tmp_path)}), tmp_path / "none")
    PcaCodec.fit(torch.rand(4, 3, 16, 16), 4, 4).save(damaged / "codec")
    with pytest.raises(CodecError, match="is not the codec that the manifest names"):
        build(recipe(codec=codec | {"path": str(damaged)}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_views_are_encoded_in_batches_of_one_shape_so_that_their_number_changes_no_rounding(tmp_path, monkeypatch):
    sizes, encode, decode = [], PcaCodec.encode_moments, PcaCodec.decode

    def counted(function):
        return lambda codec, batch: sizes.append(len(batch)) or function(codec, batch)

    monkeypatch.setattr(PcaCodec, "encode_moments", counted(encode))
    monkeypatch.setattr(PcaCodec, "decode", counted(decode))
    build(recipe(), tmp_path / "out")
    assert sizes == [4] * (6 + 2 * (3 + 1))  # train shards take 2 batches each; test and val are also decoded


def test_info_says_what_a_dataset_holds(dataset):
    lines = info(dataset).splitlines()
    assert lines[0].startswith("small: 16x16 pixels, latents 4x4x4, codec pca (round trip ")
    assert lines[0].endswith(" dB on 3 views of val)")
    assert [line.split(",")[0] for line in lines[1:]] == ["  train: 17 views", "  test: 7 views", "  val: 3 views"]


# ------------------------------------------------------------------------------------------- again, and interrupted


def test_building_twice_gives_the_same_bytes(dataset, tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400.0)
    build(recipe(), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(dataset)


@pytest.mark.parametrize(
    ("function", "call", "finished"),
    [
        ("write_folder", 1, 0),
        ("_write_tar", 1, 0),
        ("_write_tar", 3, 2),
        ("save_arrays", 2, 1),
        ("save_arrays", 6, 5),
        ("_held_out_psnr", 1, 6),
        ("DatasetManifest", 1, 6),
    ],
)
def test_an_interrupted_build_goes_on_and_ends_in_the_same_bytes(
    dataset, tmp_path, monkeypatch, function, call, finished
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        raise_at_call(patch, function, call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build(recipe(), out)
    with pytest.raises(DataError, match="a build was begun there; run the same command again"):
        load_manifest(out)
    assert len(list(out.rglob("*.index.npz"))) == finished
    written = raise_at_call(monkeypatch, "_write_tar", 0, None)
    build(recipe(), out)
    assert len(written) == 6 - finished  # no finished shard is made again
    assert contents(out) == contents(dataset)


def test_a_build_stopped_between_the_manifest_and_its_plans_removal_is_finished(dataset, damaged):
    (damaged / "build.json").write_text("{}")
    with pytest.raises(DataError, match="a finished dataset is there"):
        build(recipe(), damaged)
    assert contents(damaged) == contents(dataset)


KILLED_BUILD = """
import json, os, signal, sys
from sitdist.build import shard, writer
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from pathlib import Path

whole, calls = shard._write_tar, []

def half(path, samples):
    whole(path, samples)
    calls.append(path)
    if len(calls) == 2:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

shard._write_tar = half
writer.build(parse(Recipe, json.loads(sys.argv[1]), "small"), Path(sys.argv[2]))
"""


@pytest.mark.distributed
def test_a_build_killed_while_it_writes_a_shard_goes_on_and_ends_in_the_same_bytes(dataset, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_BUILD, json.dumps(RECIPE), str(out)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in out.rglob("*.index.npz")] == ["00000.index.npz"]
    assert len(list(out.rglob(".sitdist-*.tmp"))) == 1
    build(recipe(), out)
    assert contents(out) == contents(dataset)


def test_a_full_disk_is_one_line_and_the_build_can_go_on(dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        raise_at_call(patch, "_write_tar", 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(
            DataError, match=r"00001\.tar: cannot be written \(No space left on device\); free space"
        ) as caught:
            build(recipe(), out)
    assert "\n" not in str(caught.value)
    assert not list(out.rglob(".sitdist-*.tmp"))
    build(recipe(), out)
    assert contents(out) == contents(dataset)


def test_a_disk_that_is_full_while_the_codec_is_saved_leaves_no_half_codec(tmp_path, monkeypatch):
    def save(codec, folder):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PcaCodec, "save", save)
    with pytest.raises(DataError, match=r"codec: cannot be written \(No space left on device\)"):
        build(recipe(), tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["build.json", "sitdist.json", "sitdist.lock"]


# --------------------------------------------------------------------------------------------------------- refusals


def test_building_into_a_finished_dataset_refuses_and_changes_nothing(dataset):
    before = contents(dataset)
    with pytest.raises(DataError, match=r"a finished dataset is there; give another --out"):
        build(recipe(), dataset)
    assert contents(dataset) == before


def interrupted(folder, monkeypatch, values):
    with monkeypatch.context() as patch:
        raise_at_call(patch, "_write_tar", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build(values, folder)


def test_another_recipe_in_an_unfinished_folder_refuses(tmp_path, monkeypatch):
    interrupted(tmp_path / "out", monkeypatch, recipe())
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="unfinished build of another recipe"):
        build(recipe(samples_per_shard=5), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_other_pictures_under_the_same_names_refuse_to_go_on(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    poses = open_source(recipe().splits["train"], 16).camera_to_world.numpy()[:12]
    for _ in range(2):
        images = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / "views.npz", images=images, poses=poses, focal=20.0)
        values = recipe(splits={"train": {"kind": "npz", "paths": [str(tmp_path / "views.npz")]}})
        if not (tmp_path / "out").exists():
            interrupted(tmp_path / "out", monkeypatch, values)
    with pytest.raises(DataError, match="other source files"):
        build(values, tmp_path / "out")


def test_going_on_in_another_environment_refuses(tmp_path, monkeypatch):
    interrupted(tmp_path / "out", monkeypatch, recipe())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    with pytest.raises(DataError, match=r"begun with cpu \w+ but here it is ABACUS, which may give other bytes"):
        build(recipe(), tmp_path / "out")


def test_a_damaged_plan_and_folders_of_something_else_refuse(tmp_path):
    cases = {
        "plan": ("build.json", "not json", r"build\.json: damaged"),
        "someone's plan": ("build.json", "not json", "not empty, and no dataset"),
        "notes": ("notes.txt", "mine", "not empty, and no dataset"),
    }
    for name, (file, text, message) in cases.items():
        if name == "plan":
            mark(tmp_path / name, "dataset")
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text(text)
        before = contents(tmp_path / name)
        with pytest.raises(DataError, match=message):
            build(recipe(), tmp_path / name)
        assert {**contents(tmp_path / name), LOCK: b""} == {**before, LOCK: b""}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="is a file; give another --out"):
        build(recipe(), tmp_path / "file")


def test_val_views_that_leave_nothing_to_train_on_refuse(tmp_path):
    with pytest.raises(DataError, match="val_views 20 leaves none of the 20 training views"):
        build(recipe(val_views=20), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_codec_whose_latents_cannot_hold_a_pose_refuses(tmp_path, monkeypatch):
    class ThreeChannels:
        channels, downsample = 3, 4

        def __init__(self, path, dtype):
            pass

    monkeypatch.setattr(writer, "VaeCodec", ThreeChannels)
    with pytest.raises(DataError, match="codec of 3 channels that shrinks by 4: the latent needs"):
        build(recipe(codec={"kind": "vae", "path": "anything"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil(monkeypatch, codec, change):
    """Let `change` alter the moments that a codec gives for the pictures."""
    encode = codec.encode_moments
    monkeypatch.setattr(codec, "encode_moments", lambda self, images: change(encode(self, images)))


def test_latents_too_large_for_float16_name_the_views_and_the_scale(tmp_path, monkeypatch):
    spoil(monkeypatch, PcaCodec, lambda moments: moments * torch.tensor([1.0, 1e6, 1.0, 1e6])[:, None, None, None])
    with pytest.raises(DataError, match=r"train view \d+, \d+: the latent reaches .*e\+.*, more than float16 holds;"):
        build(recipe(), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small AutoencoderKL with random weights whose drawn latents of the training views have unit variance."""
    torch.manual_seed(0)
    model, views = make_vae(16, (4, 8)).eval(), open_splits(recipe())["train"]
    with torch.no_grad():
        posterior = model.encode(2.0 * views.source.images(views.indices.tolist()) - 1.0).latent_dist
        sums = latent_sums(torch.cat([posterior.mean, posterior.logvar], dim=1))
    model.register_to_config(scaling_factor=scaling_factor(sums))
    folder = tmp_path_factory.mktemp("codec") / "vae"
    model.save_pretrained(folder)
    return model, folder


def test_latents_that_are_not_finite_name_the_views_and_what_helps(tmp_path, monkeypatch, vae):
    spoil(monkeypatch, VaeCodec, lambda moments: moments.index_fill(0, torch.tensor([1]), torch.nan))
    for dtype, remedy in (("bf16", "in bfloat16; set codec.dtype: fp32"), ("fp32", "weights are damaged or not made")):
        with pytest.raises(DataError, match=rf"train view \d+: the latent is not finite.*{remedy}"):
            build(recipe(codec={"kind": "vae", "path": str(vae[1]), "dtype": dtype}), tmp_path / dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-3), ("bf16", 5e-2)])
@torch.no_grad()
def test_a_vae_stores_latents_of_unit_variance_in_either_precision(tmp_path, vae, dtype, tolerance):
    model, folder = vae
    manifest = build(recipe(codec={"kind": "vae", "path": str(folder), "dtype": dtype}), tmp_path / "out")
    assert manifest.codec["latent_scale"] == model.config.scaling_factor
    assert manifest.codec["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    stored = ShardReader(tmp_path / "out", "train").samples(np.arange(17)).moments.float()
    views = open_splits(recipe())["train"]
    posterior = model.encode(2.0 * views.source.images(views.indices.tolist()) - 1.0).latent_dist
    mean, log_variance = stored.chunk(2, dim=1)
    torch.testing.assert_close(mean, posterior.mean * model.config.scaling_factor, rtol=0, atol=tolerance)
    variance = posterior.var * model.config.scaling_factor**2
    torch.testing.assert_close(log_variance.exp(), variance, rtol=0, atol=tolerance)
    drawn_variance = mean.var(correction=0) + log_variance.exp().mean()
    assert drawn_variance.item() == pytest.approx(1.0, abs=tolerance)
    assert verify(tmp_path / "out") == []


# -------------------------------------------------------------------------------------------------------- verifying


def test_verify_names_what_is_damaged(dataset, damaged):
    assert verify(dataset) == []
    tar = damaged / "train" / "00001.tar"
    start, size = int(load_index(tar.with_suffix(".index.npz"))["start"][4]), tar.stat().st_size
    os.truncate(tar, start)  # at a sample's boundary, where a stock reader only sees a shorter shard
    flip(damaged / "val" / "00000.tar", -1)
    flip(damaged / "codec" / "weights.safetensors", -1)
    again = "build the dataset again"
    assert verify(damaged) == [
        f"codec/weights.safetensors: missing or altered; {again}",
        f"train/00001.tar: truncated: {start} of {size} bytes, 2 of 6 samples lost; build again",
        f"val/00000.tar: bytes outside the samples altered; {again}",
    ]


@pytest.mark.parametrize("field", ["start", "moments", "packed_pose", "image"])
def test_verify_names_the_shard_and_the_sample_of_one_altered_byte(damaged, field):
    tar = damaged / "test" / "00000.tar"
    flip(tar, int(load_index(tar.with_suffix(".index.npz"))[field][4]) + 100)
    assert verify(damaged) == ["test/00000.tar: sample 000000004: bytes altered (CRC differs); build the dataset again"]


def test_verify_finds_an_altered_index_and_missing_files(damaged):
    flip(damaged / "train" / "00000.index.npz", 200)
    (damaged / "train" / "00001.index.npz").unlink()
    (damaged / "train" / "00002.tar").unlink()
    assert verify(damaged) == [
        "train/00000.index.npz: damaged (Bad CRC-32 for file 'start.npy'); build the dataset again",
        "train/00001.index.npz: cannot be read (No such file or directory); build the dataset again",
        "train/00002.tar: cannot be read (No such file or directory); build the dataset again",
    ]


def test_verify_recomputes_every_packed_pose(damaged):
    edit_manifest(damaged, lambda values: values["statistics"]["translation"]["mean"].__setitem__(1, 0.5))
    problems = verify(damaged)
    assert len(problems) == 17 + 3 + 7
    assert problems[0] == (
        "train/00000.tar: sample 000000000: packed_pose is not camera_to_world standardized with the manifest's "
        "statistics"
    )


# ------------------------------------------------------------------------------------------------- packed intrinsics


@pytest.fixture(scope="module")
def with_intrinsics(tmp_path_factory):
    """Fields of view from 20 to 60 degrees, packed with the poses."""
    folder = tmp_path_factory.mktemp("writer") / "intrinsics"
    train = {"kind": "scene", "views": 20, "supersample": 1, "fov_range_deg": [20.0, 60.0]}
    build(recipe(packing="intrinsics", splits={"train": train}), folder)
    return folder


def test_packed_poses_carry_the_cameras_standardized_over_the_training_views(with_intrinsics):
    reader, manifest = ShardReader(with_intrinsics, "train"), load_manifest(with_intrinsics)
    cameras = reader.intrinsics(range(17))
    assert cameras.tolist() == [reader.meta(index).camera.normalized() for index in range(17)]
    assert cameras[:, 0].std() > 0.2  # fx / width is 1.42 at 20 degrees and 0.87 at 60
    torch.testing.assert_close(cameras[:, 2:], torch.full((17, 2), 0.5, dtype=torch.float64))
    values = manifest.statistics["intrinsics"]
    assert np.allclose(values["mean"], cameras.mean(0), atol=1e-12)
    assert np.allclose(values["std"][:2], cameras.std(0, correction=0)[:2], atol=1e-12)
    assert values["std"][2:] == [1.0, 1.0]  # constant
    packed = reader.moments_and_poses(range(17))[1]
    statistics = PoseStatistics.from_dict(manifest.statistics)
    expected = standardize(reader.camera_to_world(), statistics, cameras).float()
    assert torch.equal(packed, expected)
    assert packed[:, 3, :2].std(0, correction=0).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_verify_recomputes_the_packed_cameras(with_intrinsics, tmp_path):
    damaged = shutil.copytree(with_intrinsics, tmp_path / "damaged")
    edit_manifest(damaged, lambda values: values["statistics"]["intrinsics"]["mean"].__setitem__(0, 0.5))
    problems = verify(damaged)
    assert len(problems) == 20
    assert problems[0].startswith("train/00000.tar: sample 000000000: packed_pose is not camera_to_world standardized")


def test_a_missing_newer_or_damaged_manifest_is_named(dataset, damaged, tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere: no dataset: manifest\.json is missing; make one with `sitdist shards"
    ):
        load_manifest(tmp_path / "nowhere")
    cases = [
        (lambda values: values.update(format_version=3), "format_version 3 but this sitdist reads 2; update sitdist"),
        (lambda values: values.update(format_version=0), "reads 2; build the dataset again"),
        (lambda values: values.pop("codec"), r"damaged \(.*codec"),
        (lambda values: values["statistics"].pop("rotation"), r"damaged \(.*rotation"),
        (lambda values: values["statistics"]["translation"].update(std=[1.0, 0.0, 1.0]), "deviation is not positive"),
        (lambda values: values["statistics"]["translation"].update(std=[1.0, 1.0]), r"damaged \("),
    ]
    for change, message in cases:
        shutil.copy(dataset / "manifest.json", damaged)
        edit_manifest(damaged, change)
        with pytest.raises(DataError, match=message):
            load_manifest(damaged)
    (damaged / "manifest.json").write_text('{"format_version": 2')
    with pytest.raises(DataError, match=r"manifest.json: damaged"):
        load_manifest(damaged)


def test_focal_lengths_that_vary_must_be_packed(tmp_path):
    train = {"kind": "scene", "views": 12, "supersample": 1, "fov_range_deg": [30.0, 50.0]}
    with pytest.raises(ConfigError, match="training views of label 0 differ; set packing: intrinsics"):
        build(recipe(splits={"train": train}), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    build(recipe(splits={"train": train}, packing="intrinsics"), tmp_path / "data")
