"""User modules left as they were found: they run on copies of their buffers, and their modes are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad._eager import eagerly
from hypergrad._random import random_state, restore_random_state


@contextlib.contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Leave the generators, and the buffers and modes of every module that the body calls, as they were found.

    What has been compiled runs eagerly in the body: the hooks that watch modules would be compiled with them, and a
    compiled function has no second derivative.
    """
    if torch.compiler.is_compiling():
        yield
        return
    state = random_state(device, anew=True)
    try:
        with _StandIns(), _modes_restored(), eagerly():
            yield
    finally:
        restore_random_state(state)


class _StandIns:
    """While open, modules run on copies of their buffers; what one call writes there, the next one finds.

    A copy that a call has written to is copied again for the next call: the graph of the first may have saved it.
    One opened inside another begins with what the calls before have written, and only the innermost watches: two
    that swap the same buffers would put each other's copies back.
    """

    def __init__(self) -> None:
        self._latest: dict[int, tuple[Tensor, Tensor, int]] = {}  # by the buffer's id: it, its copy, the copy's version
        self._copies: dict[int, Tensor] = {}  # by id, so that a copy is known as one
        self._frames: list[list[tuple[nn.Module, str, Tensor]]] = []
        self._inside: set[int] = set()

    def __enter__(self) -> _StandIns:
        if _open:
            _open[-1].look_away()
            never = -1  # no version of a tensor: these copies are the other's, and are copied before they are used
            self._latest = {key: (buffer, copy, never) for key, (buffer, copy, _) in _open[-1]._latest.items()}
        self.watch()
        _open.append(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        _open.remove(self)
        self.look_away()
        while self._frames:
            self._restore(self._frames.pop())
        if _open:
            _open[-1].watch()

    def watch(self) -> None:
        """Be called around every module's forward."""
        hooks = nn.modules.module
        self._handles = (
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        )

    def look_away(self) -> None:
        """Undo `watch`."""
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        swapped: list[tuple[nn.Module, str, Tensor]] = []
        self._frames.append(swapped)
        if id(module) in self._inside:
            return
        for inner in module.modules():
            if id(inner) in self._inside:
                continue
            for name, buffer in inner._buffers.items():
                if buffer is not None and id(buffer) not in self._copies:
                    swapped.append((inner, name, buffer))
                    inner._buffers[name] = self._stand_in(buffer)
        self._inside.update(id(inner) for inner, _, _ in swapped)

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._frames:
            self._restore(self._frames.pop())

    def _stand_in(self, buffer: Tensor) -> Tensor:
        known = self._latest.get(id(buffer))
        if known is not None and known[1]._version == known[2]:
            return known[1]
        with torch.no_grad():
            copy = (buffer if known is None else known[1]).detach().clone()
        self._latest[id(buffer)] = (buffer, copy, copy._version)
        self._copies[id(copy)] = copy
        return copy

    def _restore(self, frame: list[tuple[nn.Module, str, Tensor]]) -> None:
        for module, name, buffer in frame:
            self._inside.discard(id(module))
            written = module._buffers.get(name)
            if written is not None and id(written) not in self._copies:  # assigned anew, not written in place
                with torch.no_grad():
                    copy = written.detach().clone()
                self._latest[id(buffer)] = (buffer, copy, copy._version)
                self._copies[id(copy)] = copy
            module._buffers[name] = buffer


class RunsOnClones(nn.Module):
    """A module that is only called with clones in the place of its buffers, and needs no copies of them.

    A compiled call finds the same buffers each time then, and is not compiled again.
    """


def is_watching() -> bool:
    """Return whether modules are being watched: our hooks are called around each."""
    return bool(_open)


_open: list[_StandIns] = []
"""Those whose context has been entered and not left, outermost first; the last one watches."""


def called_modules(function: Callable[[], Any]) -> set[nn.Module]:
    """Return the modules that `function` calls directly, not through others; it runs on copies of their buffers."""
    called: set[nn.Module] = set()
    depth = 0

    def enter(module: nn.Module, _args: Any) -> None:
        nonlocal depth
        if depth == 0:
            called.add(module)
        depth += 1

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal depth
        depth -= 1

    hooks = nn.modules.module
    with _StandIns(), _modes_restored():
        handles = (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        )
        try:
            function()
        finally:
            for handle in handles:
                handle.remove()
    return called


@contextlib.contextmanager
def on_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the body with `modules` on copies of their buffers, without our hooks, which would be compiled too."""
    stand_ins, modules = _StandIns(), [module for module in modules if not isinstance(module, RunsOnClones)]
    found = {inner: inner.training for module in modules for inner in module.modules()}
    patched, nn.Module.train = nn.Module.train, _train  # type: ignore[method-assign]
    for innermost in _open[-1:]:
        innermost.look_away()
    for module in modules:
        stand_ins._enter_module(module, ())
    try:
        yield
    finally:
        for module in reversed(modules):
            stand_ins._leave_module(module, (), None)
        for innermost in _open[-1:]:
            innermost.watch()
        nn.Module.train = patched  # type: ignore[method-assign]
        for inner, training in found.items():
            inner.training = training


_train = nn.Module.train


@contextlib.contextmanager
def _modes_restored() -> Iterator[None]:
    """Undo what `.train()` and `.eval()` do in the body."""
    found: dict[nn.Module, bool] = {}
    original = nn.Module.train

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        found.setdefault(module, module.training)
        return original(module, mode)

    nn.Module.train = train  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.train = original  # type: ignore[method-assign]
        for module, training in found.items():
            module.training = training
