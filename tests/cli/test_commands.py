"""Commands for a user with a model: poses and pictures as the files that other tools read."""

import csv
import io
import json
import math
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sitdist
from sitdist.build.sources import open_source
from sitdist.config.recipe import TransformsSource
from sitdist.dataset.reader import ShardReader
from sitdist.errors import DataError
from sitdist.geometry.camera import look_at
from sitdist.io import video as animation
from sitdist.io.colmap import read_model
from sitdist.io.pose_files import picture_names, read_poses
from sitdist.io.transforms import read_posed_files


@pytest.fixture(scope="module")
def flow(tiny_run):
    return sitdist.load(tiny_run)


@pytest.fixture(scope="module")
def folder(tiny_dataset, tmp_path_factory):
    """Five held-out pictures as PNGs."""
    out = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(ShardReader(tiny_dataset, "test").images(range(5))):
        array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(out / f"{number}.png")
    return out


# -------------------------------------------------------------------------------------------------------------- pose


def estimated(flow, folder, **options):
    return flow.estimate(sorted(folder.glob("*.png")), **options).camera_to_world


def test_lines_and_tables_hold_what_was_estimated(run, tiny_run, flow, folder, tmp_path):
    lines = [json.loads(line) for line in run("pose", tiny_run, folder).splitlines()]
    poses = estimated(flow, folder)
    assert [line["file"] for line in lines] == [str(folder / f"{number}.png") for number in range(5)]
    assert torch.equal(torch.tensor([line["camera_to_world"] for line in lines], dtype=torch.float64), poses)
    assert [lines[0][key] for key in ("fx", "cx", "width")] == [flow.camera.fx, 8.0, 16]
    assert lines[0]["converged"] is True
    assert lines[0]["so3_residual"] > 0

    table = list(csv.DictReader(io.StringIO(run("pose", tiny_run, folder, "--format", "csv"))))
    assert [float(table[2][key]) for key in ("r00", "r21", "tx", "tz")] == [
        float(poses[2][place]) for place in ((0, 0), (2, 1), (0, 3), (2, 3))
    ]
    out = tmp_path / "poses.jsonl"
    out.write_text("old")
    assert run("pose", tiny_run, folder, "--out", out, "--overwrite") == f"{out}: poses of 5 pictures\n"
    assert (tmp_path / json.loads(out.read_text().splitlines()[0])["file"]).resolve() == folder / "0.png"


def test_transforms_are_read_back_by_the_importer_and_by_nerfstudios_conventions(run, tiny_run, flow, folder):
    out = folder / "transforms.json"
    run("pose", tiny_run, folder, "--format", "transforms", "--out", out)
    poses = estimated(flow, folder)
    source = open_source(TransformsSource(kind="transforms", path=str(folder)), 16)
    assert (source.camera_to_world - poses).abs().max() < 1e-6
    assert source.intrinsics(3).to_list() == pytest.approx(flow.camera.to_list())
    assert torch.equal(source.images([1]), ShardReader(flow.run.config.data, "test").images([1]))
    values = json.loads(out.read_text())
    assert values["camera_model"] == "PINHOLE"
    for frame, pose in zip(values["frames"], poses, strict=True):
        matrix = np.array(frame["transform_matrix"])
        assert np.abs(matrix - pose.numpy()).max() < 1e-6
        assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1.0)
        camera = np.linalg.inv(matrix) @ [*(matrix[:3, 3] - matrix[:3, 2]), 1.0]
        assert camera[:3] == pytest.approx([0.0, 0.0, -1.0])  # what is ahead is on the camera's -z
    out.unlink()


def test_pictures_of_one_name_in_two_folders_stay_apart(run, tiny_run, folder, tmp_path):
    for side in ("left", "right"):
        (tmp_path / side).mkdir()
        shutil.copy(folder / "0.png", tmp_path / side / "0.png")
    pictures = (tmp_path / "left", tmp_path / "right")
    run("pose", tiny_run, *pictures, "--format", "colmap", "--out", tmp_path / "model")
    assert [view.name for view in read_model(tmp_path / "model")] == ["left/0.png", "right/0.png"]
    assert "# 1 is right/0.png" in run("pose", tiny_run, *pictures, "--format", "tum")


