"""One lower step: how it is taken, what its record keeps, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad._again import distance
from hypergrad._autograd import as_leaves, by_autograd, is_connected, leaf, underlying
from hypergrad._compiled import Compile, compiled_gradient, to_compile
from hypergrad._flat import Layout, Params, constant
from hypergrad._functional import Loss, Residual, arity, in_transform, scalar, second_name
from hypergrad._random import RandomState, random_state, replaying, same_state
from hypergrad._tape import (
    add,
    explained_grad,
    explained_transform,
    gradient,
    named,
    refuse_once_differentiable,
    second_order,
    vjp,
)
from hypergrad._untouched import Buffers, going_on_from
from hypergrad.averaged import Averaged, PartsTape, average_gradient
from hypergrad.loss_scale import check_compile
from hypergrad.optim import Bound, Optimizer, State, clip_norm, clip_value
from hypergrad.optim._algebra import is_zero

HyperFunction = Callable[..., Any]
"""A hyperparameter as a function of the upper parameters, and of the step's index if it takes two arguments."""

States = tuple[State, ...]
"""An optimizer's state, one for each of its parameter groups."""

Leaves = tuple[Tensor, Params]
"""Flat lower parameters and the upper ones, as leaves of a tape."""


@dataclass(frozen=True)
class Recipe:
    """How one lower step is taken, apart from its batch: loss, optimizer and what is applied around it."""

    loss: Loss
    layout: Layout
    optimizer: Bound
    hyper: Mapping[str, HyperFunction] = field(default_factory=dict)
    clip_norm: float | None = None
    clip_value: float | None = None
    project: Callable[[Params], Params] | None = None
    random: RandomState | None = None
    """The generators as `hyper` and `project` met them, to be replayed; None if they drew nothing, or draw anew."""

    def hyper_values(self, upper: Params, index: int) -> dict[str, Any]:
        """Return the optimizer's hyperparameters that are functions of `upper`, at step `index` of the run."""
        with replaying(self.random):
            return self._hyper_values(upper, index)

    def _hyper_values(self, upper: Params, index: int) -> dict[str, Any]:
        return {
            name: function(upper, index) if takes_step(function) else function(upper)
            for name, function in self.hyper.items()
        }

    def rests_without_gradient(self) -> bool:
        """Return whether a parameter stays where it is while its gradient is zero: plain gradient descent."""
        plain = "weight_decay" not in self.hyper and self._scales_gradient()
        return plain and not any(keeps_tensors(optimizer) for optimizer, _ in self.optimizer.groups)

    def is_linear(self) -> bool:
        """Return whether the step's derivative in parameters, gradient and states needs the value of none of them."""
        bare = not self.hyper and self.clip_norm is None and self.clip_value is None and self.project is None
        return bare and all(optimizer.is_linear for optimizer, _ in self.optimizer.groups)

    def is_descent(self, states: States) -> bool:
        """Return whether a step from these states is plain gradient descent, w - lr g."""
        return self.is_linear() and self._scales_gradient() and not state_tensors(states)

    def _scales_gradient(self) -> bool:
        """Return whether every rule is linear and decays nothing by itself."""
        rules = [optimizer for optimizer, _ in self.optimizer.groups]
        return all(rule.is_linear and is_zero(rule.decay().coupled) for rule in rules)

    def update(self, flat: Tensor, grad: Tensor, states: States, upper: Params, index: int) -> tuple[Tensor, States]:
        """Return parameters and optimizer states after one step along `grad`."""
        with replaying(self.random):
            return self.updated(flat, grad, states, self._hyper_values(upper, index))

    def updated(self, flat: Tensor, grad: Tensor, states: States, hyper: Mapping[str, Any]) -> tuple[Tensor, States]:
        """Return the same with the values of hyperparameters, by name."""
        if self.clip_norm is not None:
            grad = clip_norm(grad, self.clip_norm)
        if self.clip_value is not None:
            grad = clip_value(grad, self.clip_value)
        flat, states = self.optimizer.update(flat, grad, states, hyper)
        if self.project is not None:
            projected = self.project({name: p.clone() for name, p in self.layout.unravel(flat).items()})
            self.layout.check_like(projected, "the result of project")
            flat = self.layout.ravel(projected)
        return flat, states


