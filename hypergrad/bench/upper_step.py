"""One upper step of two levels that several processes share: what it sends, and the most that tensors hold then."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg
from hypergrad.costs.communication import Collective, Message, Messages

STEPS = 4
"""Own steps of the lower level."""

METHODS: dict[str, hg.Method] = {
    "Implicit(CG(5))": hg.Implicit(hg.CG(5, rtol=0.0), damping=1.0),
    "Implicit(Neumann(5))": hg.Implicit(hg.Neumann(5, step_size=0.01), damping=1.0),
    "Unrolled()": hg.Unrolled(),
    "Unrolled(checkpoint='sqrt')": hg.Unrolled(checkpoint="sqrt"),
    "Unrolled(retain=1)": hg.Unrolled(retain=1.0),
    "OneStep()": hg.OneStep(),
    "SOBA()": hg.SOBA(),
    "AmIGO(steps=5)": hg.AmIGO(steps=5),
    "StocBiO(num_products=5)": hg.StocBiO(num_products=5),
    "FiniteDifference()": hg.FiniteDifference(),
    "SAMA()": hg.SAMA(),
    "Penalty(steps=5)": hg.Penalty(steps=5),
    "F2SA(steps=5)": hg.F2SA(steps=5),
    "BOME()": hg.BOME(),
    "Unrolled() from a start (MAML)": hg.Unrolled(),
    "Unrolled(truncate=0) from a start (FOMAML)": hg.Unrolled(truncate=0),
    "Reptile()": hg.Reptile(),
}
"""`ForwardUnrolled` is left out: its cost grows with the number of upper parameters."""

STARTS = frozenset(name for name in METHODS if "start" in name or name == "Reptile()")
"""Where the lower level begins at the upper one's parameters, which are then as many."""

ON_SHARDS = tuple(name for name, method in METHODS.items() if method.serves_shards)


@dataclass(frozen=True)
class Size:
    """A lower module of `blocks` square layers of `width`; upper parameters are `width`, or as many as these."""

    width: int
    blocks: int

    @property
    def lower(self) -> int:
        """Return how many lower parameters there are."""
        return self.blocks * self.width**2


@dataclass(frozen=True)
class Counted:
    """What one rank sent in one upper step.

    Attributes:
        messages: how many collectives of each kind.
        sent_bytes: in all of them if they are rings, every word included.
        num_products: as the statistics say; 0 where they say none.
    """

    messages: Messages
    sent_bytes: float
    num_products: int


def build(name: str, size: Size, *, sharded: bool) -> hg.Engine:
    """Return an engine over all processes of `torch.distributed`, its larger modules sharded if asked."""
    torch.manual_seed(0)
    starts = name in STARTS
    net = _layers(size)
    top: nn.Module = _layers(size) if starts else nn.Linear(size.width, 1, bias=False)
    if sharded:
        for module in (net, top) if starts else (net,):
            for layer in module.children():
                fully_shard(layer)
            fully_shard(module)
    batch = 0.1 * torch.randn(8, size.width)

    def lower_loss(models: Any, x: Tensor) -> Tensor:
        fit: Tensor = (models.net(x) - x).square().mean()
        return fit if starts else fit * models.top(x).sigmoid().mean()

    def upper_loss(models: Any, x: Tensor) -> Tensor:
        fit: Tensor = models.net(x).square().mean()
        return fit if starts else fit + 0.01 * models.top.weight.square().sum()

    def start(models: Any) -> dict[str, Tensor]:
        return dict(models.top.named_parameters())

    problems = [
        hg.Problem(
            "net",
            module=net,
            loss=lower_loss,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
            data=[batch],
            steps=STEPS,
            method=METHODS[name],
            start=start if starts else None,
        ),
        hg.Problem(
            "top",
            module=top,
            loss=upper_loss,
            optimizer=torch.optim.SGD(top.parameters(), lr=0.01),
            data=[batch],
        ),
    ]
    return hg.Engine(problems, product_check=False, distributed=True)


def _layers(size: Size) -> nn.Module:
    return nn.Sequential(*(nn.Linear(size.width, size.width, bias=False) for _ in range(size.blocks)))


def counted(name: str, size: Size, *, sharded: bool) -> Counted:
    """Return what this rank sends in the second upper step; every rank must call it alike."""
    engine = build(name, size, sharded=sharded)
    engine.step()
    with Listening() as heard:
        record = engine.step()
    assert engine.ranks is not None
    upper = size.lower if name in STARTS else size.width
    return Counted(
        messages=Counter(_message(sent, size, upper, sharded=sharded) for sent in heard.found),
        sent_bytes=sum(Message(c, Fraction(1)).ring_bytes(engine.ranks.size, n, 0) for c, n in heard.found),
        num_products=int(record.get("net.num_products", 0)),
    )


def held_bytes(name: str, size: Size, *, sharded: bool) -> int:
    """Return the most that this rank's tensors hold in an upper step, above what they do between steps."""
    with Weighing() as scales:
        engine = build(name, size, sharded=sharded)
        engine.step()
        gc.collect()
        before = scales.restart()
        engine.step()
    held: int = scales.peak_bytes - before
    return held


def _message(sent: tuple[Collective, int], size: Size, upper: int, *, sharded: bool) -> Message:
    """Return how many vectors a collective of so many bytes holds; what is left over must be a few words."""
    collective, count = sent[0], sent[1] // 4
    if sharded and collective != "all_reduce":
        return Message(collective, Fraction(count, size.lower))
    vectors, rest = divmod(count, size.lower)
    above, words = divmod(rest, size.width)
    if upper == size.lower and vectors:  # as many of both: the outer gradient holds one of each
        vectors, above = (1, vectors - 1) if vectors > 1 else (1, 0)
    assert words < size.width
    return Message(collective, Fraction(vectors), above)


_COLLECTIVES: dict[str, Collective] = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Listening(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every collective of the body: which, and the bytes of the whole that it gathers, reduces or scatters."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[Collective, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        """Run the operation; a collective that is not known fails."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.found.append((_COLLECTIVES[func._opname], max(t.nbytes for t in tensors)))
        return func(*args, **kwargs)


class Weighing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, at every operation of the body, the bytes of all storages made in it that are still alive.

    Storages are asked for their size each time: `fully_shard` empties and fills those of whole parameters. What the
    collectives' own library holds is not seen.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._made: dict[int, Any] = {}

    def restart(self) -> int:
        """Let the peak begin at what is alive now, and return that."""
        self.peak_bytes = self._alive()
        return self.peak_bytes

    def _alive(self) -> int:
        storages = {key: made() for key, made in self._made.items()}
        self._made = {key: self._made[key] for key, storage in storages.items() if storage is not None}
        return sum(storage.nbytes() for storage in storages.values() if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        """Run the operation and count."""
        outcome = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(outcome):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = weakref.ref(storage)
        self.peak_bytes = max(self.peak_bytes, self._alive())
        return outcome
