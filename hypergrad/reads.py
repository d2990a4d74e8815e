"""What each problem's functions read, found out by one dry call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hypergrad._flat import Params
from hypergrad._random import random_state, replaying
from hypergrad._untouched import untouched
from hypergrad.in_place import InPlace
from hypergrad.methods import ResponseMethod
from hypergrad.network import Function, Network
from hypergrad.problem import Problem, loss_value


@dataclass(frozen=True)
class Reads:
    """What one problem's functions read, apart from the problem itself."""

    accessed: frozenset[str]
    """Problems that any of its functions touched, perhaps through a module of another problem that holds theirs."""
    connected: frozenset[str]
    """Problems on whose variables the loss, the response or the hyperparameters depend; not those with `detach`."""
    started: frozenset[str]
    """Problems on whose variables `start` depends, itself included."""
    touched_by_start: frozenset[str]
    keys: frozenset[str]
    """All variables, as "problem.parameter", on which any of its functions depends."""
    written: frozenset[str] = field(compare=False)  # a rank may write what another does not
    """The buffers of its own that its loss writes and reads back in a later call, as "problem.buffer"."""


def dry_reads(network: Network, problem: Problem, batch: Any, in_place: InPlace | None = None) -> Reads:
    """Return what the problem reads; RNG, buffers, modes and gradients are left as they were.

    Each function is called once, on variables that are leaves of their own, or with `in_place` on the modules as they
    stand; it depends on what a gradient reaches.

    Raises:
        ValueError: if the loss is not a scalar, or `reads` names no problem.
    """
    name = problem.name
    leaves: Params = {}
    for other in network.problems:
        leaves.update({key: v.requires_grad_() for key, v in network.variables(other).items()})
    device = next(iter(leaves.values())).device
    accessed: set[str] = set()
    written: set[str] = set()
    outside = {} if in_place is not None else _seen_from_outside(network, problem)

    def connections(function: Function) -> tuple[set[str], frozenset[str]]:
        with torch.enable_grad():
            random = random_state(device)
            observed = network.observe(function, leaves)
            total = _total(observed.value)
        accessed.update(observed.seen)
        own = {key: b for key, b in observed.written.items() if key.startswith(f"{name}.")}
        if own and isinstance(observed.value, Tensor):
            with replaying(random), torch.enable_grad():
                again = network.observe(function, leaves | own).value
            if not torch.equal(again, observed.value):  # batch norm in train mode reads the batch alone
                written.update(own)
        if total is None or not total.requires_grad:
            return set(), observed.seen
        inputs = [*leaves.values(), *outside.values()]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        _refuse_outside(name, [key for key, g in zip(outside, grads[len(leaves) :], strict=True) if g is not None])
        return {key for key, g in zip(leaves, grads, strict=False) if g is not None}, observed.seen

    def of_loss(loss: Any) -> set[str]:
        def value(models: Any) -> Tensor:
            before = [(x, x._version, x.clone()) for x in pytree.tree_leaves(batch) if _may_change(x)]
            found = loss_value(loss, models, batch, name)[0]
            if any(x._version != version and not _equal(x, copy) for x, version, copy in before):
                raise ValueError(
                    f"problem {name!r}: its loss changes its batch in place, which it is to see again as it was: steps "
                    "are run again and losses evaluated several times. Compute new tensors: x = x / 255 in place of "
                    "x.div_(255)."
                )
            return found

        if in_place is None:
            return connections(value)[0]

        def observed() -> tuple[Tensor, frozenset[str]]:
            found = network.observe(value, {})
            return found.value, found.seen

        _, seen, grads = in_place.gradients(observed, {}, name)
        accessed.update(seen)
        return set(grads)

    with untouched(device):
        keys = of_loss(problem.loss)
        if problem.response is not None:
            keys |= of_loss(problem.response)
        for function in problem.hyper.values():
            keys |= connections(function)[0]
        started, touched = (set[str](), set[str]()) if problem.start is None else connections(problem.start)
    connected = _owners(keys) | _named(network, problem)
    accessed |= connected | _owners(started)
    constants = {other for other, p in network.problems.items() if p.detach and other != name}
    return Reads(
        accessed=frozenset(accessed - {name}),
        connected=frozenset(connected - constants - {name}),
        started=frozenset(_owners(started) - constants),
        touched_by_start=frozenset(touched),
        keys=frozenset(keys | started),
        written=frozenset(written),
    )


def _may_change(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_inference()


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.allclose(tensor, other, rtol=0.0, atol=0.0, equal_nan=True)


def _seen_from_outside(network: Network, problem: Problem) -> dict[str, nn.Parameter]:
    """Return the parameters that the problem's functions must read through `models`, and not as tensors of their own.

    Those of a constant may be read from outside, and its own by a problem that is never evaluated at other values.
    """
    methods = [p.method for p in network.problems.values() if p.method is not None]
    stays = problem.method is None and all(isinstance(method, ResponseMethod) for method in methods)
    names = [other for other, p in network.problems.items() if not p.detach and not (stays and other == problem.name)]
    found: dict[str, nn.Parameter] = {}
    for other in names:
        found.update(network.parameters(other))
    return found


def _refuse_outside(name: str, keys: Sequence[str]) -> None:
    if keys:
        owner, key = keys[0].split(".", 1)
        raise ValueError(
            f"problem {name!r}: its loss, start or hyper reads the parameter {key!r} of problem {owner!r} as a tensor "
            f"from outside, where no other value can be put in its place. Read it through the argument, as "
            f"models.{owner}.{key}, or models.{owner}.parameters() for all."
        )


def _owners(keys: set[str]) -> set[str]:
    return {key.split(".", 1)[0] for key in keys}


def _named(network: Network, problem: Problem) -> set[str]:
    """Return the problems that the user says it reads."""
    named = set(problem.reads or ())
    unknown = sorted(named - set(network.problems))
    if unknown:
        raise ValueError(
            f"problem {problem.name!r}: reads={list(problem.reads or ())} names {unknown}, which are no problems; they "
            f"are {list(network.problems)}."
        )
    return named


def _total(value: Any) -> Tensor | None:
    """Return the sum of all tensors in a loss, a dict or a list; None if there is none that is floating-point."""
    if isinstance(value, Tensor):
        return value.sum() if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return None
    totals = [t for t in map(_total, value) if t is not None and t.requires_grad]
    return torch.stack([t.to(torch.float64) for t in totals]).sum() if totals else None
