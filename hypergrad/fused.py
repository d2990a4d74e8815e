"""Whole lower steps compiled, gradient and update in one: a function forwards and one back, for all steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad._compiled import Compile, cached, to_compile
from hypergrad._compiled_check import same
from hypergrad._flat import Params
from hypergrad._functional import Loss, scalar
from hypergrad._replayed import Calls, Compiled
from hypergrad._tape import vjp
from hypergrad.averaged import Averaged
from hypergrad.loss_scale import check_compile
from hypergrad.optim import Bound, Optimizer, State
from hypergrad.step import Recipe, States, Step

Cotangents = tuple[Tensor, States, Params]
_COUNT = "step"
_Keys = tuple[tuple[str, ...], ...]


def fused(recipe: Recipe, states: States, upper: Params, compile: Compile) -> Fused | None:
    """Return the compiled steps of a run, or None where gradient and update are not compiled as one.

    That is where hyperparameters are functions of `upper`, parameters are projected, gradients averaged over parts, or
    an optimizer's options are tensors.
    """
    if not to_compile("Unrolled", compile):
        return None
    whole = not recipe.hyper and recipe.project is None and not isinstance(recipe.loss, Averaged)
    counted = all(
        key != _COUNT and isinstance(v, Tensor) or key == _COUNT and isinstance(v, int)
        for state in states
        for key, v in state.items()
    )
    plain = all("lr" in optimizer.accepts() and _is_plain(optimizer) for optimizer, _ in recipe.optimizer.groups)
    return Fused(recipe, states, compile) if whole and counted and plain and upper else None


class Fused:
    """The steps of one run, each taken and pulled back by one compiled function."""

    def __init__(self, recipe: Recipe, states: States, compile: Compile) -> None:
        """Find the compiled functions, or make them."""
        check_compile(recipe.loss)
        self._keys = tuple(tuple(state) for state in states)
        groups = tuple((replace(optimizer, lr=0.0), names) for optimizer, names in recipe.optimizer.groups)
        key = "fused", recipe.layout, groups, recipe.clip_norm, recipe.clip_value, self._keys, compile
        maps: _Maps = cached(recipe.loss, key, lambda: _Maps(recipe, self._keys, compile))
        self._compile = compile
        self._step, self._pull = Calls(maps.step), Calls(maps.pull)

    def advance(self, step: Step, flat: Tensor, states: States, upper: Params) -> tuple[Tensor, States]:
        """Return what `step` makes of (flat, states)."""

        def is_right(value: Any) -> bool:
            (expected, _), found = step.advance(flat, states, upper), value[0]
            moved, place = (expected - flat).norm(), 10 * flat.norm()
            return same(found, expected, size=moved, noise=torch.zeros_like(moved), floor=place, compile=self._compile)

        value = self._step(step.recipe.loss, self._at(step, flat, states), (upper, step.batch), is_right)
        if value is None:
            return step.advance(flat, states, upper)
        new, tensors = value
        return new, _rebuilt(self._keys, tensors, [_count(state) + 1 for state in states])

    def pull(
        self, step: Step, flat: Tensor, states: States, upper: Params, cotangents: tuple[Tensor, States]
    ) -> Cotangents:
        """Return the cotangents of (flat, states, upper) from those of what `step` makes of them."""
        bar, bars = cotangents

        def reads(value: Any) -> tuple[str, ...] | None:
            """Return the upper parameters that the loss reads, None where `value` is wrong."""
            eager = step.pull(flat, states, upper, cotangents)
            tripled = tuple({k: 3 * t if isinstance(t, Tensor) else t for k, t in s.items()} for s in bars)
            again = step.pull(flat, states, upper, (3 * bar, tripled))
            right, thrice, direct = (
                _joined(w, _tensors(self._keys, s), u, upper) for w, s, u in (eager, again, (bar, bars, {}))
            )
            found, noise = _joined(value[0], value[1], value[2], upper), thrice / 3 - right
            curved = (right - direct).norm()  # what a wrong Hessian product shows up in
            is_right = same(found, right, size=curved, noise=noise.norm(), floor=direct.norm(), compile=self._compile)
            return tuple(eager[2]) if is_right else None

        moving = [*self._at(step, flat, states), bar, *_tensors(self._keys, bars)]
        value, read = self._pull.judged(step.recipe.loss, moving, (upper, step.batch), reads)
        if value is None:
            return step.pull(flat, states, upper, cotangents)
        flat_bar, tensor_bars, upper_bar = value
        new_states = _rebuilt(self._keys, tensor_bars, [_count(state) for state in states])
        return flat_bar, new_states, {name: upper_bar[name] for name in read}

    def _at(self, step: Step, flat: Tensor, states: States) -> list[Tensor]:
        """Return where a step begins, with numbers that change from step to step as tensors."""
        counts = [torch.tensor(_count(state), dtype=torch.float64) for state in states]
        return [*counts, *_rates(step.recipe.optimizer, states), flat, *_tensors(self._keys, states)]


class _Maps:
    """The two compiled functions of one loss, layout and optimizer; neither refers to the loss."""

    def __init__(self, recipe: Recipe, keys: _Keys, compile: Compile) -> None:
        bare, layout = replace(recipe, loss=_absent), recipe.layout

        groups, tensors = len(keys), sum(key != _COUNT for names in keys for key in names)

        def outcome(
            counts: list[Tensor],
            rates: list[Tensor],
            flat: Tensor,
            tensors: list[Tensor],
            upper: Params,
            batch: Any,
            loss: Loss,
        ) -> tuple[Tensor, list[Tensor]]:
            def value(w: Tensor) -> Tensor:
                return scalar(loss(layout.unravel(w), upper, batch), "the lower loss")

            grad = torch.func.grad(value)(flat)
            new, states = bare.updated(flat, grad, _rebuilt(keys, tensors, counts), {"lr": rates})
            return new, _tensors(keys, states)

        def step(moving: list[Tensor], upper: Params, batch: Any, loss: Loss) -> Any:
            numbers, (flat, *rest) = moving[: 2 * groups], moving[2 * groups :]
            return outcome(numbers[:groups], numbers[groups:], flat, rest, upper, batch, loss)

        def pull(moving: list[Tensor], upper: Params, batch: Any, loss: Loss) -> Any:
            numbers, vectors = moving[: 2 * groups], moving[2 * groups :]
            (flat, *rest), (bar, *bars) = vectors[: 1 + tensors], vectors[1 + tensors :]

            def of_leaves(w: Tensor, s: list[Tensor], u: Params) -> Any:
                return outcome(numbers[:groups], numbers[groups:], w, s, u, batch, loss)

            _, pullback = vjp(of_leaves, flat, rest, upper)
            return pullback((bar, bars))

        self.step, self.pull = Compiled(step, compile), Compiled(pull, compile)


def _absent(lower: Params, upper: Params, batch: Any) -> Tensor:  # noqa: ARG001
    raise AssertionError("the loss is an argument")


def _is_plain(optimizer: Optimizer) -> bool:
    """Return whether the options are numbers, by which compiled code can be found again."""
    options = [getattr(optimizer, field.name) for field in fields(optimizer) if field.name != "lr"]
    values = [v for option in options for v in (option if isinstance(option, tuple) else (option,))]
    return all(v is None or isinstance(v, bool | int | float | str) for v in values)


def _rates(bound: Bound, states: States) -> list[Tensor]:
    """Return the learning rate of each group, a tensor."""
    rates: list[Tensor] = []
    for (optimizer, _), state in zip(bound.groups, states, strict=True):
        lr = optimizer.lr(_count(state)) if callable(optimizer.lr) else optimizer.lr
        rates.append(lr.detach() if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64))
    return rates


def _count(state: State) -> int:
    count = state[_COUNT]
    assert isinstance(count, int)
    return count


def _tensors(keys: _Keys, states: States) -> list[Any]:
    """Return what the states hold beside their counts of steps."""
    return [state[key] for names, state in zip(keys, states, strict=True) for key in names if key != _COUNT]


def _rebuilt(keys: _Keys, tensors: Sequence[Tensor], counts: Sequence[Any]) -> States:
    """Return the states that hold these."""
    remaining = iter(tensors)
    return tuple(
        {key: count if key == _COUNT else next(remaining) for key in names}
        for names, count in zip(keys, counts, strict=True)
    )


def _joined(flat: Tensor, tensors: Sequence[Tensor], bars: Params, upper: Params) -> Tensor:
    """Return all cotangents as one vector; those of `upper` that `bars` lacks are 0."""
    parts = [flat, *tensors, *(bars[name] if name in bars else torch.zeros_like(u) for name, u in upper.items())]
    return torch.cat([part.reshape(-1).to(flat.dtype) for part in parts])
