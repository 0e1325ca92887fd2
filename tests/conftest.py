"""What several tests share: a small dataset, built once, and single-threaded arithmetic."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from sitdist.build.writer import build
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml, parse
from sitdist.config.recipe import Recipe
from sitdist.geometry.similarity import Similarity
from sitdist.scene.grid import VoxelField
from sitdist.scene.store import Scene, save_scene
from sitdist.train.trainer import train

torch.set_num_threads(1)

TINY_RECIPE = {
    "name": "tiny",
    "image_size": 16,
    "codec": {"kind": "pca", "patch": 4, "fit_views": 48},
    "samples_per_shard": 16,
    "encode_batch": 8,
    "val_views": 8,
    "splits": {
        "train": {"kind": "scene", "views": 56},
        "test": {"kind": "scene", "views": 12, "radius": [1.0, 7.0], "seed": 1},
    },
}


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training views of 16x16 pixels in three shards, 8 val and 12 test views; never write into it."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    build(parse(Recipe, TINY_RECIPE, "tiny"), folder)
    return folder


@pytest.fixture(scope="session")
def views_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dataset with its views kept, for appearances; never write into it."""
    folder = tmp_path_factory.mktemp("data") / "views"
    build(parse(Recipe, {**TINY_RECIPE, "keep_views": True}, "views"), folder)
    return folder


@pytest.fixture(scope="session")
def ball_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fitted scene: a grey ball in an empty white box; never write into it."""
    axis = torch.linspace(-1.0, 1.0, 12)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    inside = (x**2 + y**2 + z**2 < 0.3).float()
    values = torch.cat([(20.0 * inside - 10.0)[None], torch.zeros(3, 12, 12, 12)])
    field = VoxelField(values, torch.tensor([[-1.0] * 3, [1.0] * 3]), torch.ones(3), 5.0)
    field.find_empty()
    folder = tmp_path_factory.mktemp("scene") / "ball"
    save_scene(Scene(field, Similarity.identity()), folder)
    return folder


TINY_CONFIG = """
name: tiny
data: {data}
model: {{patch_size: 2, hidden_size: 32, depth: 2, num_heads: 2}}
train:
  steps: 6
  global_batch: 12
  optimizer: {{lr: 1.0e-2}}
  schedule: {{kind: constant}}
  ema_decay: 0.9
  log_every: 3
  validation_views: 4
  picture_views: 2
evaluate: {{batch: 2, generator: euler, generator_steps: 2}}
"""


@pytest.fixture(scope="session")
def tiny_yaml(tiny_dataset: Path) -> Path:
    """The config of a model of 40,000 parameters on the tiny dataset, to be read with overrides; a step takes 10 ms."""
    path = tiny_dataset.parent / "tiny.yaml"
    path.write_text(TINY_CONFIG.format(data=tiny_dataset))
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_yaml: Path) -> Path:
    """A run of that config, trained for six steps; never write into it."""
    folder = tiny_yaml.parent / "run"
    train(load_yaml(Config, tiny_yaml), folder)
    return folder
