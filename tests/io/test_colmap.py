"""COLMAP's text model is read with the right axes, and what a pinhole camera cannot honour is refused."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from sitdist.errors import DataError, PoseError
from sitdist.geometry.camera import Intrinsics, camera_rays
from sitdist.geometry.distortion import Distortion
from sitdist.io import colmap
from sitdist.io.colmap import camera_to_world, find_model, read_cameras, read_model
from sitdist.scene.photos import read_photos

CAMERAS = "# Camera list\n1 PINHOLE 8 6 10 11 4.5 3 \n\n2 SIMPLE_PINHOLE 8 6 9 4 3\n"
IMAGES = """# Image list with two lines of data per image:
1 1 0 0 0 0 0 5 1 b side.png
1.0 2.0 -1 3.0 4.0 7
2 0.7071067811865476 0 0.7071067811865476 0 1 2 3 2 a.png

"""


def write_model(folder, cameras=CAMERAS, images=IMAGES):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(cameras)
    (folder / "images.txt").write_text(images)
    return folder


def write_binary(folder, cameras, images):
    """Cameras (number, model's number, width, height, parameters), images (number, pose, camera, name, points)."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = [struct.pack("<IiQQ", *camera[:4]) + struct.pack(f"<{len(camera[4])}d", *camera[4]) for camera in cameras]
    (folder / "cameras.bin").write_bytes(struct.pack("<Q", len(cameras)) + b"".join(packed))
    packed = [
        struct.pack("<I7dI", number, *pose, camera) + name + b"\0" + struct.pack("<Q", points) + bytes(24 * points)
        for number, pose, camera, name, points in images
    ]
    (folder / "images.bin").write_bytes(struct.pack("<Q", len(images)) + b"".join(packed))
    return folder


def write_pictures(folder, size=(8, 6)):
    folder.mkdir(parents=True, exist_ok=True)
    for value, name in ((60, "a.png"), (200, "b side.png")):
        Image.new("RGB", size, (value, 0, 255)).save(folder / name)


def test_the_identity_looks_along_plus_z_with_y_down():
    pose = camera_to_world([1.0, 0, 0, 0], [0.0, 0, 5], "here")
    expected = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, -5], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(pose, expected)


def test_a_world_point_falls_on_the_pixel_that_colmap_says():
    quaternion, translation = [0.9, 0.1, -0.3, 0.3], [0.2, -0.1, 4.0]
    pose = camera_to_world([q / sum(v * v for v in quaternion) ** 0.5 for q in quaternion], translation, "here")
    w, x, y, z = (q / sum(v * v for v in quaternion) ** 0.5 for q in quaternion)
    axis, angle_sine = np.array([x, y, z]), w
    point = np.array([0.3, -0.2, 0.5])
    turned = point + 2 * np.cross(axis, np.cross(axis, point) + angle_sine * point)  # q p q*
    in_camera = turned + translation
    u, v = 50 * in_camera[0] / in_camera[2] + 32, 60 * in_camera[1] / in_camera[2] + 24
    to_point = torch.tensor(point) - pose[:3, 3]
    camera = Intrinsics(50.0, 60.0, 32.0 - u + 0.5, 24.0 - v + 0.5, 1, 1)  # its one pixel is at (u, v)
    _, direction = camera_rays(pose, camera)
    torch.testing.assert_close(direction[0, 0], to_point / to_point.norm())


