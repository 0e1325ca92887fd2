"""Pictures of any size and kind become what the training pictures were, and their cameras follow."""

import numpy as np
import pytest
import torch
from PIL import Image

from sitdist.dataset.manifest import load_manifest
from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics, look_at
from sitdist.inference.preprocess import Preprocess, centred, framed, preprocess_of, resampled
from sitdist.io.images import to_pixels
from sitdist.scene.views import open_scene, render

GREY = (0.5, 0.5, 0.5)
CAMERA = Intrinsics.from_fov(40.0, 32, 32)
FRAMING = Preprocess(32, CAMERA, {0: GREY})
POSE = look_at(torch.tensor([3.0, 1.5, 1.2]))


def shot(camera, pose=POSE):
    """The built-in object's picture, [3, H, W], from a fixed place."""
    return render(open_scene(None), pose, camera, 4, GREY)


def frame(picture, **options):
    return framed(picture, FRAMING, "it", background=torch.tensor(GREY), **options)


def difference(a, b):
    return float((a - b).abs().mean())


def test_a_training_picture_stays_as_it_is():
    picture = shot(CAMERA)
    assert torch.equal(frame(picture), picture)
    assert torch.equal(frame(picture, intrinsics=CAMERA), picture)


@pytest.mark.parametrize(
    "camera",
    [
        Intrinsics.from_fov(40.0, 128, 128),  # larger
        Intrinsics.from_fov(70.0, 100, 70),  # wider, not square
        Intrinsics(90.0, 120.0, 40.0, 61.0, 90, 110),  # oblong pixels, principal point elsewhere
    ],
)
def test_another_camera_at_the_same_place_gives_the_training_picture(camera):
    assert difference(frame(shot(camera), intrinsics=camera), shot(CAMERA)) < 0.006


def test_intrinsics_that_are_not_given_matter():
    wide = shot(Intrinsics.from_fov(70.0, 100, 70))
    assert difference(frame(wide), shot(CAMERA)) > 0.02


def test_a_narrower_camera_is_surrounded_by_background():
    narrow = Intrinsics.from_fov(20.0, 64, 64)
    picture = shot(narrow)
    out = frame(picture, intrinsics=narrow)
    assert torch.allclose(out[:, 0, :], torch.full((3, 32), 0.5))
    assert difference(out[:, 10:22, 10:22], shot(CAMERA)[:, 10:22, 10:22]) < 0.02
    with pytest.raises(DataError, match="it: shows less than a training picture"):
        framed(picture, FRAMING, "it", intrinsics=narrow)


def test_without_intrinsics_the_centred_square_is_used_and_its_camera_is_told():
    wide = shot(Intrinsics(CAMERA.fx * 3, CAMERA.fy * 3, 70.0, 48.0, 140, 96))
    assert difference(frame(wide), shot(CAMERA)) < 0.006
    told = centred(FRAMING, 140, 96)
    assert told.to_list() == pytest.approx([CAMERA.fx * 3, CAMERA.fy * 3, 70.0, 48.0])
    assert (told.width, told.height) == (140, 96)
    assert difference(frame(wide, intrinsics=told), frame(wide)) < 1e-6
    assert centred(Preprocess(32, None, {}), 140, 96) is None


def test_resampling_keeps_a_constant_picture_and_a_ramp():
    ramp = (torch.arange(60) + 0.5)[None, None, :].expand(3, 60, 60) / 60.0
    small = frame(ramp)
    expected = (torch.arange(32) + 0.5) / 32.0
    assert torch.allclose(small[0, 16, 3:-3], expected[3:-3], atol=1e-3)
    assert torch.allclose(frame(torch.full((3, 45, 45), 0.3)), torch.full((3, 32, 32), 0.3))
    assert resampled(ramp, CAMERA, CAMERA, None, "it") is ramp


# --------------------------------------------------------------------------------------------------- kinds of pictures


def as_png(folder, array, mode=None):
    path = folder / "picture.png"
    Image.fromarray(array, mode).save(path)
    return path


