"""Which loss reads which problem: found out by one dry call of each, checked before anything runs.

`Network` evaluates losses: as they stand on the user's modules, or functionally with other values in the place of named
parameters. `Graph` knows the levels, what each problem depends on, and refuses what has no exact meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypergrad._flat import Params
from hypergrad._functional import untouched
from hypergrad.composite import Composite
from hypergrad.methods import ForwardUnrolled, Method, Reptile, ResponseMethod, Unrolled
from hypergrad.problem import Problem, criterion_value, loss_value, penalty_value

Function = Callable[[Any], Any]
"""What is evaluated on the models: models -> anything."""


class Models(nn.Module):
    """What a loss receives: every problem's module under the problem's name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Hold the modules; they stay the user's."""
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, function: Function) -> Any:
        """Return `function` of these models."""
        return function(self)


class _ReadingModels(Models):
    """Models that note which problems are read."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self.__dict__["seen"] = set()

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        self.__dict__["seen"].add(name)
        return value


class Detached:
    """A module read as a constant: calls, submodules, methods and parameters carry no gradient to its parameters."""

    def __init__(self, module: nn.Module) -> None:
        """View `module`."""
        self.__dict__["_module"] = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's outputs with its parameters held constant."""
        return self._calling(lambda module: module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the module, cut off likewise."""
        value = getattr(self.__dict__["_module"], name)
        if isinstance(value, nn.Module):
            return Detached(value)
        if isinstance(value, Tensor):
            return value.detach()
        if name in ("parameters", "buffers"):
            return lambda *args, **kwargs: (t.detach() for t in value(*args, **kwargs))
        if name in ("named_parameters", "named_buffers"):
            return lambda *args, **kwargs: ((n, t.detach()) for n, t in value(*args, **kwargs))
        if callable(value):
            return lambda *args, **kwargs: self._calling(lambda module: getattr(module, name)(*args, **kwargs))
        return value

    def __getitem__(self, key: Any) -> Detached:
        """Return an entry of a container module, cut off likewise."""
        return Detached(self.__dict__["_module"][key])

    def _calling(self, function: Function) -> Any:
        module: nn.Module = self.__dict__["_module"]
        constants = {name: p.detach() for name, p in module.named_parameters()}
        return functional_call(_Applied(module), {f"module.{n}": p for n, p in constants.items()}, (function,))


class _Applied(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Function) -> Any:
        return function(self.module)


def detach(model: nn.Module) -> Detached:
    """Return `models.<name>` as a constant for one read: `hg.detach(models.teacher)(x)` carries no gradient to it.

    Args:
        model: a problem's module as a loss receives it, or one of its submodules.

    Example:
        >>> import torch, hypergrad as hg
        >>> net = torch.nn.Linear(2, 1)
        >>> hg.detach(net)(torch.ones(2)).requires_grad
        False
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"detach takes a module such as models.<name>, got {type(model).__name__}. Use .detach() on tensors."
        )
    return Detached(model)


class Network:
    """Evaluates functions of the models."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Hold the problems' modules, without copying them."""
        self.problems = {p.name: p for p in problems}
        self.models = Models({p.name: p.module for p in problems})
        self._modules = list(self.models.modules())
        self._tied = len(list(self.models.parameters())) < sum(
            1 for _ in self.models.named_parameters(remove_duplicate=False)
        )
        self._has_buffers = {p.name: any(True for _ in p.module.buffers()) for p in problems}

    def call(self, function: Function, overrides: Params | None = None, *, owner: str | None = None) -> Any:
        """Return function(models), with `overrides` in the place of parameters named "problem.parameter".

        Buffers of every problem but `owner` are cloned first, so that only their owner's own steps change them. Module
        modes are as before when it returns.
        """
        values: Params = dict(overrides or {})
        for name, has_buffers in self._has_buffers.items():
            if has_buffers and name != owner:
                module = self.problems[name].module
                for key, buffer in module.named_buffers():
                    full = f"{name}.{key}"
                    values[full] = values.get(full, buffer).clone()
        with self._same_modes():
            if not values:
                return function(self.models)
            return functional_call(self.models, values, (function,), tie_weights=self._tied)

    @contextlib.contextmanager
    def _same_modes(self) -> Iterator[None]:
        if torch.compiler.is_compiling():
            yield
            return
        modes = [module.training for module in self._modules]
        try:
            yield
        finally:
            for module, training in zip(self._modules, modes, strict=True):
                if module.training != training:
                    module.training = training

    def variables(self, name: str) -> Params:
        """Return the problem's variables as they are, detached, under "problem.parameter"."""
        return {f"{name}.{key}": p.detach() for key, p in self.problems[name].variables().items()}


