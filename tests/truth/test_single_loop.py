"""Single-loop methods against their published recursions, written out with matrices on a stochastic quadratic."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg
from hypergrad.testing import quadratic, relative_error

Params = dict[str, Tensor]
N, M, PENALTY = 5, 3, 0.3
GENERATOR = torch.Generator().manual_seed(0)
ROUNDS = 7
TOLERANCE = 1e-10  # a few dozen operations in float64 each; what is found is below 1e-14


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def sample() -> tuple[Tensor, Tensor]:
    """Return a lower batch: curvature A (eigenvalues from 0.5) and mixing B."""
    root = draw(N, N)
    return 0.5 * torch.eye(N, dtype=torch.float64) + 0.2 * root @ root.T, draw(N, M)


LOWER_BATCHES = [sample() for _ in range(9)]  # lengths with no common divisor, so that rounds pair them differently
UPPER_BATCHES = [draw(N) for _ in range(4)]
COUPLING = draw(M, N)
X0, Y0 = draw(M), draw(N)

# g(x, y; A, B) = y.A y / 2 - y.B x        f(x, y; t) = |y - t|^2 / 2 + PENALTY |x|^2 / 2 + x.E y


def g_value(x: Tensor, y: Tensor, b: Any) -> Tensor:
    return 0.5 * y @ b[0] @ y - y @ b[1] @ x


def g_y(x: Tensor, y: Tensor, b: Any) -> Tensor:
    return b[0] @ y - b[1] @ x


def g_x(y: Tensor, b: Any) -> Tensor:
    return -b[1].T @ y


def f_y(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return y - t + COUPLING.T @ x


def f_x(x: Tensor, y: Tensor) -> Tensor:
    return PENALTY * x + COUPLING @ y


def g_xy(v: Tensor, b: Any) -> Tensor:
    """Return the mixed derivative of g applied to v."""
    return -b[1].T @ v


def split(y: Tensor) -> Params:
    return {"weight": y[:4].view(2, 2), "bias": y[4]}


def flat(lower: Params) -> Tensor:
    return torch.cat([lower["weight"].reshape(-1), lower["bias"].reshape(-1)])


def lower_loss(lower: Params, upper: Params, b: Any) -> Tensor:
    return g_value(upper["x"], flat(lower), b)


def upper_loss(lower: Params, upper: Params, t: Tensor) -> Tensor:
    x, y = upper["x"], flat(lower)
    return 0.5 * ((y - t) ** 2).sum() + 0.5 * PENALTY * (x**2).sum() + x @ COUPLING @ y


def lowers() -> Iterator[Any]:
    return cycle(LOWER_BATCHES)


def uppers() -> Iterator[Tensor]:
    return cycle(UPPER_BATCHES)


class Lower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(v.clone()) for v in split(Y0).values())


class Upper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(X0.clone())


def engine(method: hg.Method, *, steps: int, lr: float, upper_lr: float) -> tuple[hg.Engine, Lower, Upper]:
    low, up = Lower(), Upper()

    def named(module: Any) -> Params:
        return {"weight": module.weight, "bias": module.bias}

    problems = [
        hg.Problem(
            "low",
            module=low,
            loss=lambda m, b: lower_loss(named(m.low), {"x": m.up.x}, b),
            optimizer=torch.optim.SGD(low.parameters(), lr=lr),
            data=LOWER_BATCHES,
            steps=steps,
            method=method,
        ),
        hg.Problem(
            "up",
            module=up,
            loss=lambda m, t: upper_loss(named(m.low), {"x": m.up.x}, t),
            optimizer=torch.optim.SGD(up.parameters(), lr=upper_lr),
            data=UPPER_BATCHES,
        ),
    ]
    return hg.Engine(problems), low, up


def assert_engine(method: hg.Method, published: Iterator[tuple[Tensor, Tensor]], **options: Any) -> None:
    """Check the engine's iterates, (x, y) after each upper step, against the recursion."""
    built, low, up = engine(method, **options)
    for _ in range(ROUNDS):
        built.step()
        x, y = next(published)
        close(up.x.detach(), x)
        close(flat({"weight": low.weight.detach(), "bias": low.bias.detach()}), y)


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE


# --- SOBA ------------------------------------------------------------------------------------------------------------


