"""User modules left as they were found: they run on copies of their buffers, and their modes are put back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hypergrad._eager import eagerly
from hypergrad._flat import constant
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


_NEVER = -1
"""No version of a tensor: such a copy belongs to another, and is copied before it is used."""


class _Frame(NamedTuple):
    """A module's call: the buffers replaced for it, and the modules, by id, that need not be looked at inside it."""

    swapped: list[tuple[nn.Module, str, Tensor]]
    entered: set[int]


class _StandIns:
    """While open, modules run on copies of their buffers; what one call writes there, the next one finds.

    A copy that a call has written to is copied again for the next call: the graph of the first may have saved it.
    One opened inside another begins with what the calls before have written, and only the innermost watches: two
    that swap the same buffers would put each other's copies back. Other threads of the program are let be.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._latest: dict[int, tuple[Tensor, Tensor, int]] = {}  # by the buffer's id: it, its copy, the copy's version
        self._copies: dict[int, Tensor] = {}  # by id, so that a copy is known as one
        self._written: set[int] = set()  # by the buffer's id: those that calls have changed
        self._begun: dict[int, tuple[Tensor, Tensor]] = {}  # by the buffer's id: it, and what held its value at first
        self._frames: list[_Frame] = []
        self._inside: set[int] = set()

    def __enter__(self) -> _StandIns:
        outer = _innermost()
        if outer is not None:
            outer.look_away()
            self._latest = {key: (buffer, copy, _NEVER) for key, (buffer, copy, _) in outer._latest.items()}
            self._written = set(outer._written)
            self._begun = {key: (buffer, copy) for key, (buffer, copy, _) in self._latest.items()}
        self.watch()
        _open.append(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        _open.remove(self)
        self.look_away()
        while self._frames:
            self._restore(self._frames.pop())
        outer = _innermost()
        if outer is not None:
            outer.watch()

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
        if not _works_for(self.thread):
            return
        frame = _Frame([], set())
        self._frames.append(frame)
        if id(module) in self._inside:
            return
        bare = isinstance(module, RunsOnClones)  # its buffers are clones, made for this call
        for inner in module.modules():
            if id(inner) in self._inside:
                continue
            for name, buffer in () if bare else inner._buffers.items():
                if buffer is not None and id(buffer) not in self._copies:
                    frame.swapped.append((inner, name, buffer))
                    inner._buffers[name] = self._stand_in(buffer)
                    if name.startswith("running_") and inner.training:
                        self._written.add(id(buffer))  # batch norm writes without a mark
            if bare or inner._buffers:
                frame.entered.add(id(inner))
        self._inside |= frame.entered

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._frames and _works_for(self.thread):
            self._restore(self._frames.pop())

    def _stand_in(self, buffer: Tensor) -> Tensor:
        known = self._latest.get(id(buffer))
        if known is not None and known[1]._version == known[2]:
            return known[1]
        if known is not None and known[2] != _NEVER:
            self._written.add(id(buffer))
        with torch.no_grad():
            copy = (buffer if known is None else known[1]).detach().clone()
        self._begun.setdefault(id(buffer), (buffer, buffer))  # which itself stays as it is
        self._latest[id(buffer)] = (buffer, copy, copy._version)
        self._copies[id(copy)] = copy
        return copy

    def _restore(self, frame: _Frame) -> None:
        self._inside -= frame.entered
        for module, name, buffer in frame.swapped:
            written = module._buffers.get(name)
            if written is not None and id(written) not in self._copies:  # assigned anew, not written in place
                with torch.no_grad():
                    copy = written.detach().clone()
                self._latest[id(buffer)] = (buffer, copy, copy._version)
                self._copies[id(copy)] = copy
                self._written.add(id(buffer))
            module._buffers[name] = buffer


Buffers = Mapping[int, tuple[Tensor, Tensor]]
"""What calls of modules have left in their buffers, by the buffer's id: the buffer, and what stands in for it."""