@dataclass(frozen=True)
class Step:
    """One lower step as it was taken: its batch, its random draws and, unless thinned out, where it began."""

    recipe: Recipe
    batch: Any
    index: int
    random: RandomState | None
    """The generators as the loss met them, to be replayed; None if the step drew nothing."""
    flat: Tensor | None = None
    states: States | None = None
    taped: Tensor | None = None
    """The gradient with its graph, where `retain` kept it; its leaves are `leaves`."""
    leaves: Leaves | None = None
    versions: tuple[int, ...] = ()
    """Those of the upper leaves when the tape was made; they share memory with the caller's tensors."""
    buffers: Buffers | None = None
    """What the loss found in modules' buffers; None where the batch says it, or nothing is known."""
    taken: bool = True
    """Whether the step was taken; one left out, for its gradient was not finite, changes nothing."""

    def lower_loss(self, flat: Tensor, upper: Params) -> Tensor:
        """Return the lower loss of this step at `flat`, a scalar."""
        recipe = self.recipe
        return scalar(recipe.loss(recipe.layout.unravel(flat), upper, self.batch), "the lower loss")

    def gradient(self, flat: Tensor, upper: Params, *, create_graph: bool = False) -> Tensor:
        """Return the gradient of the lower loss at `flat`, with this step's random draws."""
        loss = self.recipe.loss
        with replaying(self.random), going_on_from(self.buffers):
            if isinstance(loss, Averaged):
                return average_gradient(loss, self.recipe.layout, flat, upper, self.batch, create_graph=create_graph)
            return gradient(lambda w: self.lower_loss(w, upper), flat, create_graph=create_graph)

    def tape_holds(self) -> bool:
        """Return whether the kept tape is of the present upper parameters, none of which has been changed in place."""
        assert self.leaves is not None
        return self.versions == versions(self.leaves[1])

    def advance(
        self, flat: Tensor, states: States, upper: Params, *, create_graph: bool = False, compile: Compile = False
    ) -> tuple[Tensor, States]:
        """Return what this step makes of (flat, states): the step map, differentiable with `create_graph`."""
        if not self.taken:
            return flat, states
        if create_graph:
            grad = self.gradient(flat, upper, create_graph=True)
            return self.recipe.update(flat, grad, states, upper, self.index)
        grad = self.untaped_gradient(flat, upper, compile)
        with torch.no_grad():
            return self.recipe.update(flat, grad, states, upper, self.index)

    def untaped_gradient(self, flat: Tensor, upper: Params, compile: Compile) -> Tensor:
        """Return the gradient without a graph, compiled if asked."""
        if not compile:
            return self.gradient(flat, upper)
        with torch.no_grad():
            return self._compiled_gradient(flat, upper, compile)

    def pull(
        self,
        flat: Tensor,
        states: States,
        upper: Params,
        cotangents: tuple[Tensor, States],
        *,
        compile: Compile = False,
        ended: Tensor | None = None,
    ) -> tuple[Tensor, States, Params]:
        """Return the cotangents of (flat, states, upper) from those of the step's outcome.

        One evaluation of the gradient and one product; where the gradient was taped, the product alone. `compile`
        compiles both; the optimizer's update stays eager, so that its step count may be a Python number. Where the step
        ended, if given, is compared with where it ends now.

        Raises:
            ValueError: if the two are apart: the derivative would be another run's.
        """
        if not self.taken:
            return *cotangents, {}
        if not by_autograd():
            return self._pull_by_transform(flat, states, upper, cotangents)
        if isinstance(self.recipe.loss, Averaged) and self.taped is None and not in_transform():
            return self._pull_in_parts(self.recipe.loss, flat, states, upper, cotangents, compile)
        bar, state_bars = cotangents
        tensors = [leaf(t) for t in state_tensors(states)]
        with torch.enable_grad(), second_order():
            if self.taped is None or self.leaves is None or not self.tape_holds():
                point, leaves = leaf(flat), as_leaves(upper)
                grad = self._taped_gradient(point, leaves, compile)
                refuse_once_differentiable(grad)
            else:
                (point, leaves), grad = self.leaves, self.taped
        if ended is None and self.recipe.is_descent(states):
            return self._pull_descent(point, leaves, grad, states, upper, bar)
        with torch.enable_grad(), second_order():
            new, new_states = self.recipe.update(point, grad, with_tensors(states, tensors), leaves, self.index)
        if ended is not None:
            apart = distance(self.recipe.layout, flat, ended, new.detach(), grad.detach(), 1)
            if apart is not None:
                raise ValueError(
                    f"the lower run cannot be taken again from its record: step {self.index} ends {apart:.1%} of the "
                    "way from where it ended, so that derivatives through it would be wrong. Something takes part "
                    "beside the parameters, `upper` as it was then, the batch and the generators of torch, NumPy and "
                    "Python: a generator of the loss's own, a counter in a closure. Hand it over through the batch."
                )
        outcomes = [(new, bar), *zip(state_tensors(new_states), state_tensors(state_bars), strict=True)]
        outcomes = [(out, out_bar) for out, out_bar in outcomes if is_connected(out)]
        inputs = [point, *tensors, *leaves.values()]
        pulled = explained_grad(
            [out for out, _ in outcomes], inputs, [b for _, b in outcomes], retain_graph=self.taped is not None
        )
        known = [
            torch.zeros_like(x) if p is None else p for x, p in zip(inputs[: 1 + len(tensors)], pulled, strict=False)
        ]
        above = named(leaves, pulled[1 + len(tensors) :])  # of a kept tape, perhaps more than is asked for
        return known[0], with_tensors(states, known[1:]), {name: g for name, g in above.items() if name in upper}

    def _pull_descent(
        self, point: Tensor, leaves: Params, grad: Tensor, states: States, upper: Params, bar: Tensor
    ) -> tuple[Tensor, States, Params]:
        """Return the same for w - lr g: the cotangent of w is handed on, that of g is what the step makes of it."""
        if not is_connected(grad):
            return bar, states, {}
        with torch.no_grad():
            grad_bar, _ = self.recipe.updated(bar.new_zeros(()).expand(bar.shape), bar, states, {})
        inputs, retain = [point, *leaves.values()], self.taped is not None
        pulled, *above = explained_grad([grad], inputs, [grad_bar], retain_graph=retain)
        found = named(leaves, above)
        return bar if pulled is None else bar + pulled, states, {name: g for name, g in found.items() if name in upper}

    def _pull_in_parts(
        self,
        loss: Averaged,
        flat: Tensor,
        states: States,
        upper: Params,
        cotangents: tuple[Tensor, States],
        compile: Compile,
    ) -> tuple[Tensor, States, Params]:
        """Return the same for an average: the update first, then its gradient's parts.

        One all-reduce, and another for the gradient's value where the update's derivative needs it.
        """
        recipe, (bar, state_bars) = self.recipe, cotangents

        def part_gradient(part: Any) -> Residual:
            part_recipe = replace(recipe, loss=loss.loss)
            step = replace(self, recipe=part_recipe, batch=part, random=None)
            return lambda w, u: step._taped_gradient(w, u, compile)

        samples = [(self.random, [part_gradient(part) for part in loss.parts(self.batch)])]
        linear = recipe.is_linear()
        tape = PartsTape(samples, flat, upper, loss, valued=not linear)
        value = torch.zeros_like(flat) if linear else tape.value
        point, grad, *tensors = (t.detach().requires_grad_() for t in (flat, value, *state_tensors(states)))
        leaves = {name: u.detach().requires_grad_() for name, u in upper.items()}
        with torch.enable_grad():
            new, new_states = recipe.update(point, grad, with_tensors(states, tensors), leaves, self.index)
        outcomes = [(new, bar), *zip(state_tensors(new_states), state_tensors(state_bars), strict=True)]
        outcomes = [(out, out_bar) for out, out_bar in outcomes if out.requires_grad]
        inputs = [point, grad, *tensors, *leaves.values()]
        pulled = explained_grad([out for out, _ in outcomes], inputs, [b for _, b in outcomes], retain_graph=False)
        split = 2 + len(tensors)
        flat_bar, grad_bar, *tensor_bars = (
            torch.zeros_like(x) if p is None else p for x, p in zip(inputs[:split], pulled, strict=False)
        )
        above = named(leaves, pulled[split:])
        by_gradient, above_by_gradient = tape.pull_both(grad_bar)
        return flat_bar + by_gradient, with_tensors(states, tensor_bars), add(above, above_by_gradient)

    def _taped_gradient(self, flat: Tensor, upper: Params, compile: Compile) -> Tensor:
        if not compile:
            return self.gradient(flat, upper, create_graph=True)
        return self._compiled_gradient(flat, upper, compile)

    def _compiled_gradient(self, flat: Tensor, upper: Params, compile: Compile) -> Tensor:
        recipe = self.recipe
        check_compile(recipe.loss)
        return compiled_gradient(
            recipe.loss, flat, upper, [self.batch], layout=recipe.layout, constants={}, compile=compile
        )

    def linear(self, flat: Tensor, states: States, upper: Params) -> Callable[..., tuple[Tensor, list[Tensor]]]:
        """Return the step map's derivative: (flat tangent, state tangents, upper tangents) -> those of the outcome.

        Built from two reverse passes: the pullback is linear in its cotangents, and its transpose is the derivative.
        """
        if not self.taken:
            return lambda w_dot, s_dot, u_dot: (w_dot, s_dot)  # noqa: ARG005

        def step(w: Tensor, s: list[Tensor], u: Params) -> tuple[Tensor, list[Tensor]]:
            new, new_states = self.advance(w, with_tensors(states, s), u, create_graph=True)
            return new, state_tensors(new_states)

        tensors = state_tensors(states)
        if in_transform():
            with second_order():
                outcome, pullback = vjp(step, flat, tensors, upper)
                zeros = (torch.zeros_like(outcome[0]), [torch.zeros_like(t) for t in outcome[1]])
                _, push = vjp(lambda bar, bars: pullback((bar, bars)), *zeros)
            return lambda w_dot, s_dot, u_dot: push((w_dot, s_dot, u_dot))
        point, *rest = [t.detach().requires_grad_() for t in (flat, *tensors, *upper.values())]
        with torch.enable_grad(), second_order():
            split = len(tensors)
            new, new_tensors = step(point, rest[:split], dict(zip(upper, rest[split:], strict=True)))
        refuse_once_differentiable(new)
        outputs = [new, *new_tensors]
        live = [k for k, out in enumerate(outputs) if out.requires_grad]
        bars = [torch.zeros_like(outputs[k]).requires_grad_() for k in live]
        pulled = explained_grad([outputs[k] for k in live], [point, *rest], bars, create_graph=True)

        def push_forward(w_dot: Tensor, s_dot: list[Tensor], u_dot: Params) -> tuple[Tensor, list[Tensor]]:
            tangents = [w_dot, *s_dot, *u_dot.values()]
            pairs = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad]
            pushed = explained_grad([p for p, _ in pairs], bars, [t for _, t in pairs])
            result = [torch.zeros_like(out) for out in outputs]
            for k, value in zip(live, pushed, strict=True):
                if value is not None:
                    result[k] = value
            return result[0], result[1:]

        return push_forward

    def _pull_by_transform(
        self, flat: Tensor, states: States, upper: Params, cotangents: tuple[Tensor, States]
    ) -> tuple[Tensor, States, Params]:
        bar, state_bars = cotangents

        def step(w: Tensor, s: list[Tensor], u: Params) -> tuple[Tensor, list[Tensor]]:
            new, new_states = self.advance(w, with_tensors(states, s), u, create_graph=True)
            return new, state_tensors(new_states)

        with second_order(), explained_transform():
            _, pullback = vjp(step, flat, state_tensors(states), upper)
        flat_bar, tensors_bar, upper_bar = pullback((bar, state_tensors(state_bars)))
        return flat_bar, with_tensors(states, tensors_bar), upper_bar


