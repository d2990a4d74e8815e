"""A problem's losses as pure functions of parameters, which methods may differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._flat import Params
from hypergrad._functional import Loss
from hypergrad.averaged import Averaged
from hypergrad.composite import Composite
from hypergrad.distributed import Ranks
from hypergrad.graph import Graph
from hypergrad.in_place import InPlace, ShardedLoss
from hypergrad.loss_scale import Scale, ScaledLoss
from hypergrad.methods import ResponseMethod, best_response
from hypergrad.network import Function, Network, own
from hypergrad.problem import Problem, criterion_value, loss_value, penalty_value
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Surrounded:
    """A batch together with what the other levels were when it was seen."""

    batch: Any
    records: Mapping[str, Trajectory]
    """The runs of the lower levels that respond."""
    constants: Params
    """The variables of problems that it sees as constants and that move on before its run is differentiated."""


pytree.register_pytree_node(
    Surrounded, lambda s: ([s.batch, s.records, s.constants], None), lambda values, _: Surrounded(*values)
)


class Losses:
    """Functions (lower, upper, batch) -> scalar made of one problem's loss and response.

    Parameters of other problems are named "problem.parameter" in `upper`; levels below that respond do so inside.
    """

    def __init__(
        self, problem: Problem, graph: Graph, network: Network, ranks: Ranks | None, in_place: InPlace | None
    ) -> None:
        """Read what they are made of; `ranks` share each batch, `in_place` evaluates sharded modules."""
        self.problem, self.graph, self.network = problem, graph, network
        self.ranks, self.in_place = ranks, in_place
        self.name = problem.name
        self.scale = Scale.of(problem.loss_scale)
        """By what the derivatives of the loss are multiplied inside it at present."""

    @cached_property
    def nested(self) -> list[str]:
        """The levels below that respond inside the loss, lowest first."""
        return self.graph.below(self.name)

    @cached_property
    def reruns(self) -> bool:
        """Whether a method evaluates the loss away from where it was recorded, so that levels below run again."""
        return self.graph.is_perturbed(self.name)

    def pure(self, loss: Any) -> Loss:
        """Return a problem's loss as a pure function (lower, upper, batch), its lower levels responding inside."""
        if isinstance(loss, Composite) and not self.nested:
            return self._composite(loss)

        def value(lower: Params, upper: Params, batch: Any) -> Tensor:
            overrides = own(self.name, lower) | upper
            if isinstance(batch, Surrounded):
                overrides = self._respond(dict(batch.constants) | overrides, batch.records)
                batch = batch.batch
            scalar: Tensor = self.call(lambda models: loss_value(loss, models, batch, self.name)[0], overrides)
            return scalar

        return self._scaled(value)

    def _scaled(self, loss: Loss) -> Loss:
        """Return a loss of this problem with its derivatives scaled inside, as is right then, if the problem asks."""
        if self.scale is None:
            return loss

        def value(lower: Params, upper: Params, batch: Any) -> Tensor:
            assert self.scale is not None
            return ScaledLoss(loss, self.scale.value)(lower, upper, batch)

        return value

    def as_loss(self, loss: Any) -> Loss:
        """Return a problem's loss as a function (lower, upper, batch) that methods may differentiate."""
        return self.averaged(self.pure(loss)) if self.in_place is None else self._sharded(loss, self.name)

    def as_upper_loss(self, name: str) -> Loss:
        """Return this problem's loss as a function of the variables of `name`, below it, of others and of a batch."""
        if self.in_place is not None:
            return self._sharded(self.problem.loss, name)

        def value(lower: Params, above: Params, batch: Any) -> Tensor:
            scalar: Tensor = self.call(
                lambda models: loss_value(self.problem.loss, models, batch, self.name)[0], own(name, lower) | above
            )
            return scalar

        return self.averaged(self._scaled(value))

    def _sharded(self, loss: Any, name: str) -> Loss:
        """Return a loss of this problem evaluated in place, as a function of the variables of `name` and of others."""
        assert self.in_place is not None

        def value(batch: Any) -> Tensor:
            scalar: Tensor = self.call(lambda models: loss_value(loss, models, batch, self.name)[0])
            return scalar

        def unwrap(batch: Any) -> tuple[Any, Params]:
            return (batch.batch, dict(batch.constants)) if isinstance(batch, Surrounded) else (batch, {})

        return ShardedLoss(self.in_place, name, self.name, value, self.parts, unwrap)

    def averaged(self, loss: Loss) -> Loss:
        """Return a loss of this problem as the mean over its micro-batches and over the ranks."""
        if self.ranks is None and self.problem.micro_batches == 1:
            return loss
        return Averaged(loss, self.problem.micro_batches, self.ranks, self._split)

    def parts(self, batch: Any) -> list[Any]:
        """Return the micro-batches of a batch."""
        count = self.problem.micro_batches
        return self._split(batch, count) if count > 1 else [batch]

    def _split(self, batch: Any, count: int) -> list[Any]:
        if isinstance(batch, Surrounded):
            return [replace(batch, batch=part) for part in self.problem.parts(batch.batch, count)]
        return list(self.problem.parts(batch, count))

    def call(self, function: Function, overrides: Params | None = None) -> Any:
        """Return function(models), as this problem's functions see them; no buffer changes."""
        return self.network.call(function, overrides, reader=self.name)

    def _composite(self, loss: Composite) -> Composite:
        """Return this problem's `Composite` as one over (lower, upper, batch), for Gauss-Newton products."""

        def call(function: Callable[[Any, Any], Any], overrides: Params, batch: Any) -> Tensor:
            if isinstance(batch, Surrounded):
                overrides, batch = dict(batch.constants) | overrides, batch.batch
            value: Tensor = self.call(lambda models: function(models, batch), overrides)
            return value

        def outputs(lower: Params, upper: Params, batch: Any) -> Tensor:
            return call(loss.outputs, own(self.name, lower) | upper, batch)

        def criterion(z: Tensor, upper: Params, batch: Any) -> Tensor:
            return call(lambda models, part: criterion_value(loss, z, models, part), upper, batch)

        def penalty(lower: Params, upper: Params, batch: Any) -> Tensor:
            return call(partial(penalty_value, loss), own(self.name, lower) | upper, batch)

        return Composite(outputs, criterion, None if loss.penalty is None else penalty)

    def _respond(self, overrides: Params, records: Mapping[str, Trajectory]) -> Params:
        """Return `overrides` with the responses of the lower levels, highest first, put in."""
        for other in reversed(self.nested):
            record = records[other]
            problem = self.graph.problems[other]
            method = problem.method
            targets = self.graph.depends(other)
            upper = {key: value for key, value in overrides.items() if key.split(".", 1)[0] in targets}
            if self.graph.partial_hessian or not isinstance(method, ResponseMethod) or not upper:
                overrides = overrides | own(other, record.end)
                continue
            if self.reruns:
                record = record.again(upper)
            response = best_response(record, upper, method=method, throw=False)
            if self.ranks is not None:
                response = self.ranks.share_params(response)
            overrides = overrides | own(other, response)
        return overrides
