"""What a hypergradient method is.

A `ResponseMethod` is a VJP rule for the best response upper -> lower*(upper): given a cotangent of the lower solution
it returns one of the upper parameters. Rules chain along a graph of levels. A method without such a rule implements the
wider `Method` alone: d(upper loss)/d(upper), whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._autograd import all_finite, as_leaves, by_autograd, grads, is_connected, leaf
from hypergrad._flat import Params
from hypergrad._functional import in_transform, scalar
from hypergrad._result import Result, Stats
from hypergrad._tape import named
from hypergrad._untouched import going_on_from
from hypergrad.averaged import Averaged, over_parts
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory

UpperLoss = Callable[[Params, Params, Any], Tensor]


@dataclass(frozen=True)
class Pulled:
    """What a rule returns.

    Attributes:
        grad: the cotangent of the upper parameters by name; a name left out counts as zero.
        result: a `Result` code as an integer tensor; None where nothing can break down.
        stats: statistics by name, tensors.
        state: what warm-starts the next call, or None.
    """

    grad: Params
    result: Tensor | None = None
    stats: Stats = field(default_factory=Stats)
    state: Tensor | None = None


@dataclass(frozen=True)
class Total(Pulled):
    """What a method returns for a whole upper loss: `grad` holds the direct term too."""

    value: Tensor = field(default_factory=lambda: torch.zeros(()))


def check_pulled(method: Method, pulled: object, upper: Mapping[str, Tensor], kind: type[Pulled] = Pulled) -> None:
    """Raise a ValueError that names what of `pulled`, which a rule of `method` returned, does not fit `upper`."""
    owner = type(method).__name__
    rule, expected = ("total", "hypergrad.methods.Total") if kind is Total else ("vjp", "hypergrad.Pulled")
    if not isinstance(pulled, kind):
        raise ValueError(f"{owner}.{rule} must return a {expected}(grad, ...), got {type(pulled).__name__}.")
    check_cotangents(method, pulled.grad, upper, rule)


def check_cotangents(method: Method, grad: object, upper: Mapping[str, Tensor], rule: str) -> None:
    """Raise a ValueError that names the entry of `grad`, returned by `method`, that is none of `upper`'s."""
    owner = type(method).__name__
    if not isinstance(grad, Mapping):
        raise ValueError(f"{owner}.{rule} must return its gradients as a dict by name, got {type(grad).__name__}.")
    for name, g in grad.items():
        if name not in upper:
            raise ValueError(
                f"{owner}.{rule} returned a gradient for {name!r}, which is none of upper={list(upper)}. Return them "
                "by the names in `upper`; one left out counts as zero."
            )
        if not isinstance(g, Tensor) or g.shape != upper[name].shape:
            found = f"shape {tuple(g.shape)}" if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(
                f"{owner}.{rule} returned a gradient for {name!r} of {found}; expected a Tensor of the shape of "
                f"upper[{name!r}], {tuple(upper[name].shape)}."
            )


class Method(ABC):
    """d(upper loss)/d(upper) given the record of a lower run."""

    differentiable: ClassVar[bool] = False
    """Whether the rule can itself be differentiated, as a level with levels below needs."""
    perturbs: ClassVar[bool] = False
    """Whether the lower loss is evaluated away from the recorded points."""

    @property
    def serves_shards(self) -> bool:
        """Return whether parameters may be sharded: no second derivative, sums over entries by `Layout.sum` alone."""
        return False

    @property
    def second_order(self) -> bool:
        """Return whether second derivatives of the lower loss are taken."""
        return not self.perturbs

    @property
    def differentiates_optimizer(self) -> bool:
        """Return whether more of the lower optimizer is read than its weight decay; if not, any class will do."""
        return True

    @property
    def fixed_point(self) -> Literal["refuse", "ignore"] | None:
        """Return None if any run will do; else the run must end at a fixed point of loss and coupled weight decay.

        The word says what is to be done about decoupled decay, which moves that point.
        """
        return None

    @property
    def num_batches(self) -> int | None:
        """Return how many of the run's last steps are read; None for all, or where that is not known."""
        return None

    @property
    def num_fresh(self) -> int:
        """Return how many batches an engine draws for this method alone after each lower run; 0 to read the run's."""
        return 0

    def recording(self, num_steps: int) -> Recording:  # noqa: ARG002 - for methods that read less
        """Return which states of a run of `num_steps` this method reads."""
        return Recording()

    def check_functional(self) -> None:  # noqa: B027 - nothing to check is a fine answer
        """Raise a ValueError for options that only an engine can serve."""

    @abstractmethod
    def total(
        self, upper_loss: UpperLoss, trajectory: Trajectory, upper: Params, batch: Any, state: Tensor | None
    ) -> Total:
        """Return the upper loss and its derivative in `upper`, with the lower level responding."""


