"""From posed pictures in .npz files to a trained model: python examples/train_your_own.py VIEWS.npz OUT [STEPS]

The file holds images [N, H, H, 3], poses [N, 4, 4] camera-to-world with OpenGL axes, and focal in pixels.
"""

import sys
from pathlib import Path

import numpy as np

import sitdist
from sitdist.build.writer import build
from sitdist.config.experiment import Config
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.train.trainer import train

views, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3000
with np.load(views) as arrays:
    count, size = arrays["images"].shape[:2]
recipe = {
    "name": "mine",
    "image_size": size,
    "codec": {"kind": "pca", "patch": 4},
    "val_views": count // 10,
    "splits": {"train": {"kind": "npz", "paths": [views]}},
}
build(parse(Recipe, recipe, "recipe"), out / "data")
config = {
    "name": "mine",
    "data": str(out / "data"),
    "model": {"patch_size": 2, "hidden_size": 128, "depth": 5, "num_heads": 4},
    "train": {"steps": steps, "global_batch": 64, "optimizer": {"lr": 1e-3}, "ema_decay": 0.995},
}
train(parse(Config, config, "config"), out / "run")
flow = sitdist.load(out / "run")
print(f"{out / 'run'}: knows {flow.objects[0]} at {flow.image_size}x{flow.image_size} pixels")
