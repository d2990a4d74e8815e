"""How losses see the modules: as they stand, or with other values in the place of named parameters.

A `Network` holds every problem's module without copying it. Each problem has a *view*: the modules that its functions
read, under the problems' names. A view is evaluated with other tensors put where the modules keep theirs, as
`torch.func.functional_call` does it, but with the places found once; or directly where nothing is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypergrad._eager import is_compiled, modules_eagerly
from hypergrad._flat import Params
from hypergrad._shards import held
from hypergrad._untouched import RunsOnClones, is_watching
from hypergrad.problem import Problem

Function = Callable[[Any], Any]
"""What is evaluated on the models: models -> anything."""


class Models(RunsOnClones):
    """What a loss receives: the problems' modules under the problems' names."""

    def __init__(self, modules: Mapping[str, nn.Module], reader: str = "", withheld: Iterable[str] = ()) -> None:
        """Hold the modules, which stay the user's; reading a problem in `withheld` raises."""
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._reader = reader
        self._withheld = frozenset(withheld)

    def forward(self, function: Function) -> Any:
        """Return `function` of these models."""
        return function(self)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_withheld", ()):
            reader = self.__dict__["_reader"]
            raise ValueError(
                f"problem {reader!r} reads {name!r}, which it did not on its first batch, when the graph was inferred. "
                f"Name what it may read: Problem({reader!r}, reads=[{name!r}, ...])."
            )
        return super().__getattr__(name)


class ReadingModels(Models):
    """Models that note which problems are read."""

    def __init__(self, modules: Mapping[str, nn.Module], seen: set[str]) -> None:
        """Put the names of the problems read into `seen`."""
        super().__init__(modules)
        self.__dict__["_seen"] = seen

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if "_seen" in self.__dict__:
            self.__dict__["_seen"].add(name)
        return value


@dataclass(frozen=True)
class _View:
    """The modules that one problem's functions read, and where in them parameters and buffers lie."""

    models: Models
    paths: Mapping[str, tuple[str, ...]]
    """Names of parameters and buffers, "problem.name" -> every place in `models` that holds the same one."""
    places: Mapping[str, tuple[nn.Module, str]]
    """Module and key of each place."""
    buffers: tuple[tuple[str, frozenset[str]], ...]
    """The place of each buffer, and the problems whose module holds it."""
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Observed:
    """What a function of the models did."""

    value: Any
    seen: frozenset[str]
    """The problems that it read."""
    written: Params
    """The buffers that it wrote, "problem.buffer", as it left them."""


Anchors = tuple[list[tuple[nn.Module, str, nn.Module]], list[tuple[nn.Module, str, nn.Parameter]]]


def _anchors(module: nn.Module, variables: Mapping[str, nn.Parameter]) -> Anchors:
    """Return what has to stay for `variables` to be found: modules in their parents, and they in their modules."""
    modules: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    places = []
    for name, parameter in variables.items():
        *path, key = name.split(".")
        parent = module
        for part in path:
            child = parent._modules[part]
            assert child is not None
            modules[id(parent), part] = parent, part, child
            parent = child
        places.append((parent, key, parameter))
    return list(modules.values()), places


def _unwritten(buffer: Tensor, was: Tensor, version: int, value: Tensor) -> bool:
    if buffer.layout is not torch.strided or was.layout is not torch.strided:  # torch compares no values there
        return buffer is was and buffer._version == version
    return buffer.dtype is value.dtype and torch.equal(buffer, value)


