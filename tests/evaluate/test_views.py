"""New views of a scene for an evaluation: where they stand, and that each is a function of its number alone."""

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


def cameras(views, bin_=1, count=40):
    return views._cameras(bin_, torch.arange(count))


@pytest.mark.parametrize(
    ("options", "elevation", "azimuth"),
    [
        ({}, (0.0, 90.0), (0.0, 360.0)),
        ({"sphere": "full"}, (-90.0, 90.0), (0.0, 360.0)),
        ({"elevation_deg": [10.0, 20.0], "azimuth_deg": [30.0, 90.0]}, (10.0, 20.0), (30.0, 90.0)),
    ],
)
def test_cameras_stand_where_the_recipe_says_at_every_radius(options, elevation, azimuth):
    position = cameras(views(**options), bin_=2)[:, :3, 3]
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
    position = torch.tensor([many[0].position])
    assert float(camera_radius(views()._cameras(1, position))) == pytest.approx(many[0].radius)


@pytest.mark.distributed
def test_a_dataset_behind_a_url_is_evaluated_as_the_one_in_the_folder(tiny_dataset, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "DEFAULT_CACHE", tmp_path / "cache")
    rows = []
    for name, data in (("folder", tiny_dataset), ("url", f"file://{tiny_dataset}")):
        options = EvalOptions(split="test", max_views=4, data=data, out=tmp_path / name)
        rows.append((evaluate(tiny_run, options) / "records.csv").read_bytes())
    assert rows[0] == rows[1]
    assert list((tmp_path / "cache").glob("*/test/*.tar"))
