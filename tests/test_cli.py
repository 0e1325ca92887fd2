"""A user's mistake is one line on stderr and exit code 2, and leaves nothing half-written."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sitdist import cli
from sitdist.data import shard as shard_module
from sitdist.data import verify
from sitdist.data.format import load_index
from sitdist.errors import RunInterrupted
from sitdist.geometry.camera import look_at

RECIPE = {
    "name": "small",
    "image_size": 8,
    "codec": {"kind": "pca", "fit_views": 4},
    "val_views": 1,
    "splits": {"train": {"kind": "scene", "views": 5, "supersample": 1}},
}
CONFIG = {
    "name": "tiny",
    "data": "nowhere",
    "model": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2},
    "train": {"steps": 10, "global_batch": 8},
}


@pytest.fixture
def refused(capsys):
    """Run a command that has to fail with one line; gives the line without its beginning."""

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert printed.err.startswith("sitdist: error: ")
        assert printed.err.count("\n") == 1
        assert printed.err.endswith("\n")
        return printed.err.removeprefix("sitdist: error: ").rstrip()

    return run


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sitdist: the following arguments are required: COMMAND"),
        (["trian"], "sitdist: unknown 'trian'; did you mean 'train'?"),
        (["shards", "bild"], "sitdist shards: unknown 'bild'; did you mean 'build'?"),
        (["shards", "build", "r.yaml"], "sitdist shards build: the following arguments are required: --out"),
        (["shards", "build", "r", "--out", "x", "--sett=1"], "unknown option '--sett=1'; did you mean '--set'?"),
        (["codec", "fit", "r", "--out", "x", "--steps", "0"], "argument --steps: '0' is not a positive whole number"),
        (["codec", "fit", "r", "--out", "x", "--batch", "ten"], "'ten' is not a positive whole number"),
        (["eval", "run", "--radii", "7:1"], "argument --radii: '7:1' is no range of whole radii; write smaller:larger"),
        (["eval", "run", "--radii", "1-7"], "'1-7' is no range of whole radii"),
        (["eval", "run", "--estimator", "eular"], "unknown 'eular'; did you mean 'euler'?"),
    ],
)
def test_a_wrong_command_line_names_the_word_and_the_remedy(refused, arguments, message):
    assert message in refused(*arguments)


def test_interruptions_have_exit_codes_of_their_own(monkeypatch, capsys):
    for error, code in ((KeyboardInterrupt(), 130), (RunInterrupted("saved; run again with --resume"), 75)):

        def stop(*_, error=error):
            raise error

        monkeypatch.setattr(verify, "info", stop)
        assert cli.run(["shards", "info", "x"]) == code
        assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_the_system_that_is_not_the_disks_is_not_hidden(monkeypatch):
    def lose(*_):
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(verify, "info", lose)
    with pytest.raises(ConnectionResetError):
        cli.run(["shards", "info", "x"])


# ----------------------------------------------------------------------------------------------------------- shards


def test_a_dataset_is_built_described_and_verified(tmp_path, capsys):
    recipe, out = write(tmp_path / "recipe.yaml", RECIPE), tmp_path / "out"
    assert cli.run(["shards", "build", str(recipe), "--out", str(out), "--set", "samples_per_shard=3"]) == 0
    built = capsys.readouterr().out
    assert built.startswith("small: 8x8 pixels, latents 4x2x2, codec pca")
    assert "train: 4 views" in built
    assert "2 shards" in built
    assert cli.run(["shards", "info", str(out)]) == 0
    assert capsys.readouterr().out == built
    assert cli.run(["shards", "verify", str(out)]) == 0
    assert capsys.readouterr().out == built + "verified: every sample and every hash is right\n"


def views(folder, **changes):
    """A recipe of four posed pictures, of which a test spoils something."""
    poses = look_at(torch.tensor([[3.0, i, 1.0] for i in range(4)])).numpy()
    arrays = {"images": np.full((4, 8, 8, 3), 0.5, np.float32), "poses": poses, "focal": 9.0} | changes
    np.savez(folder / "views.npz", **{name: array for name, array in arrays.items() if array is not None})
    return RECIPE | {"splits": {"train": {"kind": "npz", "paths": [str(folder / "views.npz")]}}}


def spoiled(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def missing_views(folder):
    return RECIPE | {"splits": {"train": {"kind": "npz", "paths": [str(folder / "nowhere")]}}}


def pose_that_is_not_rigid(folder):
    return views(folder, poses=spoiled(np.stack([np.eye(4)] * 4), (2, 0, 0), 1.5))


def nan_pixel(folder):
    return views(folder, images=spoiled(np.full((4, 8, 8, 3), 0.5), (1, 4, 4, 0), np.nan))


def pixels_up_to_255(folder):
    return views(folder, images=np.full((4, 8, 8, 3), 200.0))


def images_of_several_sizes(folder):
    frames = [{"file_path": f"{size}.png", "transform_matrix": np.eye(4).tolist()} for size in (8, 10)]
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 9.0, "frames": frames}))
    for size in (8, 10):
        Image.new("RGB", (size, size)).save(folder / f"{size}.png")
    return RECIPE | {"splits": {"train": {"kind": "transforms", "path": str(folder)}}}


def missing_vae(folder):
    return RECIPE | {"codec": {"kind": "vae", "path": str(folder / "vae")}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda _: RECIPE | {"image_sise": 8}, "recipe.yaml: unknown key 'image_sise'; did you mean 'image_size'?"),
        (lambda _: RECIPE | {"image_size": "8"}, "recipe.yaml: image_size = '8': input should be a valid integer"),
        (lambda _: RECIPE | {"val_views": -1}, "val_views = -1: input should be greater than or equal to 0"),
        (lambda _: RECIPE | {"val_views": 5}, "val_views 5 leaves none of the 5 training views to train on"),
        (missing_views, "nowhere: no such file or folder; set the recipe's paths to your posed pictures"),
        (lambda folder: views(folder, focal=None), "views.npz: no array 'focal'"),
        (pose_that_is_not_rigid, "views.npz: view 2: pose is not rigid (determinant 1.5"),
        (nan_pixel, "views.npz: image 1: pixels hold NaN or infinity; repair or remove the picture"),
        (pixels_up_to_255, "views.npz: image 0: pixels from 200 to 200; float pictures are in [0, 1] (divide by 255?)"),
        (images_of_several_sizes, "10.png: 10x10 pixels but the recipe's image_size is 8; all pictures of a dataset"),
        (missing_vae, "vae: no such folder; give a diffusers AutoencoderKL folder or a hub id such as"),
        (lambda _: RECIPE | {"codec": {"kind": "pca", "channels": 64}}, "a patch of 4x4 pixels has only 48 numbers"),
    ],
)
def test_views_that_cannot_be_used_are_named_before_anything_is_written(tmp_path, refused, recipe, message):
    path = write(tmp_path / "recipe.yaml", recipe(tmp_path))
    assert message in refused("shards", "build", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(path, samples):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_module, "_write_tar", full)
    recipe = write(tmp_path / "recipe.yaml", RECIPE)
    assert cli.run(["shards", "build", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (  # after the progress bar's line
        f"sitdist: error: {tmp_path}/out/train/00000.tar: cannot be written (No space left on device); free space or "
        "name a folder you may write to, then run the same command again"
    )
    assert not list((tmp_path / "out").rglob("*.t*"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, refused):
    (tmp_path / "file").write_text("")
    recipe = write(tmp_path / "recipe.yaml", RECIPE)
    message = refused("shards", "build", recipe, "--out", tmp_path / "file" / "out")
    assert message.startswith(f"{tmp_path / 'file' / 'out'}: cannot be written (Not a directory)")


def test_a_finished_dataset_is_not_built_again(tmp_path, refused, tiny_dataset):
    recipe = write(tmp_path / "recipe.yaml", RECIPE)
    message = refused("shards", "build", recipe, "--out", tiny_dataset)
    assert message == (
        f"{tiny_dataset}: a finished dataset is there; give another --out, or remove the folder to build again"
    )


def test_verify_names_the_shard_and_the_sample_that_are_damaged(tmp_path, refused, tiny_dataset):
    damaged = shutil.copytree(tiny_dataset, tmp_path / "damaged")
    tar = damaged / "train" / "00001.tar"
    whole, start = tar.read_bytes(), int(load_index(tar.with_suffix(".index.npz"))["moments"][2])
    tar.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    expected = f"{damaged}: train/00001.tar: sample 000000018: bytes altered (CRC differs); build the dataset again"
    assert refused("shards", "verify", damaged) == expected
    os.truncate(tar, start)
    assert "train/00001.tar: truncated: " in refused("shards", "verify", damaged)


def test_verify_names_everything_that_is_damaged(tmp_path, capsys, tiny_dataset):
    damaged = shutil.copytree(tiny_dataset, tmp_path / "damaged")
    for tar in ("train/00000.tar", "test/00000.tar"):
        (damaged / tar).unlink()
    assert cli.run(["shards", "verify", str(damaged)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    missing = "00000.tar: cannot be read (No such file or directory); build the dataset again"
    assert lines[0] == f"test/{missing}"
    assert lines[1].endswith(f"train/{missing} (and 1 more, above)")


@pytest.mark.parametrize("action", ["verify", "info"])
def test_a_dataset_that_is_not_there_is_named_with_how_to_make_one(tmp_path, refused, action):
    message = refused("shards", action, tmp_path / "nowhere")
    assert message == (
        f"{tmp_path / 'nowhere'}: no dataset: manifest.json is missing; make one with `sitdist shards build`"
    )


# ------------------------------------------------------------------------------------------ codec, training, results


def test_a_codec_is_not_fitted_into_a_folder_that_is_there(tmp_path, refused):
    recipe = write(tmp_path / "recipe.yaml", RECIPE)
    message = refused("codec", "fit", recipe, "--out", tmp_path)
    assert message == f"{tmp_path}: already exists; give another name"


def test_a_wrong_config_is_refused_before_a_run_is_begun(tmp_path, refused):
    config, run = write(tmp_path / "config.yaml", CONFIG), tmp_path / "run"
    message = refused("train", config, "--out", run, "--set", "train.stpes=3")
    assert message == f"{config}: unknown key 'train.stpes'; did you mean 'steps'?"
    message = refused("train", config, "--out", run, "--set", "train.steps=-3")
    assert message == f"{config}: train.steps = -3: input should be greater than 0"
    message = refused("train", tmp_path / "nowhere.yaml", "--out", run)
    assert message == f"{tmp_path / 'nowhere.yaml'}: no such file; give the path of a YAML config"
    assert not run.exists()


def test_training_without_its_dataset_is_refused_before_a_run_is_begun(tmp_path, refused):
    config = write(tmp_path / "config.yaml", CONFIG | {"data": str(tmp_path / "nowhere")})
    message = refused("train", config, "--out", tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'nowhere'}: no dataset: manifest.json is missing; make one with")
    assert not (tmp_path / "run").exists()


def test_training_on_a_dataset_with_an_altered_byte_stops_with_its_shard_and_sample(tmp_path, refused, tiny_dataset):
    damaged = shutil.copytree(tiny_dataset, tmp_path / "damaged")
    for shard in range(3):
        tar = damaged / "train" / f"0000{shard}.tar"
        data = bytearray(tar.read_bytes())
        for start in load_index(tar.with_suffix(".index.npz"))["moments"]:
            data[int(start) + 200] ^= 1
        tar.write_bytes(data)
    config = write(tmp_path / "config.yaml", CONFIG | {"data": str(damaged)})
    message = refused("train", config, "--out", tmp_path / "run")
    assert "altered bytes (CRC differs)" in message
    assert f"{damaged}/train/0000" in message
