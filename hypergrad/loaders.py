"""What a `DataLoader` keeps besides its data, and which data cannot be found again after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler

Place = dict[str, Any]


@runtime_checkable
class Resumable(Protocol):
    """Data that knows where it is, as torchdata's `StatefulDataLoader` does: `iter` goes on from a loaded state."""

    def state_dict(self) -> dict[str, Any]:
        """Return where in the data this is."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go there with the next `iter`."""
        ...


def check_resumable(data: Any, name: str) -> None:
    """Raise a ValueError, naming the problem, for data whose place cannot be found again by iterating anew."""
    if isinstance(data, Resumable) or not isinstance(data, DataLoader):
        return
    if data.persistent_workers:
        raise ValueError(
            f"problem {name!r}: its DataLoader has persistent_workers=True. The workers keep their random states from "
            "one pass to the next, so the place in the data cannot be found again after a resume. Leave it False, or "
            "use a loader with a state_dict, such as torchdata's StatefulDataLoader."
        )
    if data.num_workers > 0 and not data.in_order:
        raise ValueError(
            f"problem {name!r}: its DataLoader has in_order=False, so its batches come in another order each time and "
            "the place in them cannot be found again after a resume. Leave it True."
        )


def _generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers hold, each once."""
    if not isinstance(data, DataLoader):
        return []
    sampler = data if data.batch_sampler is None else data.batch_sampler
    holders: list[Any] = [data, data.sampler, data.batch_sampler, *getattr(sampler, "__dict__", {}).values()]
    found = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def place(data: Any) -> Place:
    """Return the states of a loader's own generators and the epoch of its sampler: what `iter` begins from."""
    sampler = data.sampler if isinstance(data, DataLoader) else None
    epoch = sampler.epoch if isinstance(sampler, DistributedSampler) else None
    return {"generators": [g.get_state() for g in _generators(data)], "epoch": epoch}


def put_back(data: Any, found: Mapping[str, Any]) -> None:
    """Put a loader's own generators and its sampler's epoch back to what `place` found."""
    for generator, state in zip(_generators(data), found["generators"], strict=True):
        generator.set_state(state)
    if found["epoch"] is not None:
        data.sampler.set_epoch(found["epoch"])


def same_place(one: Place, other: Place) -> bool:
    """Return whether two places agree."""
    generators: Sequence[tuple[Tensor, Tensor]] = list(zip(one["generators"], other["generators"], strict=True))
    return one["epoch"] == other["epoch"] and all(torch.equal(a, b) for a, b in generators)


def fingerprint(batch: Any) -> str:
    """Return a checksum of a batch's tensors, arrays, numbers and strings."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu()
            leaf = leaf if leaf.layout is torch.strided else leaf.to_dense()
            leaf = leaf.contiguous().reshape(-1).view(torch.uint8).numpy() if leaf.numel() else leaf.shape
        if isinstance(leaf, np.ndarray):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        elif isinstance(leaf, (int, float, str, bytes, torch.Size)):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