def buffers_left() -> Buffers | None:
    """Return what calls of modules have left in those buffers that they changed; None where modules are not watched."""
    watching = None if torch.compiler.is_compiling() else _innermost()
    if watching is None:
        return None
    latest = watching._latest
    watching._written |= {key for key, (_, copy, version) in latest.items() if version not in (_NEVER, copy._version)}
    left = {key: (latest[key][0], constant(latest[key][1])) for key in watching._written if key in latest}
    latest.update({key: (buffer, copy, _NEVER) for key, (buffer, copy) in left.items()})
    return left


def buffers_at_first() -> Buffers:
    """Return what the modules called so far found in their buffers at their first call."""
    watching = None if torch.compiler.is_compiling() else _innermost()
    if watching is None:
        return {}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for key, (buffer, held) in watching._begun.items():
        _, copy, version = watching._latest[key]
        as_it_was = copy._version == version and key not in watching._written
        found[key] = buffer, constant(copy if as_it_was else held.clone())
    return found


@contextlib.contextmanager
def going_on_from(left: Buffers | None) -> Iterator[None]:
    """Let modules find in their buffers what `buffers_left` told; what they leave there is forgotten."""
    watching = None if left is None or torch.compiler.is_compiling() else _innermost()
    if left is None or watching is None:
        yield
        return
    present = watching._latest
    watching._latest = {key: (buffer, copy, _NEVER) for key, (buffer, copy) in left.items()}
    try:
        yield
    finally:
        watching._latest = present


class RunsOnClones(nn.Module):
    """A module that is only called with clones in the place of its buffers, and needs no copies of them.

    A compiled call finds the same buffers each time then, and is not compiled again.
    """


def is_watching() -> bool:
    """Return whether modules are being watched: our hooks are called around each."""
    return _innermost() is not None


_open: list[_StandIns] = []
"""Those whose context has been entered and not left, of all threads, outermost first."""


def _innermost() -> _StandIns | None:
    """Return the one that watches what this thread calls."""
    return next((stand_ins for stand_ins in reversed(_open) if _works_for(stand_ins.thread)), None)


def _works_for(thread: int) -> bool:
    """Return whether this is `thread`, or one that Python did not start: a backward pass has some on accelerators."""
    return threading.get_ident() == thread or type(threading.current_thread()).__name__ == "_DummyThread"


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
    nn.Module.train = _train  # type: ignore[method-assign]
    outer = _innermost()
    if outer is not None:
        outer.look_away()
    for module in modules:
        stand_ins._enter_module(module, ())
    try:
        yield
    finally:
        for module in reversed(modules):
            stand_ins._leave_module(module, (), None)
        if outer is not None:
            outer.watch()
        with _noting:
            _note_modes()
        for inner, training in found.items():
            inner.training = training


_train = nn.Module.train
_noted: list[tuple[int, dict[nn.Module, bool]]] = []
"""The modes that modules had before `.train()` and `.eval()`, by the thread whose calls are noted."""
_noting = threading.Lock()


def _note_modes() -> None:
    """Let `.train()` note modes while anyone asks for them."""
    nn.Module.train = _noting_train if _noted else _train  # type: ignore[method-assign, assignment]


def _noting_train(module: nn.Module, mode: bool = True) -> nn.Module:
    for thread, found in tuple(_noted):
        if _works_for(thread):
            found.setdefault(module, module.training)
    return _train(module, mode)


@contextlib.contextmanager
def _modes_restored() -> Iterator[None]:
    """Undo what `.train()` and `.eval()` do in the body."""
    entry: tuple[int, dict[nn.Module, bool]] = threading.get_ident(), {}
    with _noting:
        _noted.append(entry)
        _note_modes()
    try:
        yield
    finally:
        with _noting:
            _noted[:] = [other for other in _noted if other is not entry]
            _note_modes()
        for module, training in entry[1].items():
            module.training = training
