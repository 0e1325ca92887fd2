"""Builds the endpoint, the model and the codec from a config and a dataset's manifest."""

from __future__ import annotations

from pathlib import Path

import torch

from sitdist.config.experiment import FlowConfig, ModelConfig
from sitdist.dataset.manifest import DatasetManifest
from sitdist.errors import CodecError, ConfigError
from sitdist.flow.endpoint import Endpoint
from sitdist.io.files import require_memory
from sitdist.model.codec import Codec, load_codec
from sitdist.model.sit import SiT


def build_endpoint(config: FlowConfig) -> Endpoint:
    """The endpoint x0 of a config."""
    return Endpoint(config.endpoint, config.sigma, config.gain, config.layout)


def build_model(config: ModelConfig, manifest: DatasetManifest, endpoint: Endpoint = Endpoint()) -> SiT:  # noqa: B008
    """The transformer for the dataset's latents; ConfigError where its sizes do not fit them."""
    latent, sizes = manifest.latent, config.sizes()
    if config.num_classes < manifest.labels():
        raise ConfigError(
            f"model.num_classes = {config.num_classes}: the dataset {manifest.name} has {manifest.labels()} labels; "
            f"set it to {manifest.labels()} or more"
        )
    if latent.height % sizes["patch_size"]:
        raise ConfigError(
            f"model.patch_size = {sizes['patch_size']}: does not divide the dataset's {latent.height}x{latent.width} "
            "latents; choose a divisor"
        )
    width, grid = sizes["hidden_size"], latent.height // sizes["patch_size"]
    numbers = (10 + 2 * config.mlp_ratio) * sizes["depth"] * width**2 + (config.num_classes + grid**2) * width
    if torch.get_default_device().type != "meta":
        remedy = "take a smaller hidden_size, depth or num_classes"
        require_memory(int(4 * numbers), f"a model of {numbers / 1e6:,.0f} M weights", remedy)
    return SiT(
        input_size=latent.height,
        in_channels=latent.channels,
        mlp_ratio=config.mlp_ratio,
        mlp=config.mlp,
        class_dropout_prob=config.class_dropout_prob,
        num_classes=config.num_classes,
        learn_sigma=config.learn_sigma,
        pose_condition=endpoint.kind == "gaussian",
        **sizes,
    )


def load_matching_codec(folder: Path, manifest: DatasetManifest, device: torch.device | str) -> Codec:
    """The codec in `folder`; CodecError if it did not encode the manifest's dataset, or can hold no pose."""
    codec = load_codec(folder, device)
    ours, theirs = codec.identity(), manifest.codec
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if ours.get(name) != theirs.get(name):
            raise CodecError(
                f"{folder}: {name} is {ours.get(name)!r} but the dataset {manifest.name} was encoded with "
                f"{theirs.get(name)!r}; put its own codec back, or build the dataset again"
            )
    side = manifest.image_size // codec.downsample
    if side % 2 or codec.channels % 4:
        raise CodecError(
            f"{folder}: latents of {codec.channels} channels, {side}x{side}, hold no pose, which needs a multiple of 4 "
            "channels and an even size; build the dataset with another codec"
        )
    return codec
