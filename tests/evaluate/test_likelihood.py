"""Likelihoods of a split's latents under whole runs."""

import csv
import math

import pytest
import torch

from sitdist.config.experiment import Config
from sitdist.config.load import parse
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ConfigError
from sitdist.evaluate.likelihood import split_likelihood
from sitdist.geometry.packing import pack, standardize
from sitdist.inference.run import load_run
from sitdist.model.codec import latent_mean
from sitdist.train.trainer import train


def trained(data, folder, lr=1e-2, **flow):
    values = {
        "flow": flow,
        "name": "tiny",
        "data": str(data),
        "model": {"patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2},
        "train": {"steps": 2, "global_batch": 4, "optimizer": {"lr": lr}, "ema_decay": 0.0},
    }
    train(parse(Config, values, "tiny"), folder)
    return folder


@pytest.mark.parametrize("endpoint", ["gaussian", "pose"])
def test_a_flow_that_stands_still_has_the_likelihood_of_its_endpoint(tiny_dataset, tmp_path, endpoint):
    shares = {"share_at_one": 0, "share_at_zero": 0} if endpoint == "gaussian" else {"sigma": 0.5}
    run = trained(tiny_dataset, tmp_path / "run", lr=1e-12, endpoint=endpoint, **shares)
    result = split_likelihood(run, steps=2, probes=1, out=tmp_path / "out.csv")
    reader, loaded = ShardReader(tiny_dataset, "test"), load_run(run)
    every = range(len(reader))
    latents = latent_mean(reader.moments(every).float())
    mean, sigma = torch.zeros_like(latents), 1.0
    if endpoint == "pose":  # each view's own
        poses = standardize(reader.camera_to_world(), loaded.statistics, reader.intrinsics(list(every)))
        mean, sigma = pack(poses, *latents.shape[1:]), 0.5
    expected = torch.distributions.Normal(mean.double(), sigma).log_prob(latents.double()).flatten(1).sum(1)
    torch.testing.assert_close(result.log_density, expected, rtol=1e-5, atol=1e-4)
    bits = float(-expected.mean() / (latents[0].numel() * math.log(2)))
    assert f"{bits:.4f} +- " in result.line("test")
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["key"] for row in table] == reader.keys()
    assert [float(row["log_density_nats"]) for row in table] == result.log_density.tolist()
    few = split_likelihood(run, steps=2, probes=1, views=3)
    assert len(few.keys) == 3
    torch.testing.assert_close(few.log_density, result.log_density[:3])


def test_no_likelihood_without_noise_or_without_a_flow(tiny_dataset, tmp_path):
    sharp = trained(tiny_dataset, tmp_path / "sharp", sigma=0.0)
    with pytest.raises(ConfigError, match="so there is no likelihood; train with"):
        split_likelihood(sharp)
    regressor = trained(tiny_dataset, tmp_path / "regressor", share_at_one=1.0, share_at_zero=0.0)
    with pytest.raises(ConfigError, match="has no flow to integrate"):
        split_likelihood(regressor)
    with pytest.raises(ConfigError, match="no split 'nope'; it has test, train, val"):
        split_likelihood(trained(tiny_dataset, tmp_path / "run"), split="nope")
