"""Zoomed pictures and radius augmented views: discs of known size, labels, hold-out, and the same bytes."""

import math

import numpy as np
import pytest
import torch

from sitdist.build.sources import open_source
from sitdist.build.writer import build, open_splits
from sitdist.config.load import parse
from sitdist.config.recipe import NpzSource, Recipe, SceneSource
from sitdist.dataset.verify import verify
from sitdist.errors import DataError
from sitdist.geometry.camera import camera_radius, look_at
from sitdist.geometry.resample import zoomed

SIZE, FOCAL, DISC = 48, 60.0, 0.6  # pixels, pixels, radius of a disc at the origin that faces the camera
BLUE, LIGHT = (0.2, 0.4, 0.7), 0.8  # nothing near 0 or 1, where overshoot would be cut off


def disc(radius, centre=(24.0, 24.0), background=BLUE):
    """A light disc of `radius` pixels, drawn by 8 x 8 samples a pixel, [3, 48, 48]."""
    place = (torch.arange(SIZE * 8) + 0.5) / 8
    inside = ((place[:, None] - centre[1]) ** 2 + (place - centre[0]) ** 2 < radius**2).double()
    share = torch.nn.functional.avg_pool2d(inside[None], 8)  # [1, H, W]
    colour = torch.tensor(background, dtype=torch.float64)[:, None, None]
    return (LIGHT * share + (1 - share) * colour).float()


def area(picture):
    """Pixels that the disc covers."""
    return float((picture[0] - BLUE[0]).double().sum() / (LIGHT - BLUE[0]))


@pytest.mark.parametrize("scale", [0.3, 0.77, 1.0, 2.0])
def test_a_disc_is_as_large_as_it_should_be_and_stays_where_it_is(scale):
    out = zoomed(disc(9.0), scale, (24.0, 24.0), torch.tensor(BLUE))
    assert area(out) == pytest.approx(math.pi * (9.0 * scale) ** 2, rel=0.01)
    assert (out - disc(9.0 * scale)).abs().mean() < 0.01
    torch.testing.assert_close(out, out.flip(1), rtol=0, atol=1 / 255 + 1e-6)


def test_a_picture_is_zoomed_about_the_point_that_is_named():
    out = zoomed(disc(6.0, (30.0, 18.0)), 0.5, (40.0, 8.0), torch.tensor(BLUE))
    assert (out - disc(3.0, (35.0, 13.0))).abs().mean() < 0.003


def test_what_shrinks_is_smoothed():
    """Stripes finer than the small picture's pixels become their mean; taking every other pixel keeps a stripe."""
    stripes = torch.zeros(3, SIZE, SIZE)
    stripes[:, :, ::2] = 1.0
    out = zoomed(stripes, 0.5, (24.0, 24.0), torch.full((3,), 0.5))
    assert (out - 0.5)[:, 15:33, 15:33].abs().max() < 0.01  # its edges apart


# --------------------------------------------------------------------------------------------------------- the views


def write_discs(path, radii):
    """Views of a disc at the origin that always faces the camera, from these distances."""
    angle = torch.arange(len(radii)).double()
    place = torch.tensor(radii, dtype=torch.float64)[:, None] * torch.stack(
        [angle.cos() * 0.8, angle.sin() * 0.8, torch.full_like(angle, 0.6)], dim=1
    )
    pictures = torch.stack([disc(FOCAL * DISC / radius) for radius in radii]).permute(0, 2, 3, 1).numpy()
    np.savez(path, images=pictures, poses=look_at(place).numpy(), focal=FOCAL)
    return str(path)


def discs(tmp_path, radii, **changes):
    settings = {"range": (1.5, 7.0), "background": BLUE} | changes
    config = NpzSource(
        kind="npz", paths=[write_discs(tmp_path / "discs.npz", radii)], label=2, radius_augmentation=settings
    )
    return open_source(config, SIZE)


