"""`compile=` of `Implicit` and `Unrolled`: equal to eager, compiled once, refused where it cannot be honoured."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import device_cases as cases
import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import hypergrad as hg
from hypergrad.step import Step

AOT = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def problem() -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = networks.TiedNet().double()
    lower_loss, upper_loss = networks.losses(net)
    batches = [(torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3) for _ in range(6)]
    lower, upper = networks.parameters_of(net), networks.upper_parameters(3, torch.float64)
    return net, lower_loss, upper_loss, lower, upper, batches


def assert_same(found: hg.Hypergradient, expected: hg.Hypergradient, rtol: float = 1e-10) -> None:
    for name in expected.grad:
        torch.testing.assert_close(found.grad[name], expected.grad[name], rtol=rtol, atol=1e-13)
    assert found.result == expected.result
    assert {k: v.shape for k, v in found.stats.items()} == {k: v.shape for k, v in expected.stats.items()}


OPTIMIZERS = {
    "SGD": hg.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.05, maximize=False),
    "Adam": hg.optim.Adam(lr=0.05),
}
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "batches and over": {"batches": 2, "over": ["enc", "head"]}}


@pytest.mark.parametrize("options", OPTIONS)
def test_implicit_equals_eager_and_compiles_once(options):
    net, lower_loss, upper_loss, lower, upper, batches = problem()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    drawn = torch.get_rng_state()

    def both(optimizer: hg.optim.Optimizer, batches: list[Any]) -> None:
        traj = hg.descend(lower_loss, lower, upper, optimizer=optimizer, batches=batches)
        eager, compiled = (
            hg.hypergradient(
                upper_loss,
                traj,
                upper,
                method=hg.Implicit(hg.CG(5), damping=1.0, compile=backend, **OPTIONS[options]),
                batch=batches[0],
            )
            for backend in (False, AOT)
        )
        assert_same(compiled, eager)

    both(OPTIMIZERS["SGD"], batches)
    before = num_graphs()
    both(OPTIMIZERS["SGD"], batches[::-1])
    both(OPTIMIZERS["Adam"], batches[:3])
    assert num_graphs() == before
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert torch.equal(drawn, torch.get_rng_state())


def test_unrolled_equals_eager_and_compiles_once_for_all_steps():
    """Adam's bias correction depends on the step count, a Python number: it must not compile anew at each step."""
    _, lower_loss, upper_loss, lower, upper, batches = problem()
    before = num_graphs()
    for optimizer in OPTIMIZERS.values():
        traj = hg.descend(
            lower_loss,
            lower,
            {**upper, "lr": torch.tensor(-3.0, dtype=torch.float64)},
            optimizer=optimizer,
            batches=batches,
            hyper={"lr": lambda u: u["lr"].exp()},
        )
        upper_ = {**upper, "lr": torch.tensor(-3.0, dtype=torch.float64)}
        eager, compiled = (
            hg.hypergradient(upper_loss, traj, upper_, method=hg.Unrolled(compile=backend), batch=batches[0])
            for backend in (False, AOT)
        )
        assert_same(compiled, eager)
    assert num_graphs() == before + 1


@pytest.mark.parametrize("retain", [0.0, 0.5, 1.0])
def test_a_run_recorded_for_it_is_compiled_too(retain):
    """Steps without a tape are one graph, steps with one another; the sweep adds none."""
    _, lower_loss, upper_loss, lower, upper, batches = problem()
    before = num_graphs()

    def grad(compile: Any) -> hg.Hypergradient:
        method = hg.Unrolled(retain=retain, compile=compile)
        recording = method.recording(len(batches))
        adam = OPTIMIZERS["Adam"]
        traj = hg.descend(lower_loss, lower, upper, optimizer=adam, batches=batches, recording=recording)
        return hg.hypergradient(upper_loss, traj, upper, method=method, batch=batches[0])

    assert_same(grad(AOT), grad(False))
    assert num_graphs() == before + (1 if retain == 1.0 else 2)