def test_soba_from_one_point_as_published() -> None:
    rho, gamma = 0.11, 0.07
    z, v, x = Y0, torch.zeros(N, dtype=torch.float64), X0
    lower, upper, state = split(Y0), {"x": X0}, torch.zeros(N, dtype=torch.float64)
    for _, b, t in zip(range(ROUNDS), lowers(), uppers(), strict=False):
        traj = hg.solved(lower_loss, lower, b)
        h = hg.hypergradient(upper_loss, traj, upper, method=hg.SOBA(rho), batch=t, state=state)
        lower = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=rho), batches=[b]).end
        upper, state = {"x": upper["x"] - gamma * h.grad["x"]}, h.state
        d_z, d_v, d_x = g_y(x, z, b), b[0] @ v + f_y(x, z, t), g_xy(v, b) + f_x(x, z)
        z, v, x = z - rho * d_z, v - rho * d_v, x - gamma * d_x
        close(flat(lower), z)
        close(upper["x"], x)
        close(-state, v)


def test_soba_in_an_engine_moves_the_lower_level_first() -> None:
    rho, gamma = 0.11, 0.07

    def recursion() -> Iterator[tuple[Tensor, Tensor]]:
        z, x, v = Y0, X0, None
        for b, t in zip(lowers(), uppers(), strict=False):
            z = z - rho * g_y(x, z, b)
            v = -rho * f_y(x, z, t) if v is None else v
            d_v, d_x = b[0] @ v + f_y(x, z, t), g_xy(v, b) + f_x(x, z)
            v, x = v - rho * d_v, x - gamma * d_x
            yield x, z

    assert_engine(hg.SOBA(), recursion(), steps=1, lr=rho, upper_lr=gamma)


def test_soba_reports_the_residual_of_the_x_it_used() -> None:
    b, t, x = LOWER_BATCHES[0], UPPER_BATCHES[0], draw(N)
    traj = hg.solved(lower_loss, split(Y0), b)
    h = hg.hypergradient(upper_loss, traj, {"x": X0}, method=hg.SOBA(0.1), batch=t, state=x)
    assert float(h.stats.residual_norm) == pytest.approx(float((f_y(X0, Y0, t) - b[0] @ x).norm()), rel=1e-12)
    assert int(h.stats.num_products) == 1


def test_soba_without_a_state_is_one_step() -> None:
    p = quadratic(6)
    traj = hg.descend(p.lower_loss, p.lower, p.upper, optimizer=hg.optim.SGD(lr=0.4), batches=[None] * 3)
    first = hg.hypergradient(p.upper_loss, traj, p.upper, method=hg.SOBA()).grad
    one_step = hg.hypergradient(p.upper_loss, traj, p.upper, method=hg.OneStep()).grad
    assert relative_error(first, one_step) < 1e-12


@pytest.mark.parametrize("method", [hg.SOBA(step_size=0.9), hg.AmIGO(4, step_size=0.9)], ids=["SOBA", "AmIGO"])
def test_carried_along_they_reach_the_truth(method: hg.Method) -> None:
    p = quadratic(6, condition=10.0)
    traj, state, h = hg.solved(p.lower_loss, p.solved_at()), None, None
    for _ in range(220 if isinstance(method, hg.SOBA) else 55):  # (1 - 0.9 * 0.1)^220 < 1e-8
        h = hg.hypergradient(p.upper_loss, traj, p.upper, method=method, state=state)
        state = h.state
    assert h is not None and relative_error(h.grad, p.truth()) < 1e-8


# --- AmIGO, stocBiO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
def test_amigo_as_published(fresh: bool) -> None:
    alpha, beta, gamma, num_lower, num_solve = 0.12, 0.09, 0.06, 4, 3

    def recursion() -> Iterator[tuple[Tensor, Tensor]]:
        data, y, x, z = lowers(), Y0, X0, torch.zeros(N, dtype=torch.float64)
        for t in uppers():
            run = [next(data) for _ in range(num_lower)]
            for b in run:
                y = y - alpha * g_y(x, y, b)
            own = [next(data) for _ in range(num_solve + 1)] if fresh else run
            for b in own[:num_solve]:
                z = z - beta * (b[0] @ z + f_y(x, y, t))
            x = x - gamma * (f_x(x, y) + g_xy(z, own[num_solve]))
            yield x, y

    method = hg.AmIGO(num_solve, step_size=beta, batches=num_solve + 1, fresh=fresh)
    assert_engine(method, recursion(), steps=num_lower, lr=alpha, upper_lr=gamma)


