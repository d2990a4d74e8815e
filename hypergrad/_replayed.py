"""Functions of tensors, compiled and called many times over within a run.

What `torch.compile` makes of a function checks at every call that everything is as it was when it compiled: closures,
modules, globals. For small networks that takes as long as the work. Within one run nothing but the arguments changes,
so that the first call is checked, and the others go straight to the code that it ran.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import is_
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hypergrad._compiled import Compile, check_no_draws, explained, of_its_own, options
from hypergrad._eager import compiled_again
from hypergrad._random import random_state
from hypergrad._tape import second_order
from hypergrad._untouched import called_modules, on_copies

Graph = Callable[..., Any]
Kind = tuple[list[Any], pytree.TreeSpec]
"""What code is compiled for: shapes and the like, and Python values."""


class Compiled:
    """A function of trees of tensors, compiled without derivatives; its last argument is handed on as it is."""

    def __init__(self, function: Callable[..., Any], compile: Compile) -> None:
        """Compile `function` when it is first called; it must draw no random numbers."""
        self.function = function
        self.judged: list[_Judged] = []
        self._modules: WeakSet[nn.Module] | None = None
        self._ran: list[tuple[Graph, tuple[Any, ...], Any]] = []
        self._compiled = torch.compile(
            of_its_own(function), fullgraph=True, dynamic=False, backend=lambda g, x: self._make(g, x, compile)
        )

    def _make(self, graph: Any, inputs: list[Any], compile: Compile) -> Graph:
        run: Graph
        if isinstance(compile, str):
            run = torch._dynamo.lookup_backend(compile)(graph, inputs)
        else:
            compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx
            run = compile_fx(graph, inputs, config_patches=options())

        def watched(*arguments: Any) -> Any:
            outputs = run(*arguments)
            self._ran.append((run, arguments, outputs))
            return outputs

        return watched

    def checked(self, leaves: list[Any], tree: pytree.TreeSpec, last: Any) -> tuple[Any, Replay | None]:
        """Return the function's value by the compiler's own call, and how to have it again without its checks.

        Of two replays that have one `run`, the compiler's checks found the same code to serve both.

        Raises:
            ValueError: if the function draws random numbers, or cannot be compiled whole.
        """
        arguments = (*pytree.tree_unflatten(leaves, tree), last)
        with second_order():
            if self._modules is None:
                device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
                random = random_state(device)
                self._modules = WeakSet(called_modules(lambda: self.function(*arguments)))
                check_no_draws(device, random)
            self._ran.clear()
            try:
                with on_copies(self._modules), compiled_again(), explained():
                    value = self._compiled(*arguments)
                replay = _replay(*self._ran[0], leaves, value) if len(self._ran) == 1 else None
            finally:
                self._ran.clear()
        return value, replay


@dataclass(frozen=True)
class Replay:
    """Code that a compiled call ran, and where its inputs came from and its outputs went."""

    run: Graph
    sources: tuple[int | None, ...]
    """For each input which leaf of the arguments it is; None for a constant."""
    constants: tuple[Any, ...]
    results: tuple[int, ...]
    tree: pytree.TreeSpec

    def __call__(self, leaves: list[Any]) -> Any:
        """Return the function's value at other arguments of the same kind."""
        inputs = [
            constant if source is None else leaves[source]
            for source, constant in zip(self.sources, self.constants, strict=True)
        ]
        outputs = self.run(*inputs)
        return pytree.tree_unflatten([outputs[k] for k in self.results], self.tree)


def _replay(run: Graph, inputs: tuple[Any, ...], outputs: Any, leaves: list[Any], value: Any) -> Replay | None:
    """Return the replay of a call, None where its value is not made of the code's outputs alone."""
    place = {id(leaf): k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    made = {id(out): k for k, out in enumerate(outputs)}
    results, tree = pytree.tree_flatten(value)
    if any(id(result) not in made for result in results):
        return None
    sources = tuple(place.get(id(x)) for x in inputs)
    constants = tuple(x if source is None else None for x, source in zip(inputs, sources, strict=True))
    return Replay(run, sources, constants, tuple(made[id(result)] for result in results), tree)


class Calls:
    """Calls of one compiled function between which nothing changes but its arguments."""

    def __init__(self, compiled: Compiled) -> None:
        """Begin such calls."""
        self._compiled = compiled
        self._known: list[_Known] = []

    def __call__(self, last: Any, moving: list[Tensor], fixed: tuple[Any, ...], is_right: Callable[[Any], bool]) -> Any:
        """Return function(moving, *fixed, last), detached; None where compiled code was found to be wrong.

        Args:
            last: the function's last argument.
            moving: the tensors that differ from call to call.
            fixed: trees of tensors that are the same objects at many calls.
            is_right: says of the first value of each compiled code whether it is what it should be.
        """
        return self.judged(last, moving, fixed, lambda value: is_right(value) or None)[0]

    def judged(
        self, last: Any, moving: list[Tensor], fixed: tuple[Any, ...], judge: Callable[[Any], Any]
    ) -> tuple[Any, Any]:
        """Return the same and what `judge` made of the first value of that code; it returns None of a wrong one."""
        moving = [x.detach() for x in moving]  # tensors of their own: known by their identity
        shapes = [_mark(x) for x in moving]
        with torch.no_grad():
            for known in self._known:
                if known.shapes == shapes and all(map(is_, known.fixed, fixed)):
                    return known.replay([*moving, *known.leaves]), known.judgement
            return self._anew(last, moving, shapes, fixed, judge)

    def _anew(
        self,
        last: Any,
        moving: list[Tensor],
        shapes: list[Any],
        fixed: tuple[Any, ...],
        judge: Callable[[Any], Any],
    ) -> tuple[Any, Any]:
        given, tree = pytree.tree_flatten((moving, *fixed))
        leaves = [x.detach() if k >= len(moving) and isinstance(x, Tensor) else x for k, x in enumerate(given)]
        kind = [_mark(x) for x in leaves], tree
        for known in self._known:
            if known.kind == kind:
                self._known.append(replace(known, fixed=fixed, leaves=leaves[len(moving) :]))
                return known.replay(leaves), known.judgement
        judged = self._compiled.judged
        if any(met.judgement is None and met.kind == kind for met in judged):
            return None, None
        value, replay = self._compiled.checked(leaves, tree, last)
        run = None if replay is None else replay.run
        met = next((met for met in judged if met.run is run and (run is not None or met.kind == kind)), None)
        if met is None:
            met = _Judged(kind, run, judge(value))
            judged.append(met)
        if met.judgement is None:
            return None, None
        if replay is not None:
            self._known.append(_Known(shapes, kind, fixed, leaves[len(moving) :], replay, met.judgement))
        return value, met.judgement


@dataclass(frozen=True)
class _Judged:
    """Compiled code whose value was compared with the eager one, and what was found: None where it was wrong."""

    kind: Kind
    run: Graph | None
    """The code; None where it cannot be told, and the kind of call stands for it."""
    judgement: Any


@dataclass(frozen=True)
class _Known:
    """Arguments that were met, and how to have the value at others like them."""

    shapes: list[Any]
    kind: Kind
    fixed: tuple[Any, ...]
    leaves: list[Any]
    """Those of `fixed`."""
    replay: Replay
    judgement: Any


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def _mark(leaf: Any) -> Any:
    """Return what code is compiled for, of one argument."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf if isinstance(leaf, _PLAIN) else _Itself(leaf)


class _Itself:
    """An object, such as an array or a dataclass of tensors, that equals no other."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value
