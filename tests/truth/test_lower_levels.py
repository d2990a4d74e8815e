"""What the lower optimizer, `response`, `over`, `hyper`, roots, `start` and batches do to the hypergradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad as hg
from hypergrad.testing import quadratic, relative_error, ridge, spd

Params = dict[str, Tensor]
F64 = torch.float64
A = spd(4, 5.0, generator=torch.Generator().manual_seed(3))
B = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=F64)
C = torch.randn(4, generator=torch.Generator().manual_seed(5), dtype=F64)
UPPER = {"u": torch.tensor([0.3, -0.7, 0.4], dtype=F64), "log_decay": torch.tensor(-1.0, dtype=F64)}
LOWER = {"w": torch.zeros(4, dtype=F64)}


def lower_loss(w: Params, u: Params, batch: Any) -> Tensor:
    return 0.5 * w["w"] @ (A @ w["w"]) - w["w"] @ (B @ torch.tanh(u["u"]))


def upper_loss(w: Params, u: Params, batch: Any) -> Tensor:
    return 0.5 * ((w["w"] - C) ** 2).sum() + 0.1 * (u["u"] ** 3).sum()


def negated(w: Params, u: Params, batch: Any) -> Tensor:
    return -lower_loss(w, u, batch)


def truth(matrix: Any, force: Any = None) -> Params:
    """Return the hypergradient where the solution is matrix(u)^-1 force(u)."""

    def total(u: Params) -> Tensor:
        rhs = B @ torch.tanh(u["u"]) if force is None else force(u)
        return upper_loss({"w": torch.linalg.solve(matrix(u), rhs)}, u, None)

    return torch.func.grad(total)(UPPER)


def descend(loss: Any = lower_loss, steps: int = 400, **options: Any) -> hg.Trajectory:
    options.setdefault("optimizer", hg.optim.SGD(lr=0.5))
    return hg.descend(loss, options.pop("lower", LOWER), UPPER, batches=[None] * steps, **options)


def gradient(trajectory: hg.Trajectory, method: hg.Method) -> Params:
    return hg.hypergradient(upper_loss, trajectory, UPPER, method=method).grad


EXACT = [
    hg.Implicit(hg.CG(30, rtol=1e-13)),
    hg.Implicit(hg.Exact()),
    hg.Implicit(hg.MINRES(30, rtol=1e-13)),
    hg.Implicit(hg.GMRES(30, rtol=1e-13)),
    hg.Implicit(hg.Neumann(500, step_size=0.5)),
    hg.Implicit(hg.SciPy("gmres", 50, rtol=1e-13)),
    hg.Unrolled(),
]
EYE = torch.eye(4, dtype=F64)


@pytest.mark.parametrize("method", EXACT, ids=lambda m: str(m)[:30])
@pytest.mark.parametrize(
    "optimizer",
    [
        hg.optim.SGD(lr=0.5, weight_decay=0.4),
        hg.optim.SGD(lr=0.5, weight_decay=0.4, momentum=0.3),
        hg.optim.SGD(lr=torch.tensor(0.5, dtype=F64), weight_decay=torch.tensor(0.4, dtype=F64)),
        torch.optim.SGD([torch.zeros(4, dtype=F64)], lr=0.5, weight_decay=0.4),
    ],
    ids=["sgd", "momentum", "tensor", "torch"],
)
def test_coupled_weight_decay_is_part_of_stationarity(method: hg.Method, optimizer: Any) -> None:
    expected = truth(lambda u: A + 0.4 * EYE)
    assert relative_error(gradient(descend(optimizer=optimizer), method), expected) < 1e-8


@pytest.mark.parametrize("method", EXACT, ids=lambda m: str(m)[:30])
@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_maximize_flips_the_sign(method: hg.Method, decay: float) -> None:
    trajectory = descend(negated, optimizer=hg.optim.SGD(lr=0.5, maximize=True, weight_decay=decay))
    assert relative_error(gradient(trajectory, method), truth(lambda u: A + decay * EYE)) < 1e-8


@pytest.mark.parametrize("method", EXACT, ids=lambda m: str(m)[:30])
def test_weight_decay_as_an_upper_variable(method: hg.Method) -> None:
    trajectory = descend(hyper={"weight_decay": lambda u: u["log_decay"].exp()})
    expected = truth(lambda u: A + u["log_decay"].exp() * EYE)
    assert expected["log_decay"].abs() > 1e-3
    assert relative_error(gradient(trajectory, method), expected) < 1e-8


@pytest.mark.parametrize("method", [hg.OneStep(), hg.FiniteDifference(1e-3), hg.SAMA(1e-3)], ids=lambda m: str(m)[:30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_first_order_methods_see_decay_and_maximize(method: hg.Method, sign: float) -> None:
    """F = grad L + d w in all of them: the mixed derivative of the decay is its value times w."""
    optimizer = hg.optim.SGD(lr=0.5, maximize=sign < 0)
    trajectory = descend(
        lower_loss if sign > 0 else negated,
        steps=6,
        optimizer=optimizer,
        hyper={"weight_decay": lambda u: u["log_decay"].exp()},
    )
    w = trajectory.end["w"]
    x = 0.5 * (w - C)

    def pairing(u: Params) -> Tensor:
        slope = A @ w - B @ torch.tanh(u["u"]) + u["log_decay"].exp() * w
        return upper_loss({"w": w}, u, None) - slope @ x

    assert relative_error(gradient(trajectory, method), torch.func.grad(pairing)(UPPER)) < 1e-8


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("method", EXACT, ids=lambda m: str(m)[:30])
def test_two_param_groups_from_torch(method: hg.Method, order: tuple[str, str]) -> None:
    parts = {"a": torch.zeros(1, dtype=F64, requires_grad=True), "b": torch.zeros(3, 1, dtype=F64, requires_grad=True)}
    decays = {"a": 0.7, "b": 0.1}
    optimizer = torch.optim.SGD(
        [{"params": [parts[n]], "weight_decay": decays[n], "lr": 0.5 - 0.1 * k} for k, n in enumerate(order)], lr=1.0
    )

    def whole(w: Params) -> Params:
        return {"w": torch.cat([w["a"], w["b"].reshape(-1)])}

    trajectory = hg.descend(
        lambda w, u, b: lower_loss(whole(w), u, b), parts, UPPER, optimizer=optimizer, batches=[None] * 400
    )
    h = hg.hypergradient(lambda w, u, b: upper_loss(whole(w), u, b), trajectory, UPPER, method=method)
    decay = torch.diag(torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=F64))
    assert list(trajectory.end) == ["a", "b"]
    assert relative_error(h.grad, truth(lambda u: A + decay)) < 1e-8


@pytest.mark.parametrize("solver", [hg.CG(30, rtol=1e-13), hg.Exact(), hg.GMRES(30, rtol=1e-13)])
def test_response_is_the_loss_of_the_implicit_system(solver: hg.Solver) -> None:
    def response(w: Params, u: Params, batch: Any) -> Tensor:
        return 0.5 * (w["w"] ** 2).sum() * u["log_decay"].exp() - w["w"] @ (B @ torch.sin(u["u"]))

    trajectory = descend(steps=5, response=response)
    w, scale = trajectory.end["w"], UPPER["log_decay"].exp()
    x = (w - C) / scale

    def pairing(u: Params) -> Tensor:
        return upper_loss({"w": w}, u, None) - (w * u["log_decay"].exp() - B @ torch.sin(u["u"])) @ x

    expected = torch.func.grad(pairing)(UPPER)
    assert relative_error(gradient(trajectory, hg.Implicit(solver)), expected) < 1e-8
    given = hg.solved(lower_loss, trajectory.end, response=response)
    assert relative_error(gradient(given, hg.Implicit(solver)), expected) < 1e-8


@pytest.mark.parametrize("solver", [hg.CG(30, rtol=1e-13), hg.Exact(), hg.MINRES(30, rtol=1e-13)])
@pytest.mark.parametrize("prefixes", [["head."], ("head.", "body.w")])
def test_over_lets_only_a_part_respond(solver: hg.Solver, prefixes: Any) -> None:
    def whole(w: Params) -> Params:
        return {"w": torch.cat([w["body.w"], w["head.w"], w["head.b"].reshape(1)])}

    lower = {"head.b": torch.tensor(0.2, dtype=F64), "body.w": LOWER["w"][:1] + 0.4, "head.w": LOWER["w"][:2]}
    solved = hg.solved(lambda w, u, b: lower_loss(whole(w), u, b), lower)
    h = hg.hypergradient(
        lambda w, u, b: upper_loss(whole(w), u, b),
        solved,
        UPPER,
        method=hg.Implicit(solver, over=prefixes),
    )
    keep = slice(1, 4) if len(prefixes) == 1 else slice(0, 4)
    w = whole(lower)["w"]
    x = torch.linalg.solve(A[keep, keep], (w - C)[keep])

    def pairing(u: Params) -> Tensor:
        return upper_loss({"w": w}, u, None) - (A @ w - B @ torch.tanh(u["u"]))[keep] @ x

    assert relative_error(h.grad, torch.func.grad(pairing)(UPPER)) < 1e-8


def by_hand(rates: Any, steps: int, start: Any = None) -> Params:
    """Return the derivative of plain gradient descent, taped whole."""

    def total(u: Params) -> Tensor:
        w = LOWER["w"] if start is None else start(u)["w"]
        for k in range(steps):
            w = w - rates(u, k) * (A @ w - B @ torch.tanh(u["u"]))
        return upper_loss({"w": w}, u, None)

    return torch.func.grad(total)(UPPER)


UNROLLED = [hg.Unrolled(), hg.Unrolled(checkpoint=3), hg.Unrolled(checkpoint="sqrt", retain=0.4), hg.ForwardUnrolled()]


@pytest.mark.parametrize("method", UNROLLED, ids=lambda m: str(m)[:50])
@pytest.mark.parametrize(
    ("name", "function", "rates"),
    [
        ("scalar", lambda u: 0.3 * u["log_decay"].exp(), lambda u, k: 0.3 * u["log_decay"].exp()),
        (
            "dict",
            lambda u: {"w": u["u"][0] * torch.arange(1.0, 5.0, dtype=F64)},
            lambda u, k: u["u"][0] * torch.arange(1.0, 5.0, dtype=F64),
        ),
        ("per-step", lambda u, step: u["u"][0] / (1 + step), lambda u, k: u["u"][0] / (1 + k)),
        ("named-step", lambda u, step=0: u["u"][0] / (1 + step), lambda u, k: u["u"][0] / (1 + k)),
        ("indexed", lambda u, step: u["u"][:2].square()[step % 2], lambda u, k: u["u"][:2].square()[k % 2]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_learning_rates_as_upper_variables(method: hg.Method, name: str, function: Any, rates: Any) -> None:
    trajectory = descend(steps=7, hyper={"lr": function}, recording=method.recording(7))
    assert relative_error(gradient(trajectory, method), by_hand(rates, 7)) < 1e-10


JACOBIAN = A + torch.tensor([[0.0, 0.9, 0, 0], [-0.4, 0, 0, 0.3], [0, 0, 0, -0.8], [0, 0, 0.5, 0]], dtype=F64)


def root(w: Params, u: Params, batch: Any) -> Params:
    return {"w": torch.sinh(JACOBIAN @ w["w"]) - B @ torch.tanh(u["u"]) * u["log_decay"]}


@pytest.mark.parametrize(
    "solver",
    [
        hg.Exact(),
        hg.GMRES(30, rtol=1e-13),
        hg.SciPy("gmres", 30, rtol=1e-13),
        hg.SciPy("bicgstab", 60, rtol=1e-13),
        hg.SciPy("bicg", 60, rtol=1e-13),
        hg.SciPy("lgmres", 60, rtol=1e-13),
    ],
    ids=str,
)
def test_a_root_with_a_non_symmetric_jacobian(solver: hg.Solver) -> None:
    def solution(u: Params) -> Params:
        return {"w": torch.linalg.solve(JACOBIAN, torch.asinh(B @ torch.tanh(u["u"]) * u["log_decay"]))}

    expected = torch.func.grad(lambda u: upper_loss(solution(u), u, None))(UPPER)
    trajectory = hg.solved_root(root, solution(UPPER))
    assert relative_error(gradient(trajectory, hg.Implicit(solver)), expected) < 1e-8
    upper = {name: u.clone().requires_grad_() for name, u in UPPER.items()}
    upper_loss(hg.best_response(trajectory, upper, method=hg.Implicit(solver)), upper, None).backward()
    assert relative_error({n: u.grad for n, u in upper.items()}, expected) < 1e-8


def test_a_fixed_point_by_neumann() -> None:
    """w = T(w) with a contraction T: the series of its Jacobian is Neumann's with step size 1."""

    def fixed(w: Params, u: Params, batch: Any) -> Params:
        return {"w": w["w"] - (w["w"] - 0.4 * JACOBIAN @ w["w"] + B @ torch.tanh(u["u"]))}

    trajectory = hg.solved_root(fixed, {"w": torch.linalg.solve(0.4 * JACOBIAN, B @ torch.tanh(UPPER["u"]))})
    expected = truth(lambda u: 0.4 * JACOBIAN)
    assert relative_error(gradient(trajectory, hg.Implicit(hg.Neumann(600, step_size=1.0))), expected) < 1e-8