def test_grey_alpha_and_sixteen_bits_are_converted(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    colour, alpha = to_pixels(as_png(tmp_path, grey), "it")
    assert alpha is None
    assert torch.equal(colour, torch.from_numpy(grey / np.float32(255)).expand(3, 4, 4))

    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    colour, _ = to_pixels(as_png(tmp_path, deep), "it")
    assert torch.allclose(colour[0], torch.from_numpy(deep / np.float32(65535)), atol=1e-7)

    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 1], rgba[2:, :, 3] = 255, 255
    colour, alpha = to_pixels(as_png(tmp_path, rgba), "it")
    assert torch.equal(colour[:, 0, 0], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(alpha, torch.from_numpy(rgba[..., 3] / np.float32(255)))

    palette = Image.fromarray(rgba).quantize(4)
    palette.save(tmp_path / "palette.png")
    assert to_pixels(tmp_path / "palette.png", "it")[1] is not None


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_and_tensors_of_every_type_agree(channels):
    eight = np.random.default_rng(0).integers(0, 256, (6, 5, channels)).astype(np.uint8)
    expected, alpha = to_pixels(eight, "it")
    assert (alpha is not None) == (channels in (2, 4))
    for other in (eight.astype(np.uint16) * 257, eight / 255.0, torch.from_numpy(eight).permute(2, 0, 1)):
        colour, opacity = to_pixels(other, "it")
        assert torch.allclose(colour, expected, atol=1e-7)
        assert alpha is None or torch.allclose(opacity, alpha, atol=1e-7)


def test_transparency_and_a_mask_are_put_on_the_background():
    red = np.zeros((32, 32, 4), np.uint8)
    red[..., 0], red[:, :16, 3] = 255, 255
    out = frame(red)
    assert torch.equal(out[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(out[:, 0, 31], torch.tensor(GREY))
    assert torch.equal(frame(red[..., :3], mask=red[..., 3] > 0), out)
    assert torch.equal(frame(red, mask=np.zeros((32, 32), bool)), torch.full((3, 32, 32), 0.5))
    with pytest.raises(DataError, match="it: transparent, and the colour behind the object is not known"):
        framed(red, FRAMING, "it")


def empty(folder):
    (folder / "picture.png").write_bytes(b"")
    return folder / "picture.png"


def cut(folder):
    path = as_png(folder, np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:900])
    return path


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (empty, r"picture\.png: not a readable picture \("),
        (cut, r"picture\.png: not a readable picture \("),
        (lambda folder: folder / "none.png", r"none\.png: cannot be read \(No such file or directory\)"),
        (lambda folder: folder, "is a folder, not a file"),
        (lambda _: np.zeros((4, 4, 5)), r"it: an array of shape \[4, 4, 5\] is no picture"),
        (lambda _: np.zeros((0, 4, 3)), r"it: an array of shape \[0, 4, 3\] is no picture"),
        (lambda _: np.full((4, 4), 200.0), r"it: pixels from 200 to 200; float pictures are in \[0, 1\]"),
        (lambda _: np.full((4, 4), np.nan), "it: pixels hold NaN or infinity"),
        (lambda _: np.zeros((4, 4), np.int64), "it: pixels of type int64; expected uint8, uint16, or floats"),
        (lambda _: 7, "it: int is no picture"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, picture, message):
    with pytest.raises(DataError, match=message):
        to_pixels(picture(tmp_path), "it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intrinsics": Intrinsics.from_fov(40.0, 16, 16)}, "32x32 pixels but its intrinsics are for 16x16"),
        ({"intrinsics": Intrinsics(0.0, 9.0, 4.0, 4.0, 32, 32)}, "focal length 0 for 32 pixels"),
        ({"intrinsics": Intrinsics(9.0, float("nan"), 4.0, 4.0, 32, 32)}, "expected finite numbers"),
        ({"mask": np.zeros((8, 8))}, "mask of it: 8x8 pixels but the picture has 32x32"),
    ],
)
def test_what_does_not_fit_a_picture_is_named(options, message):
    with pytest.raises(DataError, match=message):
        frame(shot(CAMERA), **options)


# ------------------------------------------------------------------------------------------- what the training tells


def test_the_recipe_tells_the_camera_and_the_background(tiny_dataset, tmp_path):
    preprocess = preprocess_of(load_manifest(tiny_dataset), tmp_path)
    assert preprocess == Preprocess(16, Intrinsics.from_fov(40.0, 16, 16), {0: GREY})
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


def test_what_the_recipe_does_not_tell_is_read_from_the_dataset(tiny_dataset, tmp_path, monkeypatch):
    manifest = load_manifest(tiny_dataset)
    manifest.recipe["splits"]["train"] = {"kind": "npz", "paths": ["views.npz"], "label": 0}
    monkeypatch.setattr("sitdist.inference.preprocess.load_manifest", lambda _: manifest)
    measured = preprocess_of(manifest, tiny_dataset)
    assert measured.camera.to_list() == pytest.approx(Intrinsics.from_fov(40.0, 16, 16).to_list())
    assert measured.backgrounds[0] == pytest.approx(GREY, abs=0.51 / 255)
    monkeypatch.undo()
    unknown = preprocess_of(manifest, tmp_path)  # the dataset is not at hand
    assert unknown == Preprocess(16, None, {})
    with pytest.raises(DataError, match="label 0: the colour behind the object is not known here"):
        unknown.background(0)
    with pytest.raises(DataError, match="the training pictures' intrinsics are not known here"):
        framed(np.zeros((16, 16, 3)), unknown, "it", intrinsics=CAMERA)


@pytest.mark.parametrize(
    "source",
    [
        {"background": "red"},
        {"background": [0.5]},
        {"background": [2.0, 0.0, 0.0]},
        {"fov_deg": "wide"},
        {"fov_deg": 0.0},
        {"fov_deg": [40.0]},
        {"radius_augmentation": 3},
    ],
)
def test_a_recipe_that_tells_no_camera_or_colour_is_refused_in_one_line(tiny_dataset, tmp_path, source):
    manifest = load_manifest(tiny_dataset)
    recipe = manifest.recipe | {"splits": {"train": manifest.recipe["splits"]["train"] | source}}
    with pytest.raises(DataError, match=r"dataset tiny|framing") as refused:
        preprocess_of(manifest.model_copy(update={"recipe": recipe}), tmp_path)
    assert "\n" not in str(refused.value)
