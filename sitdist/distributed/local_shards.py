"""Tensors that are shared out over processes, as FSDP2 does it: this process's part, and the whole."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be shared out over processes: all of it, or a part of its rows."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shards(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of each trained parameter."""
    return {name: local_part(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The tensor that `part` is this process's part of, shared out as `like` is; every process calls it."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of `whole_of`, for a tensor that every process has whole."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
