"""Pictures of a scene come with the cameras that the importer reads back, whole or not at all."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sitdist.build import pictures
from sitdist.build.pictures import recipe_cameras, turntable_cameras, write_pictures
from sitdist.build.sources import open_source
from sitdist.cli.main import run
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe, TransformsSource
from sitdist.errors import ConfigError, DataError
from sitdist.geometry.camera import camera_radius
from sitdist.io.pose_files import read_poses
from sitdist.scene.views import open_scene, render


def read(folder, size, background=(1.0, 1.0, 1.0)):
    return open_source(TransformsSource(kind="transforms", path=str(folder), background=background), size)


def test_a_turntable_is_a_closed_circle_that_looks_at_the_origin():
    poses = turntable_cameras(8, 4.0, 30.0, 40.0, 16).camera_to_world
    assert torch.allclose(camera_radius(poses), torch.full((8,), 4.0, dtype=torch.float64))
    assert torch.allclose(poses[:, 2, 3], torch.full((8,), 2.0, dtype=torch.float64))  # 4 sin 30
    assert torch.allclose(poses[:, :3, 2] * 4.0, poses[:, :3, 3])
    steps = (poses[:, :3, 3] - poses[:, :3, 3].roll(1, 0)).norm(dim=-1)
    assert torch.allclose(steps, steps[:1].expand(8))


def test_pictures_and_cameras_are_read_back_as_they_were_rendered(tmp_path):
    cameras = turntable_cameras(3, 3.5, 25.0, 45.0, 24)
    assert write_pictures(None, cameras, tmp_path / "out", background=(0.2, 0.4, 0.6)) == 3
    source = read(tmp_path / "out", 24)
    assert torch.equal(source.camera_to_world, cameras.camera_to_world)
    assert [source.intrinsics(view) for view in range(3)] == cameras.intrinsics
    scene = open_scene(None)
    for view in range(3):
        expected = render(scene, cameras.camera_to_world[view], cameras.intrinsics[view], 2, (0.2, 0.4, 0.6))
        assert torch.equal(source.images([view])[0], expected)
    assert not (tmp_path / "out" / "turntable.gif").exists()


def test_alpha_before_any_background_is_the_picture_before_it(tmp_path):
    cameras = turntable_cameras(2, 3.5, 25.0, 45.0, 24)
    write_pictures(None, cameras, tmp_path / "out", alpha=True)
    with Image.open(tmp_path / "out" / "00000.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (24, 24, 4)
    assert pixels[0, 0, 3] == 0
    assert pixels[..., 3].max() == 255
    for background in ((1.0, 1.0, 1.0), (0.0, 0.5, 1.0)):
        expected = render(open_scene(None), cameras.camera_to_world[0], cameras.intrinsics[0], 2, background)
        assert (read(tmp_path / "out", 24, background).images([0])[0] - expected).abs().max() < 2.5 / 255


def test_the_cameras_of_a_recipe_and_the_command(tmp_path, capsys):
    recipe = {
        "name": "views",
        "image_size": 16,
        "codec": {"kind": "pca", "patch": 4},
        "val_views": 0,
        "splits": {"train": {"kind": "scene", "views": 4, "fov_range_deg": [30, 50]}},
    }
    (tmp_path / "views.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["scene", "render", "built-in", "--recipe", str(tmp_path / "views.yaml")]
    assert run([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "out: 4 pictures" in capsys.readouterr().out
    cameras = recipe_cameras(parse(Recipe, recipe, "views"), "train")
    source = read(tmp_path / "out", 16)
    assert torch.equal(source.camera_to_world, cameras.camera_to_world)
    assert len({source.intrinsics(view).fx for view in range(4)}) == 4
    turntable = ["scene", "render", "built-in", "--turntable", "3", "--size", "16", "--out", str(tmp_path / "turn")]
    assert run(turntable) == 0
    assert run([*turntable[:-1], str(tmp_path / "wide"), "--fov", "180"]) == 2
    assert "--fov 180: a field of view is between 1 and 170 degrees" in capsys.readouterr().err
    with Image.open(tmp_path / "turn" / "turntable.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (16, 16))
    with pytest.raises(ConfigError, match="--split test: the recipe has no such split; it has train"):
        recipe_cameras(parse(Recipe, recipe, "views"), "test")


def test_cameras_are_written_for_other_tools_and_replace_nothing_unasked(tmp_path, capsys):
    recipe = tmp_path / "views.yaml"
    recipe.write_text(
        "name: views\nimage_size: 16\ncodec: {kind: pca, patch: 4}\nval_views: 0\n"
        "splits: {train: {kind: scene, views: 4}}\n"
    )
    files = tmp_path / "path.json", tmp_path / "transforms.json"
    command = ["shards", "cameras", str(recipe), "--split", "train", "--out", str(files[0]), "--transforms"]
    assert run([*command, str(files[1])]) == 0
    path, other = json.loads(files[0].read_text()), read_poses(files[1])
    for view, pose, camera in zip(path["camera_path"], other.camera_to_world, other.intrinsics, strict=True):
        assert view["camera_to_world"] == pose.flatten().tolist()
        assert 0.5 * path["render_height"] / math.tan(math.radians(view["fov"]) / 2) == pytest.approx(camera.fy)
    before = files[0].read_bytes()
    files[1].write_text("precious")
    assert run([*command, str(files[1])]) == 2
    assert "already exists; give another name or --overwrite" in capsys.readouterr().err
    files[0].unlink()
    assert run([*command, str(files[1])]) == 2
    assert files[1].read_text() == "precious"
    assert not files[0].exists()
    assert run([*command, str(files[1]), "--overwrite"]) == 0
    assert files[0].read_bytes() == before


def test_what_is_there_is_kept_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    cameras = turntable_cameras(2, 4.0, 20.0, 40.0, 16)
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="there: already exists; give another name"):
        write_pictures(None, cameras, tmp_path / "there")
    with pytest.raises(DataError, match=r"scene\.json: no such file"):
        write_pictures(str(tmp_path / "none"), cameras, tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "transforms", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_pictures(None, cameras, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
