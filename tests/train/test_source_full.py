"""The source's own experiment at its own sizes: its recipe and config load, and its model has the published size."""

from pathlib import Path

import torch

from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.config.recipe import Recipe
from sitdist.model.sit import SiT

ROOT = Path(__file__).parents[2]


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
    with torch.device("meta"):
        model = SiT(input_size=16, in_channels=4, **config.model.sizes())  # 128 pixels, 8 to a latent
    assert 129e6 < sum(value.numel() for value in model.parameters()) < 132e6  # SiT-B