def test_a_model_is_read_in_order_of_its_names_with_its_own_cameras(tmp_path):
    first, second = read_model(write_model(tmp_path))
    assert (first.name, second.name) == ("a.png", "b side.png")
    assert first.intrinsics == Intrinsics(9.0, 9.0, 4.0, 3.0, 8, 6)
    assert second.intrinsics == Intrinsics(10.0, 11.0, 4.5, 3.0, 8, 6)
    # a quarter turn about y: the camera's x axis is the world's -z, and its z axis (forward) the world's x
    expected = torch.tensor([[0.0, 0, 1], [0, -1, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(first.camera_to_world[:3, :3].abs(), expected.abs(), atol=1e-12, rtol=0)
    torch.testing.assert_close(-first.camera_to_world[:3, 2], torch.tensor([-1.0, 0, 0], dtype=torch.float64))


QUARTER = 0.7071067811865476
BINARY_CAMERAS = [(1, 1, 8, 6, (10.0, 11.0, 4.5, 3.0)), (2, 0, 8, 6, (9.0, 4.0, 3.0))]
BINARY_IMAGES = [
    (1, (1.0, 0, 0, 0, 0, 0, 5), 1, b"b side.png", 2),
    (2, (QUARTER, 0, QUARTER, 0, 1, 2, 3), 2, b"a.png", 0),
]


def test_a_binary_model_is_read_as_the_same_model_in_text(tmp_path):
    text = read_model(write_model(tmp_path / "text"))
    write_binary(tmp_path / "binary" / "sparse" / "0", BINARY_CAMERAS, BINARY_IMAGES)
    binary = read_model(find_model(tmp_path / "binary"))
    for one, other in zip(text, binary, strict=True):
        assert (one.name, one.intrinsics, one.distortion) == (other.name, other.intrinsics, other.distortion)
        assert torch.equal(one.camera_to_world, other.camera_to_world)


def test_binary_models_that_are_cut_short_or_damaged_are_refused(tmp_path):
    folder = write_binary(tmp_path, BINARY_CAMERAS, BINARY_IMAGES)
    for name in ("cameras.bin", "images.bin"):
        whole = (folder / name).read_bytes()
        for length in range(len(whole)):
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"\.bin"):
                read_model(folder)
        (folder / name).write_bytes(whole)

    def refused(message, cameras=BINARY_CAMERAS, images=BINARY_IMAGES):
        with pytest.raises((DataError, PoseError), match=message):
            read_model(write_binary(folder, cameras, images))

    refused("camera model number 11 is none of", [(1, 11, 8, 6, ())])
    refused("not all finite", [(1, 0, 8, 6, (float("nan"), 4.0, 3.0))])
    refused("camera 1 is there twice", [BINARY_CAMERAS[0]] * 2)
    refused("camera 7 of a.png is not in cameras.bin", images=[(1, (1.0, 0, 0, 0, 0, 0, 5), 7, b"a.png", 0)])
    refused("is not in the folder of pictures", images=[(1, (1.0, 0, 0, 0, 0, 0, 5), 1, b"../a.png", 0)])
    refused("its name is not text", images=[(1, (1.0, 0, 0, 0, 0, 0, 5), 1, b"\xff.png", 0)])
    refused("its name does not end", images=[(1, (1.0, 0, 0, 0, 0, 0, 5), 1, b"a" * 5000, 0)])
    refused("holds no pictures", images=[])


LENSES = [  # number and name of the model, parameters after the focal lengths and the principal point, distortion
    (2, "SIMPLE_RADIAL", (0.1,), Distortion("perspective", (0.1, 0, 0, 0, 0, 0))),
    (3, "RADIAL", (0.1, 0.2), Distortion("perspective", (0.1, 0.2, 0, 0, 0, 0))),
    (4, "OPENCV", (0.1, 0.2, 0.3, 0.4), Distortion("perspective", (0.1, 0.2, 0, 0, 0, 0), (0.3, 0.4))),
    (5, "OPENCV_FISHEYE", (0.1, 0.2, 0.3, 0.4), Distortion("fisheye", (0.1, 0.2, 0.3, 0.4))),
    (
        *(6, "FULL_OPENCV", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
        Distortion("perspective", (0.1, 0.2, 0.5, 0.6, 0.7, 0.8), (0.3, 0.4)),
    ),
    (7, "FOV", (0.9,), Distortion("fov", (0.9,))),
    (8, "SIMPLE_RADIAL_FISHEYE", (0.1,), Distortion("fisheye", (0.1, 0, 0, 0))),
    (9, "RADIAL_FISHEYE", (0.1, 0.2), Distortion("fisheye", (0.1, 0.2, 0, 0))),
    (4, "OPENCV", (0.0, 0.0, 0.0, 0.0), None),
]


@pytest.mark.parametrize(("number", "model", "parameters", "distortion"), LENSES)
def test_every_lens_is_read_in_text_and_binary(tmp_path, number, model, parameters, distortion):
    focal = (9.0,) if "RADIAL" in model else (9.0, 9.0)
    values = (*focal, 4.0, 3.0, *parameters)
    cameras = f"1 {model} 8 6 {' '.join(map(str, values))}\n"
    text = write_model(tmp_path / "text", cameras)
    binary = write_binary(tmp_path / "binary", [(1, number, 8, 6, values)], [])
    expected = {"1": (Intrinsics(9.0, 9.0, 4.0, 3.0, 8, 6), distortion)}
    assert read_cameras(text / "cameras.txt") == read_cameras(binary / "cameras.bin") == expected


def test_photos_of_a_workspace_are_found_with_their_poses(tmp_path):
    write_model(tmp_path / "sparse" / "0")
    write_pictures(tmp_path / "images")
    photos = read_photos(tmp_path)
    assert photos.images.shape == (2, 3, 6, 8)
    assert photos.images[:, 0, 0, 0].tolist() == [60, 200]
    assert photos.intrinsics[1].fy == 11.0
    write_pictures(tmp_path / "elsewhere")
    assert torch.equal(read_photos(tmp_path, images=tmp_path / "elsewhere").images, photos.images)
    assert len(photos.fingerprint) == 64


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        ("1 THIN_PRISM_FISHEYE 8 6 9 9 4 3 0 0 0 0 0 0 0 0", "line 1: camera model THIN_PRISM_FISHEYE is none of"),
        ("1 PINHOLE 8 6 9 4 3", "3 parameters, but PINHOLE has 4"),
        ("1 PINHOLE 8 6 nan 9 4 3", "not all finite numbers"),
        ("1 PINHOLE 0 6 9 9 4 3", "a camera for 0x6 pixels"),
        ("1 PINHOLE 100000 100000 9 9 4 3", "at most 89,478,485 pixels"),
        ("1 PINHOLE 8 6 9 9 1e9 3", r"principal point 1e\+09 for 8 pixels is far outside"),
        ("1 PINHOLE 8 6 9 9 4 3\n1 PINHOLE 8 6 9 9 4 3", "line 2: camera 1 is there twice"),
        ("1 PINHOLE 8 6 9 9 4 \udcff", "line 1 is not text"),
    ],
)
def test_cameras_that_are_no_pinhole_are_refused(tmp_path, camera, message):
    (tmp_path / "cameras.txt").write_text(camera + "\n", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        read_cameras(tmp_path / "cameras.txt")


def test_distortion_of_zero_is_a_pinhole_camera(tmp_path):
    (tmp_path / "cameras.txt").write_text("1 OPENCV 8 6 9 10 4 3 0 0 0 0\n2 SIMPLE_RADIAL 8 6 9 4 3 0\n")
    cameras = read_cameras(tmp_path / "cameras.txt")
    assert cameras["1"] == (Intrinsics(9.0, 10.0, 4.0, 3.0, 8, 6), None)
    assert cameras["2"] == (Intrinsics(9.0, 9.0, 4.0, 3.0, 8, 6), None)


def test_models_that_cannot_be_used_are_refused_in_one_line(tmp_path, monkeypatch):
    def refused(images, message):
        with pytest.raises((DataError, PoseError), match=message):
            read_model(write_model(tmp_path / "model", images=images))

    refused("", "holds no pictures")
    refused("1 1 0 0 0 0 0 5 7 a.png\n\n", "camera 7 of a.png is not in cameras.txt")
    refused("1 1 0 0 0 0 0 5 1\n\n", "is no picture")
    refused("1 1 0 1 0 0 0 5 1 a.png\n\n", "of length 1.414")
    line = "1 1 0 0 0 0 0 5 1"
    for name in ("/etc/a.png", "../a.png", "b/../../a.png"):
        refused(f"{line} {name}\n\n", "is not in the folder of pictures")
    refused(f"{line} a.png\n\n{line} b.png\n\n", "picture 1, b.png, is there twice")
    monkeypatch.setattr(colmap, "MAX_LINE", 1000)
    refused(f"{line} a.png\n{'1 2 -1 ' * 200}\n", "line 2 has 1,000 bytes or more")
    assert find_model(tmp_path) is None


def test_pictures_that_are_missing_or_of_another_size_are_refused(tmp_path):
    write_model(tmp_path)
    with pytest.raises(DataError, match=r"a\.png: picture is missing"):
        read_photos(tmp_path)
    write_pictures(tmp_path / "images", (16, 12))
    with pytest.raises(DataError, match=r"16x12 pixels but its intrinsics are for 8x6"):
        read_photos(tmp_path)
    write_pictures(tmp_path / "images")
    Image.new("RGB", (6, 8)).save(tmp_path / "images" / "b side.png")
    with pytest.raises(DataError, match=r"b side\.png: 6x8 pixels but its intrinsics are for 8x6"):
        read_photos(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "b side.png", exif=exif)
    with pytest.raises(DataError, match=r"b side\.png: stored as 8x6 pixels, turned to 6x8 .* for 8x6; save"):
        read_photos(tmp_path)