@dataclass(frozen=True)
class Reads:
    """What one problem's functions read, from a dry call."""

    accessed: frozenset[str]
    """Problems that any of its functions touched."""
    connected: frozenset[str]
    """Problems whose variables the loss, the response or the hyperparameters depend on."""
    started: frozenset[str]
    """Problems whose variables `start` depends on."""
    touched_by_start: frozenset[str]
    used: frozenset[str]
    """The problem's own variables on which its loss depends."""


def dry_reads(network: Network, problem: Problem, batch: Any) -> Reads:
    """Return what the problem reads; RNG, buffers, modes and gradients are left as they were."""
    modules = {name: p.module for name, p in network.problems.items()}
    leaves: Params = {}
    for name in modules:
        leaves.update({key: v.requires_grad_() for key, v in network.variables(name).items()})
    seen_all: set[str] = set()

    def connections(function: Function) -> tuple[set[str], set[str]]:
        reading = _ReadingModels(modules)
        buffers = {key: b.clone() for key, b in reading.named_buffers()}
        reading.__dict__["seen"].clear()
        with torch.enable_grad():
            value = functional_call(reading, {**leaves, **buffers}, (function,))
            total = _total(value)
        seen_all.update(reading.__dict__["seen"])
        if total is None or not total.requires_grad:
            return set(), set(reading.__dict__["seen"])
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {key for key, g in zip(leaves, grads, strict=True) if g is not None}, set(reading.__dict__["seen"])

    device = next(iter(leaves.values())).device
    with untouched(device), network._same_modes():
        own, _ = connections(lambda models: loss_value(problem.loss, models, batch, problem.name)[0])
        keys = set(own)
        if problem.response is not None:
            response = problem.response
            keys |= connections(lambda models: loss_value(response, models, batch, problem.name)[0])[0]
        for function in problem.hyper.values():
            keys |= connections(function)[0]
        started, touched = (set[str](), set[str]()) if problem.start is None else connections(problem.start)
    used = frozenset(key.split(".", 1)[1] for key in own if key.split(".", 1)[0] == problem.name)
    if not used:
        raise ValueError(
            f"problem {problem.name!r}: its loss does not depend on its own variables. Call models.{problem.name}(...) "
            f"in the "
            "loss, without .detach() or torch.no_grad()."
        )
    connected = {key.split(".", 1)[0] for key in keys}
    if problem.reads is not None:
        unknown = sorted(set(problem.reads) - set(network.problems))
        if unknown:
            raise ValueError(
                f"problem {problem.name!r}: reads={list(problem.reads)} names {unknown}, which are no problems."
            )
        connected |= set(problem.reads)
        seen_all |= set(problem.reads)
    return Reads(
        frozenset(seen_all - {problem.name}),
        frozenset(connected - {problem.name}),
        frozenset(key.split(".", 1)[0] for key in started),
        frozenset(touched),
        used,
    )


def _total(value: Any) -> Tensor | None:
    """Return the sum of all tensors in a loss, a dict or a list; None if there is none that is floating-point."""
    if isinstance(value, Tensor):
        return value.sum() if value.is_floating_point() else None
    items = (
        list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, (list, tuple)) else []
    )
    totals = [t for t in map(_total, items) if t is not None and t.requires_grad]
    return torch.stack([t.to(torch.float64) for t in totals]).sum() if totals else None


