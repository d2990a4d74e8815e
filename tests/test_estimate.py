"""What `estimate` says is what an honest count by hand, and the allocator, say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypergrad as hg
from hypergrad.bench.weighing import allocated_bytes
from hypergrad.testing import quadratic

Params = dict[str, Tensor]
ROWS, INPUTS, OUTPUTS = 64, 300, 20
FLOAT = 4


def linear_loss(lower: Params, upper: Params, batch: Any) -> Tensor:
    return ((batch @ lower["w"] - upper["c"]) ** 2).mean()


def above(lower: Params, upper: Params, batch: Any) -> Tensor:
    return (lower["w"] ** 2).sum()


LOWER, UPPER, DATA = {"w": torch.zeros(INPUTS, OUTPUTS)}, {"c": torch.zeros(OUTPUTS)}, torch.zeros(ROWS, INPUTS)
SOLVED = hg.solved(linear_loss, LOWER, DATA)
PRODUCT = 2 * ROWS * INPUTS * OUTPUTS
"""FLOPs of one matrix product of the layer."""


def one(method: hg.Method, traj: hg.Trajectory = SOLVED, **options: Any) -> Any:
    return hg.estimate(above, traj, UPPER, methods={"it": method}, **options)["it"]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_linear_layer_is_two_matrix_products() -> None:
    costs = hg.estimate(above, SOLVED, UPPER, methods=[hg.OneStep(0.1)])
    assert costs.gradient.flops == 2 * PRODUCT
    assert costs.lower_bytes == INPUTS * OUTPUTS * FLOAT
    assert costs.upper_bytes == OUTPUTS * FLOAT
    assert costs.num_steps == 0


def test_a_hessian_product_of_a_linear_layer_is_two_more() -> None:
    """A product is X^T (X v); the mixed product with c pulls back through X v, one matrix product."""
    five, ten = one(hg.Implicit(hg.CG(5))), one(hg.Implicit(hg.CG(10)))
    assert (five.num_products, ten.num_products) == (5, 10)
    assert ten.flops - five.flops == 5 * 2 * PRODUCT
    assert five.flops == (2 + 5 * 2 + 1) * PRODUCT


def test_a_vector_counts_too() -> None:
    traj = hg.solved(linear_loss, {"w": torch.zeros(INPUTS)}, DATA)
    costs = hg.estimate(above, traj, {"c": torch.zeros(ROWS)}, methods=[hg.OneStep(0.1)])
    assert costs.gradient.flops == 2 * 2 * ROWS * INPUTS


@pytest.mark.parametrize(
    "method",
    [
        hg.Implicit(hg.Neumann(4, step_size=0.1)),
        hg.Implicit(hg.MINRES(7, check_every=None)),
        hg.SOBA(0.1),
        hg.AmIGO(3, 0.1),
        hg.StocBiO(6, 0.1),
        hg.OneStep(0.1),
        hg.FiniteDifference(step_size=0.1),
    ],
    ids=lambda v: str(v)[:30],
)
def test_products_are_those_that_a_call_reports(method: hg.Method) -> None:
    generator = torch.Generator().manual_seed(0)
    lower = {"w": torch.randn(INPUTS, OUTPUTS, generator=generator)}
    data = torch.randn(ROWS, INPUTS, generator=generator)
    h = hg.hypergradient(above, hg.solved(linear_loss, lower, data), UPPER, method=method)
    reported = h.stats.get("num_products")
    assert one(method).num_products == (None if reported is None else int(reported))


def test_a_dense_solve_asks_for_every_column() -> None:
    p = quadratic(6)
    costs = hg.estimate(p.upper_loss, hg.solved(p.lower_loss, p.lower), p.upper, methods=[hg.Implicit(hg.Exact())])
    assert costs.rows[0].num_products == 6


def test_the_record_of_a_run() -> None:
    """Where each of eight steps begins, and where the last one ends; with momentum as much again for its buffer."""
    size = INPUTS * OUTPUTS * FLOAT
    for momentum, vectors in ((0.0, 9), (0.9, 18)):
        sgd = hg.optim.SGD(lr=0.1, momentum=momentum)
        traj = hg.descend(linear_loss, LOWER, UPPER, optimizer=sgd, batches=[DATA] * 8)
        whole, end = one(hg.Unrolled(), traj), one(hg.OneStep(), traj)
        assert whole.record_bytes == pytest.approx(vectors * size, abs=1.1 * size * (momentum > 0))
        assert end.record_bytes < 0.6 * whole.record_bytes
        assert whole.num_products == 8


def test_a_run_of_eight_steps_is_eight_gradients() -> None:
    """Where arithmetic is what takes time; on a small batch the Python around each step adds to it."""
    sgd = hg.optim.SGD(lr=0.1)
    many, few = (
        hg.descend(linear_loss, LOWER, UPPER, optimizer=sgd, batches=[data] * 8)
        for data in (torch.zeros(500 * ROWS, INPUTS), DATA)
    )
    assert one(hg.OneStep(), many).run_equivalents == pytest.approx(8, rel=0.1)
    assert one(hg.OneStep(), few).run_equivalents > 12


def test_retained_tapes_are_in_the_record() -> None:
    """The residual of the layer, kept for the second derivative by each of four steps, is what retaining adds."""
    traj = hg.descend(linear_loss, LOWER, UPPER, optimizer=hg.optim.SGD(lr=0.1), batches=[DATA] * 4)
    plain, retained = one(hg.Unrolled(), traj), one(hg.Unrolled(retain=1.0), traj)
    assert retained.record_bytes - plain.record_bytes >= 4 * ROWS * OUTPUTS * FLOAT
    assert retained.gradient_equivalents < plain.gradient_equivalents


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_communication_is_a_ring_of_flat_vectors(ranks: int) -> None:
    """CG: the outer gradient, F, 5 products and the mixed one; each all-reduce sends 2 (R - 1) / R of its size."""
    expected = 2 * (ranks - 1) / ranks * (7 * INPUTS * OUTPUTS + 2 * OUTPUTS) * FLOAT
    assert one(hg.Implicit(hg.CG(5)), ranks=ranks).communication_bytes == round(expected)


def test_seconds_follow_a_given_gradient() -> None:
    row = one(hg.Implicit(hg.CG(5)), gradient_seconds=0.5)
    assert row.seconds == pytest.approx(0.5 * row.gradient_equivalents)
    assert one(hg.OneStep(0.1)).seconds is None
    measured = hg.estimate(above, SOLVED, UPPER, methods=[hg.OneStep(0.1)], gradient_seconds="measure")
    assert measured.gradient_seconds is not None and 0 < measured.gradient_seconds < 1
    assert "ms" in str(measured)


# --- against the allocator -------------------------------------------------------------------------------------------


def network(convolution: bool) -> tuple[Any, Any, Params, Params, Any]:
    torch.manual_seed(0)
    if convolution:
        net: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 14 * 14, 10),
        )  # fmt: skip
        x = torch.randn(32, 3, 16, 16)
    else:
        net = nn.Sequential(
            nn.Linear(200, 300), nn.Tanh(), nn.Dropout(0.2), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)
        )
        x = torch.randn(256, 200)
    y = torch.randint(10, (len(x),))
    upper = {"weight": torch.zeros(len(x))}

    def lower_loss(lower: Params, u: Params, _: Any) -> Tensor:
        logits = torch.func.functional_call(net, lower, (x,))
        return (torch.sigmoid(u["weight"]) * F.cross_entropy(logits, y, reduction="none")).mean()

    def upper_loss(lower: Params, u: Params, _: Any) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, lower, (x,)), y)

    return lower_loss, upper_loss, {n: p.detach() for n, p in net.named_parameters()}, upper, net


MEASURED = [
    hg.Implicit(hg.CG(4, check_every=None), damping=1.0),
    hg.Unrolled(),
    hg.Unrolled(retain=1.0),
    hg.SAMA(),
    hg.StocBiO(3, batches=2),
    hg.F2SA(),
]


@pytest.mark.parametrize(
    ("method", "convolution"),
    [*((method, True) for method in MEASURED), *((method, False) for method in MEASURED[:4:3])],
    ids=lambda value: {True: "convolutions", False: "mlp"}[value] if isinstance(value, bool) else str(value)[:30],
)
def test_memory_is_within_a_quarter_of_what_is_allocated(method: hg.Method, convolution: bool) -> None:
    lower_loss, upper_loss, lower, upper, _ = network(convolution)
    sgd = hg.optim.SGD(lr=0.01)

    def run() -> hg.Trajectory:
        recording = method.recording(4)
        return hg.descend(lower_loss, lower, upper, optimizer=sgd, batches=[None] * 4, recording=recording)

    def whole() -> Any:
        return hg.hypergradient(upper_loss, run(), upper, method=method, throw=False)

    row = hg.estimate(upper_loss, run(), upper, methods={"it": method})["it"]
    whole()
    measured = allocated_bytes(whole)
    assert 0.75 < row.memory_bytes / measured < 1.25


# --- nothing changes -------------------------------------------------------------------------------------------------


def weighted(m: Any, batch: Any) -> Tensor:
    weights = torch.sigmoid(m.weigh(batch[0]))[:, 0]
    return (weights * F.cross_entropy(m.net(batch[0]), batch[1], reduction="none")).mean()


def an_engine(**options: Any) -> tuple[hg.Engine, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    weigh = nn.Linear(4, 1)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randint(2, (12,))), batch_size=4, shuffle=True
    )
    optimizer = options.pop("optimizer", lambda p: torch.optim.Adam(p, lr=0.01))
    lower = hg.Problem(
        "net",
        module=net,
        loss=weighted,
        optimizer=optimizer(net.parameters()),
        data=data,
        method=options.pop("method", hg.Implicit(hg.CG(3), damping=10.0)),
        steps=3,
        **options,
    )
    upper = hg.Problem(
        "weigh",
        module=weigh,
        loss=lambda m, b: F.cross_entropy(m.net(b[0]), b[1]),
        optimizer=torch.optim.SGD(weigh.parameters(), lr=0.1),
        data=data,
    )
    return hg.Engine([lower, upper], product_check=False), net


def test_an_engine_is_left_as_it_was() -> None:
    states = []
    for asked in (False, True):
        engine, net = an_engine()
        torch.manual_seed(1)
        engine.run(2)
        if asked:
            before = torch.get_rng_state()
            table = hg.estimate(engine, ranks=2, methods=[hg.Implicit(hg.CG(3)), hg.Unrolled(), hg.StocBiO(2)])
            assert torch.equal(before, torch.get_rng_state())
            assert net.training
            first = table["net"].rows[0]
            assert isinstance(first.method, hg.Implicit) and first.num_products == 3
            assert table["net"].num_steps == 3 and first.run_equivalents > 2
            assert "net, read by weigh" in str(table)
        engine.run(2)
        states.append([v.clone() for v in net.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_an_engine_before_its_first_step() -> None:
    engine, _ = an_engine(method=hg.SOBA(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    chosen = [hg.SOBA(), hg.OneStep()]
    costs = hg.estimate(engine, methods=chosen, gradient_seconds=1.0)["net"]
    assert [row.method for row in costs.rows] == chosen
    assert costs.rows[0].num_products == 1 and costs.rows[0].seconds is not None and costs.rows[0].seconds > 3


def test_the_usual_methods_come_after_the_problems_own() -> None:
    weights = nn.ParameterDict({"w": torch.zeros(4)})
    shift = nn.ParameterDict({"c": torch.ones(4)})
    lower = hg.Problem(
        "weights",
        module=weights,
        loss=lambda m, _: ((m.weights["w"] - m.shift["c"]) ** 2).sum(),
        data=[torch.zeros(1)],
        optimizer=torch.optim.SGD(weights.parameters(), lr=0.1),
        method=hg.Implicit(hg.CG(2)),
    )
    upper = hg.Problem(
        "shift",
        module=shift,
        loss=lambda m, _: (m.weights["w"] ** 2).sum(),
        data=[torch.zeros(1)],
        optimizer=torch.optim.SGD(shift.parameters(), lr=0.1),
    )
    table = hg.estimate(hg.Engine([lower, upper], product_check=False))
    names = [type(row.method).__name__ for row in table["weights"].rows]
    assert names[:2] == ["Implicit", "Implicit"]
    assert {"Unrolled", "OneStep", "F2SA"} <= set(names)
    assert "weights, read by shift" in str(table)


def test_the_functional_pieces_are_left_as_they_were() -> None:
    lower_loss, upper_loss, lower, upper, net = network(convolution=True)
    traj = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.Adam(0.01), batches=[None] * 2)
    buffers = [b.clone() for b in net.buffers()]
    before = torch.get_rng_state()
    costs = hg.estimate(upper_loss, traj, upper, methods=[hg.Implicit(hg.CG(1)), hg.Unrolled(), hg.F2SA(steps=1)])
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) and type(b) is Tensor for a, b in zip(buffers, net.buffers(), strict=True))
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())
    assert len(costs.rows) == 3


# --- mistakes --------------------------------------------------------------------------------------------------------


def reads_a_value(lower: Params, upper: Params, batch: Any) -> Tensor:
    total = (lower["w"] ** 2).sum()
    return total if float(total.detach()) > 1 else 2 * total + upper["c"].sum()


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "no run": (lambda: hg.estimate(above), "takes an Engine, or"),
    "an engine and more": (lambda: hg.estimate(an_engine()[0], SOLVED), "the engine has them"),
    "no ranks": (lambda: one(hg.OneStep(0.1), ranks=0), "ranks must be an int >= 1, got 0"),
    "seconds": (lambda: one(hg.OneStep(0.1), gradient_seconds=-1.0), "gradient_seconds must be None, 'measure'"),
    "no methods": (lambda: hg.estimate(above, SOLVED, UPPER, methods=[]), "methods is empty"),
    "a solver": (lambda: hg.estimate(above, SOLVED, UPPER, methods=[hg.CG(3)]), "must be hypergradient methods"),
    "a value": (lambda: hg.estimate(above, hg.solved(reads_a_value, LOWER), UPPER), "asks for values"),
    "a value above": (lambda: hg.estimate(reads_a_value, SOLVED, UPPER), "asks for values"),
    "in a transform": (
        lambda: torch.func.vmap(lambda c: hg.estimate(above, SOLVED, {"c": c}) and c)(torch.zeros(2, OUTPUTS)),
        "cannot run inside torch.func",
    ),
}


@pytest.mark.parametrize("row", MISTAKES)
def test_a_mistake_is_named(row: str) -> None:
    call, message = MISTAKES[row]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_a_method_refuses_is_noted() -> None:
    costs = hg.estimate(above, SOLVED, UPPER, methods=[hg.OneStep(0.1), hg.Unrolled(), hg.Implicit(hg.SciPy("cg"))])
    assert [type(row.method) for row in costs.rows] == [hg.OneStep]
    assert len(costs.refusals) == 2
    assert "hg.descend" in str(costs)
    with pytest.raises(KeyError, match="hg.descend"):
        costs["Unrolled"]
    with pytest.raises(KeyError, match="no row 'x'"):
        costs["x"]
