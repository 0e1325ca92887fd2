"""Views from the scene, from .npz files and from a transforms.json: known pictures, poses and cameras, or a refusal."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sitdist.build.sources import open_source
from sitdist.config.recipe import NpzSource, SceneSource, TransformsSource
from sitdist.errors import DataError, PoseError
from sitdist.geometry.camera import Intrinsics, camera_radius, look_at


def cameras(count):
    return look_at(torch.tensor([[3.0 + i, 1.0, 2.0] for i in range(count)])).numpy()


def pixels(count, size=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# -------------------------------------------------------------------------------------------------------- the scene


def scene(views, seed=0, **values):
    return open_source(SceneSource(kind="scene", views=views, seed=seed, **values), 8)


def test_view_i_of_the_scene_is_a_pure_function_of_seed_and_i():
    few, many = scene(3), scene(40)
    assert torch.equal(few.camera_to_world, many.camera_to_world[:3])
    assert torch.equal(few.images([2, 0]), many.images([0, 31, 2])[[2, 0]])
    assert not torch.equal(scene(3, seed=1).camera_to_world, few.camera_to_world)


def test_the_scenes_cameras_are_where_the_recipe_says():
    radii = camera_radius(scene(200, radius=(2.0, 2.5)).camera_to_world)
    assert 2.0 <= radii.min() < 2.05
    assert 2.45 < radii.max() <= 2.5
    assert (scene(50).camera_to_world[:, 2, 3] >= 0).all()
    assert (scene(50, sphere="full").camera_to_world[:, 2, 3] < 0).any()
    assert scene(1, fov_deg=90.0).intrinsics(0) == Intrinsics(pytest.approx(4.0), pytest.approx(4.0), 4.0, 4.0, 8, 8)


# ------------------------------------------------------------------------------------------------------- .npz files


def write_npz(path, **changes):
    arrays = {"images": pixels(3), "poses": cameras(3), "focal": 5.0, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def open_npz(*paths, size=4):
    return open_source(NpzSource(kind="npz", paths=list(paths), label=1), size)


def test_npz_pictures_are_divided_by_255_or_taken_as_they_are(tmp_path):
    stored = pixels(3)
    expected = torch.from_numpy(stored.astype(np.float32) / 255).permute(0, 3, 1, 2)
    for name, images in (("uint8", stored), ("float32", stored / np.float32(255)), ("float64", stored / 255.0)):
        source = open_npz(write_npz(tmp_path / f"{name}.npz", images=images))
        torch.testing.assert_close(source.images([0, 1, 2]), expected, rtol=0, atol=1e-7)
        assert source.images([1]).dtype == torch.float32
        assert np.array_equal(source.camera_to_world.numpy(), cameras(3))
        assert source.intrinsics(2) == Intrinsics(5.0, 5.0, 2.0, 2.0, 4, 4)


def test_several_files_and_folders_follow_one_another(tmp_path):
    (tmp_path / "folder").mkdir()
    first = write_npz(tmp_path / "z.npz", images=pixels(2, seed=1), poses=cameras(2), focal=1.0)
    write_npz(tmp_path / "folder" / "b.npz", images=pixels(1, seed=3), poses=cameras(1), focal=3.0)
    write_npz(tmp_path / "folder" / "a.npz", images=pixels(3, seed=2), focal=np.array([2.0, 2.0, 2.0]))
    source = open_npz(first, str(tmp_path / "folder"))
    expected = np.concatenate([pixels(2, seed=1), pixels(3, seed=2), pixels(1, seed=3)])
    assert len(source) == 6
    images = (source.images(range(6)) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(images.numpy(), expected)
    assert [source.intrinsics(view).fx for view in range(6)] == [1.0, 1.0, 2.0, 2.0, 2.0, 3.0]
    assert np.array_equal(source.camera_to_world.numpy(), np.concatenate([cameras(2), cameras(3), cameras(1)]))


def test_the_fingerprint_follows_the_files_bytes(tmp_path):
    path = write_npz(tmp_path / "views.npz")
    before = open_npz(path).fingerprint()
    assert open_npz(path).fingerprint() == before
    write_npz(tmp_path / "views.npz", focal=6.0)
    assert open_npz(path).fingerprint() != before


def scaled(factor):
    poses = cameras(3)
    poses[1, :3, :3] *= factor
    return poses


def with_pixel(value):
    images = pixels(3) / np.float32(255)
    images[2, 1, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"poses": scaled(1.2)}, PoseError, r"views\.npz: view 1: pose is not rigid"),
        ({"poses": scaled(-1.0)}, PoseError, r"view 1: pose is not rigid \(determinant -1"),
        ({"poses": scaled(np.nan)}, PoseError, r"view 1: pose holds NaN"),
        ({"poses": cameras(2)}, DataError, r"3 images, poses of shape \(2, 4, 4\); expected \[3, 4, 4\]"),
        ({"poses": cameras(3)[:, :3]}, DataError, r"poses of shape \(3, 3, 4\)"),
        ({"poses": cameras(3).transpose(0, 2, 1)}, PoseError, r"view 0: last row of the pose is .* \(row-major 4x4\)"),
        ({"poses": cameras(3).astype(str)}, DataError, r"poses of type <U\d+ .*; expected real numbers"),
        ({"images": with_pixel(np.nan)}, DataError, r"views\.npz: image 2: pixels hold NaN or infinity"),
        ({"images": with_pixel(np.inf)}, DataError, r"image 2: pixels hold NaN or infinity"),
        ({"images": with_pixel(1.5)}, DataError, r"image 2: pixels from .* to 1\.5; float pictures are in \[0, 1\]"),
        ({"images": pixels(3).astype(np.float32)}, DataError, r"image 0: pixels from .*\(divide by 255\?\)"),
        ({"images": pixels(3).astype(np.int32)}, DataError, r"images of type int32; expected uint8, or float"),
        ({"images": pixels(3)[..., :1]}, DataError, r"images of shape \(3, 4, 4, 1\); expected \[N, H, W, 3\]"),
        ({"images": pixels(0), "poses": cameras(1)[:0]}, DataError, r"with N > 0"),
        ({"images": pixels(3, size=6)}, DataError, r"images of 6x6 pixels but the recipe's image_size is 4; set"),
        ({"images": pixels(3)[:, :2]}, DataError, r"images of 4x2 pixels"),
        (
            {"images": np.array([pixels(1), pixels(2), 0], dtype=object)},
            DataError,
            r"images: an object array, as of pictures of several sizes",
        ),
        ({"focal": None}, DataError, r"no array 'focal' \(it has images, poses\)"),
        ({"images": None}, DataError, r"no array 'images'"),
        ({"focal": np.array([1.0, 1.0, 2.0])}, DataError, r"focal \[1\.0, 1\.0, 2\.0\]; expected one positive number"),
        ({"focal": 0.0}, DataError, r"focal length 0 for 4 pixels; expected 0\.004 to 4e\+06 pixels"),
        ({"focal": "wide"}, DataError, r"focal of type <U4; expected real numbers"),
    ],
)
def test_an_npz_file_that_cannot_be_used_is_refused_at_once(tmp_path, changes, error, message):
    path = write_npz(tmp_path / "views.npz", **changes)
    with pytest.raises(error, match=message):
        open_npz(path)


def test_paths_that_hold_no_pictures_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder; set the recipe's paths"):
        open_npz(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"folder without \.npz files"):
        open_npz(str(tmp_path))
    for content in (b"", b"not a zip archive"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.npz: not a readable array"):
            open_npz(str(tmp_path / "bad.npz"))


def test_a_file_named_twice_is_refused(tmp_path):
    path = write_npz(tmp_path / "views.npz")
    with pytest.raises(DataError, match=r"views\.npz: given twice"):
        open_npz(str(tmp_path), path)


# -------------------------------------------------------------------------------------------------- transforms.json


def write_transforms(folder, count=3, size=4, **values):
    """Pictures and a transforms.json in nerfstudio's form; values that are None are left out."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for frame, picture in enumerate(pixels(count, size)):
        Image.fromarray(picture).save(folder / "images" / f"{frame}.png")
    listed = [
        {"file_path": f"images/{frame}.png", "transform_matrix": pose.tolist()}
        for frame, pose in enumerate(cameras(count))
    ]
    values = {"fl_x": 5.0, "frames": listed} | values
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "transforms.json").write_text(json.dumps(values))
    return folder


