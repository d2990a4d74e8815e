"""Parameters that `torch.distributed.fsdp.fully_shard` has split over processes: this process's part of each.

Whoever shards has imported DTensor already; nobody else need wait for it, so it is looked up where it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_shard(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor, of which this process holds a part."""
    if type(tensor) in _PLAIN:
        return False
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def held(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, detached, in the same memory: its part, or all of a plain tensor."""
    if not is_shard(tensor):
        return tensor.detach()
    shard: Any = tensor
    with torch.no_grad():
        part: Tensor = shard.to_local()
    return part.detach()


def held_params(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `held` of tensors by name."""
    return {name: held(tensor) for name, tensor in params.items()}


def like_shard(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor of which `part` is what this process holds, split as `parameter` is."""
    if not is_shard(parameter):
        return part
    whole: Any = parameter
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return made


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let sharded modules drop whole parameters that a forward without backward left behind."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        sharded: Any = module
        if isinstance(module, fsdp.FSDPModule):
            sharded.reshard()
