"""One step of a user's optimizer along a given gradient, as the same step written by hand would take it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hypergrad._flat import Params
from hypergrad._shards import held, is_shard, like_shard
from hypergrad.problem import Problem

Again = Callable[[], tuple[Tensor, Params]]
"""Evaluates the loss and its gradient at the parameters' present values."""


class Stepper:
    """Clips, steps, projects and schedules for one problem."""

    def __init__(self, problem: Problem) -> None:
        """Read what the optimizer needs."""
        self.problem = problem
        self.variables: dict[str, nn.Parameter] = problem.variables()
        self.shards = frozenset(key for key, parameter in self.variables.items() if is_shard(parameter))
        self.schedulers = problem.schedulers()
        self.takes_closure = needs_closure(problem.optimizer)

    def take(self, grad: Params, value: Tensor, hyper: Mapping[str, Any], again: Again | None) -> None:
        """Step along `grad`; a variable that it lacks has no gradient.

        Args:
            grad: by name; becomes the variables' `.grad`.
            value: the loss, for schedulers and closures that ask for it.
            hyper: options that replace the optimizer's during this step.
            again: for optimizers that evaluate the loss several times a step; None where that cannot be.
        """
        problem, optimizer = self.problem, self.problem.optimizer
        self._set_grads(grad)
        with _options(optimizer, hyper, problem.name) if hyper else contextlib.nullcontext():
            if self.takes_closure:
                assert again is not None
                optimizer.step(self._closure(value, again))  # type: ignore[arg-type]
            else:
                self._step(value, again)
        torch.autograd.graph.increment_version(self.variables.values())  # fused steps do not count as changes
        if problem.project is not None:
            with torch.no_grad():
                projected = problem.project({key: p.detach() for key, p in self.variables.items()})
                for key, parameter in self.variables.items():
                    parameter.copy_(projected[key])
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(float(value))
            else:
                scheduler.step()

    def _step(self, value: Tensor, again: Again | None) -> None:
        """Step without a closure; an optimizer that turns out to need one, before it has moved, gets it from now on."""
        optimizer = self.problem.optimizer
        versions = [p._version for p in self.variables.values()]
        grads = [p.grad for p in self.variables.values()]
        try:
            optimizer.step()
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            moved = [p._version for p in self.variables.values()] != versions
            asks = isinstance(error, AssertionError) or "closure" in str(error) or "not callable" in str(error)
            if moved or not asks or type(optimizer).__module__.startswith("torch."):
                raise
            if again is None:
                raise ValueError(refused_closure(self.problem)) from error
            self.takes_closure = True
            for parameter, g in zip(self.variables.values(), grads, strict=True):
                parameter.grad = g
            optimizer.step(self._closure(value, again))  # type: ignore[arg-type]

    def _closure(self, value: Tensor, again: Again) -> Callable[[], Tensor]:
        """Return a closure that evaluates only where the parameters have moved since `.grad` was set."""
        known = [None if p.grad is None else p.grad.clone() for p in self.variables.values()]  # it may be cleared
        begins = [(p._version, held(p).detach().clone()) for p in self.variables.values()]  # .data has no version

        def closure() -> Tensor:
            pairs = zip(self.variables.values(), begins, strict=True)
            if all(p._version == version and torch.equal(held(p), place) for p, (version, place) in pairs):
                for parameter, g in zip(self.variables.values(), known, strict=True):
                    parameter.grad = None if g is None else g.clone()
                return value
            value_there, found = again()
            self._set_grads(found)
            return value_there

        return closure

    def _set_grads(self, grad: Params) -> None:
        taken: set[int] = set()
        for key, parameter in self.variables.items():
            if key not in grad:
                parameter.grad = None
                continue
            g, here = grad[key], held(parameter) if key in self.shards else parameter
            if g.requires_grad or g.dtype != here.dtype:
                g = g.detach().to(here.dtype)
            if g.layout is torch.strided:  # as backward() leaves it: laid out like the parameter, memory of its own
                address = g.data_ptr()
                if g.stride() != here.stride() or address in taken:
                    g = torch.empty_like(here).copy_(g)
                taken.add(address)
            parameter.grad = like_shard(g, parameter) if key in self.shards else g
        if self.problem.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.variables.values(), self.problem.clip_norm)
        if self.problem.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.variables.values(), self.problem.clip_value)


@dataclass(frozen=True)
class Rates:
    """A learning rate for each step of a run."""

    values: tuple[float, ...]

    def __call__(self, step: int) -> float:
        """Return that of step `step`, counted from 0."""
        return self.values[step]


