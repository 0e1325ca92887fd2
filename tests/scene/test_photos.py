"""Photos of every format come with their poses and cameras; whatever lacks one of them is refused in one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sitdist.cli.main import run
from sitdist.errors import DataError, OutOfMemoryError, PoseError
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, look_at, shell_cameras
from sitdist.geometry.distortion import Distortion, undistorted
from sitdist.io import files as memory
from sitdist.io.images import to_pixels
from sitdist.scene.field import chair
from sitdist.scene.photos import read_photos
from sitdist.scene.store import load_scene
from sitdist.scene.views import render

POSES = look_at(torch.tensor([[4.0, 0, 1], [0, 4.0, 1], [-4.0, 0, 1]]))


def write_npz(path, size=(6, 8), count=3, dtype=np.uint8, **changes):
    pixels = np.random.default_rng(0).integers(0, 255, (count, *size, 3))
    images = pixels.astype(dtype) if dtype == np.uint8 else (pixels / 255).astype(dtype)
    np.savez(path, **{"images": images, "poses": POSES[:count].numpy(), "focal": 9.5, **changes})
    return path


def write_transforms(folder, count=3, **values):
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.new("RGBA", (8, 6), (255, 0, 0, 0 if index == 0 else 255)).save(folder / f"{index}.png")
    listed = [{"file_path": f"{i}", "transform_matrix": POSES[i].tolist()} for i in range(count)]
    text = json.dumps({"fl_x": 10.0, "frames": listed, **values})
    (folder / "transforms.json").write_text(text)
    return folder


def test_npz_photos_need_not_be_square(tmp_path):
    photos = read_photos(write_npz(tmp_path / "a.npz"))
    assert photos.images.shape == (3, 3, 6, 8)
    assert photos.images.dtype == torch.uint8
    assert photos.intrinsics[2] == Intrinsics(9.5, 9.5, 4.0, 3.0, 8, 6)
    assert torch.equal(photos.camera_to_world, POSES)
    floats = read_photos(write_npz(tmp_path / "b.npz", dtype=np.float32))
    torch.testing.assert_close(floats.pictures([1]), photos.pictures([1]))
    assert floats.fingerprint != photos.fingerprint


def test_evenly_spaced_photos_are_as_good_a_capture(tmp_path):
    photos = read_photos(write_npz(tmp_path / "a.npz"))
    two = photos.thinned(2)
    assert torch.equal(two.images, photos.images[[0, 1]])
    assert torch.equal(two.camera_to_world, POSES[[0, 1]])
    assert len(two.intrinsics) == 2
    assert two.fingerprint != photos.fingerprint
    assert photos.thinned(None) is photos.thinned(3) is photos


def test_transparent_photos_lie_on_the_background(tmp_path):
    folder = write_transforms(tmp_path / "photos")
    white, blue = read_photos(folder), read_photos(folder / "transforms.json", (0.0, 0.0, 1.0))
    assert white.images[:, :, 0, 0].tolist() == [[255, 255, 255], [255, 0, 0], [255, 0, 0]]
    assert blue.images[0, :, 5, 7].tolist() == [0, 0, 255]
    assert white.intrinsics[0] == Intrinsics(10.0, 10.0, 4.0, 3.0, 8, 6)
    assert white.fingerprint != blue.fingerprint
    assert torch.equal(white.camera_to_world, POSES)


def test_a_frames_own_camera_comes_first_and_an_angle_is_enough(tmp_path):
    frames = [{"file_path": f"{i}", "transform_matrix": POSES[i].tolist()} for i in range(3)]
    frames[1] |= {"fl_x": 20.0, "fl_y": 21.0, "cx": 3.5}
    cameras = read_photos(write_transforms(tmp_path / "a") and _rewrite(tmp_path / "a", frames)).intrinsics
    assert cameras[1] == Intrinsics(20.0, 21.0, 3.5, 3.0, 8, 6)
    (tmp_path / "a" / "transforms.json").write_text(json.dumps({"camera_angle_x": np.pi / 2, "frames": frames}))
    assert read_photos(tmp_path / "a").intrinsics[0].fx == pytest.approx(4.0)


def _rewrite(folder, frames, **values):
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 10.0, "frames": frames, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k1": -1e7}, "folds the picture"),
        ({"camera_model": "SPHERICAL"}, "SPHERICAL is neither"),
        ({"w": 16}, "8x6 pixels but its intrinsics are for 16x6"),
        ({"fl_x": -1.0}, "focal length -1 for 8 pixels"),
        ({"frames": []}, "holds no frames"),
        ({"frames": [{"file_path": "0"}]}, "its pose is not a 4x4 matrix of numbers"),
        ({"frames": [{"file_path": "0", "transform_matrix": "none"}]}, "its pose is not a 4x4 matrix of numbers"),
        ({"frames": [{"file_path": "9", "transform_matrix": POSES[0].tolist()}]}, "frame 9: picture is missing"),
        ({"frames": 3}, "no list of frames"),
    ],
)
def test_transforms_that_cannot_be_honoured_are_refused(tmp_path, values, message):
    with pytest.raises(DataError, match=message):
        read_photos(write_transforms(tmp_path / "photos", **values))


def test_a_pose_that_is_not_rigid_is_refused_by_name(tmp_path):
    frames = [{"file_path": "0", "transform_matrix": (2 * POSES[0]).tolist()}]
    with pytest.raises(PoseError, match="frame 0: last row"):
        read_photos(write_transforms(tmp_path / "photos", 1) and _rewrite(tmp_path / "photos", frames))


def test_photos_through_a_lens_become_those_of_the_pinhole_camera(tmp_path):
    lens = Distortion("perspective", (1.5, -0.1), (0.01, -0.02))
    camera, wider = Intrinsics(80.0, 76.0, 35.0, 22.0, 64, 48), Intrinsics(320.0, 304.0, 204.0, 152.0, 384, 288)
    row, column = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    place = lens.undistort(torch.stack([(column - 35.0) / 80.0, (row - 22.0) / 76.0], dim=-1))
    grid = (place * torch.tensor([320.0, 304.0]) + torch.tensor([204.0, 152.0])) / torch.tensor([192.0, 144.0]) - 1.0
    frames, poses = [], look_at(torch.tensor([[2.2, 0, 0.6], [0, 2.2, 0.6], [-2.2, 0, 0.6]]))
    for index, pose in enumerate(poses):
        seen = render(chair(), pose, wider, 1, (0.0, 0.5, 0.0))
        through = torch.nn.functional.grid_sample(seen[None], grid[None].float(), align_corners=False)[0]
        pixels = (255.0 * through).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        frames.append({"file_path": f"{index}.png", "transform_matrix": pose.tolist()})
    values = {"fl_x": 80.0, "fl_y": 76.0, "cx": 35.0, "cy": 22.0, "frames": frames}
    values |= {"camera_model": "OPENCV", "k1": 1.5, "k2": -0.1, "p1": 0.01, "p2": -0.02}
    (tmp_path / "transforms.json").write_text(json.dumps(values))
    photos = read_photos(tmp_path, background=(1.0, 0.0, 0.0))
    assert photos.intrinsics == [camera] * 3
    _, inside = undistorted(torch.ones(1, 48, 64), camera, lens)
    expected = torch.stack([render(chair(), pose, camera, 4, (0.0, 0.5, 0.0)) for pose in poses])
    difference = (photos.pictures(range(3)) - expected).abs()[..., inside.bool()]
    assert difference.mean() < 0.02
    bent = torch.stack([to_pixels(tmp_path / f"{index}.png", "")[0] for index in range(3)])
    assert (bent - expected).abs()[..., inside.bool()].mean() > 2 * difference.mean()
    outside = photos.images[..., ~inside.bool()]
    assert outside.shape[-1] > 0
    assert (outside == torch.tensor([255, 0, 0])[None, :, None]).all()


def test_places_without_posed_photos_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_photos(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no posed photos"):
        read_photos(tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "one.jpg")
    with pytest.raises(DataError, match=r"photos without poses; expected .*run COLMAP"):
        read_photos(tmp_path)


def test_photos_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    folder = write_transforms(tmp_path / "photos")
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "_limits", lambda: [(2 * 3 * 3 * 8 * 6 - 1, 10**9)])
    with pytest.raises(OutOfMemoryError, match=r"transforms\.json: 3 photos: .* GB of memory.*; give fewer"):
        read_photos(folder)


def test_sizes_that_differ_are_refused(tmp_path):
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz", size=(8, 8))
    with pytest.raises(DataError, match="8x6 and 8x8 pixels in several files"):
        read_photos(tmp_path)
    folder = write_transforms(tmp_path / "photos")
    Image.new("RGB", (9, 6)).save(folder / "2.png")
    with pytest.raises(DataError, match=r"2\.png: 9x6 pixels but 0\.png has 8x6"):
        read_photos(folder)


def test_float_pixels_out_of_range_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"image 0: pixels hold NaN"):
        read_photos(write_npz(tmp_path / "a.npz", images=np.full((3, 6, 8, 3), np.nan, np.float32)))


@pytest.mark.distributed
def test_the_command_fits_a_scene_and_says_how_well(tmp_path, capsys):
    camera = Intrinsics.from_fov(40.0, 16, 16)
    poses = shell_cameras(draws.uniform(0, "cameras", torch.arange(12), 3), (4.0, 4.0))
    pictures = torch.stack([render(chair(), pose, camera, 2) for pose in poses])
    images = (pictures.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    np.savez(tmp_path / "photos.npz", images=images, poses=poses.numpy(), focal=camera.fx)
    command = ["scene", "fit", str(tmp_path / "photos.npz"), "--out", str(tmp_path / "scene"), "--device", "cpu"]
    command += ["--resolutions", "8", "12", "--steps", "30", "30"]
    assert run([*command, "--keep-frame", "--seed", "3", "--no-view-dependence", "--background", "1", "0", "0.5"]) == 0
    assert "dB, SSIM" in capsys.readouterr().out
    scene = load_scene(tmp_path / "scene")
    assert (tmp_path / "scene" / "turntable.png").is_file()
    assert scene.frame == "capture"
    assert scene.field.background.tolist() == [1.0, 0.0, 0.5]
    assert len(scene.field.values) == 4
    assert scene.source["options"]["seed"] == 3
    assert scene.source["options"]["steps"] == [30, 30]
    assert len(scene.source["fingerprint"]) == 64
    assert run(command) == 2  # it is there already
    assert "already exists" in capsys.readouterr().err
    assert run(["scene", "fit", str(tmp_path / "none.npz"), "--out", str(tmp_path / "other")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
