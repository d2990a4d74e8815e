"""A loss with its partial derivatives, and their means: over micro-batches, and over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


class AcrossRanks:
    """Means of one problem's partials over the ranks, by one all-reduce each."""

    def __init__(self, ranks: Ranks) -> None:
        """Begin without knowing the metrics."""
        self._ranks = ranks
        self._metric_names: list[str] | None = None
        """Those that are averaged: what any rank returned the first time."""

    def mean(
        self, own: Partials, like: Mapping[Leaf, Tensor], buffers: Sequence[Tensor], signals: Signals | None
    ) -> Partials:
        """Return the mean over ranks; `buffers` get theirs, and `signals` travel along. Derivatives keep their graph.

        Args:
            own: this rank's.
            like: the parameters whose derivatives are averaged, with their shapes.
            buffers: that the evaluation has written, averaged in place.
            signals: of the top level.
        """
        value, metrics = own.value, own.metrics
        numbers = {
            key: torch.as_tensor(m, dtype=torch.float64 if value.dtype is torch.float64 else torch.float32).to(value)
            for key, m in metrics.items()
            if isinstance(m, int | float) or (isinstance(m, Tensor) and m.numel() == 1 and not m.is_complex())
        }
        if self._metric_names is None:
            self._metric_names = sorted(set[str]().union(*gather_objects(self._ranks, list(numbers))))
        known = self._metric_names
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