def edit_frame(folder, frame, **values):
    path = folder / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"][frame].update(values)
    path.write_text(json.dumps(content))


def open_transforms(path, size=4, **values):
    return open_source(TransformsSource(kind="transforms", path=str(path), **values), size)


def test_a_transforms_json_gives_the_pictures_and_poses_it_names(tmp_path):
    for path in (write_transforms(tmp_path), tmp_path / "transforms.json"):
        source = open_transforms(path)
        images = (source.images([2, 0]) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        assert np.array_equal(images.numpy(), pixels(3)[[2, 0]])
        assert np.array_equal(source.camera_to_world.numpy(), cameras(3))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"fl_x": 5.0}, (5.0, 5.0, 2.0, 2.0)),
        ({"fl_x": 5.0, "fl_y": 6.0, "cx": 1.5, "cy": 2.5, "w": 4, "h": 4.0}, (5.0, 6.0, 1.5, 2.5)),
        ({"fl_x": None, "camera_angle_x": math.pi / 2}, (2.0, 2.0, 2.0, 2.0)),
        ({"fl_x": 5.0, "camera_angle_x": 1.0, "k1": 0.0, "camera_model": "OPENCV"}, (5.0, 5.0, 2.0, 2.0)),
    ],
)
def test_the_focal_length_comes_in_pixels_or_as_an_angle(tmp_path, values, expected):
    intrinsics = open_transforms(write_transforms(tmp_path, **values)).intrinsics(1)
    assert intrinsics.to_list() == pytest.approx(expected)
    assert (intrinsics.width, intrinsics.height) == (4, 4)