def test_a_colmap_model_is_read_back_by_its_documented_layout(run, tiny_run, flow, folder, tmp_path):
    run("pose", tiny_run, folder, "--format", "colmap", "--out", tmp_path / "model")
    poses = estimated(flow, folder)
    ours = read_model(tmp_path / "model")
    assert [view.name for view in ours] == [f"{number}.png" for number in range(5)]
    assert (torch.stack([view.camera_to_world for view in ours]) - poses).abs().max() < 1e-6
    assert ours[0].intrinsics.to_list() == pytest.approx(flow.camera.to_list())
    lines = (tmp_path / "model" / "images.txt").read_text().split("\n")[1:]
    number, w, x, y, z, *t, camera, name = lines[4].split()
    assert (number, camera, name, lines[5]) == ("3", "1", "2.png", "")
    w, x, y, z = map(float, (w, x, y, z))
    rotation = np.array(  # R(q) of COLMAP's documentation: world to camera, y down, z forward
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    centre = -rotation.T @ np.array(t, dtype=float)
    assert np.abs(centre - poses[2, :3, 3].numpy()).max() < 1e-6
    assert np.abs(rotation[2] + poses[2, :3, 2].numpy()).max() < 1e-6  # forward
    assert np.abs(rotation[1] + poses[2, :3, 1].numpy()).max() < 1e-6  # down
    camera_line = (tmp_path / "model" / "cameras.txt").read_text().splitlines()[1]
    assert camera_line.startswith("1 PINHOLE 16 16 ")
    assert (tmp_path / "model" / "points3D.txt").is_file()


def test_tum_lines_are_time_place_and_quaternion(run, tiny_run, flow, folder):
    text = run("pose", tiny_run, folder, "--format", "tum")
    rows = np.array([[float(word) for word in line.split()] for line in text.splitlines() if line[0] != "#"])
    poses = estimated(flow, folder).numpy()
    assert rows.shape == (5, 8)
    assert rows[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert np.abs(rows[:, 1:4] - poses[:, :3, 3]).max() < 1e-12
    x, y, z, w = rows[1, 4:]
    assert np.linalg.norm(rows[1, 4:]) == pytest.approx(1.0)
    forward = [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]  # R(q) e_z
    assert np.abs(np.array(forward) + poses[1, :3, 2]).max() < 1e-6


def test_intrinsics_follow_a_picture_of_another_size(run, tiny_run, flow, tmp_path):
    Image.fromarray(np.full((60, 80, 3), 128, np.uint8)).save(tmp_path / "wide.png")
    line = json.loads(run("pose", tiny_run, tmp_path / "wide.png"))
    assert [line[key] for key in ("fx", "fy", "cx", "cy", "width", "height")] == pytest.approx(
        [flow.camera.fx * 60 / 16, flow.camera.fy * 60 / 16, 40.0, 30.0, 80, 60]
    )


def test_every_option_of_pose_changes_what_it_says(run, tiny_run, flow, folder, tmp_path):
    plain = run("pose", tiny_run, folder)
    for number in range(5):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, :8] = 255
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
    for option in (
        ["--intrinsics", 30.0, 30.0, 8.0, 8.0],
        ["--masks", tmp_path],
        ["--estimator", "euler", "--estimator-steps", 3],
        ["--estimator", "multi_zoom", "--zooms", 1.1, 1.2],
    ):
        assert run("pose", tiny_run, folder, *option) != plain
    few = run("pose", tiny_run, folder, "--estimator", "euler", "--estimator-steps", 2)
    assert few != run("pose", tiny_run, folder, "--estimator", "euler", "--estimator-steps", 3)
    assert run("pose", tiny_run, folder, "--frame", "user") == plain  # these poses were never moved
    single = json.loads(run("pose", tiny_run, folder / "3.png", "--device", "cpu", "--label", 0))
    several = json.loads(run("pose", tiny_run, folder, "--batch", 2).splitlines()[3])
    assert np.abs(np.array(single["camera_to_world"]) - several["camera_to_world"]).max() < 1e-4


def test_what_pose_cannot_use_is_one_line_and_nothing_is_written(refused, tiny_run, folder, tmp_path):
    out = tmp_path / "out.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "fifo.png")
    for arguments, message in (
        ([tmp_path / "empty"], "empty: a folder without pictures"),
        ([tmp_path / "bad.png"], "bad.png: not a readable picture"),
        ([tmp_path / "none.png"], "none.png: No such file or directory; check the path"),
        ([tmp_path / "fifo.png"], "not a regular file"),
        ([folder, "--label", 2], "label 2: the model knows no such object"),
        ([folder, "--masks", tmp_path], "0.png: no mask for"),
        ([folder, "--estimator", "best"], "unknown 'best'; did you mean 'one_step'?"),
        ([folder, "--refine", tmp_path], "scene.json: no such file; make a scene with"),
        ([folder, "--intrinsics", 0, 1, 1, 1], "focal length 0 for 16 pixels"),
    ):
        assert message in refused("pose", tiny_run, *arguments, "--out", out)
        assert not out.exists()
    out.write_text("precious")
    assert "out.json: already exists; give another name or --overwrite" in refused(
        "pose", tiny_run, folder, "--out", out
    )
    assert out.read_text() == "precious"
    assert "a model is a folder of three files; give --out" in refused("pose", tiny_run, folder, "--format", "colmap")
    there = ["--format", "colmap", "--out", tmp_path / "empty"]
    assert "empty: already exists" in refused("pose", tiny_run, folder, *there)
    assert "nowhere: no such folder; give a run, an exported folder, or a hub id" in refused("pose", "nowhere", folder)


def test_pictures_that_are_turned_or_not_have_one_pose(run, refused, tiny_run, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    for tag, array in ((1, upright), (3, upright[::-1, ::-1]), (6, np.rot90(upright)), (8, np.rot90(upright, 3))):
        exif[0x0112] = tag
        Image.fromarray(np.ascontiguousarray(array)).save(tmp_path / f"{tag}.png", exif=exif)
    lines = [json.loads(line) for line in run("pose", tiny_run, tmp_path).splitlines()]
    for line in lines:
        assert np.array(line["camera_to_world"]) == pytest.approx(np.array(lines[0]["camera_to_world"]), abs=1e-5)
        assert (line["width"], line["height"], line["cx"], line["cy"]) == (20, 12, 10.0, 6.0)
    camera = ("--intrinsics", 20, 20, 10, 6)
    assert "6.png: stored as 12x20 pixels, turned to 20x12" in refused("pose", tiny_run, tmp_path, *camera)


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1b[1m.png", "a\u2028b.png", "\udcff.png"])
def test_names_that_a_format_cannot_hold_are_refused_by_name(run, tiny_run, folder, tmp_path, name):
    shutil.copy(folder / "0.png", tmp_path / name)
    utf8 = name != "\udcff.png"
    for kind in ("csv", "tum", "colmap", *(() if utf8 else ("jsonl", "transforms"))):
        with pytest.raises(DataError, match=f"{re.escape(name)}: a name with .* the format {kind} cannot hold; rename"):
            picture_names([tmp_path / name], kind)
    if utf8:  # JSON escapes all of them
        assert json.loads(run("pose", tiny_run, tmp_path))["file"] == str(tmp_path / name)
        run("pose", tiny_run, tmp_path, "--format", "transforms", "--out", tmp_path / "transforms.json")
        assert read_posed_files(tmp_path / "transforms.json")[0].picture == tmp_path / name


def test_names_with_spaces_stay_whole_but_in_colmap(run, refused, tiny_run, folder, tmp_path):
    for name in ("a b.png", "c,d.png", 'e"f.png', "\u00e9 \u202f.png"):
        shutil.copy(folder / "0.png", tmp_path / name)
    table = csv.DictReader(io.StringIO(run("pose", tiny_run, tmp_path, "--format", "csv")))
    assert [row["file"] for row in table] == [str(path) for path in sorted(tmp_path.iterdir())]
    assert "# 0 is a b.png" in run("pose", tiny_run, tmp_path, "--format", "tum")
    assert "a b.png: a name with spaces" in refused(
        "pose", tiny_run, tmp_path, "--format", "colmap", "--out", tmp_path / "out"
    )
    for kind in ("colmap", "transforms"):
        pictures = (folder / "0.png", folder / "0.png")
        assert "0.png: named twice" in refused("pose", tiny_run, *pictures, "--format", kind, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_calibrated_run_and_its_export_give_error_bars_and_trust(run, tiny_run, folder, tmp_path, monkeypatch):
    for module in ("inference.calibration", "flow.error_bars"):
        monkeypatch.setattr(f"sitdist.{module}.FEWEST", 12)
    calibrated = shutil.copytree(tiny_run, tmp_path / "run")
    run("calibrate", calibrated, "--split", "test")
    bars = ["rotation_std_deg", "translation_std", "trust", "rotation_bar_90_deg", "translation_bar_90"]
    assert not set(bars) & json.loads(run("pose", tiny_run, folder).splitlines()[0]).keys()
    lines = run("pose", calibrated, folder)
    values = json.loads(lines.splitlines()[2])
    assert set(bars) <= values.keys()
    assert 0.0 < values["trust"] <= 1.0
    assert "rotation_bar_90_deg" in run("pose", calibrated, folder, "--format", "csv").splitlines()[0]
    other = json.loads(run("pose", calibrated, folder, "--estimator", "euler").splitlines()[0])
    assert "trust" not in other  # calibrated for the run's own estimator alone
    run("export", calibrated, tmp_path / "model")
    assert run("pose", tmp_path / "model", folder) == lines


# ------------------------------------------------------------------------------------------------------------ render


def test_a_turntable_is_rendered_to_pictures_that_come_back_with_their_poses(run, tiny_run, flow, tmp_path):
    assert run("render", tiny_run, "--turntable", 4, "--out", tmp_path / "turn") == f"{tmp_path / 'turn'}: 4 pictures\n"
    source = open_source(TransformsSource(kind="transforms", path=str(tmp_path / "turn")), 16)
    assert torch.equal(source.camera_to_world, flow.turntable(4))
    assert (source.images(range(4)) - flow.render(flow.turntable(4))).abs().max() < 0.51 / 255
    for name, options in (
        ("r", ["--radius", 3.2]),
        ("e", ["--elevation", 60]),
        ("s", ["--seed", 1]),
        ("g", ["--generator", "heun"]),
        ("n", ["--generator-steps", 7]),
        ("guided", ["--guidance", 2]),
    ):
        run("render", tiny_run, "--turntable", 4, *options, "--out", tmp_path / name)
        assert (tmp_path / name / "00001.png").read_bytes() != (tmp_path / "turn" / "00001.png").read_bytes(), name
    run("render", tiny_run, "--poses", tmp_path / "r", "--frame", "user", "--batch", 3, "--out", tmp_path / "again")
    again, before = (
        open_source(TransformsSource(kind="transforms", path=str(tmp_path / n)), 16) for n in ("again", "r")
    )
    assert torch.equal(again.camera_to_world, before.camera_to_world)
    assert (again.images(range(4)) - before.images(range(4))).abs().max() < 1.5 / 255


def test_a_gif_loops_at_its_speed_and_replaces_nothing_unasked(run, refused, tiny_run, tmp_path):
    for fps, duration in ((16, 60), (5, 200)):
        out = tmp_path / f"{fps}.gif"
        run("render", tiny_run, "--turntable", 3, "--out", out, "--fps", fps)
        with Image.open(out) as gif:
            assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (3, (16, 16), duration, 0)
    out.write_bytes(b"precious")
    turn = ("render", tiny_run, "--turntable", 2, "--out", out)
    assert "5.gif: already exists; give another name or --overwrite" in refused(*turn)
    assert out.read_bytes() == b"precious"
    assert "--fps: '1e-09' is not a number from 0.01 to 1000" in refused(*turn, "--overwrite", "--fps", 1e-9)
    run(*turn, "--overwrite")
    assert out.read_bytes() != b"precious"
    (tmp_path / "link.gif").symlink_to(tmp_path / "nowhere")
    assert "link.gif: already exists" in refused(*turn[:-1], tmp_path / "link.gif")


def test_an_mp4_is_made_by_ffmpeg_or_refused_before_anything_is_rendered(run, refused, tiny_run, tmp_path, monkeypatch):
    out = tmp_path / "turn.mp4"
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(animation.shutil, "which", lambda _: None)
    message = refused("render", tiny_run, "--turntable", 2, "--out", out)
    assert "an MP4 needs ffmpeg, which is not installed; pip install imageio-ffmpeg, or name a .gif" in message
    script = tmp_path / "ffmpeg"
    script.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\ncat | wc -c >> "$last"\n')
    script.chmod(0o755)
    monkeypatch.setattr(animation.shutil, "which", lambda _: str(script))
    run("render", tiny_run, "--turntable", 2, "--out", out, "--fps", 7)
    command, count = out.read_text().splitlines()
    assert int(count) == 2 * 16 * 16 * 3
    assert "-s 16x16 -r 7.0" in command
    assert "scale=256:256" in command
    assert re.search(r"-c:v libx264 -pix_fmt yuv420p", command)
    script.write_text('#!/bin/sh\ncat > /dev/null\necho "Unknown encoder" >&2\nexit 1\n')
    out.unlink()
    message = refused("render", tiny_run, "--turntable", 2, "--out", out)
    assert "ffmpeg could not write it (Unknown encoder); name a .gif instead" in message
    assert not list(tmp_path.glob("*.mp4*"))


def test_poses_are_read_from_every_file_that_holds_them(tmp_path, run, tiny_run):
    poses = look_at(torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 2.0]]))
    np.save(tmp_path / "a.npy", poses.numpy())
    np.savez(tmp_path / "b.npz", poses=poses.numpy())
    frames = [{"transform_matrix": pose.tolist()} for pose in poses]
    (tmp_path / "c.json").write_text(json.dumps({"camera_angle_x": 0.7, "w": 20, "h": 10, "frames": frames}))
    (tmp_path / "d.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames}))
    for name in "a.npy", "b.npz", "c.json", "d.json":
        assert torch.equal(read_poses(tmp_path / name).camera_to_world, poses), name
    assert read_poses(tmp_path / "d.json").intrinsics is None
    camera = read_poses(tmp_path / "c.json").intrinsics[0]
    assert (camera.width, camera.height) == (20, 10)
    assert camera.fx == camera.fy == pytest.approx(10.0 / math.tan(0.35))
    run("render", tiny_run, "--poses", tmp_path / "c.json", "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "00001.png") as picture:
        assert picture.size == (20, 10)


def test_what_render_cannot_use_is_one_line_and_nothing_is_written(refused, tiny_run, tmp_path):
    out = tmp_path / "out"
    opencv = look_at(torch.tensor([[4.0, 0.0, 1.0]])) @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])).double()
    np.save(tmp_path / "opencv.npy", opencv.numpy())
    np.save(tmp_path / "skew.npy", np.diag([1.0, 2.0, 1.0, 1.0])[None])
    np.savez(tmp_path / "other.npz", matrices=np.eye(4))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("opencv.npy", "pose 0: its camera looks away from the origin, where the object is (1 of 1 do); poses are"),
        ("skew.npy", "skew.npy: pose 0: pose is not rigid"),
        ("other.npz", "other.npz: no array 'poses' (it has matrices)"),
        ("none.npy", "none.npy: No such file or directory"),
        ("empty", "empty: holds neither a transforms.json nor COLMAP's"),
    ):
        assert message in refused("render", tiny_run, "--poses", tmp_path / name, "--out", out)
        assert not out.exists()
    turn = ["render", tiny_run, "--turntable", 2]
    assert "empty: already exists" in refused(*turn, "--out", tmp_path / "empty")
    assert "turn.avi: pictures go to a folder, or to a file that ends in .gif or .mp4" in refused(
        *turn, "--out", "turn.avi"
    )
    mixed = ["render", tiny_run, "--poses", tmp_path / "skew.npy", "--radius", 3, "--out", out]
    assert "are the turntable's; give them with --turntable" in refused(*mixed)
