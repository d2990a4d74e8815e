"""The core inside `torch.compile(fullgraph=True, dynamic=False)`: whole-graph, equal to eager.

The backend "aot_eager" traces forwards and backwards as inductor would and runs the graph as it is, in seconds. The
quick cases cover each method and solver once; the full cross product and one inductor case are slow.
"""

from __future__ import annotations

from typing import Any

import device_cases as cases
import networks
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad as hg

ADAM, MOMENTUM = hg.optim.Adam(lr=0.05), hg.optim.SGD(lr=0.1, momentum=0.9)
OPTIMIZERS = {"SGD": MOMENTUM, "Adam": ADAM}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def assert_same(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    left, right = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-11)


def tied_net() -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = networks.TiedNet().double()
    lower_loss, upper_loss = networks.losses(net)
    batches = [(torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3) for _ in range(2)]
    return lower_loss, upper_loss, networks.parameters_of(net), networks.upper_parameters(3, torch.float64), batches


def hypergradient_of_run(method: hg.Method, optimizer: hg.optim.Optimizer) -> tuple[Any, tuple[Any, ...]]:
    """Return a function whole in itself, a run and its hypergradient, and its arguments: a net with tied weights."""
    lower_loss, upper_loss, lower, upper, batches = tied_net()

    def function(lower, upper, batches):
        traj = hg.descend(
            lower_loss, lower, upper, optimizer=optimizer, batches=batches, recording=method.recording(len(batches))
        )
        return hg.hypergradient(upper_loss, traj, upper, method=method, batch=batches[0], throw=False)

    return function, (lower, upper, batches)


def assert_compiles(method: hg.Method, optimizer: hg.optim.Optimizer, backend: str = "aot_eager", **kw: Any) -> None:
    function, arguments = hypergradient_of_run(method, optimizer)
    expected = function(*arguments)
    found = compiled(function, backend)(*arguments)
    assert isinstance(found, hg.Hypergradient)
    assert_same(found, expected, **kw)
    assert set(found.stats) == set(expected.stats)


QUICK = {
    "Implicit-CG-Adam": (hg.Implicit(hg.CG(2, check_every=None), damping=1.0, warm_start=True), ADAM),
    "Unrolled-SGD": (hg.Unrolled(), MOMENTUM),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_run_and_its_hypergradient_with_batch_norm_and_tied_weights(name):
    method, optimizer = QUICK[name]
    assert_compiles(method, optimizer)


def test_the_first_order_methods_in_one_graph_returning_what_the_caller_picks():
    lower, upper = cases.parameters()
    batches = [cases.data(seed=seed) for seed in range(2)]
    methods = [
        hg.OneStep(),
        hg.FiniteDifference(),
        hg.SAMA(),
        hg.Penalty(strength=5.0, optimizer=hg.optim.SGD(lr=0.1), steps=1),
        hg.F2SA(strength=5.0),
        hg.BOME(),
    ]

    def function(lower, upper, batches):
        traj = hg.descend(cases.lower_loss, lower, upper, optimizer=ADAM, batches=batches)
        found = [
            hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=batches[0], throw=False)
            for method in methods
        ]
        return [(h.grad, h.value, dict(h.stats), h.result) for h in found], traj.end

    assert_same(compiled(function)(lower, upper, batches), function(lower, upper, batches))


SOLVERS = {
    "Neumann": hg.Neumann(2, num_power_steps=10),
    "MINRES": hg.MINRES(2, check_every=None),
    "GMRES": hg.GMRES(2, check_every=None),
    "Nystrom": hg.Nystrom(2),
    "Exact": hg.Exact(),
}


def quadratic(lower, upper, batch):
    return 0.5 * ((batch @ lower["w"] - upper["c"]) ** 2).sum() + 0.05 * upper["l"].exp() * (lower["w"] ** 2).sum()


def quadratic_upper(lower, upper, batch):
    return (lower["w"] ** 3).sum() + upper["l"] ** 2


