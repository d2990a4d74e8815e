"""Losses whose derivatives are taken at a multiple of their size, so that float16 inside does not lose them.

`ScaledLoss` is the loss; `DynamicScale` and `Scale` say how large the multiple is as an engine goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._functional import Loss, scalar
from hypergrad.composite import Composite


@dataclass(frozen=True)
class ScaledLoss:
    """A loss with the values and derivatives of another; inside, each backward pass carries `scale` times as much.

    Gradients, products and mixed products of any order are those of `loss`. In a backward pass through what `loss`
    computes, every cotangent is multiplied by `scale`, and divided by it where the pass leaves at `lower` or `upper`.
    `torch.autocast` with float16 needs it, where entries below 6e-8 are zero.
    The vector of a product enters as large as it is: where its entries are below that, or above 65504, use bfloat16.

    Cost: one more copy of the parameters in each evaluation.

    Args:
        loss: function (lower, upper, batch) -> scalar.
        scale: what derivatives are multiplied by inside, > 0; powers of two round nothing. 2.0**12 is a good first
            try. Too large a scale overflows, and gradients are then not finite.

    Raises:
        ValueError: for a scale out of range, or a `Composite`.

    Example:
        >>> import torch, hypergrad as hg
        >>> loss = hg.ScaledLoss(lambda lower, upper, batch: (lower["w"] ** 2).sum(), scale=2.0**12)
        >>> w = torch.ones(2, requires_grad=True)
        >>> torch.autograd.grad(loss({"w": w}, {}, None), w)[0]
        tensor([2., 2.])
    """

    loss: Loss
    scale: float

    def __post_init__(self) -> None:
        """Validate the options."""
        if isinstance(self.loss, Composite) or not callable(self.loss):
            raise ValueError(
                f"ScaledLoss: loss must be a function (lower, upper, batch) -> scalar, got {self.loss!r}. The parts of "
                "a Composite are differentiated one by one, without a scale: pass the whole as one function."
            )
        check_scale(self.scale, "ScaledLoss: scale")

    def __call__(self, lower: Params, upper: Params, batch: Any) -> Tensor:
        """Return the loss."""
        value = self.loss(entered(lower, self.scale), entered(upper, self.scale), batch)
        return left(scalar(value, "the loss"), self.scale)


@dataclass(frozen=True)
class DynamicScale:
    """A scale that follows what float16 can hold, for `Problem(loss_scale=...)`, as `torch.amp.GradScaler`'s does.

    It begins at `initial`. A gradient that is not finite although its loss is has overflowed: that step is left out and
    the scale divided by `factor`; after `interval` steps without that it is multiplied. A hypergradient that overflows
    lowers the scales of all problems that took part. Once a scale is at `smallest` it is no longer to blame, and
    `Engine(on_nonfinite=...)` decides, as it does for a loss that is not finite. All ranks look at the averaged
    gradient, so that they agree; the scale is saved with the problem.

    Cost: on an accelerator, one flag read back for each own step, as `on_nonfinite="skip"` reads it.

    Args:
        initial: the first scale, > 0.
        factor: by which it grows and shrinks, > 1; powers of two round nothing.
        interval: steps without overflow before it grows, >= 1.
        smallest: below which it does not go, > 0 and at most `initial`.

    Raises:
        ValueError: for options out of range.

    Example:
        >>> import hypergrad as hg
        >>> hg.DynamicScale(initial=2.0**12, interval=500).factor
        2.0
    """

    initial: float = 2.0**16
    factor: float = 2.0
    interval: int = 2000
    smallest: float = 1.0

    def __post_init__(self) -> None:
        """Validate the options."""
        check_scale(self.initial, "DynamicScale: initial")
        check_scale(self.smallest, "DynamicScale: smallest")
        check_scale(self.factor, "DynamicScale: factor")
        if self.factor <= 1:
            raise ValueError(f"DynamicScale: factor must be > 1, got {self.factor!r}.")
        if self.smallest > self.initial:
            raise ValueError(
                f"DynamicScale: smallest={self.smallest!r} is above initial={self.initial!r}. Let it be at most that."
            )
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"DynamicScale: interval must be an int >= 1, got {self.interval!r}.")


@dataclass(frozen=True)
class Scale:
    """The present scale of a problem's loss.

    Attributes:
        value: the scale.
        num_good: steps without overflow since it changed.
        rule: how it changes; None for one that stays.
    """

    value: float
    num_good: int = 0
    rule: DynamicScale | None = None

    @staticmethod
    def of(given: float | DynamicScale | None) -> Scale | None:
        """Return where a problem's `loss_scale` begins."""
        if given is None:
            return None
        return Scale(given.initial, rule=given) if isinstance(given, DynamicScale) else Scale(float(given))

    def after_good(self) -> Scale:
        """Return the scale after a step without overflow."""
        if self.rule is None:
            return self
        if self.num_good + 1 < self.rule.interval:
            return replace(self, num_good=self.num_good + 1)
        grown = self.value * self.rule.factor
        return replace(self, value=grown if grown < math.inf else self.value, num_good=0)

    def after_overflow(self) -> Scale | None:
        """Return the scale after an overflow; None if it cannot be lower."""
        if self.rule is None or self.value <= self.rule.smallest:
            return None
        return replace(self, value=max(self.value / self.rule.factor, self.rule.smallest), num_good=0)

    def state_dict(self) -> dict[str, float]:
        """Return what changes."""
        return {"value": self.value, "num_good": self.num_good}

    def at(self, state: Mapping[str, Any]) -> Scale:
        """Return the scale as it was saved; one that stays is what the problem says."""
        if self.rule is None:
            return self
        return replace(self, value=float(state["value"]), num_good=int(state["num_good"]))


