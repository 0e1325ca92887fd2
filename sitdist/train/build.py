"""From a config and a dataset's manifest to the model and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sitdist.config import EvaluateConfig, FlowConfig, ModelConfig, OptimizerConfig
from sitdist.data.format import DatasetManifest
from sitdist.errors import CodecError, ConfigError
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.estimate import EstimateOptions
from sitdist.flow.sample import SampleOptions
from sitdist.io.memory import require_memory
from sitdist.model.codec import Codec, load_codec
from sitdist.model.sit import SiT


def build_endpoint(config: FlowConfig) -> Endpoint:
    """What x0 is."""
    return Endpoint(config.endpoint, config.sigma, config.gain, config.layout)


def build_sampling(config: EvaluateConfig) -> SampleOptions:
    """How latents are generated."""
    return SampleOptions(
        config.generator,
        config.generator_steps,
        config.tolerance,
        config.guidance,
        config.guidance_channels,
        config.diffusion,
        config.diffusion_norm,
        config.last_step,
        config.last_step_size,
    )


def build_estimate(config: EvaluateConfig) -> EstimateOptions:
    """How latents are read; what the estimator does not look at has its default, so that equal ways are equal.

    ConfigError for multi_zoom, which reads pictures.
    """
    values: dict[str, Any] = {"readout": config.readout}
    match config.estimator:
        case "multi_zoom":
            raise ConfigError(
                "evaluate.estimator = 'multi_zoom' reads pictures, and there are only latents here; use one_step"
            )
        case "euler" | "heun" | "midpoint":
            values |= {"steps": config.estimator_steps}
        case "exact":
            values |= {"generator": config.generator, "generator_steps": config.generator_steps}
        case "renoised":
            values |= {"draws": config.estimator_draws, "time": config.estimator_time, "seed": config.seed}
        case "draws":
            values |= {"draws": config.estimator_draws, "seed": config.seed}
    return EstimateOptions(config.estimator, **values)


def build_latent_estimate(config: EvaluateConfig) -> EstimateOptions:
    """How each single latent is read: as `build_estimate` says, and in one step for multi_zoom, which reads several."""
    of_one = {"estimator": "one_step"} if config.estimator == "multi_zoom" else {}
    return build_estimate(config.model_copy(update=of_one))


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


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of these parameters; its rate is set anew at every step, and so is `found_inf`, a number on
    the device: where it is 1, a fused optimizer leaves parameters and state as they are.
    """
    if config.kind == "sgd":
        sgd = torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
        if config.momentum:  # a first step that is left out would leave the buffer undefined
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def load_matching_codec(folder: Path, manifest: DatasetManifest, device: torch.device | str) -> Codec:
    """The codec in `folder`; CodecError with both values if it is not the one that encoded the manifest's dataset, or
    if its latents can hold no pose.
    """
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