@dataclass
class Graph:
    """Levels of problems, lowest first, and who depends on whom."""

    levels: list[list[Problem]]
    reads: dict[str, Reads] = field(default_factory=dict)
    partial_hessian: bool = False

    def __post_init__(self) -> None:
        """Index the problems."""
        self.problems = {p.name: p for level in self.levels for p in level}
        self.level_of = {p.name: k for k, level in enumerate(self.levels) for p in level}
        self._depends: dict[str, set[str]] = {}

    def below(self, name: str) -> list[str]:
        """Return the problems below `name` whose response its loss takes part in, lowest level first."""
        reads = self.reads[name].connected
        return [
            other
            for other, level in sorted(self.level_of.items(), key=lambda item: item[1])
            if level < self.level_of[name] and other in reads and self.problems[other].responds
        ]

    def depends(self, name: str) -> set[str]:
        """Return the problems above `name` on which its solution depends, its lower levels' responses included."""
        if name not in self._depends:
            direct = self.reads[name].connected | self.reads[name].started
            above = {other for other in direct if self.level_of[other] > self.level_of[name]}
            for other in self.below(name):
                above |= {t for t in self.depends(other) if self.level_of[t] > self.level_of[name]}
            self._depends[name] = above
        return self._depends[name]

    def reaching(self, name: str) -> list[str]:
        """Return the problems below `name` whose solutions depend on it, directly or through others, lowest first."""
        reaching: set[str] = set()
        for level in reversed(range(self.level_of[name])):
            for problem in self.levels[level]:
                targets = self.depends(problem.name)
                if problem.responds and (name in targets or targets & reaching):
                    reaching.add(problem.name)
        return [p.name for level in self.levels for p in level if p.name in reaching]

    def targets(self, name: str, top: str) -> list[str]:
        """Return the problems through which the solution of `name` depends on `top`, `top` included."""
        relevant = {*self.reaching(top), top}
        return [other for other in self.depends(name) if other in relevant]

    def validate(self) -> None:
        """Raise a ValueError, naming the problems, for a graph that has no exact meaning."""
        for problem in self.problems.values():
            self._validate_reads(problem)
        self._validate_starts()
        for problem in self.problems.values():
            self._validate_role(problem)
            self._validate_methods(problem)

    def _validate_reads(self, problem: Problem) -> None:
        level = self.level_of[problem.name]
        for other in self.reads[problem.name].connected:
            if self.level_of[other] == level and self.problems[other].responds:
                raise ValueError(
                    f"problems {problem.name!r} and {other!r} are on one level, and the loss of {problem.name!r} "
                    f"depends on "
                    f"{other!r}: which responds to which is not defined. Put them on levels of their own, read it as "
                    f"hg.detach(models.{other}), or give {other!r} detach=True."
                )

    def _validate_starts(self) -> None:
        for name, reads in self.reads.items():
            for other in reads.started:
                if self.level_of[other] <= self.level_of[name] and self.problems[other].responds:
                    what = "a cycle" if other == name or name in self.reads[other].touched_by_start else "not above it"
                    raise ValueError(
                        f"problem {name!r}: its start depends on {other!r}, which is {what}: a start may depend on "
                        f"problems "
                        f"of higher levels only. Read it as hg.detach(models.{other}), or move {other!r} up."
                    )
            for other in reads.touched_by_start - {name}:
                if name in self.reads[other].touched_by_start:
                    raise ValueError(
                        f"problems {name!r} and {other!r} begin at each other's values: a cycle through start."
                    )

    def _validate_role(self, problem: Problem) -> None:
        name, level = problem.name, self.level_of[problem.name]
        top = len(self.levels) - 1
        if level == top:
            for option, value in (("steps", problem.steps), ("every", problem.every)):
                if value != 1:
                    raise ValueError(
                        f"problem {name!r} is on the top level, so {option}={value} has no level above to refer to. "
                        f"Leave it "
                        "1 and run the engine for more steps."
                    )
            if problem.data is None:
                raise ValueError(
                    f"problem {name!r} is on the top level and has no data: there is no level above to give it batches."
                )
            if problem.tasks is not None:
                raise ValueError(
                    f"problem {name!r} is on the top level; tasks={problem.tasks} needs a level above that reads it."
                )
        if level < top:
            readers = [p.name for p in self.problems.values() if name in self.reads[p.name].accessed]
            if not any(self.level_of[reader] > level for reader in readers):
                if not any(self.problems[r].detach or problem.detach for r in readers):
                    above = [p.name for p in self.levels[level + 1]]
                    raise ValueError(
                        f"problem {name!r} is read by no problem above it: the losses of {above} never touch "
                        f"models.{name}. Read "
                        f"it there, or leave {name!r} out."
                    )
        if level > 0:
            lower = [p.name for k in range(level) for p in self.levels[k]]
            if all(self.problems[other].detach for other in lower):
                return
            if not any(name in self.depends(other) for other in lower):
                raise ValueError(
                    f"problem {name!r} is on an upper level, but no problem below it ({lower}) depends on "
                    f"models.{name}: its "
                    "hypergradient would have no indirect part. Read it in a lower loss, start or hyper, without "
                    "detaching it, "
                    "or train it apart."
                )

    def _validate_methods(self, problem: Problem) -> None:
        name = problem.name
        reaching = self.reaching(name)
        read = [other for other in self.below(name) if other in reaching]
        self._validate_tasks(problem, reaching)
        for other in read:
            method = self.problems[other].method
            if method is None:
                raise ValueError(
                    f"problem {other!r} needs a method: {name!r} differentiates through its solution. Give "
                    f"method=hg.Implicit(hg.CG()), hg.Unrolled() or another, or detach=True to hold it constant."
                )
            self._validate_method(problem, self.problems[other], method, read)

    def _validate_tasks(self, reader: Problem, reaching: list[str]) -> None:
        counts = {other: self.problems[other].tasks for other in reaching}
        if all(count is None for count in counts.values()):
            return
        below = {p.name for p in self.levels[self.level_of[reader.name] - 1]}
        if len(set(counts.values())) > 1 or not set(counts) <= below:
            raise ValueError(
                f"problem {reader.name!r}: the problems it differentiates through must all have the same number of "
                f"tasks and be on "
                f"the level directly below it, got {counts}."
            )
        for other in counts:
            if self.below(other):
                raise ValueError(
                    f"problem {other!r} has tasks and levels below it; only a lowest level can have tasks."
                )

    def _validate_method(self, reader: Problem, lower: Problem, method: Method, read: list[str]) -> None:
        kind = type(method).__name__
        chained = len(read) > 1 or any(
            t != reader.name and self.level_of[t] < self.level_of[reader.name]
            for t in self.targets(lower.name, reader.name)
        )
        if not isinstance(method, (ResponseMethod, Reptile)) and chained:
            raise ValueError(
                f"problem {lower.name!r}: {kind} has no best response, so it cannot be chained, and {reader.name!r} "
                f"needs one of "
                f"{read}. Use hg.Implicit, hg.Unrolled or another method with a rule for {lower.name!r}."
            )
        if isinstance(method, Reptile):
            return
        self._validate_start_is_used(lower, method)
        nested = [r for r in self.below(lower.name)]
        if not nested or self.partial_hessian:
            return
        for inner in nested:
            inner_method = self.problems[inner].method
            if inner_method is None or not self.depends(inner) & ({lower.name} | self.depends(lower.name)):
                continue
            enough = isinstance(inner_method, ResponseMethod) and (inner_method.differentiable or method.perturbs)
            if not enough:
                raise ValueError(
                    f"problem {inner!r}: {type(inner_method).__name__} has no differentiable rule, and {lower.name!r} "
                    f"above it is "
                    f"itself differentiated by {kind}, which needs one. Use hg.Unrolled or hg.Implicit for {inner!r}, "
                    f"or "
                    "Engine(partial_hessian=True), which holds it fixed in curvature and mixed partial."
                )

    def _validate_start_is_used(self, lower: Problem, method: Method) -> None:
        if lower.start is None or isinstance(method, (Unrolled, ForwardUnrolled)):
            return
        ignored = self.reads[lower.name].started - self.reads[lower.name].connected
        if ignored:
            raise ValueError(
                f"problem {lower.name!r} begins at a function of {sorted(ignored)}, which {type(method).__name__} "
                f"ignores, and its "
                "loss does not read them: their hypergradient would be lost. Use hg.Unrolled (truncate=0 is "
                "first-order MAML) or "
                "hg.Reptile, or add a proximal term to the loss that reads them (iMAML)."
            )


def functional_composite(network: Network, loss: Composite, name: str) -> Composite:
    """Return a problem's `Composite` as one over (lower, upper, batch), for Gauss-Newton products."""

    def outputs(lower: Params, upper: Params, batch: Any) -> Tensor:
        value: Tensor = network.call(lambda models: loss.outputs(models, batch), own(name, lower) | upper)
        return value

    def criterion(z: Tensor, upper: Params, batch: Any) -> Tensor:
        value: Tensor = network.call(lambda models: criterion_value(loss, z, models, batch), upper)
        return value

    def penalty(lower: Params, upper: Params, batch: Any) -> Tensor:
        value: Tensor = network.call(lambda models: penalty_value(loss, models, batch), own(name, lower) | upper)
        return value

    return Composite(outputs, criterion, None if loss.penalty is None else penalty)


def own(name: str, params: Mapping[str, Tensor]) -> Params:
    """Return `params` under the names that the network uses: "problem.parameter"."""
    return {f"{name}.{key}": value for key, value in params.items()}
