"""Latents of packed poses, by the ODE of the flow or an SDE with its marginals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sitdist import checks
from sitdist.flow import draws
from sitdist.flow.choices import GENERATORS, STOCHASTIC
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.predict import GUIDED_CHANNELS, guided
from sitdist.flow.sde import SdeOptions, generate_sde
from sitdist.flow.solve import Model, generate


@dataclass(frozen=True)
class SampleOptions:
    """How latents are generated.

    `generator`: a solver of the ODE, or one of STOCHASTIC, which need the gaussian endpoint and read the last four
    fields (see SdeOptions). `tolerance`: of adaptive solvers and implicit_adams. `guidance`: the scale of
    classifier-free guidance on all channels or, as published, on three; None is off.
    """

    generator: str = "heun"
    steps: int = 10
    tolerance: float = 1e-6
    guidance: float | None = None
    guidance_channels: str = "all"
    diffusion: str = "SBDM"
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        checks.choice("generator", self.generator, GENERATORS)
        checks.number("generator tolerance", self.tolerance, 1e-30)
        checks.choice("guidance channels", self.guidance_channels, GUIDED_CHANNELS)
        if self.guidance is not None:
            checks.number("guidance", self.guidance, 0.0)
        self.sde()

    def sde(self) -> SdeOptions:
        """How the SDE of a stochastic generator is solved."""
        method = STOCHASTIC.get(self.generator, "heun")
        return SdeOptions(method, self.steps, self.diffusion, self.diffusion_norm, self.last_step, self.last_step_size)


@torch.no_grad()
def sample_latents(
    model: Model,
    interpolant: Interpolant,
    endpoint: Endpoint,
    packed_pose: Tensor,
    y: Tensor,
    shape: torch.Size,
    options: SampleOptions,
    seed: int,
    stream: str,
    positions: Tensor,
) -> Tensor:
    """Latents x1 [B, *shape] of packed poses [B, 4, 4] and labels `y` [B].

    All noise is keyed by (seed, stream, position), `positions` [B]: the batch around a sample changes nothing, but for
    adaptive solvers.
    """
    x0 = endpoint.x0(packed_pose, _normal(seed, stream, positions, shape))  # [B, C, h, w]
    velocity = endpoint.conditioned(model, packed_pose)
    if options.guidance is not None:
        velocity = guided(velocity, options.guidance, options.guidance_channels)
    if options.generator not in STOCHASTIC:
        return generate(velocity, interpolant, x0, y, options.generator, options.steps, options.tolerance)

    def kick(step: int) -> Tensor:
        return _normal(seed, f"{stream} step {step}", positions, shape)

    return generate_sde(velocity, interpolant, x0, y, kick, options.sde(), endpoint.kind)


def _normal(seed: int, stream: str, positions: Tensor, shape: torch.Size) -> Tensor:
    return draws.normal(seed, stream, positions, shape.numel()).reshape(-1, *shape)
