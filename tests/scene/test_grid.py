"""The grid interpolates what it is given, skipping and stopping change nothing, gradients are true, files are whole."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics, look_at
from sitdist.geometry.similarity import Similarity
from sitdist.scene.fit import add_variation_gradient
from sitdist.scene.grid import SLOPE, VoxelField
from sitdist.scene.store import Scene, load_scene, render_field, save_scene
from sitdist.scene.volume import _occupied_stretches, box_interval, composite, march_occupied

BOX = torch.tensor([[-1.0, -0.8, -0.6], [1.0, 0.8, 0.6]])
BLUE = torch.tensor([0.0, 0.0, 1.0])


def ball(channels=4, resolution=(21, 17, 13), dtype=torch.float32):
    """An orange ball of radius 0.45, dense inside and empty outside, before a blue background."""
    axes = [torch.linspace(*BOX[:, i].tolist(), n, dtype=dtype) for i, n in enumerate(resolution)]
    z, y, x = torch.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    values = torch.zeros(channels, *x.shape, dtype=dtype)
    values[0] = 60.0 * (0.45 - (x * x + y * y + z * z).sqrt())
    values[1], values[2], values[3] = 3.0, x, -3.0
    return VoxelField(values, BOX.to(dtype), torch.tensor([0.0, 0.0, 1.0], dtype=dtype), 30.0)


def rays(count=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    origins = 4 * torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=dtype), dim=-1)
    target = 0.5 * torch.randn(count, 3, generator=generator, dtype=dtype)
    return origins, torch.nn.functional.normalize(target - origins, dim=-1)


def test_values_linear_in_space_are_interpolated_exactly_in_the_right_axes():
    x, y, z = (torch.linspace(*BOX[:, i].tolist(), n) for i, n in enumerate((5, 4, 3)))
    raw = 2.0 * x[None, None] - 1.0 * y[None, :, None] + 0.5 * z[:, None, None] + 0.3
    field = VoxelField(raw[None].repeat(4, 1, 1, 1), BOX, torch.zeros(3), 7.0)
    points = BOX[0] + torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * (BOX[1] - BOX[0])
    expected = points @ torch.tensor([2.0, -1.0, 0.5]) + 0.3
    density, colour = field.radiance(points, points)
    torch.testing.assert_close(density, 7.0 * torch.nn.functional.softplus(expected), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(field.density(points), density)
    torch.testing.assert_close(colour[:, 1], torch.sigmoid(expected), atol=1e-5, rtol=1e-5)


def test_colour_turns_with_the_direction_of_view():
    field = ball(channels=13)
    field.values[4 + 3 * 2] = 1.0  # red's slope along z
    point = torch.tensor([[0.0, 0.1, 0.0]])
    up, down = (field.radiance(point, torch.tensor([[0.0, 0.0, sign]]))[1][0] for sign in (1.0, -1.0))
    assert up[0].item() == pytest.approx(1 / (1 + math.exp(-3.0 - SLOPE)), abs=1e-5)
    assert down[0].item() == pytest.approx(1 / (1 + math.exp(-3.0 + SLOPE)), abs=1e-5)
    assert torch.equal(up[1:], down[1:])


def test_rays_enter_and_leave_the_box_where_they_should():
    origins = torch.tensor([[-3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 5.0, 0.0], [3.0, 0.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    enter, leave = box_interval(BOX, origins, directions)
    torch.testing.assert_close(enter[:2], torch.tensor([2.0, 0.0]))
    torch.testing.assert_close((leave - enter), torch.tensor([2.0, 0.6, 0.0, 0.0]))  # through, from within, misses


def full_march(field, origins, directions, step):
    """Every stretch within the box, whether or not it is empty or reached; float64."""
    enter, leave = box_interval(field.box, origins, directions)
    distance = enter[:, None] + step * (torch.arange(int((leave - enter).max() / step) + 1) + 0.5)  # [R, S]
    points = origins[:, None] + distance[..., None] * directions[:, None]
    toward = directions[:, None].expand_as(points).reshape(-1, 3)
    density, colour = field.radiance(points.reshape(-1, 3), toward)
    inside = distance < leave[:, None]
    density = density.reshape(distance.shape) * inside
    colour = colour.double().reshape(*distance.shape, 3)
    return composite(density.double() * step, colour, distance).on(BLUE.double())


@pytest.mark.parametrize("step", [0.02, 0.05, 0.3])  # half a voxel, about one, many
@pytest.mark.parametrize("channels", [4, 13])
def test_skipping_empty_cells_and_stopping_early_equal_the_full_march(step, channels):
    field = ball(channels, (41, 33, 25))
    field.values[4:] = torch.randn(channels - 4, 25, 33, 41, generator=torch.Generator().manual_seed(0))
    skipping = VoxelField(field.values, field.box, field.background, field.density_scale)
    skipping.find_empty()
    assert 0.02 < skipping.cells.float().mean() < 0.5
    assert 0.02 < skipping.near.float().mean() < 0.9  # whole groups of stretches are left out
    origins, directions = rays()
    expected = full_march(field, origins, directions, step)
    assert expected[:, 0].max() > 0.8  # the ball is seen,
    assert expected[:, 2].max() == 1.0  # and so is the background
    for each in (field, skipping, skipping.frozen()):
        colour = march_occupied(each, origins, directions, step).on(BLUE)
        torch.testing.assert_close(colour.double(), expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("step", [0.02, 0.048, 0.11])
def test_looking_for_full_cells_in_groups_finds_the_stretches_that_looking_at_every_one_finds(step):
    field = ball()
    field.cells = torch.rand(12, 16, 20, generator=torch.Generator().manual_seed(0)) < 0.01
    ungrouped = VoxelField(field.values, BOX, BLUE, 30.0, field.cells, torch.ones_like(field.cells))
    grouped = VoxelField(field.values, BOX, BLUE, 30.0, field.cells)
    assert grouped.near.float().mean() < 0.8
    offset = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    found = [_occupied_stretches(each, *rays(2000), step, offset) for each in (grouped, ungrouped)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert len(found[0][0]) > 100


def test_a_frozen_field_is_the_same_field():
    field = ball(13)
    field.values[1:] = torch.randn(12, 13, 17, 21, generator=torch.Generator().manual_seed(0))
    points = BOX[0] + torch.rand(500, 3, generator=torch.Generator().manual_seed(1)) * (BOX[1] - BOX[0])
    points = torch.cat([points, BOX, BOX * torch.tensor([1.0, -1.0, 1.0])])  # and corners
    directions = torch.nn.functional.normalize(points + 0.1, dim=-1)
    frozen_field = field.frozen()
    for mine, frozen in zip(field.radiance(points, directions), frozen_field.radiance(points, directions), strict=True):
        torch.testing.assert_close(frozen, mine, atol=2e-4, rtol=1e-5)


def test_rays_that_meet_nothing_are_the_background():
    field = ball()
    field.find_empty()
    rendered = march_occupied(field, torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[0.0, 1.0, 0.0]]), 0.1)
    assert rendered.light.tolist() == [[0.0, 0.0, 0.0]]
    assert rendered.through.tolist() == [1.0]
    assert rendered.on(BLUE).tolist() == [[0.0, 0.0, 1.0]]
    none = march_occupied(field, torch.zeros(0, 3), torch.zeros(0, 3), 0.1)
    assert none.light.shape == (0, 3)


def test_the_gradient_of_compositing_is_that_of_differences():
    generator = torch.Generator().manual_seed(0)
    optical_depth = torch.rand(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    colour = torch.rand(3, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    distance = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(composite, (optical_depth, colour, distance))


def test_the_gradient_of_a_march_reaches_the_grid():
    field = ball(13, (5, 4, 3), torch.float64)
    field.values[0].add_(-2.0)
    field.density_scale = 1.0
    origins, directions = rays(6, torch.float64)

    def render(values):
        moved = VoxelField(values, field.box, field.background, field.density_scale)
        return march_occupied(moved, origins, directions, 0.1)

    assert torch.autograd.gradcheck(render, (field.values.requires_grad_(),), atol=1e-6)


def test_the_gradient_of_total_variation_is_that_of_its_definition():
    values = torch.nn.Parameter(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)))
    variation = sum(
        weight * sum(v.diff(dim=i).square().sum() for i in range(3)) / 60
        for v, weight in zip(values, (2, 3), strict=True)
    )
    (expected,) = torch.autograd.grad(variation, values)
    values.grad = torch.ones_like(values)
    add_variation_gradient(values, [2.0, 3.0])
    torch.testing.assert_close(values.grad - 1.0, expected, atol=1e-6, rtol=1e-5)


def test_a_finer_grid_holds_the_same_field():
    field = ball(resolution=(11, 9, 7))
    finer = field.resampled(BOX, (21, 17, 13))
    points = 0.9 * (torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1) * BOX[1]
    torch.testing.assert_close(finer.density(points), field.density(points), atol=1e-2, rtol=1e-3)
    cropped = field.resampled(0.5 * BOX, (21, 17, 13))
    at_vertex = torch.tensor([[0.5, 0.4, 0.3], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(cropped.density(at_vertex), field.density(at_vertex), atol=1e-3, rtol=1e-4)


def scene(frame="unit"):
    field = ball(13)
    field.find_empty()
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    similarity = Similarity(0.5, turn, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    return Scene(field, similarity, frame, {"psnr": 30.0, "views": 2.0}, {"fingerprint": "abc"})


def test_a_scene_that_is_loaded_is_bit_for_bit_the_one_saved(tmp_path):
    saved = scene()
    save_scene(saved, tmp_path / "scene", torch.rand(3, 4, 6))
    assert sorted(p.name for p in (tmp_path / "scene").iterdir()) == [
        "field.safetensors",
        "scene.json",
        "turntable.png",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["scene"]  # nothing is left beside it
    loaded = load_scene(tmp_path / "scene")
    for name in ("values", "box", "background", "cells"):
        assert torch.equal(getattr(loaded.field, name), getattr(saved.field, name)), name
    assert loaded.field.density_scale == saved.field.density_scale
    assert loaded.similarity.to_dict() == saved.similarity.to_dict()
    assert (loaded.frame, loaded.held_out, loaded.source) == (saved.frame, saved.held_out, saved.source)
    with pytest.raises(DataError, match="already exists"):
        save_scene(saved, tmp_path / "scene")


def test_an_interrupted_save_leaves_no_scene(tmp_path, monkeypatch):
    monkeypatch.setattr("sitdist.scene.store._describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_scene(scene(), tmp_path / "scene")
    assert not (tmp_path / "scene").exists()
    monkeypatch.undo()
    save_scene(scene(), tmp_path / "scene")  # and what it left is in nobody's way
    load_scene(tmp_path / "scene")


def test_a_scene_in_the_captures_frame_answers_its_poses():
    camera = Intrinsics.from_fov(40.0, 12, 8)
    pose = look_at(torch.tensor([[3.0, 2.0, 1.0]]))
    capture = scene("capture")
    expected = render_field(capture.field, pose[0], camera)
    seen = capture.render(capture.similarity.inverse().cameras(pose), camera)[0]
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(scene("unit").render(pose, camera)[0], expected, atol=0, rtol=0)
    assert expected.std() > 0.1


def test_damaged_and_newer_scenes_are_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match=r"scene\.json: no such file; make a scene"):
        load_scene(tmp_path)
    save_scene(scene(), tmp_path / "scene")
    path = tmp_path / "scene" / "field.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"field\.safetensors: damaged or altered"):
        load_scene(tmp_path / "scene")
    data[-1] ^= 1
    path.write_bytes(data)
    description = tmp_path / "scene" / "scene.json"
    values = json.loads(description.read_text())
    for change, message in (
        ({"format_version": 2}, "format_version 2 but this sitdist reads 1"),
        ({"extra": 1}, "extra"),
        ({"box": [1.0]}, "not a scene's description"),
        ({"frame": "other"}, "frame 'other' is none of"),
    ):
        description.write_text(json.dumps({**values, **change}))
        with pytest.raises(DataError, match=message):
            load_scene(tmp_path / "scene")
    description.write_text("{")
    with pytest.raises(DataError, match=r"scene\.json: damaged"):
        load_scene(tmp_path / "scene")
    description.write_text(json.dumps(values))
    path.unlink()
    with pytest.raises(DataError, match=r"field\.safetensors: cannot be read"):
        load_scene(tmp_path / "scene")


def spoiled(values=None, cells=None, **description):
    """Change a saved scene's tensors, with the hash to match, or keys of its description."""

    def spoil(folder):
        path, told = folder / "field.safetensors", json.loads((folder / "scene.json").read_text())
        tensors = load_file(path)
        changed = {"values": values, "cells": cells}
        save_file({name: each(tensors[name]) if (each := changed[name]) else tensors[name] for name in changed}, path)
        told |= {"field_sha256": hashlib.sha256(path.read_bytes()).hexdigest()} | description
        (folder / "scene.json").write_text(json.dumps(told))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled(values=lambda values: values * torch.nan),
        spoiled(values=lambda values: values.double()),
        spoiled(values=lambda values: values[:, 1:].clone()),
        spoiled(cells=lambda cells: cells.float()),
        spoiled(cells=lambda cells: cells[1:].clone()),
        spoiled(resolution=[10**9] * 3),
        spoiled(resolution=["13"] * 3),
        spoiled(channels=5),
        spoiled(density_scale=0.0),
        spoiled(density_scale=1e300),
        spoiled(density_scale="dense"),
        spoiled(box=[[0.0] * 3, [0.0] * 3]),
        spoiled(box=[[-1e300] * 3, [1e300] * 3]),
        spoiled(background=[0.5, 0.5, 2.0]),
        spoiled(background=None),
        spoiled(similarity={"scale": 1.0}),
        spoiled(similarity={"scale": 0.0, "rotation": torch.eye(3).tolist(), "translation": [0.0] * 3}),
        spoiled(held_out={"psnr": "good"}),
        spoiled(field_sha256=None),
        spoiled(format_version=[1]),
    ],
)
def test_an_absurd_scene_is_refused_in_one_line(tmp_path, spoil):
    save_scene(scene(), tmp_path / "scene")
    spoil(tmp_path / "scene")
    with pytest.raises(DataError, match=r"scene\.json|field\.safetensors") as refused:
        load_scene(tmp_path / "scene")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 800


def test_a_save_removes_no_folder_of_a_similar_name(tmp_path):
    (tmp_path / ".scene.tmp").mkdir()
    (tmp_path / ".scene.tmp" / "precious").write_text("mine")
    save_scene(scene(), tmp_path / "scene")
    assert (tmp_path / ".scene.tmp" / "precious").read_text() == "mine"
