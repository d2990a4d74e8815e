"""Whether an engine is data parallel, and what its processes agree on before it starts."""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from hypergrad._random import RandomState, random_state, restore_random_state
from hypergrad._shards import is_shard
from hypergrad.distributed.ranks import Ranks

_ours: list[int] = []
"""The process that initialised the default group here; empty where the user did, or no one."""


def choose_ranks(distributed: Any) -> Ranks | None:
    """Return the processes that an engine shares its work with, None for this one alone.

    Args:
        distributed: True, a process group, False, or None: all processes of a `torchrun` whose script has not
            initialised `torch.distributed` itself.

    Raises:
        ValueError: where None leaves it open: the user initialised a group of several processes.
    """
    if distributed is False:
        return None
    if distributed is None:
        if not dist.is_available():
            return None
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return None
            _initialise()
        elif not _ours:
            if dist.get_world_size() == 1:
                return None
            raise ValueError(
                f"Engine: torch.distributed is initialised with {dist.get_world_size()} processes. Say what they are "
                "for: Engine(..., distributed=True) averages every gradient over all of them, each taking its part of "
                "every batch; distributed=group does so over a group; distributed=False runs this process by itself."
            )
        distributed = True
    if distributed is True:
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                raise ValueError(
                    "Engine: distributed=True, but this process was not started by torchrun and torch.distributed is "
                    "not initialised. Start it with torchrun --nproc-per-node N, or call init_process_group first."
                )
            _initialise()
        return Ranks()
    if not isinstance(distributed, dist.ProcessGroup):
        raise ValueError(
            f"Engine: distributed must be None, True, False or a torch.distributed process group, got {distributed!r}."
        )
    return Ranks(distributed)


def _initialise() -> None:
    """Initialise the default group: gloo for tensors on the CPU, NCCL for those on GPUs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    _ours.append(os.getpid())
    atexit.register(dist.destroy_process_group)


def begin_alike(ranks: Ranks, modules: Mapping[str, nn.Module]) -> None:
    """Give every rank the first one's parameters, buffers and random state.

    Raises:
        ValueError: on every rank, if the modules differ in what they hold.
    """
    shapes = {
        name: [(key, tuple(t.shape), str(t.dtype)) for key, t in _tensors(module).items()]
        for name, module in modules.items()
    }
    for other, theirs in enumerate(gather_objects(ranks, shapes)):
        for name in shapes:
            if theirs.get(name) != shapes[name]:
                raise ValueError(
                    f"problem {name!r}: rank {other} built another module than rank {ranks.rank}. Every rank must "
                    "build the same problems."
                )
    source = dist.get_global_rank(ranks.group, 0) if ranks.group is not None else 0
    with torch.no_grad():
        for module in modules.values():
            for tensor in _tensors(module).values():
                if is_shard(tensor):  # each rank has its own part of one and the same
                    continue
                data = tensor.detach().contiguous()
                dist.broadcast(data, source, group=ranks.group)
                if data.data_ptr() != tensor.data_ptr():
                    tensor.copy_(data)
    state = gather_objects(ranks, random_state(torch.device("cpu")))[0]
    restore_random_state(state)


def check_alike(ranks: Ranks, reads: Mapping[str, object]) -> None:
    """Raise a ValueError, on every rank, if the losses read different things on different ranks."""
    for other, theirs in enumerate(gather_objects(ranks, dict(reads))):
        for name, read in reads.items():
            if theirs[name] != read:
                raise ValueError(
                    f"problem {name!r}: its loss reads {read} on rank {ranks.rank} and {theirs[name]} on rank {other}, "
                    "each on the first batch it got. Say what it may read: Problem(reads=[...])."
                )


def gather_objects(ranks: Ranks, ours: Any) -> list[Any]:
    """Return every rank's object, in order; for a few words at build time."""
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, ours, group=ranks.group)
    return found


def rank_stream(ranks: Ranks, device: torch.device) -> RandomState | None:
    """Return a random state of this rank's own; the generators stay as they are."""
    before = random_state(device)
    seed = (torch.initial_seed() + 1 + ranks.rank) % 2**63
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    own = random_state(device)
    restore_random_state(before)
    return own


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