@pytest.mark.parametrize("fresh", [True, False])
def test_stocbio_as_published(fresh: bool) -> None:
    alpha, eta, beta, num_lower, num_terms = 0.12, 0.09, 0.06, 4, 3

    def recursion() -> Iterator[tuple[Tensor, Tensor]]:
        data, y, x = lowers(), Y0, X0
        for t in uppers():
            run = [next(data) for _ in range(num_lower)]
            for b in run:
                y = y - alpha * g_y(x, y, b)
            own = [next(data) for _ in range(num_terms + 1)] if fresh else run
            terms = [f_y(x, y, t)]
            for b in own[:num_terms]:
                terms.append(terms[-1] - eta * b[0] @ terms[-1])
            v = eta * torch.stack(terms).sum(0)
            x = x - beta * (f_x(x, y) - g_xy(v, own[num_terms]))
            yield x, y

    method = hg.StocBiO(num_terms, step_size=eta, batches=num_terms + 1, fresh=fresh)
    assert_engine(method, recursion(), steps=num_lower, lr=alpha, upper_lr=beta)


@pytest.mark.parametrize("num_products", [1, 4])
def test_on_one_batch_stocbio_is_a_neumann_series(num_products: int) -> None:
    p = quadratic(6)
    traj = hg.descend(p.lower_loss, p.lower, p.upper, optimizer=hg.optim.SGD(lr=0.4), batches=[None] * 3)
    series = hg.Implicit(hg.Neumann(num_products + 1, step_size=0.4))
    expected = hg.hypergradient(p.upper_loss, traj, p.upper, method=series)
    found = hg.hypergradient(p.upper_loss, traj, p.upper, method=hg.StocBiO(num_products))
    assert relative_error(found.grad, expected.grad) < 1e-12
    assert int(found.stats.num_products) == num_products


def test_a_step_size_for_each_parameter_is_the_series_of_the_preconditioned_system() -> None:
    p = quadratic(6)
    w = torch.nn.Parameter(p.lower["weight"][:1].clone()), torch.nn.Parameter(p.lower["weight"][1:].clone())

    def loss(lower: Params, upper: Params, batch: Any) -> Tensor:
        return p.lower_loss({"weight": torch.cat([lower["a"], lower["b"]])}, upper, batch)

    def above(lower: Params, upper: Params, batch: Any) -> Tensor:
        return p.upper_loss({"weight": torch.cat([lower["a"], lower["b"]])}, upper, batch)

    groups = torch.optim.SGD([{"params": [w[0]], "lr": 0.3}, {"params": [w[1]], "lr": 0.7}])
    lower = {"a": w[0].detach(), "b": w[1].detach()}
    bound = hg.optim.from_torch(groups, {"a": w[0], "b": w[1]})
    traj = hg.descend(loss, lower, p.upper, optimizer=bound, batches=[None])
    converged = hg.hypergradient(above, traj, p.upper, method=hg.StocBiO(600)).grad
    exact = hg.hypergradient(above, traj, p.upper, method=hg.Implicit(hg.Exact())).grad
    assert relative_error(converged, exact) < 1e-6  # (1 - 0.3 * 0.1)^600 < 1e-7


# --- F2SA, BOME ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupled", [False, True], ids=["alpha", "gamma over 2 lambda"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_f2sa_as_published(num_steps: int, coupled: bool) -> None:
    gamma, alpha, xi, strength, growth = 0.12, 0.02, 0.7, 2.0, 0.25

    def recursion() -> Iterator[tuple[Tensor, Tensor]]:
        data, x, y, z, multiplier = lowers(), X0, Y0, Y0, strength
        for t in uppers():
            step = gamma / (2 * multiplier) if coupled else alpha
            for _ in range(num_steps):
                b = next(data)
                z = z - gamma * g_y(x, z, b)
                y = y - step * (f_y(x, y, t) + multiplier * g_y(x, y, b))
            x = x - xi * alpha * (f_x(x, y) + multiplier * (g_x(y, b) - g_x(z, b)))
            multiplier += growth
            yield x, z

    method = hg.F2SA(strength, growth=growth, step_size=None if coupled else alpha, steps=num_steps)
    assert_engine(method, recursion(), steps=num_steps, lr=gamma, upper_lr=xi * alpha)