def check_compile(loss: Loss | None) -> None:
    """Raise a ValueError if `loss`, whose gradient is to be compiled, is scaled."""
    if isinstance(loss, ScaledLoss):
        raise ValueError(
            "compile=True does not take a scaled loss (ScaledLoss, loss_scale=): torch.compile does not trace its "
            "derivatives. Use compile=False, or bfloat16 without a scale."
        )


def check_scale(scale: object, what: str) -> None:
    """Raise a ValueError unless `scale` is a finite number above zero."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"{what} must be a finite number > 0, such as 2.0**12, got {scale!r}.")


def check_problem_scale(scale: object, what: str) -> None:
    """Raise a ValueError unless `scale` is a scale that stays or one that moves."""
    if isinstance(scale, str):
        raise ValueError(f"{what} must be a finite number > 0, such as 2.0**12, or hg.DynamicScale(), got {scale!r}.")
    if not isinstance(scale, DynamicScale):
        check_scale(scale, what)


def entered(params: Params, scale: float) -> Params:
    """Return `params` as a scaled loss sees them: derivatives that pass back through here are divided by `scale`."""
    return {name: _Enter.apply(p, 1.0, scale) for name, p in params.items()}  # type: ignore[no-untyped-call]


def left(value: Tensor, scale: float) -> Tensor:
    """Return a scaled loss's value as others see it: cotangents that come in here are multiplied by `scale`."""
    outside: Tensor = _Leave.apply(value, 1.0, scale)  # type: ignore[no-untyped-call]
    return outside


# Inside, a cotangent is `scale` times the true one. So what enters as f x has the derivative that leaves as (f / scale)
# times the inner cotangent, and what leaves as f x one that enters as (f scale) times the outer cotangent. Each is the
# other's derivative, which makes all of it right to any order.


class _Times(torch.autograd.Function):
    """`factor` times a tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float, _scale: float) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.factor, ctx.scale = inputs[1:]


class _Enter(_Times):
    """Into a scaled loss."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        return _Leave.apply(cotangents[0], ctx.factor / ctx.scale, ctx.scale), None, None  # type: ignore[no-untyped-call]


class _Leave(_Times):
    """Out of a scaled loss."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        return _Enter.apply(cotangents[0], ctx.factor * ctx.scale, ctx.scale), None, None  # type: ignore[no-untyped-call]