def scheduled_rates(problem: Problem) -> list[Rates]:
    """Return each param group's learning rates over `problem.steps` steps from where its schedulers stand.

    The schedulers and the optimizer are left as they were found.

    Raises:
        ValueError: for a scheduler that looks at the loss, or moves more than learning rates.
    """
    schedulers, groups = problem.schedulers(), problem.optimizer.param_groups
    watching = [type(s).__name__ for s in schedulers if isinstance(s, ReduceLROnPlateau)]
    if watching:
        raise ValueError(
            f"problem {problem.name!r}: {watching[0]} follows the loss, and tasks={problem.tasks} have one each. Use a "
            "scheduler that counts steps."
        )
    states = [copy.deepcopy(s.state_dict()) for s in schedulers]
    found = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in groups]
    rates: list[list[float]] = [[] for _ in groups]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has not stepped in between
            for _ in range(problem.steps):
                for values, group in zip(rates, groups, strict=True):
                    values.append(float(group["lr"]))
                for scheduler in schedulers:
                    scheduler.step()
        moved = {k for before, group in zip(found, groups, strict=True) for k, v in before.items() if group[k] != v}
    finally:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for group, before in zip(groups, found, strict=True):
            lr = group["lr"]
            group.update(before)
            if isinstance(lr, Tensor):  # schedulers write into it
                group["lr"] = lr.copy_(before["lr"])
    others = sorted(moved - {"lr"})
    if others:
        raise ValueError(
            f"problem {problem.name!r}: its scheduler moves {others}; with tasks={problem.tasks} only learning rates "
            "can be scheduled. Use cycle_momentum=False, or a scheduler of learning rates."
        )
    return [Rates(tuple(values)) for values in rates]


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's step must be given a closure, as L-BFGS's must."""
    try:  # the class's own: schedulers wrap the object's
        parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    if not parameters:
        return False
    first = parameters[0]
    return first.default is first.empty and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)


def refused_closure(problem: Problem) -> str:
    """Return why an optimizer that takes a closure does not serve this problem, which has levels below."""
    return (
        f"problem {problem.name!r}: {type(problem.optimizer).__name__} evaluates its loss several times a step, and "
        "each would need the levels below to run again. Use an optimizer that takes no closure on upper levels."
    )


def check_hyper(optimizer: torch.optim.Optimizer, values: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError unless each value can be an option of the optimizer: a number, or one a param group."""
    for option, value in values.items():
        key = "betas" if option in ("beta1", "beta2") else option
        if any(key not in group for group in optimizer.param_groups):
            known = sorted(set(optimizer.param_groups[0]) - {"params"})
            raise ValueError(
                f"problem {name!r}: hyper[{option!r}] is no option of {type(optimizer).__name__}; it has {known}."
            )
        if key == option and isinstance(optimizer.param_groups[0][key], (list, tuple)):
            remedy = "Name 'beta1' and 'beta2' instead, a function each." if key == "betas" else "Leave it out."
            raise ValueError(
                f"problem {name!r}: hyper[{option!r}] is a tuple in {type(optimizer).__name__}; only a single number "
                f"can be replaced. {remedy}"
            )
        per_group = list(value) if isinstance(value, (list, tuple)) else [value] * len(optimizer.param_groups)
        scalars = all(isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.numel() == 1) for v in per_group)
        if not scalars or len(per_group) != len(optimizer.param_groups):
            raise ValueError(
                f"problem {name!r}: hyper[{option!r}] must return a scalar, or a list of one per param group "
                f"({len(optimizer.param_groups)} here); a torch optimizer takes no value per parameter. Use one "
                "group a parameter, or hg.descend(hyper=...)."
            )


@contextlib.contextmanager
def _options(optimizer: torch.optim.Optimizer, values: Mapping[str, Any], name: str) -> Iterator[None]:
    """Run the body with the optimizer's options replaced by `values`, then put them back."""
    check_hyper(optimizer, values, name)
    found = [{key: option for key, option in group.items() if key != "params"} for group in optimizer.param_groups]
    for option, value in values.items():
        per_group = value if isinstance(value, (list, tuple)) else [value] * len(found)
        for group, v in zip(optimizer.param_groups, per_group, strict=True):
            if option in ("beta1", "beta2"):
                betas = list(group["betas"])
                betas[int(option == "beta2")] = _number(v)
                group["betas"] = tuple(betas)
            else:
                group[option] = _number(v)
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, found, strict=True):
            group.update(before)


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
