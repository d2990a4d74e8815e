"""A problem's loss at the modules' present values, with its partial derivatives there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Layout, Params
from hypergrad._tape import refuse_once_differentiable, second_order
from hypergrad.loss_scale import entered, left
from hypergrad.losses import Losses, Surrounded
from hypergrad.network import own
from hypergrad.partials import Leaf, Partials, mean, mean_metrics
from hypergrad.problem import loss_value
from hypergrad.step import Leaves, Step


@dataclass(frozen=True)
class Taped:
    """The loss with its flat gradient on a tape."""

    partials: Partials
    """The gradient stands in `found` under the empty name, before those of parameters it was not expected to have."""
    leaves: Leaves
    """Of the tape: the flat parameters, and the variables of the problems above."""
    reached: frozenset[str]
    """The problem's parameters on which the loss depends."""


class Evaluation:
    """The loss of one problem, evaluated where its modules are; only the problem's own buffers change."""

    def __init__(self, losses: Losses, layout: Layout, unused: Mapping[str, Tensor]) -> None:
        """Evaluate the loss of `losses`.

        Args:
            losses: the problem's.
            layout: of the variables that the loss uses.
            unused: the problem's other variables.
        """
        self._losses, self._layout, self._unused = losses, layout, unused
        self._name = losses.name

    def partials(self, batch: Any, leaves: Mapping[Leaf, Tensor]) -> Partials:
        """Return loss, metrics and derivatives, averaged over micro-batches; parameters it does not reach left out."""
        return mean([self._of_part(part, leaves) for part in self._losses.parts(batch)])

    def _of_part(self, part: Any, leaves: Mapping[Leaf, Tensor]) -> Partials:
        losses = self._losses
        if losses.in_place is None:
            value, metrics = self._value(part, {})
            scale = None if losses.scale is None else losses.scale.value
            bar = None if scale is None else torch.full_like(value, scale)
            self._check_trains(leaves)
            tensors = torch.autograd.grad(value, list(leaves.values()), bar, allow_unused=True)
            given = {key: g for key, g in zip(leaves, tensors, strict=True) if g is not None}
            return Partials(value, metrics, given if scale is None else {key: g / scale for key, g in given.items()})
        value, metrics, grads = losses.in_place.gradients(lambda: self._value(part, {}), {}, self._name)
        return Partials(value, metrics, {key: grads[".".join(key)] for key in leaves if ".".join(key) in grads})

    def taped(self, step: Step, batch: Any) -> Taped:
        """Return the same at where `step` begins, with the gradient's graph kept.

        With ranks it is this rank's own, of which their mean is the gradient.
        """
        assert step.flat is not None
        losses, graph = self._losses, self._losses.graph
        leaf = step.flat.detach().requires_grad_()
        above: Params = {}
        for name in graph.depends(self._name):
            above.update({key: v.requires_grad_() for key, v in losses.network.variables(name).items()})
        flat, upper = leaf, above
        if losses.ranks is not None:  # one node for both: a product sends one message for the two of them
            flat, *tensors = losses.ranks.share([leaf, *above.values()])
            upper = dict(zip(above, tensors, strict=True))
        written = graph.reads[self._name].written  # by this call, in the module itself
        seen = step.batch.constants if isinstance(step.batch, Surrounded) else {}
        seen = {key: value for key, value in seen.items() if key not in written}
        lower = self._layout.unravel(flat)
        overrides = seen | own(self._name, lower) | upper
        scale = None if losses.scale is None else losses.scale.value
        if scale is not None:
            overrides = entered(overrides, scale)
        with second_order():
            several = [self._value(part, overrides, written) for part in losses.parts(batch)]
            value = torch.stack([value for value, _ in several]).mean() if len(several) > 1 else several[0][0]
            if scale is not None:
                value = left(value, scale)
            inputs = {**lower, **self._unused}
            seed = torch.ones_like(value).requires_grad_()  # see `gradient`
            slopes = torch.autograd.grad(value, list(inputs.values()), seed, create_graph=True, allow_unused=True)
            found = {key: g for key, g in zip(inputs, slopes, strict=True) if g is not None}
            taped = self._layout.ravel({key: found.get(key, torch.zeros_like(w)) for key, w in lower.items()})
        refuse_once_differentiable(taped)
        metrics = mean_metrics([metrics for _, metrics in several]) if len(several) > 1 else several[0][1]
        late = {(self._name, key): g for key, g in found.items() if key in self._unused}
        return Taped(Partials(value, metrics, {(self._name, ""): taped} | late), (leaf, above), frozenset(found))

    def _value(self, batch: Any, overrides: Params, apart: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        name, problem = self._name, self._losses.problem
        value, metrics = self._losses.network.call(
            lambda models: loss_value(problem.loss, models, batch, name),
            overrides,
            reader=name,
            owner=name,
            apart=apart,
        )
        if not value.requires_grad:
            raise ValueError(
                f"problem {name!r}: its loss carries no gradient; do not detach it or compute it under no_grad."
            )
        return value, metrics

    def _check_trains(self, leaves: Mapping[Leaf, Tensor]) -> None:
        """Raise a ValueError if a variable has been frozen since the engine was built."""
        frozen = [f"{name}.{key}" for (name, key), p in leaves.items() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"problem {self._name!r}: {frozen} do not require gradients any more. What trains is settled when the "
                "engine is built: build another one."
            )