@pytest.mark.parametrize("barrier", ["gradient", "value"])
def test_bome_as_published(barrier: Any) -> None:
    alpha, xi, eta, num_steps = 0.12, 0.05, 0.5, 4
    b, t = LOWER_BATCHES[0], UPPER_BATCHES[0]
    theta, x = Y0, X0
    lower, upper = split(Y0), {"x": X0}
    method = hg.BOME(xi, eta=eta, barrier=barrier)
    multipliers = []
    for _ in range(ROUNDS):
        traj = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=alpha), batches=[b] * num_steps)
        h = hg.hypergradient(upper_loss, traj, upper, method=method, batch=t)
        lower, upper = traj.named(h.state), {"x": upper["x"] - xi * h.grad["x"]}

        inner = theta
        for _ in range(num_steps):
            inner = inner - alpha * g_y(x, inner, b)
        f_grad = torch.cat([f_y(x, theta, t), f_x(x, theta)])
        q_grad = torch.cat([g_y(x, theta, b), g_x(theta, b) - g_x(inner, b)])
        phi = q_grad @ q_grad if barrier == "gradient" else g_value(x, theta, b) - g_value(x, inner, b)
        multiplier = max(float((eta * phi - f_grad @ q_grad) / (q_grad @ q_grad)), 0.0)
        step = xi * (f_grad + multiplier * q_grad)
        theta, x = theta - step[:N], x - step[N:]
        close(flat(lower), theta)
        close(upper["x"], x)
        assert float(h.stats.strength) == pytest.approx(multiplier, rel=1e-10)
        multipliers.append(multiplier)
    assert max(multipliers) > 0


def test_bome_in_an_engine_keeps_its_copy_beside_the_lower_run() -> None:
    alpha, xi, eta, num_steps = 0.12, 0.05, 0.5, 2

    def recursion() -> Iterator[tuple[Tensor, Tensor]]:
        data, theta, w, x = lowers(), Y0, Y0, X0
        for t in uppers():
            for b in (next(data) for _ in range(num_steps)):
                w = w - alpha * g_y(x, w, b)
                last = b
            f_grad = torch.cat([f_y(x, theta, t), f_x(x, theta)])
            q_grad = torch.cat([g_y(x, theta, last), g_x(theta, last) - g_x(w, last)])
            multiplier = max(float((eta * q_grad @ q_grad - f_grad @ q_grad) / (q_grad @ q_grad)), 0.0)
            step = xi * (f_grad + multiplier * q_grad)
            theta, x = theta - step[:N], x - step[N:]
            yield x, w

    assert_engine(hg.BOME(xi, eta=eta), recursion(), steps=num_steps, lr=alpha, upper_lr=xi)


def test_f2sa_is_within_one_over_its_strength() -> None:
    """At solved levels the error is O(1 / strength): a strength twice as large halves it."""
    p = quadratic(6, condition=4.0)
    traj = hg.solved(p.lower_loss, p.solved_at())
    errors = []
    for strength in (50.0, 100.0, 200.0):
        method, state, h = hg.F2SA(strength, step_size=0.5 / strength, steps=20), None, None
        for _ in range(8):  # a step contracts by 7/8 or better
            h = hg.hypergradient(p.upper_loss, traj, p.upper, method=method, state=state)
            state = h.state
        assert h is not None
        errors.append(relative_error(h.grad, p.truth()))
    assert errors[-1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.05)


def test_bome_comes_to_rest_where_the_hypergradient_is_zero() -> None:
    """The upper objective is convex here, and its minimizer known: y = B x, x minimizes |B x - t|^2 + PENALTY |x|^2."""
    (_, mixing), t = LOWER_BATCHES[0], UPPER_BATCHES[0]

    def lower_loss(lower: Params, upper: Params, _: Any) -> Tensor:
        return 0.5 * ((lower["y"] - mixing @ upper["x"]) ** 2).sum()

    def upper_loss(lower: Params, upper: Params, _: Any) -> Tensor:
        return 0.5 * ((lower["y"] - t) ** 2).sum() + 0.5 * PENALTY * (upper["x"] ** 2).sum()

    best = torch.linalg.solve(mixing.T @ mixing + PENALTY * torch.eye(M, dtype=torch.float64), mixing.T @ t)
    lower, upper, xi = {"y": Y0}, {"x": X0}, 0.01
    for _ in range(500):
        traj = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=0.9), batches=[None] * 2)
        h = hg.hypergradient(upper_loss, traj, upper, method=hg.BOME(xi))
        lower, upper = traj.named(h.state), {"x": upper["x"] - xi * h.grad["x"]}
    assert float((upper["x"] - best).norm()) < 0.02 * float((X0 - best).norm())


# --- mistakes --------------------------------------------------------------------------------------------------------


def run(steps: int = 3, **options: Any) -> hg.Trajectory:
    p = quadratic(6)
    return hg.descend(p.lower_loss, p.lower, p.upper, optimizer=hg.optim.SGD(lr=0.4), batches=[None] * steps, **options)


def gradient(traj: hg.Trajectory, method: hg.Method, state: Any = None) -> hg.Hypergradient:
    p = quadratic(6)
    return hg.hypergradient(p.upper_loss, traj, p.upper, method=method, state=state)