def test_a_loss_that_is_gone_takes_its_compiled_gradient_along():
    from hypergrad import _compiled

    _, lower_loss, upper_loss, lower, upper, batches = problem()
    gc.collect()
    size = len(_compiled._cache)
    traj = hg.solved(lower_loss, lower, batches[0])
    hg.hypergradient(upper_loss, traj, upper, method=hg.Implicit(hg.CG(2), damping=1.0, compile=AOT), batch=batches[0])
    assert len(_compiled._cache) == size + 1
    gone = weakref.ref(lower_loss)
    del lower_loss, traj
    gc.collect()
    assert gone() is None
    assert len(_compiled._cache) == size


class Model:
    """A loss that is a method, made anew at each access."""

    def __init__(self) -> None:
        self.scale = 2.0

    def loss(self, lower: Any, upper: Any, batch: Any) -> torch.Tensor:
        return self.scale * ((lower["w"] - upper["c"] * batch) ** 2).sum()


def test_a_bound_method_compiles_once():
    model, upper = Model(), {"c": torch.ones(2)}

    def grad() -> torch.Tensor:
        traj = hg.solved(model.loss, {"w": torch.ones(2)}, torch.ones(2))
        method = hg.Implicit(hg.CG(2), compile=AOT)
        return hg.hypergradient(lambda w, u, b: (w["w"] ** 2).sum(), traj, upper, method=method).grad["c"]

    before = num_graphs()
    torch.testing.assert_close(grad(), torch.full((2,), 2.0))
    grad()
    assert num_graphs() == before + 2  # one for the lower, one for the mixed product


def simple(lower: Any, upper: Any, batch: Any) -> torch.Tensor:
    return ((lower["w"] - upper["c"]) ** 2).sum()


def run(method: hg.Method, loss: Any = simple, upper: Any = None) -> hg.Hypergradient:
    upper = {"c": torch.ones(2)} if upper is None else upper
    traj = hg.descend(loss, {"w": torch.ones(2)}, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[None])
    return hg.hypergradient(lambda w, u, b: (w["w"] ** 2).sum(), traj, upper, method=method, throw=False)


METHODS = [hg.Implicit(hg.CG(2, check_every=None), compile=AOT), hg.Unrolled(compile=AOT)]


@pytest.mark.parametrize("method", METHODS, ids=["Implicit", "Unrolled"])
def test_refused_inside_vmap_and_inlined_inside_compile(method):
    with pytest.raises(ValueError, match="compile the whole"):
        torch.func.vmap(lambda c: run(method, upper={"c": c}).grad["c"])(torch.ones(3, 2))
    whole = torch.compile(lambda c: run(method, upper={"c": c}).grad["c"], fullgraph=True, backend=AOT)
    torch.testing.assert_close(whole(torch.ones(2)), run(method).grad["c"])


@pytest.mark.parametrize("method", METHODS, ids=["Implicit", "Unrolled"])
def test_random_draws_are_refused_before_anything_is_compiled(method):
    def noisy(lower, upper, batch):
        return (F.dropout(lower["w"] - upper["c"], 0.5) ** 2).sum()

    before, drawn = num_graphs(), torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers"):
        run(method, noisy)
    assert num_graphs() == before
    assert torch.equal(drawn, torch.get_rng_state())


def test_captured_buffers_that_are_written_are_refused_by_name():
    norm = nn.BatchNorm1d(2)

    def loss(lower, upper, batch):
        return (norm(torch.outer(torch.arange(3.0), lower["w"]) + upper["c"]) ** 4).sum()

    with pytest.raises(ValueError, match="Pass clones"):
        run(METHODS[0], loss)
    assert torch.equal(norm.running_mean, torch.zeros(2)) and int(norm.num_batches_tracked) == 0
    run(hg.Implicit(hg.CG(2)), loss)  # hooks and buffers work as before


def test_losses_that_break_the_graph_are_refused():
    def breaks(lower, upper, batch):
        torch._dynamo.graph_break()
        return simple(lower, upper, batch)

    with pytest.raises(ValueError, match="cannot take the lower loss whole"):
        run(METHODS[0], breaks)


