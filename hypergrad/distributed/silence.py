"""Which processes are gone when a collective has failed."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from hypergrad.distributed.ranks import Ranks

PATIENCE = 10.0
"""Seconds that the others have to say that the collective failed for them too."""


class RankError(RuntimeError):
    """A process that trains with this one is gone; the message names its rank."""


def of_a_collective(error: BaseException) -> bool:
    """Return whether an error was raised by `torch.distributed`, and not by this process's own losses or data."""
    if isinstance(error, dist.DistError):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    return innermost is not None and Path(innermost.tb_frame.f_code.co_filename).is_relative_to(_TORCH_DISTRIBUTED)


_TORCH_DISTRIBUTED = Path(dist.__file__).parent


def silent_ranks(ranks: Ranks) -> list[int]:
    """Return those, numbered as all processes are, that did not say within `PATIENCE` seconds that they live.

    This one says so.

    Every process whose collective fails comes here. They meet in the store that the group was made with; where the
    process that holds it is gone, that is rank 0's, unless `torchrun` holds it.
    """
    members = list(range(ranks.size)) if ranks.group is None else dist.get_process_group_ranks(ranks.group)
    try:
        store = _get_default_store()
        store.set(f"hypergrad/alive/{members[ranks.rank]}", "1")
        silent = []
        for rank in members:
            try:
                store.wait([f"hypergrad/alive/{rank}"], timedelta(seconds=PATIENCE / max(len(members) - 1, 1)))
            except dist.DistStoreError:
                silent.append(rank)
        return silent
    except dist.DistError:
        return [0]
