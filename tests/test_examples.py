"""The scripts in examples/ do what they say."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sitdist
from sitdist.dataset.reader import ShardReader

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run one with arguments; gives what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_there_are_no_others():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert names == ["estimate_poses", "render_turntable", "train_your_own"]


def test_render_turntable(example, tiny_run, tmp_path):
    example("render_turntable", tiny_run, tmp_path / "out.gif")
    with Image.open(tmp_path / "out.gif") as gif:
        assert (gif.n_frames, gif.size) == (24, (16, 16))


def test_estimate_poses(example, tiny_run, tiny_dataset, tmp_path):
    image = ShardReader(tiny_dataset, "test").images([0])
    Image.fromarray((image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    x, y, z = sitdist.load(tiny_run).estimate(image).camera_to_world[0, :3, 3].tolist()
    assert example("estimate_poses", tiny_run, tmp_path / "a.png") == (
        f"{tmp_path / 'a.png'}: camera at {x:.2f}, {y:.2f}, {z:.2f}\n"
    )


def test_train_your_own(example, tiny_dataset, tmp_path):
    reader = ShardReader(tiny_dataset, "test")
    images = (reader.images(range(12)) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "views.npz", images=images, poses=reader.camera_to_world().numpy(), focal=22.0)
    assert example("train_your_own", tmp_path / "views.npz", tmp_path / "out", 2).endswith("at 16x16 pixels\n")
    assert sitdist.load(tmp_path / "out" / "run").camera.fx == 22.0
