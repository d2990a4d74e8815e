"""One step of a user's optimizer along a given gradient, as the same step written by hand would take it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
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

    def take(self, grad: Params, value: Tensor, hyper: Mapping[str, Any], again: Again) -> None:
        """Step along `grad`; a variable that it lacks has no gradient.

        Args:
            grad: by name; becomes the variables' `.grad`.
            value: the loss, for schedulers and closures that ask for it.
            hyper: options that replace the optimizer's during this step.
            again: for optimizers that evaluate the loss several times a step.
        """
        problem, optimizer = self.problem, self.problem.optimizer
        self._set_grads(grad)
        with _options(optimizer, hyper, problem.name) if hyper else contextlib.nullcontext():
            if self.takes_closure:
                optimizer.step(self._closure(value, again))  # type: ignore[arg-type]
            else:
                optimizer.step()
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

    def _closure(self, value: Tensor, again: Again) -> Callable[[], Tensor]:
        """Return a closure that evaluates only where the parameters have moved since the gradient was taken."""
        versions = [p._version for p in self.variables.values()]

        def closure() -> Tensor:
            if [p._version for p in self.variables.values()] == versions:
                return value
            present, grad = again()
            self._set_grads(grad)
            return present

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
                betas[int(option == "beta2")] = float(v)
                group["betas"] = tuple(betas)
            else:
                group[option] = float(v)
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, found, strict=True):
            group.update(before)