class Network:
    """Evaluates functions of the models."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Hold the problems' modules, without copying them."""
        self.problems = {p.name: p for p in problems}
        self._kept: dict[str, tuple[list[tuple[int, int]], Params]] = {}
        self._variables = {p.name: p.variables() for p in problems}
        self._modules = {p.name: p.module for p in problems}
        self._anchors = {p.name: _anchors(p.module, self._variables[p.name]) for p in problems}
        self._whole = self._view(Models(self._modules))
        self._views: dict[str, _View] = {}

    def restrict(self, reader: str, names: Iterable[str]) -> None:
        """Let the functions of `reader` read its own problem and `names`; reading another then raises."""
        known = {reader, *names}
        modules = {name: module for name, module in self._modules.items() if name in known}
        self._views[reader] = self._view(Models(modules, reader, set(self._modules) - known))

    def _view(self, models: Models) -> _View:
        slots: dict[int, list[str]] = {}
        places: dict[str, tuple[nn.Module, str]] = {}
        buffers = []
        for prefix, module in models.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    places[f"{prefix}.{key}"] = module, key
                    slots.setdefault(id(parameter), []).append(f"{prefix}.{key}")
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    owners = frozenset(
                        n for n, p in self.problems.items() if any(m is module for m in p.module.modules())
                    )
                    places[f"{prefix}.{key}"] = module, key
                    buffers.append((f"{prefix}.{key}", owners))
                    slots.setdefault(id(buffer), []).append(f"{prefix}.{key}")
        paths: dict[str, tuple[str, ...]] = {}
        for name, problem in self.problems.items():
            tensors = [
                *problem.module.named_parameters(remove_duplicate=False),
                *problem.module.named_buffers(remove_duplicate=False),
            ]
            for key, tensor in tensors:
                if id(tensor) in slots:
                    paths[f"{name}.{key}"] = tuple(slots[id(tensor)])
        return _View(models, paths, places, tuple(buffers), tuple(models.modules()))

    def observe(self, function: Function, overrides: Params) -> Observed:
        """Return function(models) with `overrides` in place, and what it did."""
        noted: set[str] = set()
        seen: set[str] = set()
        written: Params = {}
        view = self._view(ReadingModels(self._modules, noted))

        def buffers() -> Params:
            found = ((path, m._buffers[key]) for path, (m, key) in view.places.items() if key in m._buffers)
            return {path: buffer for path, buffer in found if buffer is not None}

        def watched(models: Any) -> Any:
            noted.clear()  # putting the overrides in place reads everything
            before = {path: (b, b._version, b.detach().clone()) for path, b in buffers().items()}
            value = function(models)
            seen.update(noted)
            after = buffers()  # compared by value: batch norm writes without a mark
            changed = {path for path, b in after.items() if path not in before or not _unwritten(b, *before[path])}
            for name, places in view.paths.items():
                for place in changed.intersection(places):
                    written[name] = after[place].detach().clone()
            return value

        value = _evaluate(view, watched, overrides, None, ())
        return Observed(value, frozenset(seen), written)

    def call(
        self,
        function: Function,
        overrides: Params | None = None,
        *,
        reader: str | None = None,
        owner: str | None = None,
        apart: Collection[str] = (),
    ) -> Any:
        """Return function(models), with `overrides` in the place of parameters named "problem.parameter".

        Tied parameters are replaced together, within a module and across problems. Buffers of every problem but `owner`
        are cloned first, so that only their owner's own steps change them. Module modes are as before when it returns.

        Args:
            function: of the models.
            overrides: parameters and buffers by "problem.name"; those that `reader` does not read are left out.
            reader: the problem whose function it is; it sees the problems that it reads. None for all.
            owner: the problem whose buffers this call may change, or None.
            apart: those of them, "problem.buffer", that are cloned as well, and take over what the call leaves in the
                clone: the graph of this call may save it.
        """
        view = self._whole if reader is None else self._views.get(reader, self._whole)
        return _evaluate(view, function, overrides or {}, owner, apart)

    def variables(self, name: str) -> Params:
        """Return the problem's variables as they are, detached, under "problem.parameter"; of shards, this part."""
        return {f"{name}.{key}": held(p) for key, p in self._variables[name].items()}

    def kept_variables(self, name: str) -> Params:
        """Return copies of the same, one copy for as long as they do not change."""
        present = self.variables(name)
        versions = [(p._version, p.data_ptr()) for p in present.values()]
        found = self._kept.get(name)
        if found is None or found[0] != versions:
            found = self._kept[name] = (versions, {key: p.clone() for key, p in present.items()})
        return found[1]

    def buffers(self, names: Iterable[str]) -> Params:
        """Return copies of these buffers, "problem.buffer"."""
        places = [(name, *self._place(name)) for name in names]
        return {name: b.detach().clone() for name, module, key in places if (b := module._buffers[key]) is not None}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return module and key of "problem.name"; of a shared module, wherever it was met first."""
        return self._whole.places[self._whole.paths[name][0]]

    def check_present(self, name: str) -> None:
        """Raise a ValueError if the problem trains other parameters than when the engine was built."""
        problem, variables = self.problems[name], self._variables[name]
        modules, places = self._anchors[name]
        present = all(parent._modules.get(key) is child for parent, key, child in modules)
        if not present or any(module._parameters.get(key) is not p for module, key, p in places):
            found = dict(problem.module.named_parameters())
            gone = [key for key, p in variables.items() if found.get(key) is not p] or list(variables)
            raise ValueError(
                f"problem {name!r}: its parameter {gone[0]!r} has been replaced since the engine was built. Change the "
                "tensor in place (under torch.no_grad(), with copy_), or build another engine."
            )
        known = {id(p) for p in variables.values()}
        held = [p for group in problem.optimizer.param_groups for p in group["params"]]
        if any(p.requires_grad and id(p) not in known for p in held):
            added = [key for key in problem.variables() if key not in variables]
            raise ValueError(
                f"problem {name!r}: its optimizer holds {added}, which did not train when the engine was built. What "
                "trains is settled there: build another engine, and go on with that."
            )

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the problem's variables themselves, under "problem.parameter"."""
        return {f"{name}.{key}": p for key, p in self._variables[name].items()}