def test_a_frames_own_camera_comes_before_the_common_one(tmp_path):
    edit_frame(write_transforms(tmp_path), 1, fl_x=7.0)
    source = open_transforms(tmp_path)
    assert [source.intrinsics(frame).fx for frame in range(3)] == [5.0, 7.0, 5.0]


def test_transparent_pixels_show_the_background(tmp_path):
    folder = write_transforms(tmp_path, count=1)
    picture = np.full((4, 4, 4), 255, dtype=np.uint8)
    picture[..., :3] = (255, 0, 51)
    picture[0, :, 3], picture[1, :, 3] = 0, 51
    Image.fromarray(picture).save(folder / "images" / "0.png")
    image = open_transforms(folder, background=(0.25, 0.5, 1.0)).images([0])[0]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([0.25, 0.5, 1.0]))
    torch.testing.assert_close(image[:, 1, 0], 0.2 * torch.tensor([1.0, 0.0, 0.2]) + 0.8 * torch.tensor([0.25, 0.5, 1]))
    torch.testing.assert_close(image[:, 3, 3], torch.tensor([1.0, 0.0, 0.2]))
    white = open_transforms(folder)
    torch.testing.assert_close(white.images([0])[0, :, 0, 0], torch.ones(3))
    assert white.fingerprint() != open_transforms(folder, background=(0.25, 0.5, 1.0)).fingerprint()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k1": 0.01}, r"images/0\.png: its lens has distortion; .*`sitdist photos .*transforms\.json --out FOLDER`"),
        ({"k3": "x"}, r"k3 is 'x'; expected a number"),
        ({"camera_model": "OPENCV_FISHEYE"}, r"its lens has distortion"),
        ({"w": 8}, r"images/0\.png: 4x4 pixels but its intrinsics are for 8x4"),
        ({"w": 4, "h": 3}, r"4x4 pixels but its intrinsics are for 4x3"),
        ({"fl_x": None}, r"no fl_x, and camera_angle_x is None; give the focal length in pixels, or the angle"),
        ({"fl_x": None, "camera_angle_x": 3.5}, r"camera_angle_x is 3\.5"),
        ({"fl_x": -5.0}, r"focal length -5 for 4 pixels"),
        ({"frames": []}, r"transforms\.json: holds no frames"),
        ({"frames": None}, "no list of frames with file_path and transform_matrix"),
        ({"frames": [{"file_path": "images/0.png"}]}, "its pose is not a 4x4 matrix of numbers"),
        ({"frames": [3]}, r"no list of frames"),
    ],
)
def test_a_transforms_json_that_cannot_be_honoured_is_refused_at_once(tmp_path, values, message):
    write_transforms(tmp_path, **values)
    with pytest.raises(DataError, match=message):
        open_transforms(tmp_path)


def test_poses_of_a_transforms_json_must_be_rigid_4x4_matrices(tmp_path):
    edit_frame(write_transforms(tmp_path), 1, transform_matrix=scaled(2.0)[1].tolist())
    with pytest.raises(PoseError, match=r"frame images/1\.png: pose is not rigid \(determinant 8"):
        open_transforms(tmp_path)
    edit_frame(tmp_path, 1, transform_matrix=cameras(2)[1, :3].tolist())
    with pytest.raises(PoseError, match=r"pose of shape \[3, 4\]; expected a 4x4"):
        open_transforms(tmp_path)


def test_pictures_of_another_size_or_of_several_are_refused_at_once(tmp_path):
    Image.fromarray(pixels(1, size=6)[0]).save(write_transforms(tmp_path) / "images" / "1.png")
    with pytest.raises(DataError, match=r"images/1\.png: 6x6 pixels but the recipe's image_size is 4; all pictures"):
        open_transforms(tmp_path)
    with pytest.raises(DataError, match=r"images/0\.png: 4x4 pixels but the recipe's image_size is 6"):
        open_transforms(tmp_path, size=6)


def test_missing_and_unreadable_pictures_are_named(tmp_path):
    (write_transforms(tmp_path) / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"images/1\.png: not a readable picture .* replace it or leave it out"):
        open_transforms(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(DataError, match=r"frame images/1\.png: picture is missing \(looked for .*\); restore it"):
        open_transforms(tmp_path)
    write_transforms(tmp_path)
    whole = (tmp_path / "images" / "1.png").read_bytes()
    (tmp_path / "images" / "1.png").write_bytes(whole[:60])  # the header is there, the pixels are not
    with pytest.raises(DataError, match=r"images/1\.png: not a readable picture"):
        open_transforms(tmp_path).images([1])
    with pytest.raises(DataError, match=r"nowhere: no such file; give the path of a transforms\.json"):
        open_transforms(tmp_path / "nowhere")
    (tmp_path / "transforms.json").write_text("{")
    with pytest.raises(DataError, match=r"transforms\.json: damaged"):
        open_transforms(tmp_path)
