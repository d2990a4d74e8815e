"""What `diagnose` measures is right on problems of known spectrum, and what it advises works."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hypergrad as hg
from hypergrad.testing import relative_error

F64 = torch.float64


class Quadratic:
    """Lower loss w.A w / 2 - w.B u with eigenvalues of A as given; upper loss norm(w - c)^2 / 2 + norm(u)^2 / 10."""

    def __init__(self, values: list[float], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = len(values)
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))[0]
        self.matrix = (basis * torch.tensor(values, dtype=F64)) @ basis.T
        self.mixing = torch.randn(size, 3, generator=generator, dtype=F64)
        self.target = torch.randn(size, generator=generator, dtype=F64)
        self.upper = {"u": torch.randn(3, generator=generator, dtype=F64)}
        self.lower = {"w": torch.zeros(size, dtype=F64)}

    def lower_loss(self, lower, upper, batch) -> Tensor:
        return 0.5 * lower["w"] @ self.matrix @ lower["w"] - lower["w"] @ self.mixing @ upper["u"]

    def upper_loss(self, lower, upper, batch) -> Tensor:
        return 0.5 * ((lower["w"] - self.target) ** 2).sum() + 0.1 * (upper["u"] ** 2).sum()

    def solved(self) -> hg.Trajectory:
        return hg.solved(self.lower_loss, {"w": self.solution()})

    def solution(self) -> Tensor:
        return torch.linalg.lstsq(self.matrix, self.mixing @ self.upper["u"], driver="gelsd").solution

    def run(self, num_steps: int, optimizer=None) -> hg.Trajectory:
        optimizer = optimizer or hg.optim.SGD(lr=0.1)
        return hg.descend(self.lower_loss, self.lower, self.upper, optimizer=optimizer, batches=[None] * num_steps)

    def truth(self) -> dict[str, Tensor]:
        w = self.solution()
        response = self.mixing.T @ torch.linalg.solve(self.matrix, w - self.target)
        return {"u": response + 0.2 * self.upper["u"]}

    def diagnose(self, traj: hg.Trajectory, **options) -> hg.Diagnosis:
        return hg.diagnose(self.upper_loss, traj, self.upper, **options)

    def hypergradient(self, traj: hg.Trajectory, method: hg.Method) -> hg.Hypergradient:
        return hg.hypergradient(self.upper_loss, traj, self.upper, method=method)


def geometric(size: int, smallest: float, largest: float) -> list[float]:
    return torch.logspace(math.log10(smallest), math.log10(largest), size, dtype=F64).tolist()


def agreement(diagnosis: hg.Diagnosis, name: str) -> hg.Agreement:
    return next(a for a in diagnosis.agreement if a.name == name)


@pytest.mark.parametrize("condition", [10.0, 100.0, 1e3])
def test_stationary_and_well_conditioned_gets_cg_with_enough_steps(condition: float) -> None:
    problem = Quadratic(geometric(25, 1.0, condition))
    d = problem.diagnose(problem.solved(), rtol=1e-6)
    assert d.smallest == pytest.approx(1.0, rel=1e-9)
    assert d.largest == pytest.approx(condition, rel=1e-9)
    assert d.condition == pytest.approx(condition, rel=1e-9)
    assert not d.negative_curvature and d.damping == 0.0
    assert d.distance < 1e-10 and d.relative_stationarity is None
    assert d.size == 25 and d.reference == "Implicit, converged" and d.reference_residual < 1e-9
    assert isinstance(d.recommendation, hg.Implicit) and isinstance(d.recommendation.solver, hg.CG)
    assert d.recommendation.solver.max_steps == d.predicted_steps
    h = problem.hypergradient(problem.solved(), d.recommendation)
    assert h.result is hg.Result.SUCCESS
    assert relative_error(h.grad, problem.truth()) < 1e-4
    assert f"CG({d.predicted_steps})" in d.advice and "positive definite" in d.advice


def test_predicted_steps_suffice_in_a_large_problem_and_follow_the_square_root() -> None:
    steps = []
    for condition in (16.0, 64.0, 256.0):
        problem = Quadratic(geometric(300, 1.0, condition))
        d = problem.diagnose(problem.solved(), lanczos_steps=80)
        h = problem.hypergradient(problem.solved(), d.recommendation)
        assert h.result is hg.Result.SUCCESS
        assert int(h.stats["num_steps"]) <= d.predicted_steps
        steps.append(d.predicted_steps)
    assert 1.8 < steps[1] / steps[0] < 2.4 and 1.8 < steps[2] / steps[1] < 2.4


def test_negative_curvature_gets_enough_damping() -> None:
    problem = Quadratic([-0.3, 1.0, 2.0, 5.0])
    d = problem.diagnose(problem.solved(), method=hg.Implicit(hg.CG(10)))
    assert d.negative_curvature and d.condition == math.inf
    assert d.smallest == pytest.approx(-0.3)
    assert 0.3 < d.damping < 0.4
    assert agreement(d, "Implicit(CG(10))").result is hg.Result.NEGATIVE_CURVATURE
    assert d.recommendation == hg.Implicit(hg.CG(max_steps=d.predicted_steps, rtol=1e-5), damping=d.damping)
    assert problem.hypergradient(problem.solved(), d.recommendation).result is hg.Result.SUCCESS
    for words in (f"at least {d.damping:.3g}", "gauss_newton", "hg.Composite", "MINRES"):
        assert words in d.advice


def test_negative_curvature_met_by_the_configured_damping_is_still_reported_of_the_undamped_problem() -> None:
    problem = Quadratic([-0.3, 1.0, 2.0])
    d = problem.diagnose(problem.solved(), method=hg.Implicit(hg.CG(10), damping=1.0))
    assert d.smallest == pytest.approx(-0.3)
    assert agreement(d, "Implicit(CG(10), damping=1)").result is hg.Result.SUCCESS


def test_negative_curvature_in_a_run_that_is_not_stationary_gets_unrolled() -> None:
    problem = Quadratic([-0.3, 1.0, 2.0])
    d = problem.diagnose(problem.run(5))
    assert d.recommendation == hg.Unrolled() and d.reference == "Unrolled"
    assert "negative curvature" in d.advice and "Nor is it stationary" in d.advice


def test_a_short_run_gets_unrolled_which_differentiates_it_exactly() -> None:
    problem = Quadratic(geometric(6, 0.05, 5.0))
    traj = problem.run(20)
    d = problem.diagnose(traj)
    assert d.recommendation == hg.Unrolled() and d.reference == "Unrolled"
    assert d.distance == pytest.approx(
        float((traj.end["w"] - problem.solution()).norm() / traj.end["w"].norm()), rel=1e-6
    ) or d.distance == pytest.approx(1.0)
    start = float((problem.mixing @ problem.upper["u"]).norm())
    end = float((problem.matrix @ traj.end["w"] - problem.mixing @ problem.upper["u"]).norm())
    assert d.stationarity == pytest.approx(end) and d.relative_stationarity == pytest.approx(end / start)
    assert agreement(d, "Implicit, converged").difference > 0.1
    assert "not at its solution" in d.advice


def test_a_run_too_short_for_curvature_gets_the_identity() -> None:
    problem = Quadratic(geometric(6, 0.1, 2.0))
    d = problem.diagnose(problem.run(4, hg.optim.SGD(lr=1e-3)))
    assert d.recommendation == hg.OneStep()
    assert agreement(d, "OneStep").cosine > 0.99
    assert agreement(d, "OneStep").difference == pytest.approx(0.75, abs=0.01)  # one step's length of four


def test_a_long_run_is_stationary_and_all_exact_methods_agree() -> None:
    problem = Quadratic(geometric(5, 1.0, 8.0))
    d = problem.diagnose(problem.run(400), method=hg.Implicit(hg.CG(10, rtol=1e-10)))
    assert d.reference == "Implicit, converged"
    for name in ("Implicit(CG(10))", "Unrolled"):
        assert agreement(d, name).cosine == pytest.approx(1.0) and agreement(d, name).difference < 1e-8
    assert "keep it" in d.advice


def test_solved_elsewhere_and_not_stationary_says_so() -> None:
    problem = Quadratic(geometric(5, 1.0, 8.0))
    d = problem.diagnose(hg.solved(problem.lower_loss, {"w": problem.solution() + 1.0}))
    assert d.distance > 0.1 and d.recommendation is None
    assert "not stationary" in d.advice and "hg.descend" in d.advice


def test_curvature_like_the_identity_gets_one_step_within_its_bound() -> None:
    problem = Quadratic(torch.linspace(2.0, 2.2, 12).tolist())
    d = problem.diagnose(problem.solved())
    assert isinstance(d.recommendation, hg.OneStep)
    assert d.recommendation.step_size == pytest.approx(1 / 2.1, rel=1e-3)
    direct = {"u": 0.2 * problem.upper["u"]}
    response = {"u": problem.truth()["u"] - direct["u"]}
    h = problem.hypergradient(problem.solved(), d.recommendation)
    # norm(I - s A) <= (c - 1) / (c + 1) bounds the error in w; the mixing matrix may amplify it by its condition
    amplification = float(torch.linalg.cond(problem.mixing))
    assert relative_error({"u": h.grad["u"] - direct["u"]}, response) < amplification * 0.1 / 2.1
    assert "identity" in d.advice


@pytest.mark.parametrize(
    ("values", "words"), [(geometric(20, 1e-6, 1.0), "condition number"), ([0.0, 1.0, 2.0], "sing")]
)
def test_ill_conditioned_gets_damping(values: list[float], words: str) -> None:
    problem = Quadratic(values)
    problem.mixing = problem.matrix @ problem.mixing  # a solution exists also where the matrix is singular
    d = problem.diagnose(problem.solved())
    assert d.damping == pytest.approx(1e-3 * max(values), rel=0.1)
    assert words in d.advice and "bias" in d.advice
    assert problem.hypergradient(problem.solved(), d.recommendation).result is hg.Result.SUCCESS


def test_solver_residual_and_difference_of_a_truncated_solve() -> None:
    problem = Quadratic(geometric(20, 1.0, 100.0))
    method = hg.Implicit(hg.CG(3))
    d = problem.diagnose(problem.solved(), method=method)
    h = problem.hypergradient(problem.solved(), method)
    v = problem.solution() - problem.target
    assert d.solver_residual == pytest.approx(float(h.stats["residual_norm"] / v.norm()))
    direct = 0.2 * problem.upper["u"]
    expected = relative_error({"u": h.grad["u"] - direct}, {"u": problem.truth()["u"] - direct})
    assert agreement(d, "Implicit(CG(3))").difference == pytest.approx(expected, rel=1e-6)
    assert "is off by" in d.advice


def test_weight_decay_and_maximize_belong_to_the_condition() -> None:
    problem = Quadratic([-4.0, -3.0, -1.0])
    sgd = hg.optim.SGD(lr=0.1, weight_decay=0.5, maximize=True)
    d = problem.diagnose(problem.run(300, sgd))
    assert (d.smallest, d.largest) == (pytest.approx(1.5), pytest.approx(4.5))


def test_decoupled_decay_is_refused_unless_the_method_in_use_ignores_it() -> None:
    problem = Quadratic([1.0, 2.0, 3.0])
    traj = problem.run(50, hg.optim.AdamW(lr=0.1, weight_decay=0.1))
    d = problem.diagnose(traj)
    assert d.recommendation == hg.Unrolled() and "decoupled weight decay" in d.advice
    d = problem.diagnose(traj, method=hg.Implicit(hg.CG(5), decoupled="ignore"))
    assert "decoupled weight decay" not in d.advice and d.reference_residual is not None


def test_a_thinned_record_leaves_out_what_needs_more() -> None:
    problem = Quadratic(geometric(4, 1.0, 4.0))
    method = hg.Implicit(hg.CG(5))
    traj = hg.descend(
        problem.lower_loss,
        problem.lower,
        problem.upper,
        optimizer=hg.optim.SGD(lr=0.2),
        batches=[None] * 200,
        recording=method.recording(200),
    )
    d = problem.diagnose(traj, method=method)
    assert d.relative_stationarity is None and d.distance < 1e-6
    assert "Unrolled" not in [a.name for a in d.agreement]


def test_penalty_is_compared_without_its_direct_term() -> None:
    problem = Quadratic(geometric(5, 1.0, 4.0))
    method = hg.Penalty(strength=1e4, optimizer=hg.optim.SGD(lr=0.2), steps=200)
    assert agreement(problem.diagnose(problem.solved(), method=method), "Penalty").difference < 1e-3


def test_a_root_whose_jacobian_is_not_symmetric_gets_gmres() -> None:
    matrix = torch.tensor([[2.0, 1.0], [-1.0, 1.0]], dtype=F64)
    upper = {"u": torch.ones(2, dtype=F64)}
    traj = hg.solved_root(
        lambda w, u, _: {"w": matrix @ w["w"] - u["u"]}, {"w": torch.linalg.solve(matrix, upper["u"])}
    )
    d = hg.diagnose(lambda w, u, _: (w["w"] ** 2).sum(), traj, upper)
    assert d.condition == pytest.approx(float(torch.linalg.cond(matrix)), rel=1e-6)
    assert isinstance(d.recommendation, hg.Implicit) and isinstance(d.recommendation.solver, hg.GMRES)
    assert not d.negative_curvature


def test_a_learning_rate_as_upper_variable_gets_unrolled_with_the_refusal() -> None:
    problem = Quadratic([1.0, 2.0])
    upper = {"lr": torch.tensor(0.1, dtype=F64)}
    fixed = problem.upper
    traj = hg.descend(
        lambda w, u, b: problem.lower_loss(w, fixed, b),
        problem.lower,
        upper,
        optimizer=hg.optim.SGD(lr=0.1),
        batches=[None] * 5,
        hyper={"lr": lambda u: u["lr"]},
    )
    d = hg.diagnose(lambda w, u, b: problem.upper_loss(w, fixed, b), traj, upper)
    assert d.recommendation == hg.Unrolled() and "does not move the fixed point" in d.advice
    assert d.reference == "Unrolled" and d.reference_residual is None


def test_no_response_and_values_that_are_not_finite() -> None:
    problem = Quadratic([1.0, 2.0])
    d = hg.diagnose(lambda w, u, b: (u["u"] ** 2).sum(), problem.solved(), problem.upper)
    assert "response is zero" in d.advice
    broken = hg.solved(lambda w, u, b: problem.lower_loss(w, u, b) * float("nan"), problem.lower)
    d = problem.diagnose(broken)
    assert "not finite" in d.advice and d.recommendation is None


def test_only_part_of_the_lower_parameters_responds() -> None:
    def lower_loss(lower, upper, batch) -> Tensor:
        return 0.5 * ((lower["a"] - upper["u"]) ** 2).sum() + 3.0 * ((lower["b"] - upper["u"]) ** 2).sum()

    upper = {"u": torch.ones(2, dtype=F64)}
    traj = hg.solved(lower_loss, {"a": torch.ones(2, dtype=F64), "b": torch.ones(2, dtype=F64)})
    d = hg.diagnose(lambda w, u, b: (w["a"] ** 2).sum(), traj, upper, method=hg.Implicit(hg.CG(3), over=["a"]))
    assert d.size == 2 and d.largest == pytest.approx(1.0)


def test_the_table_names_everything() -> None:
    problem = Quadratic(geometric(5, 1.0, 8.0))
    text = str(problem.diagnose(problem.run(100), method=hg.Implicit(hg.CG(3))))
    for words in (
        "stationarity",
        "curvature",
        "condition number",
        "relative residual",
        "cosine",
        "Unrolled",
        "reference",
    ):
        assert words in text
    assert max(len(line) for line in text.splitlines()[:-1]) < 120


def test_a_functional_call_leaves_everything_as_found() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)
    )
    x = torch.randn(8, 3)

    def lower_loss(lower, upper, batch) -> Tensor:
        outputs = torch.func.functional_call(net, lower, (x,))
        return (outputs**2).mean() + upper["decay"].exp() * sum((p**2).sum() for p in lower.values())

    def upper_loss(lower, upper, batch) -> Tensor:
        return ((torch.func.functional_call(net, lower, (x,)) - 1) ** 2).mean()

    lower = {name: p.detach().clone() for name, p in net.named_parameters()}
    upper = {"decay": torch.tensor(-2.0)}
    traj = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[None] * 5)
    before = {key: value.clone() for key, value in net.state_dict().items()}, torch.get_rng_state()
    d = hg.diagnose(upper_loss, traj, upper)
    assert math.isfinite(d.largest)
    assert all(torch.equal(before[0][key], value) for key, value in net.state_dict().items())
    assert torch.equal(before[1], torch.get_rng_state()) and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: hg.diagnose(p.upper_loss), "takes an Engine, or"),
        (lambda p: p.diagnose(p.solved(), rtol=0.0), "rtol must lie between 0 and 1"),
        (lambda p: p.diagnose(p.solved(), max_steps=0), "max_steps must be an int >= 1"),
        (lambda p: p.diagnose(p.solved(), lanczos_steps=0), "lanczos_steps must be an int >= 1"),
        (lambda p: p.diagnose(p.solved(), method=hg.CG()), "must be a hypergradient method"),
        (lambda p: hg.diagnose(p.upper_loss, None, p.upper), "takes an Engine, or"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Quadratic([1.0, 2.0]))
