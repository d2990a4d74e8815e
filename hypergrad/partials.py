"""A loss with its partial derivatives, and their means: over micro-batches, and over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hypergrad._shards import is_shard
from hypergrad.distributed import Ranks, Signals
from hypergrad.distributed.launch import gather_objects

Leaf = tuple[str, str]
"""A problem's name, and the name of one of its parameters."""


@dataclass(frozen=True)
class Partials:
    """What one evaluation of a problem's loss gave.

    Attributes:
        value: the loss.
        metrics: what it returned beside.
        found: its derivatives; a parameter that it does not depend on is left out.
    """

    value: Tensor
    metrics: dict[str, Any]
    found: dict[Leaf, Tensor]


def mean(parts: Sequence[Partials]) -> Partials:
    """Return the mean over micro-batches; a derivative that is left out counts as zero."""
    if len(parts) == 1:
        return parts[0]
    count = len(parts)
    found: dict[Leaf, Tensor] = {}
    for part in parts:
        for key, g in part.found.items():
            found[key] = found[key] + g if key in found else g
    return Partials(
        sum((p.value.detach() for p in parts[1:]), parts[0].value.detach()) / count,
        mean_metrics([p.metrics for p in parts]),
        {key: g / count for key, g in found.items()},
    )


def mean_metrics(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each metric's mean over the micro-batches that have it; its last value where it is not a number."""
    collected: dict[str, list[Any]] = {}
    for metrics in several:
        for name, metric in metrics.items():
            collected.setdefault(name, []).append(metric)
    return {name: _mean(values) for name, values in collected.items()}


def _mean(values: Sequence[Any]) -> Any:
    if all(isinstance(m, int | float) or (isinstance(m, Tensor) and m.is_floating_point()) for m in values):
        return sum(values[1:], values[0]) / len(values)
    return values[-1]


class WrittenBuffers:
    """A module's floating-point buffers, and which of them have been written: in place, or assigned anew."""

    def __init__(self, module: nn.Module) -> None:
        """Find them; `begin` says from when on writing counts."""
        self._places = {
            f"{prefix}.{name}" if prefix else name: (owner, name)
            for prefix, owner in module.named_modules()
            for name in owner._buffers
        }
        self._before: dict[str, tuple[Tensor, int]] = {}

    def begin(self) -> None:
        """Forget what has been written."""
        self._before = self._marks()

    def names(self) -> list[str]:
        """Return the names of those written since."""
        before = self._before
        return [
            name
            for name, (buffer, version) in self._marks().items()
            if name not in before
            or before[name][0] is not buffer
            or before[name][1] != version
            or _normalizes(self._places[name][0])
        ]

    def values(self, names: Sequence[str]) -> list[Tensor]:
        """Return the present tensors of these names."""
        present = {key: buffer for key, (buffer, _) in self._marks().items()}
        return [present[key] for key in names]

    def _marks(self) -> dict[str, tuple[Tensor, int]]:
        found = ((key, owner._buffers.get(name)) for key, (owner, name) in self._places.items())
        return {key: (b, b._version) for key, b in found if b is not None and b.is_floating_point()}


def _normalizes(module: nn.Module) -> bool:
    """Return whether the module writes its running statistics when called, which leaves no mark."""
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


class AcrossRanks:
    """Means of one problem's partials over the ranks, by one all-reduce each."""

    def __init__(self, ranks: Ranks, module: nn.Module) -> None:
        """Begin without knowing metrics and buffers."""
        self._ranks, self._buffers = ranks, WrittenBuffers(module)
        self._metric_names: list[str] = []
        """Those that are averaged: what any rank returned the first time."""
        self._written: list[str] | None = None
        """The buffers that are averaged: what the evaluation has written on any rank so far."""

    def begin(self) -> None:
        """Take note of the buffers; an evaluation comes next."""
        self._buffers.begin()

    def mean(self, own: Partials, like: Mapping[Leaf, Tensor], signals: Signals | None) -> Partials:
        """Return the mean over ranks; the buffers written get theirs, in place. Derivatives keep their graph.

        Args:
            own: this rank's.
            like: the parameters whose derivatives are averaged, with their shapes.
            signals: of the top level, which travel along.
        """
        value, metrics = own.value, own.metrics
        numbers = {
            key: torch.as_tensor(m, dtype=torch.float64 if value.dtype is torch.float64 else torch.float32).to(value)
            for key, m in metrics.items()
            if isinstance(m, int | float) or (isinstance(m, Tensor) and m.numel() == 1 and not m.is_complex())
        }
        written = self._buffers.names()
        if self._written is None or not set(written) <= set(self._written):
            told = gather_objects(self._ranks, (list(numbers), written))
            if self._written is None:
                self._metric_names = sorted(set[str]().union(*(names for names, _ in told)))
            self._written = sorted(set(self._written or []).union(*(names for _, names in told)))
        known, buffers = self._metric_names, self._buffers.values(self._written)
        slots = [numbers[key].detach().reshape(()) if key in numbers else value.new_zeros(()) for key in known]
        given = torch.tensor([float(key in numbers) for key in known], device=value.device)
        also = [value.detach(), *slots, given, *buffers]
        if signals is not None:
            also.append(signals.send(value.device))
        whole = {pair: like[pair] for pair in like if not is_shard(like[pair])}
        sharded = {pair: g for pair, g in own.found.items() if pair in like and pair not in whole}  # means already
        names = {".".join(pair): pair for pair in whole}
        local = {text: own.found[pair] for text, pair in names.items() if pair in own.found}
        averaged, means = self._ranks.average_params(local, {text: like[pair] for text, pair in names.items()}, also)
        means = [m.detach() for m in means]
        if signals is not None:
            *means, sent = means
            signals.receive(sent)
        value, *means = means
        slots, given, means = means[: len(known)], means[len(known)], means[len(known) + 1 :]
        with torch.no_grad():
            for buffer, average in zip(buffers, means, strict=True):
                buffer.copy_(average)
        for key, total, share in zip(known, slots, given.unbind(), strict=True):
            if key in numbers or (key not in metrics and float(share) > 0):  # read only where this rank lacks it
                metrics = metrics | {key: total / share}
        return Partials(value, metrics, sharded | {names[text]: g for text, g in averaged.items()})
