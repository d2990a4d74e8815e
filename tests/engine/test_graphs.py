"""Chains, diamonds and shared levels against closed forms; what is not exact is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import EXACT, Vec, draw, engine, error, finite_difference, problem, spd
from torch import Tensor

import hypergrad as hg

N = 3
A1, A2, A3 = spd(N, 1), spd(N, 2), spd(N, 3)
B, C, D, E = (0.3 * draw(N, N, seed=k) for k in (4, 5, 6, 7))
TARGET = draw(N, seed=8)


# --- chains: a*(b, t), b*(t), the top loss reads both ----------------------------------------------------------------


def loss_a(m: Any, _: Any) -> Tensor:
    return 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ (B @ m.b.v + D @ torch.tanh(m.t.v))


def loss_b(m: Any, _: Any) -> Tensor:
    return 0.5 * m.b.v @ A2 @ m.b.v - m.b.v @ (C @ m.t.v) + 0.5 * (m.a.v**2).sum() + 0.1 * (m.b.v * m.a.v).sum()


def loss_t(m: Any, _: Any) -> Tensor:
    return 0.5 * ((m.b.v - TARGET) ** 2).sum() + 0.1 * (m.a.v**2).sum() + 0.05 * (m.t.v**2).sum()


def a_star(b: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.solve(A1, B @ b + D @ torch.tanh(t))


def total_b(b: Tensor, t: Tensor) -> Tensor:
    a = a_star(b, t)
    return 0.5 * b @ A2 @ b - b @ (C @ t) + 0.5 * (a**2).sum() + 0.1 * (b * a).sum()


def b_star(t: Tensor, frozen: bool = False) -> Tensor:
    zero = torch.zeros(N, dtype=t.dtype)
    hessian = torch.func.jacrev(torch.func.grad(total_b))(zero, t)
    return -torch.linalg.solve(hessian, torch.func.grad(total_b)(zero, t))


def total_t(t: Tensor) -> Tensor:
    b = b_star(t)
    a = a_star(b, t)
    return 0.5 * ((b - TARGET) ** 2).sum() + 0.1 * (a**2).sum() + 0.05 * (t**2).sum()


def chain(method_a: hg.Method, method_b: hg.Method, *, begin: bool = True, steps: int = 4, **options: Any) -> Any:
    """Return the chain, begun at its solution, which thirty steps more leave at rounding error."""
    a, b, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)
    if begin:
        b.v.data = b_star(t.v.detach())
        a.v.data = a_star(b.v.detach(), t.v.detach())
    run = engine(
        problem("a", a, loss_a, steps=steps, method=method_a),
        problem("b", b, loss_b, steps=3, method=method_b),
        problem("t", t, loss_t, lr=1e-9),
        **options,
    )
    return a, b, t, run


@pytest.mark.parametrize(
    "solver", [hg.CG(10, rtol=1e-13), hg.Exact(), hg.MINRES(12, rtol=1e-13), hg.GMRES(5, rtol=1e-13)]
)
def test_a_chain_of_implicit_levels_equals_the_closed_form(solver: hg.Solver) -> None:
    _, _, t, run = chain(hg.Implicit(solver), hg.Implicit(solver))
    run.step()
    assert error(t.v.grad, torch.func.grad(total_t)(t.v.detach())) < 1e-8


def test_a_chain_with_an_unrolled_lowest_level_equals_the_closed_form() -> None:
    _, _, t, run = chain(hg.Unrolled(), EXACT, steps=16)
    run.step()
    assert error(t.v.grad, torch.func.grad(total_t)(t.v.detach())) < 1e-8


@pytest.mark.parametrize("method", [EXACT, hg.Unrolled()], ids=["implicit", "unrolled"])
def test_a_chain_with_an_unrolled_middle_level_equals_the_closed_form(method: hg.Method) -> None:
    a, b, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)
    run = engine(
        problem("a", a, loss_a, steps=16, method=method),
        problem("b", b, loss_b, steps=26, method=hg.Unrolled()),
        problem("t", t, loss_t, lr=1e-9),
    )
    run.step()
    assert error(t.v.grad, torch.func.grad(total_t)(t.v.detach())) < 1e-7


@pytest.mark.parametrize("method", [hg.FiniteDifference(epsilon=1e-4, step_size=0.7), hg.OneStep(step_size=0.7)])
def test_a_first_order_middle_level_equals_its_formula(method: hg.Method) -> None:
    """The inverse Hessian of the middle level is taken to be a step size; the lower response in it is exact."""
    _, _, t, run = chain(EXACT, method, steps=20)
    run.step()
    at = t.v.detach()
    b = b_star(at)

    def top(b: Tensor, t: Tensor) -> Tensor:
        a = a_star(b, t)
        return 0.5 * ((b - TARGET) ** 2).sum() + 0.1 * (a**2).sum() + 0.05 * (t**2).sum()

    v = torch.func.grad(top)(b, at)
    mixed = torch.func.grad(lambda t: torch.func.grad(total_b)(b, t) @ v)(at)
    expected = torch.func.grad(top, argnums=1)(b, at) - 0.7 * mixed
    assert error(t.v.grad, expected) < 1e-6


def test_sama_in_the_middle_runs_the_level_below_again() -> None:
    _, _, t, run = chain(EXACT, hg.SAMA(epsilon=1e-4), steps=20)
    _, _, s, other = chain(EXACT, hg.FiniteDifference(epsilon=1e-4, step_size=0.8), steps=20)
    run.step()
    other.step()
    assert s.v.grad is not None
    assert error(t.v.grad, s.v.grad) < 1e-6


def program_error(build: Any, top: str) -> float:
    """Return the error of an engine's hypergradient against central differences of the loss that the program reports.

    `build(value)` returns the top's module, its variables at `value` unless that is None, and an engine whose lower
    levels begin anew each time: so one step is a function of the top's variables.
    """
    module, run = build(None)
    at = module.v.detach().clone()
    run.step()
    expected = finite_difference(lambda value: build(value.clone())[1].step().read(f"{top}.loss"), at, epsilon=1e-5)
    return error(module.v.grad, expected)


@pytest.mark.parametrize("direct", [False, True], ids=["through the middle", "past the middle too"])
@pytest.mark.parametrize(("method", "steps"), [(hg.Unrolled(), 2), (EXACT, 24)], ids=["unrolled", "implicit"])
def test_an_unsettled_chain_equals_finite_differences_of_the_program(
    method: hg.Method, steps: int, direct: bool
) -> None:
    def loss_low(m: Any, _: Any) -> Tensor:
        """Return a loss whose solution is curved in b, so that every own step of b has its own response."""
        return 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ torch.tanh(B @ m.b.v + D @ m.t.v)

    def loss_top(m: Any, _: Any) -> Tensor:
        past = 0.5 * (m.a.v**2).sum() if direct else 0.0
        return 0.5 * ((m.b.v - TARGET) ** 2).sum() + past + 0.05 * (m.t.v**2).sum()

    def build(value: Tensor | None) -> Any:
        a, b, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)
        t.v.data = t.v.data if value is None else value
        run = engine(
            problem("a", a, loss_low, steps=steps, method=method, after="restart"),
            problem("b", b, loss_b, lr=0.3, steps=3, method=hg.Unrolled(), after="restart"),
            problem("t", t, loss_top, lr=1e-12),
        )
        return t, run

    assert program_error(build, "t") < 1e-7


def test_an_unsettled_diamond_equals_finite_differences_of_the_program() -> None:
    def build(value: Tensor | None) -> Any:
        a, b, c, t = (Vec(N, k) for k in range(1, 5))
        t.v.data = t.v.data if value is None else value
        unrolled: dict[str, Any] = {"method": hg.Unrolled(), "after": "restart"}
        run = engine(
            problem(
                "a",
                a,
                lambda m, _: 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ (B @ m.b.v + C @ m.c.v + D @ m.t.v),
                steps=3,
                **unrolled,
            ),
            [
                problem(
                    "b", b, lambda m, _: 0.5 * m.b.v @ A2 @ m.b.v - m.b.v @ (D @ m.t.v), steps=2, lr=0.3, **unrolled
                ),
                problem(
                    "c", c, lambda m, _: 0.5 * m.c.v @ A3 @ m.c.v - m.c.v @ (E @ m.t.v), steps=4, lr=0.3, **unrolled
                ),
            ],
            problem("t", t, lambda m, _: 0.5 * ((m.a.v - TARGET) ** 2).sum() + (m.b.v * m.c.v).sum(), lr=1e-12),
        )
        return t, run

    assert program_error(build, "t") < 1e-7


@pytest.mark.parametrize("seen", ["", "a", "b", "ab"])
def test_four_unsettled_levels_equal_finite_differences_of_the_program(seen: str) -> None:
    """The top reads the third level and, past it, the first or the second, which the third has left behind."""

    def loss_d(m: Any, _: Any) -> Tensor:
        past = sum(0.5 * ((getattr(m, name).v + 0.3) ** 2).sum() for name in seen)
        return 0.5 * ((m.c.v - TARGET) ** 2).sum() + past + 0.05 * (m.d.v**2).sum()

    def build(value: Tensor | None) -> Any:
        a, b, c, d = (Vec(N, k) for k in range(1, 5))
        d.v.data = d.v.data if value is None else value
        unrolled: dict[str, Any] = {"method": hg.Unrolled(), "after": "restart", "lr": 0.4}
        run = engine(
            problem("a", a, lambda m, _: 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ (B @ m.b.v), steps=2, **unrolled),
            problem(
                "b",
                b,
                lambda m, _: 0.5 * m.b.v @ A2 @ m.b.v - m.b.v @ torch.tanh(C @ m.c.v) + 0.2 * (m.a.v**2).sum(),
                steps=2,
                **unrolled,
            ),
            problem(
                "c",
                c,
                lambda m, _: 0.5 * m.c.v @ A3 @ m.c.v - m.c.v @ m.d.v + 0.2 * (m.b.v**2).sum(),
                steps=2,
                **unrolled,
            ),
            problem("d", d, loss_d, lr=1e-12),
        )
        return d, run

    assert program_error(build, "d") < 1e-7


def test_a_level_read_past_the_middle_runs_once_more_and_rolls_back_afterwards() -> None:
    seen: dict[str, list[Tensor]] = {"a": [], "t": []}

    def loss_low(m: Any, batch: Any) -> Tensor:
        seen["a"].append(m.b.v.detach().clone())
        return loss_a(m, batch)

    def loss_top(m: Any, batch: Any) -> Tensor:
        seen["t"].append(m.a.v.detach().clone())
        return loss_t(m, batch)

    a, b, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)
    run = engine(
        problem("a", a, loss_low, steps=24, method=EXACT, after="rollback"),
        problem("b", b, loss_b, lr=0.3, steps=2, method=EXACT),
        problem("t", t, loss_top, lr=1e-12),
    )
    begun = a.v.detach().clone()
    for calls in seen.values():
        calls.clear()  # what the build has called
    run.step()
    runs = torch.stack(seen["a"]).unique_consecutive(dim=0)
    assert len(runs) == 3, "before each of the two own steps of b, and once more after the last"
    assert torch.equal(runs[-1], b.v.detach())
    assert error(seen["t"][0], a_star(b.v.detach(), t.v.detach())) < 1e-8
    assert torch.equal(a.v.detach(), begun)


def test_four_levels_equal_the_closed_form() -> None:
    def low(name: str, matrix: Tensor, mixing: Tensor, above: str) -> Any:
        def loss(m: Any, _: Any) -> Tensor:
            v = getattr(m, name).v
            return 0.5 * v @ matrix @ v - v @ (mixing @ getattr(m, above).v)

        return loss

    def loss_c(m: Any, _: Any) -> Tensor:
        return 0.5 * m.c.v @ A3 @ m.c.v - m.c.v @ m.d.v + 0.2 * (m.b.v**2).sum()

    def loss_b4(m: Any, batch: Any) -> Tensor:
        return low("b", A2, C, "c")(m, batch) + 0.2 * (m.a.v**2).sum()

    def loss_d(m: Any, _: Any) -> Tensor:
        return 0.5 * ((m.c.v - TARGET) ** 2).sum() + 0.05 * (m.d.v**2).sum()

    inverse_a = torch.linalg.inv(A1) @ B
    hessian_b = A2 + 0.4 * inverse_a.T @ inverse_a
    inverse_b = torch.linalg.inv(hessian_b) @ C
    hessian_c = A3 + 0.4 * inverse_b.T @ inverse_b
    a, b, c, d = (Vec(N, k) for k in range(4))
    c.v.data = torch.linalg.solve(hessian_c, d.v.detach())
    b.v.data = inverse_b @ c.v.detach()
    a.v.data = inverse_a @ b.v.detach()
    run = engine(
        problem("a", a, low("a", A1, B, "b"), steps=2, method=hg.Implicit(hg.Exact())),
        problem("b", b, loss_b4, steps=2, method=hg.Implicit(hg.Exact())),
        problem("c", c, loss_c, steps=2, method=hg.Implicit(hg.Exact())),
        problem("d", d, loss_d, lr=1e-9),
    )
    run.step()

    def total(d: Tensor) -> Tensor:
        return 0.5 * ((torch.linalg.solve(hessian_c, d) - TARGET) ** 2).sum() + 0.05 * (d**2).sum()

    assert error(d.v.grad, torch.func.grad(total)(d.v.detach())) < 1e-8


# --- wider graphs ----------------------------------------------------------------------------------------------------


def test_two_bottoms_read_by_one_top() -> None:
    a, b, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)

    def loss_top(m: Any, _: Any) -> Tensor:
        return ((m.a.v - TARGET) ** 2).sum() + (m.a.v * m.b.v).sum() + 0.1 * (m.t.v**2).sum()

    run = engine(
        [
            problem("a", a, lambda m, _: 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ (B @ m.t.v), steps=20, method=EXACT),
            problem(
                "b", b, lambda m, _: 0.5 * m.b.v @ A2 @ m.b.v - m.b.v @ (C @ m.t.v), steps=20, method=hg.Unrolled()
            ),
        ],
        problem("t", t, loss_top, lr=1e-9),
    )
    run.step()

    def total(t: Tensor) -> Tensor:
        a, b = torch.linalg.solve(A1, B @ t), torch.linalg.solve(A2, C @ t)
        return ((a - TARGET) ** 2).sum() + (a * b).sum() + 0.1 * (t**2).sum()

    assert error(t.v.grad, torch.func.grad(total)(t.v.detach())) < 1e-8


def test_one_bottom_read_by_two_tops() -> None:
    a, s, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)
    run = engine(
        problem(
            "a", a, lambda m, _: 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ (B @ m.t.v + C @ m.s.v), steps=20, method=EXACT
        ),
        [
            problem("s", s, lambda m, _: ((m.a.v - TARGET) ** 2).sum(), lr=1e-9),
            problem("t", t, lambda m, _: (m.a.v**2).sum() + (m.t.v**2).sum(), lr=1e-9),
        ],
    )
    run.step()
    at, other = t.v.detach(), s.v.detach()
    grad_t = torch.func.grad(lambda t: (torch.linalg.solve(A1, B @ t + C @ other) ** 2).sum() + (t**2).sum())(at)
    grad_s = torch.func.grad(lambda s: ((torch.linalg.solve(A1, B @ at + C @ s) - TARGET) ** 2).sum())(other)
    assert error(t.v.grad, grad_t) < 1e-8
    assert error(s.v.grad, grad_s) < 1e-8


def test_a_diamond_whose_middle_levels_do_not_see_each_other() -> None:
    """The top moves two middle problems, both move the bottom, and the top reads the bottom."""
    a, b, c, t = (Vec(N, k) for k in range(1, 5))
    run = engine(
        problem(
            "a", a, lambda m, _: 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ (B @ m.b.v + C @ m.c.v), steps=20, method=EXACT
        ),
        [
            problem("b", b, lambda m, _: 0.5 * m.b.v @ A2 @ m.b.v - m.b.v @ (D @ m.t.v), steps=20, method=EXACT),
            problem("c", c, lambda m, _: 0.5 * m.c.v @ A3 @ m.c.v - m.c.v @ (E @ m.t.v), steps=20, method=EXACT),
        ],
        problem("t", t, lambda m, _: 0.5 * ((m.a.v - TARGET) ** 2).sum() + (m.b.v * m.c.v).sum(), lr=1e-9),
    )
    run.step()

    def total(t: Tensor) -> Tensor:
        b, c = torch.linalg.solve(A2, D @ t), torch.linalg.solve(A3, E @ t)
        a = torch.linalg.solve(A1, B @ b + C @ c)
        return 0.5 * ((a - TARGET) ** 2).sum() + (b * c).sum()

    assert error(t.v.grad, torch.func.grad(total)(t.v.detach())) < 1e-7


def coupled(method: hg.Method, **options: Any) -> Any:
    """Return a diamond in which each middle problem moves the bottom that the other reads."""
    a, b, c, t = (Vec(N, k) for k in range(1, 5))
    run = engine(
        problem(
            "a", a, lambda m, _: 0.5 * m.a.v @ A1 @ m.a.v - m.a.v @ (B @ m.b.v + C @ m.c.v), steps=24, method=EXACT
        ),
        [
            problem(
                "b",
                b,
                lambda m, _: 0.5 * m.b.v @ A2 @ m.b.v - m.b.v @ (D @ m.t.v + 0.3 * m.a.v),
                steps=24,
                method=method,
            ),
            problem(
                "c",
                c,
                lambda m, _: 0.5 * m.c.v @ A3 @ m.c.v - m.c.v @ (E @ m.t.v - 0.3 * m.a.v),
                steps=24,
                method=method,
            ),
        ],
        problem("t", t, lambda m, _: 0.5 * ((m.a.v - TARGET) ** 2).sum() + (m.b.v * m.c.v).sum(), lr=1e-9),
        **options,
    )
    return t, run


def test_a_diamond_whose_middle_levels_meet_at_the_bottom_equals_the_equilibrium() -> None:
    def stationary(bc: Tensor, t: Tensor) -> Tensor:
        b, c = bc.split(N)

        def a(b: Tensor, c: Tensor) -> Tensor:
            return torch.linalg.solve(A1, B @ b + C @ c)

        grad_b = torch.func.grad(lambda b: 0.5 * b @ A2 @ b - b @ (D @ t + 0.3 * a(b, c)))(b)
        grad_c = torch.func.grad(lambda c: 0.5 * c @ A3 @ c - c @ (E @ t - 0.3 * a(b, c)))(c)
        return torch.cat([grad_b, grad_c])

    def total(t: Tensor) -> Tensor:
        zero = torch.zeros(2 * N, dtype=torch.float64)
        b, c = torch.linalg.solve(torch.func.jacrev(stationary)(zero, t), -stationary(zero, t)).split(N)
        a = torch.linalg.solve(A1, B @ b + C @ c)
        return 0.5 * ((a - TARGET) ** 2).sum() + (b * c).sum()

    t, run = coupled(EXACT)
    run.step()
    assert error(t.v.grad, torch.func.grad(total)(t.v.detach())) < 1e-7


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.OneStep(), hg.FiniteDifference()])
def test_coupled_middle_levels_are_refused_where_the_rule_is_not_exact(method: hg.Method) -> None:
    with pytest.raises(ValueError, match=r"\['b', 'c'\] on one level move each other.*partial_hessian"):
        coupled(method)