def start(u: Params) -> Params:
    return {"w": torch.cat([u["u"].exp(), u["log_decay"].reshape(1) ** 2])}


@pytest.mark.parametrize("method", UNROLLED, ids=lambda m: str(m)[:50])
def test_start_is_differentiated(method: hg.Method) -> None:
    trajectory = descend(steps=6, start=start, recording=method.recording(6))
    assert relative_error(gradient(trajectory, method), by_hand(lambda u, k: 0.5, 6, start)) < 1e-10


@pytest.mark.parametrize("truncate", [0, 2, 6])
def test_start_with_truncation_passes_the_cotangent(truncate: int) -> None:
    """The window's own derivative, and the cotangent at its beginning handed to the start as it is."""
    trajectory = descend(steps=6, start=start)
    w = trajectory.steps[6 - truncate].flat if truncate else trajectory.end_flat

    def window(begin: Tensor, u: Params) -> Tensor:
        for _ in range(truncate):
            begin = begin - 0.5 * (A @ begin - B @ torch.tanh(u["u"]))
        return upper_loss({"w": begin}, u, None)

    bar, inside = torch.func.grad(window, argnums=(0, 1))(w, UPPER)
    from_start = torch.func.grad(lambda u: start(u)["w"] @ bar)(UPPER)
    expected = {name: inside[name] + from_start[name] for name in UPPER}
    method = hg.Unrolled(truncate=truncate)
    assert relative_error(gradient(trajectory, method), expected) < 1e-10
    thinned = descend(steps=6, start=start, recording=method.recording(6))
    assert relative_error(gradient(thinned, method), expected) < 1e-10