def test_roots_and_gauss_newton_are_refused():
    traj = hg.solved_root(lambda w, u, b: {"w": w["w"] - u["c"]}, {"w": torch.ones(2)})
    upper = {"c": torch.ones(2)}
    with pytest.raises(ValueError, match="solved_root"):
        hg.hypergradient(lambda w, u, b: w["w"].sum(), traj, upper, method=hg.Implicit(hg.GMRES(2), compile=AOT))
    with pytest.raises(ValueError, match="gauss_newton"):
        hg.Implicit(hg.CG(2), curvature="gauss_newton", compile=True)
    for method in (lambda c: hg.Implicit(hg.CG(2), compile=c), lambda c: hg.Unrolled(compile=c)):
        with pytest.raises(ValueError, match="compile must be a bool"):
            method(3)


def test_losses_of_one_function_have_a_limit_of_recompilations_each():
    """Nine problems in one process, each with its own loss, all compile: the compiler's limit of 8 is per loss."""

    def make(scale: float) -> Any:
        return lambda lower, upper, batch: scale * ((lower["w"] - upper["c"]) ** 2).sum()

    kept = [make(1.0 + k) for k in range(9)]
    for loss in kept:
        run(hg.Implicit(hg.CG(2), compile="eager"), loss)


def test_second_derivatives_stay_eager():
    lower, upper = cases.parameters()
    batch = cases.data()

    def twice(compile: Any) -> torch.Tensor:
        leaf = {name: u.clone().requires_grad_() for name, u in upper.items()}
        traj = hg.descend(cases.lower_loss, lower, leaf, optimizer=OPTIMIZERS["SGD"], batches=[batch] * 2)
        end = hg.best_response(traj, leaf, method=hg.Unrolled(compile=compile))
        value = cases.upper_loss(end, leaf, batch)
        (grad,) = torch.autograd.grad(value, [leaf["shift"]], create_graph=True)
        return torch.autograd.grad((grad**2).sum(), leaf["shift"])[0]

    torch.testing.assert_close(twice(AOT), twice(False))


def unrolled(loss: Any, upper: Any, batches: list[Any], compile: Any) -> hg.Hypergradient:
    method = hg.Unrolled(compile=compile)
    recording = method.recording(len(batches))
    sgd = hg.optim.SGD(lr=0.1)
    traj = hg.descend(loss, {"w": torch.zeros(3)}, upper, optimizer=sgd, batches=batches, recording=recording)
    return hg.hypergradient(lambda w, u, b: (w["w"] ** 2).sum(), traj, upper, method=method)


@pytest.mark.parametrize("labelled", [(True, False), (False, True)])
def test_steps_that_read_other_upper_parameters_keep_their_share(labelled, monkeypatch):
    def loss(lower: Any, upper: Any, batch: Any) -> torch.Tensor:
        x, is_labelled = batch
        value = upper["l2"].exp() * (lower["w"] ** 2).sum() + ((lower["w"] - x) ** 2).sum()
        return value + ((lower["w"] - upper["c"]) ** 2).sum() if is_labelled else value

    upper = {"c": torch.ones(3), "l2": torch.zeros(()), "unread": torch.ones(2)}
    batches = [(torch.full((3,), 1.0 + k), is_labelled) for k, is_labelled in enumerate(labelled)]
    assert_same(unrolled(loss, upper, batches, AOT), unrolled(loss, upper, batches, False), rtol=1e-6)

    others = [(x + 1, is_labelled) for x, is_labelled in batches * 2]
    expected = unrolled(loss, upper, others, False)
    monkeypatch.setattr(Step, "pull", None)  # steps of known kinds are never pulled back eagerly
    assert_same(unrolled(loss, upper, others, AOT), expected, rtol=1e-6)


