"""Every number of a transforms.json is checked, and its cameras are those of the upright pictures."""

import json
import os

import pytest
import torch
from PIL import Image

from sitdist.errors import DataError, PoseError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.distortion import Distortion
from sitdist.io.pose_files import read_poses
from sitdist.io.transforms import read_posed_files
from sitdist.scene.photos import read_photos

POSE = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]


def write(folder, text=None, picture="a.png", **values):
    """Two pictures of 8x6 pixels, the first called `picture`; a value of None is left out."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 6)).save(folder / name)
    frames = [{"file_path": name, "transform_matrix": POSE} for name in (picture, "b.png")]
    common = {"fl_x": 10.0, "w": 8, "h": 6, "frames": frames} | values
    content = json.dumps({key: value for key, value in common.items() if value is not None})
    (folder / "transforms.json").write_text(content if text is None else text)
    return folder / "transforms.json"


def moved(row, column, value):
    pose = [list(each) for each in POSE]
    pose[row][column] = value
    return pose


def each(values):
    """One dict for each value of each key."""
    return [{key: value} for key, bad in values.items() for value in bad]


CAMERAS = [  # of pictures whose size is told: these are wrong for any reader
    *each({"fl_x": (0, 1e8, 10**400, "10", True), "fl_y": (-10.0,), "cx": (1e6,)}),
    *each({"w": (0, 8.5), "h": (1e30, "6")}),
    {"cy": None, "cx": "middle"},
    *({"fl_x": None, "camera_angle_x": angle} for angle in (0.0, 3.2)),
]
TEXT = [[str(value) for value in row] for row in POSE]
MOVED = ((0, 0, "1"), (0, 0, 10**400), (0, 0, 1.1), (0, 0, -1), (3, 3, 2))
POSES = [
    *(None, [], {"0": 1}, POSE[:3], TEXT, [[*POSE[0], 0.0], *POSE[1:]]),
    *(moved(*entry) for entry in MOVED),
]
FILES = ["{", "[]", '{"frames": {}}', '{"frames": []}', '{"frames": [1]}', '{"frames": ' + "[" * 100_000]
FILES += ['{"frames": [{"transform_matrix": ' + matrix + "}]}" for matrix in ("[[NaN]]", "[[1e999]]", "9" * 5000)]


@pytest.mark.parametrize("values", CAMERAS, ids=str)
def test_cameras_out_of_bounds_are_refused_by_every_reader(tmp_path, values):
    file = write(tmp_path, **values)
    for read in (read_posed_files, read_photos, read_poses):
        with pytest.raises(DataError):
            read(file)


@pytest.mark.parametrize("pose", POSES, ids=lambda pose: str(pose)[:40])
def test_poses_that_are_none_are_refused_by_every_reader(tmp_path, pose):
    file = write(tmp_path, frames=[{"file_path": "a.png", "transform_matrix": pose}])
    for read in (read_posed_files, read_poses):
        with pytest.raises((DataError, PoseError), match=r"frame a\.png: "):
            read(file)


@pytest.mark.parametrize("text", FILES, ids=lambda text: text[:40])
def test_files_that_hold_no_frames_are_refused_by_every_reader(tmp_path, text):
    file = write(tmp_path, text)
    for read in (read_posed_files, read_poses):
        with pytest.raises(DataError, match=r"transforms\.json: "):
            read(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/hostname", "is an absolute path"),
        ("b.png", "is there twice"),
        ("b", "is there twice"),
        ("none.png", "is missing"),
        ("nul\0.png", "is missing"),
        ("device", "is missing"),
        (None, "file_path is None"),
    ],
)
def test_pictures_are_files_named_once_by_paths_from_the_file(tmp_path, name, message):
    (tmp_path / "device").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=message):
        read_posed_files(write(tmp_path, picture=name))


def test_lenses_are_read_from_the_file_or_the_frame(tmp_path):
    frames = [
        {"file_path": "a.png", "transform_matrix": POSE},
        {"file_path": "b.png", "transform_matrix": POSE, "camera_model": "OPENCV_FISHEYE", "k4": 0.4},
    ]
    file = write(tmp_path, camera_model="OPENCV", k1=0.1, k2=-0.2, k3=0.3, p1=0.01, p2=0.02, frames=frames)
    first, second = read_posed_files(file)
    assert first.distortion == Distortion("perspective", (0.1, -0.2, 0.3), (0.01, 0.02))
    assert second.distortion == Distortion("fisheye", (0.1, -0.2, 0.3, 0.4))
    assert first.intrinsics == second.intrinsics == Intrinsics(10.0, 10.0, 4.0, 3.0, 8, 6)
    assert read_posed_files(write(tmp_path, camera_model="OPENCV", k1=0.0))[0].distortion is None
    with pytest.raises(DataError, match=r"k4 is 0\.4, which only OPENCV_FISHEYE has"):
        read_posed_files(write(tmp_path, k4=0.4))
    with pytest.raises(DataError, match="camera_model EQUIRECTANGULAR is neither"):
        read_posed_files(write(tmp_path, camera_model="EQUIRECTANGULAR"))


def test_pictures_may_lie_in_a_folder_above(tmp_path):
    (tmp_path / "nerf").mkdir()
    file = write(tmp_path / "nerf", picture="../c.png")
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "c.png")
    posed = read_posed_files(file)
    assert posed[0].picture.samefile(tmp_path / "c.png")
    assert posed[0].intrinsics == Intrinsics(10.0, 10.0, 4.0, 3.0, 8, 6)
    assert torch.equal(posed[0].camera_to_world, torch.tensor(POSE, dtype=torch.float64))


def test_a_million_common_values_are_not_copied_for_every_frame(tmp_path):
    frames = [{"file_path": f"{number}.png", "transform_matrix": POSE} for number in range(300)]
    file = write(tmp_path, frames=frames, **{f"x{number}": 0 for number in range(100_000)})
    for number in range(300):
        os.link(tmp_path / "a.png", tmp_path / f"{number}.png")
    assert len(read_posed_files(file)) == 300


def test_cameras_for_the_stored_size_of_a_turned_picture_are_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = write(tmp_path, frames=[{"file_path": "a.png", "transform_matrix": POSE}])
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png", exif=exif)
    with pytest.raises(DataError, match=r"a\.png: stored as 8x6 pixels, turned to 6x8 .* for 8x6; save the picture up"):
        read_photos(file)  # w and h are the stored size
    values = json.loads(file.read_text())
    for width, height, message in ((None, None, "a size that they do not tell"), (12, 9, "6x8 pixels but its intr")):
        write_again(file, values | {"w": width, "h": height})
        with pytest.raises(DataError, match=message):
            read_photos(file)
    write_again(file, values | {"w": 6, "h": 8})
    photos = read_photos(file)
    assert photos.intrinsics[0] == Intrinsics(10.0, 10.0, 3.0, 4.0, 6, 8)
    assert photos.images.shape == (1, 3, 8, 6)


def write_again(file, values):
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