class ResponseMethod(Method):
    """A method that is a VJP rule for the best response. Write `vjp`; the rest follows."""

    @abstractmethod
    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return (d lower*/d upper)^T cotangent.

        Args:
            trajectory: the lower run or solution.
            upper: the upper parameters it was made with, detached.
            cotangent: over the lower solution, shape (trajectory.layout.size,).
            state: `Pulled.state` of an earlier call, or None.
        """

    def differentiable_vjp(self, trajectory: Trajectory, end: Tensor, upper: Params, cotangent: Tensor) -> Params:  # noqa: ARG002
        """Return the same cotangent as a differentiable function of `end`, `upper` and `cotangent`."""
        raise ValueError(
            f"{type(self).__name__} has no differentiable rule, which second derivatives through the best response "
            "need. Use hg.Unrolled or hg.Implicit for that level, or Engine(partial_hessian=True)."
        )

    def total(
        self, upper_loss: UpperLoss, trajectory: Trajectory, upper: Params, batch: Any, state: Tensor | None
    ) -> Total:
        """Return the direct derivative of the upper loss plus the rule's pullback of its lower one."""
        value, cotangent, direct = partials(upper_loss, trajectory, upper, batch)
        with going_on_from(trajectory.buffers):
            pulled = self.vjp(trajectory, upper, cotangent, state)
        check_pulled(self, pulled, upper)
        if not direct and not pulled.grad:
            raise ValueError(
                f"nothing depends on upper={list(upper)}: neither the upper loss nor the lower level reads it. "
                "Use the `upper` argument inside the losses, and do not detach it."
            )
        grad = {name: _sum(u, direct.get(name), pulled.grad.get(name)) for name, u in upper.items()}
        return Total(grad, pulled.result, pulled.stats, pulled.state, value)


def partials(upper_loss: UpperLoss, trajectory: Trajectory, upper: Params, batch: Any) -> tuple[Tensor, Tensor, Params]:
    """Return the upper loss at the lower solution, and its partial derivatives in the flat lower and in `upper`."""
    if isinstance(upper_loss, Averaged) and not in_transform():
        return _averaged_partials(upper_loss, trajectory, upper, batch)

    def loss(flat: Tensor, u: Params) -> Tensor:
        return scalar(upper_loss(trajectory.named(flat), u, batch), "the upper loss")

    if not by_autograd():
        (cotangent, direct), value = torch.func.grad_and_value(loss, argnums=(0, 1))(trajectory.end_flat, upper)
        return value, cotangent, direct
    with torch.enable_grad():
        flat = leaf(trajectory.end_flat)
        leaves = as_leaves(upper)
        value = loss(flat, leaves)
        if not is_connected(value):
            raise ValueError(
                "the upper loss depends neither on the lower nor on the upper parameters it receives: its value "
                "carries no gradient. Compute it from its arguments, without .detach(), .item() or torch.no_grad()."
            )
        slope, *others = grads([value], [flat, *leaves.values()])
    cotangent = torch.zeros_like(flat) if slope is None else slope
    return value.detach(), cotangent, named(leaves, others)


def _averaged_partials(
    upper_loss: Averaged, trajectory: Trajectory, upper: Params, batch: Any
) -> tuple[Tensor, Tensor, Params]:
    """Return the same for an average: value and both derivatives in one all-reduce."""

    def of_part(loss: UpperLoss, part: Any) -> Params:
        value, cotangent, direct = partials(loss, trajectory, upper, part)
        return {"value": value, "lower": cotangent, **{f"upper.{name}": g for name, g in direct.items()}}

    found = over_parts(upper_loss, batch, of_part)
    value, cotangent = found.pop("value"), found.pop("lower")
    if upper_loss.ranks is not None:
        like = {f"upper.{name}": u for name, u in upper.items()}
        found, (value, cotangent) = upper_loss.ranks.average_params(found, like, [value, cotangent])
    return value, cotangent, {name.removeprefix("upper."): g for name, g in found.items()}


def _sum(like: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        only = second if first is None else first
        return torch.zeros_like(like) if only is None else only
    return first + second


def finite_code(result: Tensor | None, value: Tensor, grad: Params) -> Tensor:
    """Return `result`, or NON_FINITE where the value or the gradient is not finite and `result` is no breakdown."""
    finite = all_finite([value, *grad.values()])
    code = Result.SUCCESS.tensor(value.device) if result is None else result
    unexplained = ~finite & (code < int(Result.NEGATIVE_CURVATURE))
    return torch.where(unexplained, Result.NON_FINITE.tensor(value.device), code)
