"""How latents are generated and read, from the `evaluate` part of a config."""

from __future__ import annotations

from typing import Any

from sitdist.config.experiment import EvaluateConfig
from sitdist.errors import ConfigError
from sitdist.flow.estimate import EstimateOptions
from sitdist.flow.sample import SampleOptions


def build_sampling(config: EvaluateConfig) -> SampleOptions:
    """How latents are generated."""
    return SampleOptions(
        generator=config.generator,
        steps=config.generator_steps,
        tolerance=config.tolerance,
        guidance=config.guidance,
        guidance_channels=config.guidance_channels,
        diffusion=config.diffusion,
        diffusion_norm=config.diffusion_norm,
        last_step=config.last_step,
        last_step_size=config.last_step_size,
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
    return EstimateOptions(config.estimator, **values)


def build_latent_estimate(config: EvaluateConfig) -> EstimateOptions:
    """How each single latent is read: as `build_estimate` says, and in one step for multi_zoom, which reads several."""
    of_one = {"estimator": "one_step"} if config.estimator == "multi_zoom" else {}
    return build_estimate(config.model_copy(update=of_one))