SOLVED = hg.solved(quadratic(6).lower_loss, quadratic(6).lower)
MISTAKES: dict[str, tuple[Any, str]] = {
    "step size": (lambda: hg.SOBA(step_size=0.0), "SOBA: step_size must be None or a finite number > 0"),
    "no steps": (lambda: hg.AmIGO(0), "AmIGO: steps must be an int >= 1"),
    "no batches": (lambda: hg.AmIGO(batches=0), "AmIGO: batches must be an int >= 1"),
    "no products": (lambda: hg.StocBiO(0), "StocBiO: num_products must be an int >= 1"),
    "a bool": (lambda: hg.StocBiO(batches=True), "StocBiO: batches must be an int >= 1"),
    "no strength": (lambda: hg.F2SA(0.0), "F2SA: strength must be a finite number > 0"),
    "shrinking": (lambda: hg.F2SA(growth=-1.0), "F2SA: growth must be a finite number >= 0"),
    "no copy steps": (lambda: hg.F2SA(steps=0), "F2SA: steps must be an int >= 1"),
    "eta": (lambda: hg.BOME(eta=0.0), "BOME: eta must be a finite number > 0"),
    "barrier": (lambda: hg.BOME(barrier="norm"), "BOME: barrier must be 'gradient' or 'value'"),
    "fresh amigo": (lambda: gradient(run(), hg.AmIGO(fresh=True)), "AmIGO: fresh=True.*hg.Engine"),
    "fresh stocbio": (lambda: gradient(run(), hg.StocBiO(fresh=True)), "StocBiO: fresh=True.*hg.Engine"),
    "too many batches": (lambda: gradient(run(), hg.StocBiO(batches=9)), "batches=9.*the run has 3"),
    "a state": (lambda: gradient(run(), hg.StocBiO(), torch.zeros(6)), "StocBiO solves nothing iteratively"),
    "soba's state": (lambda: gradient(run(), hg.SOBA(), torch.zeros(7)), r"state has shape \(7,\).*\(6,\)"),
    "f2sa's state": (lambda: gradient(run(), hg.F2SA(), torch.zeros(6)), r"state has shape \(6,\).*\(7,\)"),
    "soba solved": (lambda: gradient(SOLVED, hg.SOBA()), "takes its step size from the lower run"),
    "f2sa solved": (lambda: gradient(SOLVED, hg.F2SA()), "takes its step size from the lower run"),
    "bome solved": (lambda: gradient(SOLVED, hg.BOME(0.1)), "begins its copy.*hg.descend"),
    "bome thinned": (
        lambda: gradient(run(recording=hg.SOBA().recording(3)), hg.BOME()),
        "record of this run was thinned.*recording=",
    ),
    "steps of the problem": (
        lambda: engine(hg.AmIGO(batches=4), steps=3, lr=0.1, upper_lr=0.1),
        r"problem 'low': AmIGO\(batches=4\).*steps=3.*fresh=True",
    ),
}


@pytest.mark.parametrize("row", MISTAKES)
def test_a_mistake_is_named(row: str) -> None:
    call, message = MISTAKES[row]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize(
    "method", [hg.SOBA(0.1), hg.AmIGO(2, 0.1), hg.StocBiO(2, 0.1), hg.F2SA(step_size=0.1), hg.BOME(0.1)], ids=str
)
def test_each_refuses_what_its_condition_does_not_describe(method: hg.Method) -> None:
    with pytest.raises(ValueError, match="needs a lower loss.*solved_root"):
        gradient(hg.solved_root(lambda w, u, b: w, quadratic(6).lower), method)
    p = quadratic(6)
    adamw = hg.optim.AdamW(lr=0.1, weight_decay=0.1)
    decayed = hg.descend(p.lower_loss, p.lower, p.upper, optimizer=adamw, batches=[None])
    with pytest.raises(ValueError, match="decoupled weight decay"):
        gradient(decayed, method)


@pytest.mark.parametrize("method", [hg.F2SA(step_size=0.1), hg.BOME(0.1)], ids=str)
def test_a_copy_notices_that_nothing_depends(method: hg.Method) -> None:
    lower, upper = {"w": torch.ones(2)}, {"c": torch.ones(2)}
    traj = hg.descend(lambda w, u, b: (w["w"] ** 2).sum(), lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[None])
    with pytest.raises(ValueError, match="nothing depends on upper"):
        hg.hypergradient(lambda w, u, b: w["w"].sum(), traj, upper, method=method)