def test_implicit_maml() -> None:
    """A start that the loss reads as a proximal term: the implicit method ignores the start, rightly."""

    def proximal(w: Params, u: Params, batch: Any) -> Tensor:
        return lower_loss(w, u, batch) + 0.5 * ((w["w"] - start(u)["w"]) ** 2).sum()

    trajectory = descend(proximal, start=start)
    expected = truth(lambda u: A + EYE, lambda u: B @ torch.tanh(u["u"]) + start(u)["w"])
    assert relative_error(gradient(trajectory, hg.Implicit(hg.CG(30, rtol=1e-13))), expected) < 1e-8


def composite(penalty: bool = True) -> tuple[hg.Composite, Params, Any]:
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(7), dtype=F64)
    y = torch.randint(0, 3, (9,), generator=torch.Generator().manual_seed(8))

    def outputs(w: Params, u: Params, batch: Any) -> Tensor:
        return torch.tanh(batch[0] @ w["a"]) @ w["b"] * u["log_decay"].exp()

    loss = hg.Composite(
        outputs,
        lambda z, u, batch: torch.nn.functional.cross_entropy(z, batch[1]),
        (lambda w, u, batch: (w["a"] ** 4).sum() + u["u"].exp().sum() * (w["b"] ** 2).sum()) if penalty else None,
    )
    generator = torch.Generator().manual_seed(9)
    lower = {n: torch.randn(s, generator=generator, dtype=F64) for n, s in (("a", (2, 3)), ("b", (3, 3)))}
    return loss, lower, (x, y)


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_gauss_newton_is_jtbj_and_the_hessian_of_the_penalty(penalty: bool, decay: float) -> None:
    loss, lower, batch = composite(penalty)
    trajectory = hg.descend(
        loss, lower, UPPER, optimizer=hg.optim.SGD(lr=0.01, weight_decay=decay), batches=[batch] * 2
    )
    w = trajectory.end_flat
    sizes = {n: p.shape for n, p in trajectory.end.items()}

    def named(v: Tensor) -> Params:
        a, b = v.split_with_sizes([6, 9])
        return {"a": a.view(sizes["a"]), "b": b.view(sizes["b"])}

    def z(v: Tensor) -> Tensor:
        return loss.outputs(named(v), UPPER, batch).reshape(-1)

    jacobian = torch.func.jacrev(z)(w)
    curve = torch.func.jacrev(torch.func.grad(lambda o: loss.criterion(o.view(9, 3), UPPER, batch)))(z(w))
    matrix = jacobian.T @ curve @ jacobian + (decay + 0.1) * torch.eye(15, dtype=F64)
    if penalty:
        matrix = matrix + torch.func.jacrev(torch.func.grad(lambda v: loss.penalty(named(v), UPPER, batch)))(w)

    def objective(v: Params) -> Tensor:
        return (v["a"].sum() - 1) ** 2 + (v["b"] ** 3).sum()

    x = torch.linalg.solve(matrix, torch.func.grad(lambda v: objective(named(v)))(w))
    expected = torch.func.grad(lambda u: -torch.func.grad(lambda v: loss(named(v), u, batch))(w) @ x)(UPPER)
    for solver in (hg.Exact(), hg.CG(60, rtol=1e-13)):
        method = hg.Implicit(solver, curvature="gauss_newton", damping=0.1)
        h = hg.hypergradient(lambda v, u, b: objective(v) + 0 * u["u"].sum(), trajectory, UPPER, method=method)
        assert relative_error(h.grad, expected) < 1e-8