def test_a_later_run_may_read_other_upper_parameters():
    """A flag that the loss sees changes between runs, in which the compiler finds or makes other code."""
    flags = {"labelled": False}

    def loss(lower: Any, upper: Any, batch: Any) -> torch.Tensor:
        value = upper["l2"].exp() * ((lower["w"] - batch) ** 2).sum()
        return value + ((lower["w"] - upper["c"]) ** 2).sum() if flags["labelled"] else value

    upper, batches = {"c": torch.ones(3), "l2": torch.zeros(())}, [torch.full((3,), 2.0)] * 2
    for labelled in (False, True, False, True):
        flags["labelled"] = labelled
        assert_same(unrolled(loss, upper, batches, AOT), unrolled(loss, upper, batches, False), rtol=1e-6)


@dataclass
class Pair:
    x: torch.Tensor
    weight: float


BATCHES: dict[str, tuple[Callable[[float], Any], Callable[[Any], torch.Tensor]]] = {
    "dataclass": (lambda k: Pair(torch.full((3,), k), 2.0), lambda batch: batch.weight * batch.x),
    "array of indices": (lambda k: (torch.full((3,), k), np.full(3, k)), lambda batch: batch[0]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_objects_that_do_not_compare(name):
    make, data = BATCHES[name]

    def loss(lower: Any, upper: Any, batch: Any) -> torch.Tensor:
        return ((lower["w"] - upper["c"] * data(batch)) ** 2).sum()

    batches = [make(1.0 + k) for k in range(4)] * 2
    upper, before = {"c": torch.ones(3)}, num_graphs()
    assert_same(unrolled(loss, upper, batches, AOT), unrolled(loss, upper, batches, False), rtol=1e-6)
    assert num_graphs() == before + 2  # a step and its derivative


def wrong_backward(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """Compile exactly, but for derivatives that are too large by a thousandth."""
    del inputs

    def run(*arguments: torch.Tensor) -> Any:
        return [
            torch.lerp(out.detach(), out, 1.001) if isinstance(out, torch.Tensor) and out.requires_grad else out
            for out in graph(*arguments)
        ]

    return run


def wrong_outputs(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """Compile exactly, but for values that are too large by a thousandth: a step pulled back is a derivative itself."""
    del inputs
    return lambda *arguments: [1.001 * out for out in graph(*arguments)]


@pytest.mark.parametrize(
    ("name", "wrong", "off"), [("Implicit", wrong_backward, r"0\.001 "), ("Unrolled", wrong_outputs, "")]
)
def test_wrong_compiled_derivatives_give_way_to_eager_ones(name, wrong, off):
    from torch._dynamo.backends.registry import register_backend

    backend = f"wrong_backward_of_{name}"
    register_backend(wrong, name=backend)
    _, lower_loss, upper_loss, lower, upper, batches = problem()
    make = {
        "Implicit": lambda c: hg.Implicit(hg.CG(5), damping=1.0, compile=c),
        "Unrolled": lambda c: hg.Unrolled(compile=c),
    }[name]
    traj = hg.descend(lower_loss, lower, upper, optimizer=OPTIMIZERS["SGD"], batches=batches)

    def run(compile: bool | str) -> hg.Hypergradient:
        return hg.hypergradient(upper_loss, traj, upper, method=make(compile), batch=batches[0])

    eager = run(False)
    with pytest.warns(RuntimeWarning, match=rf"compiled derivative .* is off by {off}.*compile='aot_eager'"):
        assert_same(run(backend), eager)
    assert_same(run(backend), eager)  # and says so once


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
@pytest.mark.parametrize("name", ["Implicit", "Unrolled"])
def test_inductor(name):
    _, lower_loss, upper_loss, lower, upper, batches = problem()
    make = {
        "Implicit": lambda c: hg.Implicit(hg.CG(5), damping=1.0, compile=c),
        "Unrolled": lambda c: hg.Unrolled(compile=c),
    }[name]
    traj = hg.descend(lower_loss, lower, upper, optimizer=OPTIMIZERS["Adam"], batches=batches)
    eager, compiled = (
        hg.hypergradient(upper_loss, traj, upper, method=make(c), batch=batches[0]) for c in (False, True)
    )
    assert_same(compiled, eager, rtol=1e-8)
    before = num_graphs()
    hg.hypergradient(upper_loss, traj, upper, method=make(True), batch=batches[1])
    assert num_graphs() == before