@pytest.mark.parametrize("name", SOLVERS)
def test_each_solver_on_a_solution_from_elsewhere(name):
    generator = torch.Generator().manual_seed(0)
    lower = {"w": torch.randn(3, dtype=torch.float64, generator=generator)}
    upper = {"c": torch.ones(4, dtype=torch.float64), "l": torch.zeros((), dtype=torch.float64)}
    batch = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    method = hg.Implicit(SOLVERS[name])

    def function(lower, upper, batch):
        traj = hg.solved(quadratic, lower, batch)
        return hg.hypergradient(quadratic_upper, traj, upper, method=method, throw=False)

    assert_same(compiled(function)(lower, upper, batch), function(lower, upper, batch))


def test_forward_mode_and_a_composite_under_gauss_newton():
    lower, upper = cases.parameters()
    batches = [cases.data(seed=seed) for seed in range(2)]
    gauss_newton = hg.Implicit(hg.CG(2, check_every=None), curvature="gauss_newton")
    forward = hg.ForwardUnrolled()

    def function(lower, decay, shift, batches):
        upper = {"decay": decay, "shift": shift}
        traj = hg.descend(cases.composite, lower, upper, optimizer=MOMENTUM, batches=batches)
        first = hg.hypergradient(cases.upper_loss, traj, upper, method=gauss_newton, batch=batches[0], throw=False)

        def with_decay(lower, other, batch):
            return cases.lower_loss(lower, {"decay": other["decay"], "shift": shift}, batch)

        few = {"decay": decay}
        traj = hg.descend(with_decay, lower, few, optimizer=MOMENTUM, batches=batches[:1])
        upper_loss = lambda w, u, b: cases.upper_loss(w, {**u, "shift": shift}, b)  # noqa: E731
        second = hg.hypergradient(upper_loss, traj, few, method=forward, batch=batches[0], throw=False)
        return first, second

    arguments = (lower, upper["decay"], upper["shift"], batches)
    assert_same(compiled(function)(*arguments), function(*arguments))


def test_a_compiled_population():
    """compile(vmap(f)) is supported: several upper variables, one graph."""
    lower, upper = cases.parameters()
    many = {name: torch.stack([u, u + 0.3, u - 0.2]) for name, u in upper.items()}
    batches = [cases.data(seed=seed) for seed in range(2)]
    methods = [hg.Implicit(hg.CG(2, check_every=None), damping=1.0), hg.Unrolled()]

    def one(upper):
        traj = hg.descend(cases.lower_loss, lower, upper, optimizer=MOMENTUM, batches=batches)
        return [
            hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=batches[0], throw=False)
            for method in methods
        ]

    loop = [one({name: u[i] for name, u in many.items()}) for i in range(3)]
    found = compiled(torch.func.vmap(one))(many)
    for k in range(len(methods)):
        for name in many:
            expected = torch.stack([member[k].grad[name] for member in loop])
            torch.testing.assert_close(found[k].grad[name], expected, rtol=1e-9, atol=1e-11)
        assert found[k].result.tolist() == [int(member[k].result) for member in loop]


CROSS = {
    f"{name}-{optimizer}": (method, OPTIMIZERS[optimizer])
    for name, method in cases.methods(None).items()
    for optimizer in OPTIMIZERS
    if not (optimizer == "SGD" and name == "Implicit-CG-second-moment") and name != "Implicit-over"
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CROSS)
def test_every_method_over_every_run(name):
    method, optimizer = CROSS[name]
    assert_compiles(method, optimizer, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_unrolled_steps(optimizer):
    lower, upper = cases.parameters()
    batches = [cases.data(seed=seed) for seed in range(10)]

    def function(lower, upper, batches):
        traj = hg.descend(cases.lower_loss, lower, upper, optimizer=OPTIMIZERS[optimizer], batches=batches)
        return hg.hypergradient(cases.upper_loss, traj, upper, method=hg.Unrolled(), batch=batches[0], throw=False)

    assert_same(compiled(function)(lower, upper, batches), function(lower, upper, batches))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
def test_inductor():
    assert_compiles(hg.Implicit(hg.CG(3, check_every=None), damping=1.0), MOMENTUM, backend="inductor", rtol=1e-8)