@dataclass(frozen=True)
class Recording:
    """Which steps of a run keep where they began (`first`, `first + every`, ... and the last), and which their tape."""

    first: int = 0
    every: int = 1
    taped_from: int | None = None
    compile: Compile = False
    """Whether the gradients of the run are compiled, taped or not."""

    def keeps(self, index: int, num_steps: int) -> bool:
        """Return whether step `index` of `num_steps` keeps its parameters and optimizer state."""
        return index == num_steps - 1 or (index >= self.first and (index - self.first) % self.every == 0)

    def tapes(self, index: int) -> bool:
        """Return whether step `index` keeps the graph of its gradient."""
        return self.taped_from is not None and index >= self.taped_from


def take(
    step: Step,
    flat: Tensor,
    states: States,
    upper: Params,
    recording: Recording,
    num_steps: int,
    advance: Callable[[Step, Tensor, States, Params], tuple[Tensor, States]] | None = None,
    above: Params | None = None,
) -> tuple[Step, Tensor, States]:
    """Return `step` as recorded, and the parameters and states after it; random draws go on from the generators.

    `advance` takes the steps that are not taped, if there is one; `above` are the leaves of `upper`, for those that
    are.
    """
    if recording.keeps(step.index, num_steps):
        step = replace(step, flat=flat, states=states)
    recipe = step.recipe if step.recipe.random is None else replace(step.recipe, random=None)
    live = replace(step, recipe=recipe, random=None, buffers=None)
    compile = to_compile("Recording", recording.compile)
    grad: Tensor | None = None
    if recording.tapes(step.index) and by_autograd():
        point, leaves = leaf(flat), as_leaves(upper) if above is None else above
        with second_order():
            taped = live._taped_gradient(point, leaves, compile)
        refuse_once_differentiable(taped)
        step = replace(step, flat=flat, states=states, taped=taped, leaves=(point, leaves), versions=versions(leaves))
        grad = taped.detach()
    elif advance is not None:
        flat, states = advance(live, flat, states, upper)
    else:
        grad = live.untaped_gradient(flat, upper, compile)
    if grad is not None:
        may_draw = bool(recipe.hyper) or recipe.project is not None
        random = random_state(flat.device) if may_draw else None
        with torch.no_grad():
            flat, states = recipe.update(flat, grad, states, upper, step.index)
        if may_draw and not same_state(random, random_state(flat.device)):
            step = replace(step, recipe=replace(recipe, random=random))
    if in_transform():
        flat, states = constant(flat), constant_states(states)
    return step, flat, states


def versions(params: Params) -> tuple[int, ...]:
    """Return how often each tensor has been changed in place."""
    return tuple(underlying(p)._version for p in params.values())


def takes_step(function: HyperFunction) -> bool:
    """Return whether a hyperparameter's function is to be given the step's index as its second argument."""
    return arity(function, 1) == 2 or second_name(function) == "step"


def keeps_tensors(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's state holds more than numbers: momentum, second moments."""
    return any(isinstance(value, Tensor) for value in optimizer.init(torch.zeros(1)).values())


def state_tensors(states: States) -> list[Tensor]:
    """Return the tensors of optimizer states in a fixed order."""
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def constant_states(states: States) -> States:
    """Return `states` with the `constant` of each tensor."""
    return with_tensors(states, [constant(tensor) for tensor in state_tensors(states)])


def with_tensors(states: States, tensors: list[Tensor]) -> States:
    """Return `states` with `tensors`, in the order of `state_tensors`, in the place of theirs."""
    remaining = iter(tensors)
    return tuple(
        {key: next(remaining) if isinstance(value, Tensor) else value for key, value in state.items()}
        for state in states
    )
