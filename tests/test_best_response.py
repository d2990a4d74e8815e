"""The best response as a function: backward, transforms, second derivatives, nesting, torch.compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import hypergrad as hg
from hypergrad.testing import relative_error, spd

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch.func.jvp

Params = dict[str, Tensor]
F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
A = spd(5, 4.0, generator=GENERATOR)
B = torch.randn(5, 3, generator=GENERATOR, dtype=F64)
C = torch.randn(5, generator=GENERATOR, dtype=F64)
U = torch.randn(3, generator=GENERATOR, dtype=F64)
LOWER = {"b": torch.zeros(1, dtype=F64), "a": torch.zeros(2, 2, dtype=F64)}


def flat(w: Params) -> Tensor:
    return torch.cat([w["a"].reshape(-1), w["b"]])


def lower_loss(w: Params, u: Params, batch: Any) -> Tensor:
    x = flat(w)
    return 0.5 * x @ (A @ x) + 0.25 * (u["u"][0] ** 2) * (x @ x) - x @ (B @ torch.tanh(u["u"]))


def solution(u: Tensor) -> Tensor:
    return torch.linalg.solve(A + 0.5 * u[0] ** 2 * torch.eye(5, dtype=F64), B @ torch.tanh(u))


def outer(x: Tensor, u: Tensor) -> Tensor:
    return (0.25 * (x - C) ** 4).sum() + (x @ B) @ u


SGD = hg.optim.SGD(lr=0.7)


def value(u: Tensor, method: hg.Method, steps: int = 60, optimizer: hg.optim.Optimizer = SGD) -> Tensor:
    upper = {"u": u}
    trajectory = hg.descend(lower_loss, LOWER, upper, optimizer=optimizer, batches=[None] * steps)
    return outer(flat(hg.best_response(trajectory, upper, method=method)), u)


def truth(u: Tensor) -> Tensor:
    return outer(solution(u), u)


DIFFERENTIABLE = {
    "Unrolled": hg.Unrolled(),
    "CG": hg.Implicit(hg.CG(20, rtol=1e-13)),
    "Exact": hg.Implicit(hg.Exact()),
    "MINRES": hg.Implicit(hg.MINRES(20, rtol=1e-13)),
    "GMRES": hg.Implicit(hg.GMRES(20, rtol=1e-13)),
}
ONCE = {"OneStep": hg.OneStep(), "FD": hg.FiniteDifference(), "SAMA": hg.SAMA(), "Forward": hg.ForwardUnrolled()}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_every_kind_equal_the_closed_form(name: str) -> None:
    method = DIFFERENTIABLE[name]
    expected = torch.func.grad(truth)(U)
    leaf = U.clone().requires_grad_()
    value(leaf, method).backward()
    assert relative_error({"u": leaf.grad}, {"u": expected}) < 1e-8
    assert relative_error({"u": torch.func.grad(value)(U, method)}, {"u": expected}) < 1e-8
    assert torch.equal(value(U, method), value(leaf.detach(), method))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_equal_the_closed_form(name: str) -> None:
    method = DIFFERENTIABLE[name]
    expected = {"h": torch.func.jacrev(torch.func.grad(truth))(U)}
    by_autograd = torch.autograd.functional.hessian(lambda u: value(u, method), U)
    assert relative_error({"h": by_autograd}, expected) < 1e-8
    func, f = torch.func, lambda u: value(u, method)
    ways = [func.jacrev(func.grad(f)), func.hessian(f), func.jacrev(func.jacfwd(f))]
    for way in ways:
        assert relative_error({"h": way(U)}, expected) < 1e-8


@pytest.mark.parametrize("options", [{}, {"retain": 1.0}, {"checkpoint": 2}], ids=str)
@pytest.mark.parametrize("optimizer", [hg.optim.SGD(lr=0.1, momentum=0.5), hg.optim.Adam(lr=0.1)])
def test_second_derivatives_of_a_run_that_keeps_a_state(optimizer: hg.optim.Optimizer, options: Any) -> None:
    def f(u: Tensor) -> Tensor:
        return value(u, hg.Unrolled(**options), 4, optimizer)

    expected = {"h": torch.autograd.functional.hessian(f, U)}
    for way in (torch.func.jacrev(torch.func.grad(f)), torch.func.jacrev(torch.func.jacrev(f)), torch.func.hessian(f)):
        assert relative_error({"h": way(U)}, expected) < 1e-10


def test_forward_mode_twice_is_refused() -> None:
    """PyTorch takes the second forward derivative of any autograd.Function for zero."""
    with pytest.raises(ValueError, match=r"jacfwd of jacfwd.*torch\.func\.hessian"):
        torch.func.jacfwd(torch.func.jacfwd(lambda u: value(u, hg.Unrolled(), 2)))(U)


@pytest.mark.parametrize("name", ["Unrolled", "CG", "Exact", "GMRES"])
def test_forward_mode_equals_the_closed_form(name: str) -> None:
    tangent = torch.tensor([0.3, -1.0, 0.5], dtype=F64)
    _, pushed = torch.func.jvp(lambda u: value(u, DIFFERENTIABLE[name]), (U,), (tangent,))
    assert relative_error({"p": pushed}, {"p": torch.func.grad(truth)(U) @ tangent}) < 1e-8


@pytest.mark.parametrize("name", ["CG", "Unrolled"])
def test_third_derivatives(name: str) -> None:
    def directional(f: Any) -> Any:
        return lambda u: torch.func.grad(f)(u) @ torch.tensor([0.3, -1.0, 0.5], dtype=F64)

    method = DIFFERENTIABLE[name]
    third = torch.func.grad(directional(directional(lambda u: value(u, method, 50))))(U)
    expected = torch.func.grad(directional(directional(truth)))(U)
    assert relative_error({"t": third}, {"t": expected}) < 1e-6  # 50 steps at a rate of 0.8, differentiated thrice


def test_gauss_newton_rules_have_a_derivative() -> None:
    """Where outputs are linear in the parameters Gauss-Newton is the Hessian, so closed forms hold for it too."""
    loss = hg.Composite(
        lambda w, u, b: torch.linalg.cholesky(A).T @ flat(w),
        lambda z, u, b: 0.5 * z @ z,
        lambda w, u, b: 0.25 * (u["u"][0] ** 2) * (flat(w) @ flat(w)) - flat(w) @ (B @ torch.tanh(u["u"])),
    )
    method = hg.Implicit(hg.CG(20, rtol=1e-13), curvature="gauss_newton")

    def total(u: Tensor) -> Tensor:
        upper = {"u": u}
        trajectory = hg.descend(loss, LOWER, upper, optimizer=hg.optim.SGD(lr=0.7), batches=[None] * 60)
        return outer(flat(hg.best_response(trajectory, upper, method=method)), u)

    expected = torch.func.jacrev(torch.func.grad(truth))(U)
    assert relative_error({"h": torch.autograd.functional.hessian(total, U)}, {"h": expected}) < 1e-8


@pytest.mark.parametrize("name", {**DIFFERENTIABLE, **ONCE})
def test_vmap_of_grad_equals_the_loop(name: str) -> None:
    method = {**DIFFERENTIABLE, **ONCE}[name]
    points = torch.stack([U, U + 0.3, 0 * U])
    steps = 4 if name == "Forward" else 6
    slope = torch.func.grad(lambda u: value(u, method, steps))
    together, one_by_one = torch.func.vmap(slope)(points), torch.stack([slope(u) for u in points])
    assert relative_error({"g": together}, {"g": one_by_one}) < 1e-9
    leaf = points[1].clone().requires_grad_()
    value(leaf, method, steps).backward()
    assert relative_error({"g": leaf.grad}, {"g": one_by_one[1]}) < 1e-9


@pytest.mark.parametrize("name", ONCE)
def test_rules_without_a_derivative_refuse_a_second_one(name: str) -> None:
    def total(u: Tensor) -> Tensor:
        return value(u, ONCE[name], 3)

    with pytest.raises(ValueError, match=r"cannot be differentiated.*hg.Unrolled or hg.Implicit"):
        torch.autograd.functional.hessian(total, U)
    with pytest.raises(ValueError, match=r"cannot be differentiated.*hg.Unrolled or hg.Implicit"):
        torch.func.jacrev(torch.func.grad(total))(U)
    with pytest.raises(ValueError, match=r"forward mode.*hg.Unrolled or hg.Implicit"):
        torch.func.jvp(total, (U,), (U,))


def test_the_value_and_order_of_the_response() -> None:
    upper = {"u": U.clone().requires_grad_()}
    trajectory = hg.descend(lower_loss, LOWER, upper, optimizer=hg.optim.SGD(lr=0.7), batches=[None] * 3)
    response = hg.best_response(trajectory, upper, method=hg.Unrolled())
    assert list(response) == ["b", "a"] == list(trajectory.end)
    assert all(torch.equal(response[n], trajectory.end[n]) and response[n].requires_grad for n in response)
    assert not any(w.requires_grad for w in trajectory.end.values())


def test_upper_parameters_that_require_no_gradient() -> None:
    upper = {"u": U.clone(), "other": U.clone().requires_grad_()}
    trajectory = hg.solved(lambda w, u, b: lower_loss(w, u, b) + (u["other"] * w["b"]).sum(), LOWER)
    response = hg.best_response(trajectory, upper, method=hg.Implicit(hg.Exact()))
    flat(response).sum().backward()
    assert upper["u"].grad is None and upper["other"].grad is not None


def test_a_breakdown_raises_in_the_backward_pass() -> None:
    upper = {"u": U.clone().requires_grad_()}
    trajectory = hg.solved(lambda w, u, b: lower_loss(w, u, b) - flat(w) @ flat(w) * 2, LOWER)
    response = hg.best_response(trajectory, upper, method=hg.Implicit(hg.CG(5)))
    with pytest.raises(hg.SolveError, match="negative curvature"):
        flat(response).sum().backward()
    with pytest.raises(hg.SolveError, match="negative curvature"):
        torch.autograd.grad(flat(response).sum(), upper["u"], create_graph=True)
    quiet = hg.best_response(trajectory, upper, method=hg.Implicit(hg.CG(5)), throw=False)
    flat(quiet).sum().backward()
    assert torch.isfinite(upper["u"].grad).all()


# --- three levels --------------------------------------------------------------------------------------------

M = torch.randn(2, 5, generator=GENERATOR, dtype=F64)
K = torch.randn(3, 2, generator=GENERATOR, dtype=F64)
TOP = {"t": torch.tensor([0.4, -0.8], dtype=F64)}
MID = {"m": torch.zeros(3, dtype=F64)}


def lowest_loss(w: Params, u: Params, batch: Any) -> Tensor:
    """Quadratic in w, with a force that both upper levels exert."""
    return 0.5 * w["x"] @ (A @ w["x"]) - w["x"] @ (B @ u["m"] + M.T @ u["t"].sin())


def lowest(m: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.solve(A, B @ m + M.T @ t.sin())


def middle_value(x: Tensor, m: Tensor, t: Tensor) -> Tensor:
    return 0.002 * ((x - C) ** 2).sum() + 0.5 * m @ m - m @ (K @ t)


def middle_solution(t: Tensor) -> Tensor:
    """Stationary in m: the middle loss is quadratic once x is put in."""
    zero = torch.zeros(3, dtype=F64)

    def slope(m: Tensor) -> Tensor:
        return torch.func.grad(lambda n: middle_value(lowest(n, t), n, t))(m)

    return torch.linalg.solve(torch.func.jacrev(slope)(zero), -slope(zero))


def top_value(x: Tensor, m: Tensor, t: Tensor) -> Tensor:
    return (x**2).sum() + (m[0] - 1) ** 2 + (x @ B) @ m + 0.1 * (t**2).sum()


RULES = {"Unrolled": hg.Unrolled(), "CG": hg.Implicit(hg.CG(20, rtol=1e-13)), "Exact": hg.Implicit(hg.Exact())}


@pytest.mark.parametrize("rule_middle", RULES)
@pytest.mark.parametrize("rule_low", RULES)
def test_three_levels_of_quadratics(rule_low: str, rule_middle: str) -> None:
    def respond(upper: Params) -> Tensor:
        run = hg.descend(
            lowest_loss, {"x": torch.zeros(5, dtype=F64)}, upper, optimizer=hg.optim.SGD(lr=1.6), batches=[None] * 40
        )
        return hg.best_response(run, upper, method=RULES[rule_low])["x"]

    def middle_loss(w: Params, u: Params, batch: Any) -> Tensor:
        return middle_value(respond({"m": w["m"], "t": u["t"]}), w["m"], u["t"])

    def top_loss(w: Params, u: Params, batch: Any) -> Tensor:
        return top_value(respond({"m": w["m"], "t": u["t"]}), w["m"], u["t"])

    def total(t: Tensor) -> Tensor:
        m = middle_solution(t)
        return top_value(lowest(m, t), m, t)

    expected = {"t": torch.func.grad(total)(TOP["t"])}
    if rule_middle == "Unrolled":
        begin = {"m": middle_solution(TOP["t"])}
        middle = hg.descend(middle_loss, begin, TOP, optimizer=hg.optim.SGD(lr=1.0), batches=[None] * 12)
    else:
        middle = hg.solved(middle_loss, {"m": middle_solution(TOP["t"])})
    h = hg.hypergradient(top_loss, middle, TOP, method=RULES[rule_middle])
    assert relative_error(h.grad, expected) < 1e-8


# --- torch.compile -------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Any:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda f, **options: torch.compile(f, backend="aot_eager", dynamic=False, **options)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Implicit(hg.CG(3))], ids=["Unrolled", "CG"])
def test_a_compiled_function_is_differentiated_rightly(method: hg.Method, compiler: Any) -> None:
    leaf = U.clone().requires_grad_()
    compiler(lambda u: value(u, method, 2), fullgraph=True)(leaf).backward()
    assert relative_error({"u": leaf.grad}, {"u": torch.func.grad(value)(U, method, 2)}) < 1e-10


COMPILED = {"CG": hg.Implicit(hg.CG(3)), "OneStep": hg.OneStep(), "FiniteDifference": hg.FiniteDifference()}


@pytest.mark.parametrize("num_uppers", [2, 3])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_response_to_several_upper_tensors(name: str, num_uppers: int, compiler: Any) -> None:
    """Of three the second stands still; none may move."""
    given = {"u": U, "scale": torch.tensor(-1.0, dtype=F64), "shift": 0.1 * B}
    given = {key: given[key] for key in list(given)[:num_uppers]}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        x = flat(w)
        value = lower_loss(w, u, batch) + u["scale"].exp() * (x @ x)
        return value + (x @ u["shift"]).sum() if "shift" in u else value

    run = hg.descend(loss, LOWER, given, optimizer=hg.optim.SGD(lr=0.1), batches=[None] * 3)
    record = run if name == "OneStep" else hg.solved(loss, run.end)

    def f(*tensors: Tensor) -> Tensor:
        upper = dict(zip(given, tensors, strict=True))
        return outer(flat(hg.best_response(record, upper, method=COMPILED[name])), upper["u"])

    def slopes(function: Any) -> Params:
        leaves = {key: u.clone().requires_grad_(num_uppers == 2 or key != "scale") for key, u in given.items()}
        function(*leaves.values()).backward()
        return {key: x.grad for key, x in leaves.items() if x.grad is not None}

    compiled = compiler(f, fullgraph=True)
    assert relative_error(slopes(compiled), slopes(f)) < 1e-10
    assert relative_error({"value": compiled(*given.values())}, {"value": f(*given.values())}) < 1e-12


OUTSIDE = {
    "CG": hg.Implicit(hg.CG(3, check_every=None)),
    "OneStep": hg.OneStep(),
    "FiniteDifference": hg.FiniteDifference(),
    "Unrolled": hg.Unrolled(),
    "Forward": hg.ForwardUnrolled(),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_compiled_hypergradient_of_a_run_made_outside(name: str, compiler: Any) -> None:
    run = hg.descend(lower_loss, LOWER, {"u": U}, optimizer=SGD, batches=[None] * 2)
    records = [run] if "nrolled" in str(OUTSIDE[name]) or name == "OneStep" else [run, hg.solved(lower_loss, run.end)]

    for record in records:

        def f(u: Tensor, record: hg.Trajectory = record) -> Tensor:
            def upper_loss(w: Params, u: Params, _: None) -> Tensor:
                return outer(flat(w), u["u"])

            h = hg.hypergradient(upper_loss, record, {"u": u}, method=OUTSIDE[name], throw=False)
            return h.grad["u"]

        assert relative_error({"u": compiler(f, fullgraph=True)(U)}, {"u": f(U)}) < 1e-10
        torch._dynamo.reset()


def test_a_compiled_hypergradient_of_a_run_that_drew_is_refused(compiler: Any) -> None:
    def noisy(w: Params, u: Params, batch: Any) -> Tensor:
        return lower_loss(w, u, batch) + torch.randn(()) * flat(w).sum()

    run = hg.descend(noisy, LOWER, {"u": U}, optimizer=SGD, batches=[None] * 2)

    def f(u: Tensor) -> Tensor:
        upper_loss = lambda w, u, _: outer(flat(w), u["u"])  # noqa: E731
        return hg.hypergradient(upper_loss, run, {"u": u}, method=hg.Unrolled(), throw=False).grad["u"]

    with pytest.raises(Exception, match="drew random numbers"):
        compiler(f, fullgraph=True)(U)


def test_a_compiled_transform_is_refused_or_right(compiler: Any) -> None:
    """torch.compile drops the derivative of an autograd.Function inside torch.func.grad: it must never be silent."""
    trajectory = hg.solved(lower_loss, LOWER)
    method = hg.Implicit(hg.CG(2))
    slope = torch.func.grad(lambda u: outer(flat(hg.best_response(trajectory, {"u": u}, method=method)), u))
    with pytest.raises(Exception, match="leave the transform uncompiled"):
        compiler(slope, fullgraph=True)(U)
    torch._dynamo.reset()
    assert relative_error({"u": compiler(slope)(U)}, {"u": slope(U)}) < 1e-10


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Unrolled(retain=1.0), hg.Implicit(hg.Exact(), damping=0.5)])
def test_the_rule_sees_the_buffers_that_the_run_saw(method: hg.Method) -> None:
    """The lower loss reads batch norm's running statistics, which the upper loss then moves."""
    x, y = 2 * torch.randn(8, 3, dtype=torch.float64) + 1, torch.randn(8, 2, dtype=torch.float64)

    def case() -> tuple[nn.Module, hg.Trajectory, dict[str, Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2)).double()
        lower = {name: p.detach().clone() for name, p in net.named_parameters()}
        upper = {"u": torch.tensor(0.3, dtype=torch.float64, requires_grad=True)}

        def loss(w: Params, u: Params, _: Any) -> Tensor:
            net.eval()
            return (functional_call(net, w, (x,)) - y).square().mean() * u["u"].exp()

        record = method.recording(3)
        return net, hg.descend(loss, lower, upper, optimizer=SGD, batches=[None] * 3, recording=record), upper

    def judge(net: nn.Module, w: Params) -> Tensor:
        net.train()
        return (functional_call(net, w, (3 * x,)) - y).square().mean()

    net, run, upper = case()
    right = hg.hypergradient(lambda w, u, _: judge(net, w), run, upper, method=method).grad["u"]
    net, run, upper = case()
    value = judge(net, hg.best_response(run, upper, method=method))
    for differentiable in (False, True):
        (found,) = torch.autograd.grad(value, upper["u"], create_graph=differentiable, retain_graph=True)
        assert relative_error({"u": found.detach()}, {"u": right}) < 1e-12