def _evaluate(view: _View, function: Function, overrides: Params, owner: str | None, apart: Collection[str]) -> Any:
    """Return function(models) with `overrides` in place, modes and foreign buffers as before.

    Compiled modules run compiled as they stand, and eagerly with overrides: those come with second derivatives.
    """
    values: Params = {}
    for name, tensor in overrides.items():
        for path in view.paths.get(name, ()):
            values[path] = tensor
    clones: dict[int, Tensor] = {}
    apart = {path for name in apart for path in view.paths.get(name, ())}
    for path, owners in view.buffers:
        if owner is None or owner not in owners or path in apart:
            module, key = view.places[path]
            buffer = values.get(path, module._buffers[key])
            if buffer is not None:
                if id(buffer) not in clones:
                    clones[id(buffer)] = buffer.clone()
                values[path] = clones[id(buffer)]
    special = not torch.compiler.is_compiling() and (overrides or is_watching())
    eager = special and is_compiled(view.modules)
    modes = [] if torch.compiler.is_compiling() else [(module, module.training) for module in view.modules]
    try:
        with modules_eagerly() if eager else contextlib.nullcontext():
            if not values:
                return function(view.models)
            with _replaced(view, values, apart):
                return view.models(function)
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training


@contextlib.contextmanager
def _replaced(view: _View, values: Params, apart: Collection[str]) -> Iterator[None]:
    """Run the body with `values`, by place, where the modules keep parameters and buffers.

    The buffers in `apart` take over what is in their place at the end.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, tensor in values.items():
            module, key = view.places[path]
            kept: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            before.append((kept, key, kept[key] if key in kept else None))
            kept[key] = tensor
        yield
        for index, (path, (kept, key, buffer)) in enumerate(zip(values, tuple(before), strict=True)):
            if path in apart:
                written = kept[key]
                if written is None or written.shape != buffer.shape or written.dtype != buffer.dtype:
                    before[index] = kept, key, None if written is None else written.detach()  # assigned anew
                else:
                    with torch.no_grad():
                        buffer.copy_(written)
    finally:
        for kept, key, tensor in reversed(before):
            kept[key] = tensor


_TENSORS = frozenset({"parameters", "buffers"})
_NAMED_TENSORS = frozenset({"named_parameters", "named_buffers"})
_MODULES = frozenset({"children", "modules", "get_submodule", "values", "named_children", "named_modules", "items"})


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
        if name in _TENSORS | _NAMED_TENSORS | _MODULES or name in ("get_parameter", "get_buffer"):
            return lambda *args, **kwargs: _cut_lazily(value(*args, **kwargs))
        if callable(value) and not isinstance(value, nn.Module):
            return lambda *args, **kwargs: self._calling(lambda module: getattr(module, name)(*args, **kwargs))
        return _cut(value)

    def __getitem__(self, key: Any) -> Any:
        """Return an entry of a container module, cut off likewise."""
        return _cut(self.__dict__["_module"][key])

    def __iter__(self) -> Iterator[Any]:
        """Yield the entries of a container module, cut off likewise."""
        return (_cut(entry) for entry in self.__dict__["_module"])

    def __len__(self) -> int:
        """Return the number of entries of a container module."""
        return len(self.__dict__["_module"])

    def __contains__(self, key: Any) -> bool:
        """Return whether a container module has this entry."""
        return key in self.__dict__["_module"]

    def _calling(self, function: Function) -> Any:
        module: nn.Module = self.__dict__["_module"]
        constants = {f"module.{name}": p.detach() for name, p in module.named_parameters()}
        applied = _Applied(module)
        outcome = functional_call(applied, constants, (function,)) if constants else applied(function)
        return Detached(outcome) if isinstance(outcome, nn.Module) else outcome


class _Applied(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Function) -> Any:
        return function(self.module)


def _cut(value: Any) -> Any:
    """Return what a detached module's attribute may show: tensors detached, modules as `Detached`; containers too."""
    if isinstance(value, nn.Module):
        return Detached(value)
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_cut(entry) for entry in value)
    if isinstance(value, list):
        return [_cut(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _cut(entry) for key, entry in value.items()}
    return value


def _cut_lazily(value: Any) -> Any:
    """Return the same for what a module's own listing returned, which may be an iterator."""
    if isinstance(value, (nn.Module, Tensor)):
        return _cut(value)
    return (_cut(entry) for entry in value)


def detach(model: nn.Module) -> Detached:
    """Return `models.<name>` as a constant for one read: `hg.detach(models.teacher)(x)` carries no gradient to it.

    Args:
        model: a problem's module as a loss receives it, or one of its submodules.

    Raises:
        ValueError: for anything but a module.

    Example:
        >>> import torch, hypergrad as hg
        >>> net = torch.nn.Linear(2, 1)
        >>> hg.detach(net)(torch.ones(2)).requires_grad
        False
    """
    if isinstance(model, Detached):
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"detach takes a module such as models.<name>, got {type(model).__name__}. Use .detach() on tensors."
        )
    return Detached(model)


def own(name: str, params: Mapping[str, Tensor]) -> Params:
    """Return `params` under the names that the network uses: "problem.parameter"."""
    return {f"{name}.{key}": value for key, value in params.items()}
