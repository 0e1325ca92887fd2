"""The source's own experiment at its own sizes: its recipe and config load, and one step of it runs."""

from pathlib import Path

import pytest
import torch

from sitdist.build.writer import build
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.config.recipe import Recipe
from sitdist.dataset.manifest import load_manifest
from sitdist.runs import checkpoint as checkpoints
from sitdist.train.trainer import train

ROOT = Path(__file__).parents[2]

# stabilityai/sd-vae-ft-ema: the published architecture, here with random weights.
SD_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


def test_the_published_numbers_are_in_the_recipe_and_the_config():
    recipe = load_yaml(Recipe, ROOT / "shards" / "source_full.yaml")
    config = load_yaml(Config, ROOT / "configs" / "source_full.yaml")
    assert (recipe.image_size, recipe.splits["train"].views) == (128, 30_000)
    assert recipe.codec.path == "stabilityai/sd-vae-ft-ema"
    assert config.model.sizes() == {"patch_size": 8, "hidden_size": 768, "depth": 12, "num_heads": 12}
    assert (config.flow.sigma, config.flow.path, config.model.num_classes) == (1.0, "linear", 1)
    assert (config.train.global_batch, config.train.optimizer.lr, config.train.ema_decay) == (150, 1e-4, 0.9999)
    assert config.train.precision == "bf16"
    assert (config.evaluate.estimator, config.evaluate.generator, config.evaluate.generator_steps) == (
        *("euler_249", "euler", 249),
    )


@pytest.mark.distributed
def test_one_step_of_it_runs(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(**SD_VAE).save_pretrained(tmp_path / "vae")
    counts = ["splits.train.views=3", "splits.test.views=1", "val_views=1", "encode_batch=1"]
    recipe = load_yaml(Recipe, ROOT / "shards" / "source_full.yaml", [f"codec.path={tmp_path / 'vae'}", *counts])
    build(recipe, tmp_path / "data")
    manifest = load_manifest(tmp_path / "data")
    assert (manifest.latent.channels, manifest.latent.height, manifest.latent.width) == (4, 16, 16)

    # The checkpoint, two gigabytes, is looked at instead of being written.
    saved = {}
    monkeypatch.setattr(
        checkpoints, "save_checkpoint", lambda run, state, tensors, *retention: saved.update(state=state, **tensors)
    )
    counts = ["train.steps=1", "train.global_batch=2", "train.validation_views=1", "train.picture_views=1"]
    counts += ["evaluate.generator_steps=3"]
    config = load_yaml(Config, ROOT / "configs" / "source_full.yaml", [f"data={tmp_path / 'data'}", *counts])
    train(config, tmp_path / "run")
    assert saved["state"]["step"] == 1
    assert 129e6 < sum(value.numel() for value in saved["model"].values()) < 132e6  # SiT-B
    assert saved["optimizer"]["final_layer.linear.weight/exp_avg"].abs().max() > 0
    for name in ("model", "ema"):
        assert all(value.isfinite().all() for value in saved[name].values())
