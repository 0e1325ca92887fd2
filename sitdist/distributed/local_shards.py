"""Tensors that FSDP2 shards over processes: this process's shard, and the full tensor."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or if it is sharded, some of its rows."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shards(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of each trained parameter."""
    return {name: local_shard(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_tensor(shard: Tensor, like: Tensor) -> Tensor:
    """The full tensor of shards that lie as those of `like`; every process calls it."""
    if not isinstance(like, DTensor):
        return shard
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """The inverse of `full_tensor`, for a tensor that every process has in full."""
    if not isinstance(like, DTensor):
        return full
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()
