"""What an appearance may change and what not, where it is drawn from, and that datasets keep what it needs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from edited import Edited
from PIL import Image

from sitdist.build.sources import cut_out, open_source, plain_background
from sitdist.config.experiment import AppearanceConfig, Config
from sitdist.config.load import load_yaml, parse
from sitdist.config.recipe import Recipe, SceneSource
from sitdist.dataset.appearance import Appearance, draw_moves, moved, on_background
from sitdist.dataset.batches import BatchReader
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.resident import ResidentSamples
from sitdist.dataset.verify import verify
from sitdist.errors import ConfigError, DataError
from sitdist.flow.interpolant import get_interpolant
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.packing import PoseStatistics, destandardize
from sitdist.geometry.pose import rotation_error_deg, rotation_from_vector
from sitdist.model.codec import load_codec, psnr
from sitdist.scene.field import chair
from sitdist.scene.views import look
from sitdist.train.inputs import VariedViews, draw_times

GREY = (0.5, 0.5, 0.5)
SIZE = 32


@pytest.fixture(scope="module")
def views():
    """Views [24, 4, 32, 32] uint8 of the built-in object."""
    source = open_source(SceneSource(kind="scene", views=24), SIZE)
    return (source.views(range(24)) * 255.0).round().to(torch.uint8)


def draw(views, seed=0, first=0, **options):
    appearance = Appearance(AppearanceConfig(**options), seed, SIZE, {0: GREY})
    positions = torch.arange(first, first + len(views))
    return appearance(views, torch.zeros(len(views), dtype=torch.int64), positions)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_strength_0_is_the_clean_view(views):
    clean = on_background(views.float() / 255.0, torch.tensor(GREY)[:, None, None])
    torch.testing.assert_close(draw(views, strength=0.0), clean, rtol=0, atol=1e-6)


def test_the_stronger_the_farther_from_the_clean_view(views):
    clean = on_background(views.float() / 255.0, torch.tensor(GREY)[:, None, None])
    errors = [float((draw(views, strength=strength) - clean).square().mean()) for strength in (0.1, 0.5, 1.0)]
    assert 1e-4 < 2 * errors[0] < errors[1] < errors[2]


def test_an_appearance_depends_on_seed_and_position_alone(views):
    batch = draw(views)
    assert batch.min() >= 0.0
    assert batch.max() <= 1.0
    torch.testing.assert_close(draw(views[5:9], first=5), batch[5:9], rtol=0, atol=1e-6)
    for other in (draw(views, seed=1), draw(views, first=24)):
        assert ((other - batch).abs().flatten(1).mean(1) > 0.01).float().mean() > 0.9


def test_an_object_that_fills_the_picture_hides_every_background(views):
    opaque = torch.zeros_like(views)
    opaque[:, :3] = 128
    assert (
        psnr(draw(opaque), torch.full((24, 3, SIZE, SIZE), 128 / 255)).median()
        > psnr(draw(views), on_background(views / 255.0, torch.tensor(GREY)[:, None, None])).median()
    )


def test_backgrounds_come_from_the_folder_of_pictures(views, tmp_path):
    Image.new("RGB", (50, 40), (0, 0, 255)).save(tmp_path / "blue.png")
    empty = torch.zeros_like(views)
    empty[:, 3] = 255  # nothing but background
    corner = draw(empty.repeat(8, 1, 1, 1), pictures=str(tmp_path))[:, :, 0, 0]
    blue = (corner[:, 2] > 0.5) & (corner[:, :2].amax(1) < 0.2)
    assert 0.05 < blue.float().mean() < 0.2
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"appearance.pictures .*none: no pictures there"):
        draw(views, pictures=str(tmp_path / "none"))


def test_a_turned_and_zoomed_camera_sees_what_a_renderer_shows():
    source = open_source(SceneSource(kind="scene", views=8, fov_deg=40.0), 64)
    config = AppearanceConfig(roll_deg=20.0, turn_deg=3.0, zoom=1.2)
    rotation, zoom = draw_moves(config, 3, torch.arange(8))
    views = source.views(range(8))
    intrinsics = torch.tensor([source.intrinsics(view).normalized() for view in range(8)])
    found = moved(views, rotation, zoom, intrinsics)
    better = []
    for view in range(8):
        camera_to_world = source.camera_to_world[view].clone()
        camera_to_world[:3, :3] = camera_to_world[:3, :3] @ rotation[view]
        old = source.intrinsics(view)
        camera = Intrinsics(old.fx * float(zoom[view]), old.fy * float(zoom[view]), old.cx, old.cy, 64, 64)
        seen = look(chair(), camera_to_world, camera, 2)
        true = torch.cat([seen.light.permute(2, 0, 1), seen.through[None]])
        better.append((psnr(found[view, None, :3], true[None, :3]), psnr(views[view, None, :3], true[None, :3])))
    after, before = (torch.cat(column) for column in zip(*better, strict=True))
    assert after.min() > 28.0
    assert before.median() < 20.0


def test_rotations_by_vectors_have_the_vectors_angles():
    vectors = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.1, -0.2, 0.2]], dtype=torch.float64)
    angles = rotation_error_deg(rotation_from_vector(vectors), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(angles, torch.rad2deg(vectors.norm(dim=1)), atol=1e-9, rtol=0)
    quarter = rotation_from_vector(torch.tensor([0.0, 0.0, math.pi / 2]))
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))


# ----------------------------------------------------------------------------------------- sources without transparency


def test_a_plain_background_is_learned_from_the_border_and_a_cluttered_one_is_not(views):
    white = on_background(views.float() / 255.0, torch.tensor([1.0, 0.9, 0.8])[:, None, None])
    torch.testing.assert_close(plain_background(white), torch.tensor([1.0, 0.9, 0.8]), atol=2e-3, rtol=0)
    assert plain_background(torch.rand(4, 3, SIZE, SIZE)) is None


def test_an_object_cut_out_of_a_plain_picture_is_the_object(views):
    background, errors = torch.tensor([1.0, 0.9, 0.8]), []
    for view in views.float() / 255.0:
        picture = on_background(view[None], background[:, None, None])[0]
        cut = cut_out(picture, background)
        torch.testing.assert_close(on_background(cut[None], background[:, None, None])[0], picture, atol=1e-5, rtol=0)
        errors.append(float((cut[3] - view[3]).abs().mean()))
    assert max(errors) < 0.05
    assert sum(errors) / len(errors) < 0.02
    holed = torch.ones(3, 16, 16)
    holed[:, 4:12, 4:12] = 0.2
    holed[:, 7:9, 7:9] = 1.0  # as white as the background, but enclosed
    assert (cut_out(holed, torch.ones(3))[3, 7:9, 7:9] == 0).all()


# ----------------------------------------------------------------------------------------------------------- datasets


def test_a_dataset_keeps_its_views_and_nothing_else_changes(tiny_dataset, views_dataset):
    plain, kept = (
        ShardReader(folder, "train", views=views) for folder, views in ((tiny_dataset, False), (views_dataset, True))
    )
    a, b = (reader.samples(np.arange(48)) for reader in (plain, kept))
    assert torch.equal(a.moments, b.moments)
    assert torch.equal(a.packed_pose, b.packed_pose)
    assert a.view is None
    assert b.view.shape == (48, 4, 16, 16)
    codec, background = load_codec(views_dataset / "codec"), kept.manifest.backgrounds()[0]
    pictures = on_background(b.view / 255.0, torch.tensor(background)[:, None, None])
    torch.testing.assert_close(codec.encode_moments(pictures)[:, :4], b.moments[:, :4].float(), atol=0.05, rtol=0)
    assert torch.equal(ResidentSamples(kept).samples(np.array([7, 3])).view, b.view[[7, 3]])
    assert verify(views_dataset) == []
    with pytest.raises(ConfigError, match=r"keeps no views, which appearance needs; set keep_views: true"):
        ShardReader(tiny_dataset, "train", views=True)


def test_an_index_without_the_promised_views_is_refused(views_dataset, tmp_path):
    edited = Edited(views_dataset, tmp_path / "edited")
    edited.index("train", lambda index: index.pop("view"))
    with pytest.raises(DataError, match=r"00000.index.npz: has no places of the views"):
        ShardReader(edited.folder, "train", views=True).samples(np.arange(1))
    assert any("has no places of the views" in problem for problem in verify(edited.folder))


# ----------------------------------------------------------------------------------------------------------- training


def config(folder: Path, yaml: Path, *overrides: str) -> Config:
    return load_yaml(Config, yaml, [f"data={folder}", "appearance={}", *overrides])


def vary(folder, config):
    reader, codec = ShardReader(folder, "train", views=True), load_codec(folder / "codec")
    interpolant = get_interpolant(config.flow.path, config.flow.prediction)
    batch = BatchReader(reader, config.seed, 24).batch(3)
    return (
        batch,
        VariedViews(config, interpolant, reader, codec)(batch),
        draw_times(config, interpolant, batch.positions),
    )


def test_only_views_that_train_reading_poses_vary(views_dataset, tiny_yaml):
    batch, varied, t = vary(views_dataset, config(views_dataset, tiny_yaml))
    same = (batch.moments == varied.moments).flatten(1).all(1)
    assert torch.equal(same, t != 1)
    assert 0 < same.sum() < 24
    assert torch.equal(batch.packed_pose, varied.packed_pose)


def test_moved_cameras_have_moved_labels(views_dataset, tiny_yaml):
    batch, varied, t = vary(views_dataset, config(views_dataset, tiny_yaml, "appearance.roll_deg=10"))
    statistics = PoseStatistics.from_dict(load_manifest(views_dataset).statistics)
    before, after = (destandardize(each.packed_pose, statistics) for each in (batch, varied))
    relative = before[:, :3, :3].mT @ after[:, :3, :3]
    angle = rotation_error_deg(relative, torch.eye(3))
    assert (angle[t != 1] < 1e-3).all()
    assert (angle[t == 1] < 10.0 + 1e-3).all()
    assert angle.max() > 1.0
    torch.testing.assert_close(
        relative[:, 2, 2], torch.ones(24, dtype=torch.float64), atol=1e-5, rtol=0
    )  # about the axis
    torch.testing.assert_close(before[:, :3, 3], after[:, :3, 3], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"appearance.zoom 1.2: the dataset packs no focal lengths"):
        vary(views_dataset, config(views_dataset, tiny_yaml, "appearance.zoom=1.2"))


def test_appearance_needs_times_at_which_poses_are_read(views_dataset, tiny_yaml):
    with pytest.raises(ConfigError, match=r"appearance .*flow.share_at_one is 0"):
        config(views_dataset, tiny_yaml, "flow.share_at_one=0")


def test_views_are_rebuilt_to_the_same_bytes(views_dataset, tmp_path):
    from sitdist.build.writer import build

    build(parse(Recipe, load_manifest(views_dataset).recipe, "again"), tmp_path / "again")
    for path in sorted(views_dataset.glob("train/*")):
        assert path.read_bytes() == (tmp_path / "again" / "train" / path.name).read_bytes()