def test_a_copy_shows_the_disc_as_from_the_radius_that_it_is_labelled_with(tmp_path):
    source = discs(tmp_path, [3.0, 4.0, 5.0] * 4, copies=2, range=(2.5, 7.0))
    radii = camera_radius(source.camera_to_world)
    assert len(source) == 36
    assert source.original.tolist() == [view // 3 * 3 for view in range(36)]
    for view, picture in enumerate(source.images(range(36))):
        assert area(picture) == pytest.approx(math.pi * (FOCAL * DISC / float(radii[view])) ** 2, rel=0.02)


def test_a_copy_looks_the_same_way_along_the_same_line_and_a_view_itself_is_as_it_was(tmp_path):
    source, plain = (
        discs(tmp_path, [3.0, 4.0, 5.0]),
        open_source(NpzSource(kind="npz", paths=[str(tmp_path / "discs.npz")]), SIZE),
    )
    own, copies = source.camera_to_world[::2], source.camera_to_world[1::2]
    assert torch.equal(own, plain.camera_to_world)
    assert torch.equal(source.images([0, 2, 4]), plain.images([0, 1, 2]))
    assert torch.equal(copies[:, :3, :3], own[:, :3, :3])
    unit = [poses[:, :3, 3] / camera_radius(poses)[:, None] for poses in (own, copies)]
    torch.testing.assert_close(unit[0], unit[1])
    assert source.intrinsics(3) == plain.intrinsics(1)
    assert source.labels.tolist() == [2] * 6


def test_radii_are_uniform_in_the_range_and_a_pure_function_of_seed_and_view(tmp_path):
    many, few = discs(tmp_path, [4.0] * 400), discs(tmp_path, [4.0] * 3)
    radii = camera_radius(many.camera_to_world[1::2])
    assert 1.5 <= radii.min() < 1.7
    assert 6.8 < radii.max() <= 7.0
    assert radii.mean() == pytest.approx(4.25, abs=0.25)
    assert torch.equal(few.camera_to_world[:, :3, 3].norm(dim=1), many.camera_to_world[:6, :3, 3].norm(dim=1))
    other = discs(tmp_path, [4.0] * 3, seed=1)
    assert not torch.equal(other.camera_to_world, few.camera_to_world)
    assert other.fingerprint() != few.fingerprint()


def test_cameras_that_look_past_the_origin_are_refused():
    values = {"kind": "scene", "views": 5, "target_jitter": 1.0, "radius_augmentation": {"range": [1.5, 7.0]}}
    with pytest.raises(DataError, match=r"radius_augmentation: view \d looks past the origin by .*% of its distance"):
        open_source(SceneSource(**values), 16)


# ---------------------------------------------------------------------------------------------------- the dataset


def recipe(tmp_path, **changes):
    source = {
        "kind": "npz",
        "paths": [write_discs(tmp_path / "views.npz", [3.0 + 0.1 * i for i in range(20)])],
        "radius_augmentation": {"range": [1.5, 7.0], "background": list(BLUE)},
    }
    scene = {"kind": "scene", "views": 10, "supersample": 1, "label": 1}
    values = {
        "name": "radius",
        "image_size": SIZE,
        "codec": {"kind": "pca", "fit_views": 12},
        "samples_per_shard": 15,
        "encode_batch": 8,
        "val_views": 6,
        "splits": {"train": [source, scene]},
    }
    return parse(Recipe, values | changes, "radius")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("radius")
    build(recipe(folder), folder / "data")
    return folder


def test_validation_views_are_plain_and_no_copy_of_them_is_trained_on(tmp_path):
    splits = open_splits(recipe(tmp_path))
    train, val = splits["train"], splits["val"]
    assert len(val) == 6
    assert not val.is_zoomed.any()
    assert not set(train.source.original[train.indices].tolist()) & set(val.indices.tolist())
    of_npz = int((train.source.labels[train.indices] == 2 * 0).sum())
    assert of_npz == 2 * int(train.is_zoomed.sum())
    assert len(train) - int(train.is_zoomed.sum()) == 30 - 6


def test_an_augmented_dataset_verifies_and_is_built_again_in_the_same_bytes(built):
    assert verify(built / "data") == []
    build(recipe(built), built / "again")
    files = sorted(path.relative_to(built / "data") for path in (built / "data").rglob("*") if path.is_file())
    assert len(files) > 6
    for file in files:
        assert (built / "data" / file).read_bytes() == (built / "again" / file).read_bytes(), file