def test_a_composite_is_a_loss() -> None:
    loss, lower, batch = composite()
    plain = hg.descend(
        lambda w, u, b: loss(w, u, b), lower, UPPER, optimizer=hg.optim.SGD(lr=0.01), batches=[batch] * 3
    )
    same = hg.descend(loss, lower, UPPER, optimizer=hg.optim.SGD(lr=0.01), batches=[batch] * 3)
    assert torch.equal(plain.end_flat, same.end_flat)


@pytest.mark.parametrize(
    "criterion", [torch.nn.functional.mse_loss, torch.nn.MSELoss(), lambda z, y: ((z - y) ** 2).mean()]
)
def test_a_composite_takes_torch_losses(criterion: Any) -> None:
    loss = hg.Composite(lambda w, u, y: w["w"] * 2.0, criterion)
    assert loss(LOWER, UPPER, C) == (C**2).mean()


FORMS: dict[str, tuple[Any, Any, float]] = {
    "short": (lambda z, b: z + b, lambda w, u: w, 16.0),
    "bound": (lambda z, b, s=2.0: z + s * b, lambda w, u, lam=0.5: lam * w, 18.5),
    "whole": (lambda z, u, b: z + u * b, lambda w, u, b: w + b, 46.0),
    "batch by default": (lambda z, u, batch=None: z + u * batch, lambda w, u, batch=None: w + batch, 46.0),
    "all by default": (lambda z, u=None, b=None: z + u * b, lambda w, u=None, b=None: w + b, 46.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_of_a_composite_are_called_as_they_are_written(form: str) -> None:
    criterion, penalty, expected = FORMS[form]
    assert hg.Composite(lambda w, u, b: w + 1, criterion, penalty)(5.0, 6.0, 5.0) == expected  # type: ignore[arg-type]


def test_batches_are_averaged_in_curvature_and_mixed_partial() -> None:
    p = ridge()
    weights = [torch.tensor(v, dtype=F64) for v in (9.0, 0.5, 1.0, 3.0)]

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return p.lower_loss(w, u, None) * batch + (w["w"] * u["log_penalty"]).sum() * batch**2

    trajectory = hg.descend(loss, p.lower, p.upper, optimizer=hg.optim.SGD(lr=0.01), batches=weights)
    for count in (1, 2, 3, 4):

        def mean(w: Params, u: Params, batch: Any, count: int = count) -> Tensor:
            return sum(loss(w, u, b) for b in weights[-count:]) / count

        method = hg.Implicit(hg.Exact(), batches=count)
        averaged = hg.hypergradient(p.upper_loss, trajectory, p.upper, method=method).grad
        solved = hg.solved(mean, trajectory.end)
        expected = hg.hypergradient(p.upper_loss, solved, p.upper, method=hg.Implicit(hg.Exact())).grad
        assert relative_error(averaged, expected) < 1e-12


def test_decoupled_decay_may_be_ignored_by_name() -> None:
    p = quadratic(6)
    run = hg.descend(
        p.lower_loss, p.solved_at(), p.upper, optimizer=hg.optim.AdamW(lr=1e-9, weight_decay=0.1), batches=[None]
    )
    h = hg.hypergradient(p.upper_loss, run, p.upper, method=hg.Implicit(hg.Exact(), decoupled="ignore"))
    assert relative_error(h.grad, p.truth()) < 1e-6  # the run moved by its learning rate, 1e-9 a coordinate


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Unrolled(checkpoint="sqrt"), hg.ForwardUnrolled()])
def test_draws_of_a_start_are_those_of_the_run(method: hg.Method) -> None:
    """w_0 = mu + s e with mu = 0: each step halves it, so that ds of |w|^2 is 2 |w|^2 / s."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    upper = {"mu": torch.zeros(3, dtype=F64), "s": torch.ones((), dtype=F64)}

    def square(w: Params, u: Params, batch: Any) -> Tensor:
        return (w["w"] ** 2).sum()

    run = hg.descend(
        square,
        {"w": torch.zeros(3, dtype=F64)},
        upper,
        optimizer=hg.optim.SGD(lr=0.25),
        batches=[None] * 3,
        start=lambda u: {"w": u["mu"] + u["s"] * torch.randn(3, dtype=F64)},
    )
    assert torch.equal(before, torch.get_rng_state())
    h = hg.hypergradient(square, run, upper, method=method)
    torch.testing.assert_close(h.grad["s"], 2 * h.value)


NOISY = {
    "adjoint": hg.Unrolled(),
    "retained": hg.Unrolled(retain=1.0),
    "checkpointed": hg.Unrolled(checkpoint=2),
    "forward": hg.ForwardUnrolled(),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", [*NOISY, "best_response"])
def test_draws_of_hyper_and_project_are_those_of_the_run(name: str, micro_batches: int) -> None:
    """Loss, learning rate and projection all draw, in this order."""
    method = NOISY.get(name, NOISY["adjoint"])
    upper, lower = {"s": torch.tensor(-2.0, dtype=F64)}, {"w": torch.tensor([0.5, -0.2, 0.1], dtype=F64)}
    batches = [torch.full((2, 3), 1.0 + k, dtype=F64) for k in range(5)]

    def loss(w: Params, u: Params, batch: Tensor) -> Tensor:
        return ((w["w"] - batch) ** 2 * torch.rand(3, dtype=F64)).mean()

    def rate(u: Params) -> Tensor:
        return u["s"].exp() * torch.rand((), dtype=F64)

    def project(w: Params) -> Params:
        return {"w": w["w"] * (1 + 0.1 * torch.rand(3, dtype=F64))}

    def above(w: Params, u: Params, batch: Any) -> Tensor:
        return (w["w"] ** 2).sum()

    def by_hand(s: Tensor) -> Tensor:
        w = lower["w"]
        for batch in batches:
            parts = batch.chunk(micro_batches)
            grads = [2 * (w - part).mean(0) / 3 * torch.rand(3, dtype=F64) for part in parts]
            w = project({"w": w - rate({"s": s}) * torch.stack(grads).mean(0)})["w"]
        return above({"w": w}, upper, None)

    torch.manual_seed(1)
    run = hg.descend(
        loss if micro_batches == 1 else hg.Averaged(loss, micro_batches),
        lower,
        upper,
        optimizer=hg.optim.SGD(lr=0.1),
        batches=batches,
        hyper={"lr": rate},
        project=project,
        recording=method.recording(5),
    )
    torch.manual_seed(1)
    truth, value = torch.func.grad_and_value(by_hand)(upper["s"])
    torch.testing.assert_close(above(run.end, upper, None), value)
    torch.manual_seed(77)
    if name == "best_response":
        leaf = upper["s"].clone().requires_grad_()
        above(hg.best_response(run, {"s": leaf}, method=method), upper, None).backward()
        torch.testing.assert_close(leaf.grad, truth)
    else:
        torch.testing.assert_close(hg.hypergradient(above, run, upper, method=method).grad["s"], truth)


def test_the_rate_that_is_read_is_the_one_the_last_step_drew() -> None:
    rates: list[Tensor] = []

    def rate(u: Params) -> Tensor:
        rates.append(torch.rand((), dtype=F64))
        return rates[-1]

    run = descend(steps=3, hyper={"lr": rate})
    torch.manual_seed(77)
    for method, given in ((hg.OneStep(), hg.OneStep(float(rates[-1]))), (hg.SAMA(), hg.FiniteDifference())):
        assert relative_error(gradient(run, method), gradient(run, given)) < 1e-12


def test_what_draws_nothing_is_not_replayed() -> None:
    run = descend(steps=3, hyper={"lr": lambda u: 0.1}, project=lambda w: w)
    assert all(step.random is None and step.recipe is run.steps[0].recipe for step in run.steps)
    assert run.steps[0].recipe.random is None


def test_draws_of_a_response_are_replayed() -> None:
    """The lower loss draws nothing; both gradients of a difference quotient see the same dropped entries."""
    upper = {"c": torch.ones(8, dtype=F64)}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return ((w["w"] - u["c"]) ** 2).sum()

    def response(w: Params, u: Params, batch: Any) -> Tensor:
        return loss({"w": torch.nn.functional.dropout(w["w"], 0.5)}, u, batch)

    run = hg.descend(
        loss,
        {"w": torch.zeros(8, dtype=F64)},
        upper,
        optimizer=hg.optim.SGD(lr=0.1),
        batches=[None] * 50,
        response=response,
    )

    def above(w: Params, u: Params, batch: Any) -> Tensor:
        return (w["w"] ** 2).sum()

    one, other = (
        hg.hypergradient(above, run, upper, method=method).grad for method in (hg.OneStep(), hg.FiniteDifference())
    )
    assert relative_error(other, one) < 1e-6


def test_decoupled_decay_given_as_a_number_through_hyper_is_refused() -> None:
    p = quadratic(6)
    run = hg.descend(
        p.lower_loss,
        p.solved_at(),
        p.upper,
        optimizer=hg.optim.Adam(lr=1e-3, decoupled_weight_decay=True),
        batches=[None],
        hyper={"weight_decay": lambda u, step: 0.5},
    )
    with pytest.raises(ValueError, match="decoupled weight decay"):
        hg.hypergradient(p.upper_loss, run, p.upper, method=hg.Implicit(hg.Exact()))


def test_a_flat_hyperparameter_of_another_dtype_leaves_the_run_in_its_own() -> None:
    upper = {"log_wd": torch.zeros(3, dtype=F64)}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return ((w["w"] - 1) ** 2).sum()

    found = []
    for decay in (lambda u: {"w": u["log_wd"].exp()}, lambda u: u["log_wd"].exp()):
        run = hg.descend(
            loss,
            {"w": torch.zeros(3)},
            upper,
            optimizer=hg.optim.SGD(lr=0.1),
            batches=[None] * 50,
            hyper={"weight_decay": decay},
        )
        assert run.end["w"].dtype is torch.float32
        found.append(hg.hypergradient(loss, run, upper, method=hg.Implicit(hg.CG(5))).grad)
    assert relative_error(*found) < 1e-6
