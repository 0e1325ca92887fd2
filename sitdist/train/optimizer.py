"""The optimizer of a config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sitdist.config.experiment import OptimizerConfig


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of these parameters. Every step sets its rate and `found_inf`, a number on the device: if it is 1,
    a fused optimizer leaves parameters and state unchanged.
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
