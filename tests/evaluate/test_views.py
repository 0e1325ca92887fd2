"""New views of a scene for an evaluation: where they stand, and that each is a function of its number alone."""

import math

import pytest
import torch

from sitdist.config.load import parse
from sitdist.config.recipe import SceneSource
from sitdist.dataset import store
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.evaluate.views import RenderedViews
from sitdist.geometry.camera import camera_radius


def views(radii=(1, 3), count=40, **options):
    source = parse(SceneSource, {"kind": "scene", "views": 1, **options}, "source")
    return RenderedViews(source, 16, None, radii, count, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "elevation", "azimuth"),
    [
        ({}, (0.0, 90.0), (0.0, 360.0)),
        ({"sphere": "full"}, (-90.0, 90.0), (0.0, 360.0)),
        ({"elevation_deg": [10.0, 20.0], "azimuth_deg": [30.0, 90.0]}, (10.0, 20.0), (30.0, 90.0)),
    ],
)
def test_cameras_stand_where_the_recipe_says_at_every_radius(options, elevation, azimuth):
    new = views((2, 3), **options)
    position = new.cameras(tuple(new.references()))[0][:, :3, 3]
    radius = position.norm(dim=1)
    above = (position[:, 2] / radius).asin().rad2deg()
    around = torch.atan2(position[:, 1], position[:, 0]).rad2deg() % 360.0
    assert (radius >= 2.0).all()
    assert (radius <= 3.0).all()
    for angle, (low, high) in ((above, elevation), (around, azimuth)):
        assert low <= float(angle.min()) <= low + 0.25 * (high - low)
        assert high - 0.25 * (high - low) <= float(angle.max()) <= high


def test_a_view_has_its_radius_in_its_bin_and_depends_on_its_number_alone():
    few, many = views(count=2).references(), views((1, 4), 5).references()
    assert [view.key for view in few] == ["r01_000000", "r01_000001", "r02_000000", "r02_000001"]
    by_key = {view.key: view for view in many}
    assert all(by_key[view.key] == view for view in few)
    assert all(view.bin <= view.radius <= view.bin + 1 for view in many)
    assert float(camera_radius(views().cameras((many[0],))[0])) == pytest.approx(many[0].radius)


def test_cameras_roll_miss_the_origin_and_zoom_as_the_recipe_says():
    def seen(**options):
        new = views((2, 3), **options)
        poses, intrinsics = new.cameras(tuple(new.references()))
        right, backward, place = poses[:, :3, 0], poses[:, :3, 2], poses[:, :3, 3]
        missed = torch.linalg.vector_norm(torch.linalg.cross(backward, place), dim=-1)
        fov_deg = [math.degrees(2.0 * math.atan(0.5 / each.normalized()[0])) for each in intrinsics]
        return place, right[:, 2].abs(), missed, fov_deg

    place, tilted, missed, fov_deg = seen(fov_deg=50.0)
    assert float(tilted.max()) < 1e-12
    assert float(missed.max()) < 1e-12
    assert fov_deg == pytest.approx([50.0] * 40)
    same_place, tilted, missed, fov_deg = seen(roll_deg=30.0, target_jitter=0.5, fov_range_deg=[20.0, 60.0])
    torch.testing.assert_close(same_place, place, rtol=0, atol=0)
    assert 0.2 < float(tilted.max()) <= 0.5
    assert 0.2 < float(missed.max()) <= 0.5
    assert 20.0 <= min(fov_deg) < 25.0
    assert 55.0 < max(fov_deg) <= 60.0


@pytest.mark.distributed
def test_a_dataset_behind_a_url_is_evaluated_as_the_one_in_the_folder(tiny_dataset, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "DEFAULT_CACHE", tmp_path / "cache")
    rows = []
    for name, data in (("folder", tiny_dataset), ("url", f"file://{tiny_dataset}")):
        options = EvalOptions(split="test", max_views=4, data=data, out=tmp_path / name)
        rows.append((evaluate(tiny_run, options) / "records.csv").read_bytes())
    assert rows[0] == rows[1]
    assert list((tmp_path / "cache").glob("*/test/*.tar"))
