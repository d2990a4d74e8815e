"""The mean over micro-batches, and over ranks in the functional form, is the loss on the union of the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convex_cases as cases
import pytest
import shared_engines as ec
import torch
import torch.distributed as dist
from processes import run_ranks

import hypergrad as hg
from hypergrad.averaged import split


def _hypergradient(
    name: str, micro_batches: int = 1, *, ranks: hg.distributed.Ranks | None = None, **options: Any
) -> dict[str, Any]:
    """Return the hypergradient, the loss and the stationarity by method `name`, each rank on its part of the data."""
    lower_loss, upper_loss = cases.losses(name)
    batches, held_out = cases.data(torch.float64)
    lower, upper = cases.start(torch.float64)
    if ranks is not None:
        batches = [split(batch, ranks.size)[ranks.rank] for batch in batches]
        held_out = split(held_out, ranks.size)[ranks.rank]
    if ranks is not None or micro_batches > 1:
        lower_loss = hg.Averaged(lower_loss, micro_batches=micro_batches, ranks=ranks)
        upper_loss = hg.Averaged(upper_loss, micro_batches=micro_batches, ranks=ranks)
    method = cases.METHODS[name]
    usual = hg.optim.Adam(lr=0.1) if name == "sama" else hg.optim.SGD(lr=0.3, momentum=0.5)
    options = {"optimizer": usual, "recording": method.recording(len(batches))} | options
    run = hg.descend(lower_loss, lower, upper, batches=batches, **options)
    h = hg.hypergradient(upper_loss, run, upper, method=method, batch=held_out)
    stationarity = h.stats["stationarity"] if "stationarity" in h.stats else torch.zeros(())
    return {**{k: g.tolist() for k, g in h.grad.items()}, "value": h.value.tolist(), "F": stationarity.tolist()}


def _close(found: dict[str, Any], truth: dict[str, Any]) -> None:
    for key, value in truth.items():
        expected = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(torch.tensor(found[key], dtype=torch.float64), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", cases.METHODS)
def test_micro_batches_make_the_full_batch(name: str) -> None:
    _close(_hypergradient(name, 4), _hypergradient(name))


STEPS: dict[str, dict[str, Any]] = {
    "momentum and decay": {"optimizer": hg.optim.SGD(lr=0.3, momentum=0.5, nesterov=True, weight_decay=0.1)},
    "adaptive": {"optimizer": hg.optim.Adam(lr=0.1)},
    "clipped": {"clip_norm": 0.1},
    "clipped by value": {"clip_value": 0.05},
    "learned rate": {"hyper": {"lr": lambda upper: 0.2 * upper["decay"].mean().sigmoid()}},
    "projected": {"project": lambda params: {name: p.tanh() for name, p in params.items()}},
}


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("name", ["unrolled", "unrolled_retain", "truncated"])
def test_sweeps_through_any_step_in_micro_batches(name: str, how: str) -> None:
    _close(_hypergradient(name, 4, **STEPS[how]), _hypergradient(name, **STEPS[how]))


def test_ranks_make_the_union_batch_in_the_functional_form() -> None:
    def everything() -> dict[str, Any]:
        ranks = hg.distributed.world()
        found = {name: _hypergradient(name, ranks=ranks) for name in cases.METHODS}
        return found | {"cg and parts": _hypergradient("cg", 2, ranks=ranks)}

    first, second = run_ranks(2, everything)
    assert first == second
    for name, found in first.items():
        _close(found, _hypergradient(name.split(" ")[0]))


@pytest.mark.parametrize("method", ec.METHODS)
def test_micro_batches_in_the_engine(method: str) -> None:
    whole = ec.run(ec.two_levels, 3, method, torch.float64)
    assert max(ec.gap(ec.run(ec.two_levels, 3, method, torch.float64, micro_batches=4), whole)) <= 1e-10


PENALIZED = {"response": lambda m, b: ec.lower_loss(m, b)[0] + 0.1 * m.net.weight.square().sum()}
GRAPHS: dict[str, tuple[Callable[..., ec.Setup], tuple[Any, ...], dict[str, Any]]] = {
    "fomaml": (ec.first_order_meta, ("fomaml",), {}),
    "maml": (ec.first_order_meta, ("maml",), {}),
    "reptile": (ec.first_order_meta, ("reptile",), {}),
    "three levels, implicit": (ec.three_levels, (hg.Implicit(hg.CG(8, rtol=1e-13)),), {}),
    "three levels, unrolled": (ec.three_levels, (hg.Unrolled(),), {}),
    "a response": (ec.two_levels, ("cg",), PENALIZED),
    "a penalized response": (ec.two_levels, ("penalty",), PENALIZED),
    "a learned decay": (ec.two_levels, ("one_step",), {"hyper": {"weight_decay": lambda m: m.weights.decay.exp()[0]}}),
    "a learned rate": (ec.two_levels, ("unrolled",), {"hyper": {"lr": lambda m: 0.1 * m.weights.decay.exp()[0]}}),
    "scaled": (ec.two_levels, ("cg",), {"loss_scale": 256.0}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "three" in name else name for name in GRAPHS]
)
def test_micro_batches_of_every_level(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, arguments, options = GRAPHS[name]
    problem = hg.Problem

    def run(count: int) -> list[dict[str, list[float]]]:
        def cut(name: str, **given: Any) -> hg.Problem:
            own = options if name == "net" else {}
            return problem(name, **given | own | {"micro_batches": count})

        monkeypatch.setattr(hg, "Problem", cut)
        return ec.run(build, 2, *arguments, torch.float64)

    assert max(ec.gap(run(4), run(1))) <= 1e-10


def test_micro_batches_above_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = hg.Problem

    def cut(name: str, **given: Any) -> hg.Problem:
        return problem(name, **given | ({"micro_batches": 2} if name == "meta" else {}))

    monkeypatch.setattr(hg, "Problem", cut)
    with pytest.raises(ValueError, match=r"'meta': micro_batches=2 .* task by task, for it reads 'net', which has tas"):
        ec.tasks(torch.float64)


def test_derivatives_of_the_rule() -> None:
    """Ranks agree, and with one process, on a second derivative through the best response."""

    def second(ranks: hg.distributed.Ranks | None) -> list[float]:
        lower_loss, _ = cases.losses("cg")
        batches, _ = cases.data(torch.float64)
        lower, upper = cases.start(torch.float64)
        if ranks is not None:
            batches = [split(batch, ranks.size)[ranks.rank] for batch in batches]
            lower_loss = hg.Averaged(lower_loss, ranks=ranks)
        run = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=0.3), batches=batches[:1] * 60)
        leaves = {name: u.clone().requires_grad_() for name, u in upper.items()}
        solution = hg.best_response(run, leaves, method=hg.Implicit(hg.Exact()))
        (first,) = torch.autograd.grad(solution["w"].square().sum(), leaves["decay"], create_graph=True)
        (twice,) = torch.autograd.grad(first.square().sum(), leaves["decay"])
        found: list[float] = twice.tolist()
        return found

    several = run_ranks(2, lambda: second(hg.distributed.world()))
    assert several[0] == several[1]
    torch.testing.assert_close(torch.tensor(several[0]), torch.tensor(second(None)), rtol=1e-9, atol=1e-11)


def test_memory_of_one_micro_batch_at_a_time() -> None:
    """What a taped product keeps for backward shrinks with the micro-batch."""
    saved = {}
    for count in (1, 8):
        most = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal most
            most = max(most, tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            _hypergradient("cg", count)
        saved[count] = most
    assert saved[8] * 4 <= saved[1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Averaged: micro_batches must be an int >= 1, got 0"):
        hg.Averaged(cases.lower_loss, micro_batches=0)
    with pytest.raises(ValueError, match="Averaged: loss must be a function"):
        hg.Averaged(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Averaged: ranks must be None or"):
        hg.Averaged(cases.lower_loss, ranks=dist)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a batch of 4 samples does not divide into 3 equal parts"):
        split(torch.zeros(4, 2), 3)
    with pytest.raises(ValueError, match="lead with different sizes here"):
        split((torch.zeros(4, 2), torch.zeros(2)), 2)
