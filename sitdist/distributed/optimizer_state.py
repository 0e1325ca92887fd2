"""Optimizer state by parameter name, as checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sitdist.errors import CheckpointError

OptimizerState = dict[str, dict[str, Tensor]]  # by parameter name, then by kind, such as exp_avg


def optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of named parameters by name and kind, such as `blocks.0.attn.qkv.weight/exp_avg`."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def check_optimizer(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> OptimizerState:
    """The tensors of `optimizer_tensors` by parameter name; CheckpointError naming one that fits no parameter."""
    state: OptimizerState = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{where}: optimizer state {key} belongs to no trained parameter of the model")
        ours, theirs = tuple(parameters[name].shape), tuple(tensor.shape)
        if theirs not in (ours, ()):  # a scalar counts steps
            raise CheckpointError(f"{where}: optimizer state {key} is {theirs} but the parameter is {ours}")
        state.setdefault(name, {})[kind] = tensor
    kinds = {kind for each in state.values() for kind in each}
    for name, each in state.items():
        for kind in sorted(kinds - each.keys()):
            raise CheckpointError(f"{where}: no {name}/{kind}, which other parameters have; use an earlier checkpoint")
    return state


def load_optimizer(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Load a state, checked by `check_optimizer`, into the optimizer of these parameters."""
    names = {parameter: name for name, parameter in parameters.items()}
    trained = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    places = {place: state[name] for place, name in enumerate(trained) if name in state}
    optimizer.load_state_dict({"state": places, "param_groups": optimizer.state_dict()["param_groups"]})
