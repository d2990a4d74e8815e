"""A user's method, solver, loss or module that does not fit is named, with what to do, instead of torch's own error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad as hg

W, U = {"w": torch.tensor([1.0, 2.0])}, {"c": torch.tensor([0.5, -0.3])}
SGD = hg.optim.SGD(lr=0.1)
GRAD = {"c": torch.ones(2)}


def lower_loss(w: Any, u: Any, b: Any) -> Tensor:
    return ((w["w"] - u["c"]) ** 2).sum()


def upper_loss(w: Any, u: Any, b: Any) -> Tensor:
    return (w["w"] ** 2).sum() + (u["c"] ** 2).sum()


def run(upper: Any = U, lower: Any = W, loss: Any = lower_loss) -> hg.Trajectory:
    return hg.descend(loss, lower, upper, optimizer=SGD, batches=[None] * 3)


def gradient(method: hg.Method, upper: Any = U, **options: Any) -> Any:
    return hg.hypergradient(upper_loss, run(upper), upper, method=method, **options).grad


# --- what a user's method and solver return ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Returns(hg.ResponseMethod):
    """A rule that returns what it is told."""

    what: Callable[[], Any]

    def vjp(self, trajectory: Any, upper: Any, cotangent: Tensor, state: Any = None) -> Any:
        return self.what()


@dataclass(frozen=True)
class ReturnsTotal(hg.Method):
    """The same for a method without a rule."""

    what: Any

    def total(self, upper_loss: Any, trajectory: Any, upper: Any, batch: Any, state: Any) -> Any:
        return self.what


@dataclass(frozen=True)
class Solves(hg.Solver):
    """A solver that returns what it is told."""

    what: Callable[[Tensor], Any]
    requires_symmetric: ClassVar[bool] = False
    uses_initial: ClassVar[bool] = True

    def solve(self, op: Any, b: Tensor, *, x0: Tensor | None = None) -> Any:
        return self.what(b)


PULLED = {
    "None": (lambda: None, r"Returns\.vjp must return a hypergrad\.Pulled\(grad, \.\.\.\), got NoneType"),
    "a dict": (lambda: GRAD, r"Returns\.vjp must return a hypergrad\.Pulled.*got dict"),
    "a wrong shape": (lambda: hg.Pulled({"c": torch.ones(())}), r"Returns\.vjp.*'c' of shape \(\).*\(2,\)"),
    "an unknown name": (lambda: hg.Pulled({**GRAD, "z": torch.ones(1)}), r"Returns\.vjp.*'z'.*none of upper=\['c'\]"),
    "no tensor": (lambda: hg.Pulled({"c": None}), r"Returns\.vjp.*'c' of NoneType"),
    "a list": (lambda: hg.Pulled([torch.ones(2)]), r"Returns\.vjp.*dict by name, got list"),
}


@pytest.mark.parametrize("case", PULLED)
def test_what_a_rule_returns_is_checked(case: str) -> None:
    what, message = PULLED[case]
    with pytest.raises(ValueError, match=message):
        gradient(Returns(what))
    c = U["c"].clone().requires_grad_()
    with pytest.raises(ValueError, match=message):
        hg.best_response(run({"c": c}), {"c": c}, method=Returns(what))["w"].sum().backward()


def test_a_name_left_out_counts_as_zero() -> None:
    torch.testing.assert_close(gradient(Returns(lambda: hg.Pulled({})))["c"], 2 * U["c"])


def test_what_a_whole_method_returns_is_checked() -> None:
    with pytest.raises(ValueError, match=r"ReturnsTotal\.total must return a hypergrad\.methods\.Total.*got Pulled"):
        gradient(ReturnsTotal(hg.Pulled(GRAD)))
    with pytest.raises(ValueError, match=r"ReturnsTotal\.total.*'c' of shape \(3,\)"):
        gradient(ReturnsTotal(hg.methods.Total({"c": torch.ones(3)})))


def test_each_example_under_vmap_says_whether_its_own_gradient_is_finite() -> None:
    def code(c: Tensor) -> Tensor:
        upper = {"c": c, "none": torch.zeros(0, dtype=c.dtype)}
        traj = hg.solved(lambda w, u, _: ((w["w"] - u["c"]) ** 2).sum(), {"w": torch.ones(2, dtype=c.dtype)})

        def upper_loss(w: dict[str, Tensor], u: dict[str, Tensor], _: Any) -> Tensor:
            return (w["w"] ** 2).sum() + (u["c"] ** 2).sum()

        return hg.hypergradient(upper_loss, traj, upper, method=hg.Implicit(hg.Exact()), throw=False).result

    many = torch.tensor([[1.0, 2.0], [math.inf, 0.0], [0.0, math.nan], [3.0, 1e300]], dtype=torch.float64)
    bad = torch.tensor([0, 1, 1, 1]) * int(hg.Result.NON_FINITE)  # the square of 1e300 is no number either
    assert torch.func.vmap(code)(many).tolist() == [int(code(c)) for c in many] == bad.tolist()


def test_what_a_rule_returns_is_checked_inside_vmap_and_compile() -> None:
    wrong, right = Returns(lambda: hg.Pulled({"c": torch.ones(())})), Returns(lambda: hg.Pulled(dict(GRAD), stats={}))
    many = torch.stack([U["c"], 2 * U["c"]])

    def one(c: Tensor) -> Tensor:
        return gradient(right, {"c": c}, throw=False)["c"]

    torch.testing.assert_close(torch.func.vmap(one)(many), 1 + 2 * many)
    torch.testing.assert_close(torch.compile(one, backend="eager", fullgraph=True)(many[0]), 1 + 2 * many[0])
    with pytest.raises(ValueError, match=r"'c' of shape \(\)"):
        torch.func.vmap(lambda c: gradient(wrong, {"c": c}, throw=False)["c"])(many)


def test_what_a_differentiable_rule_returns_is_checked() -> None:
    @dataclass(frozen=True)
    class Twice(Returns):
        differentiable: ClassVar[bool] = True

        def differentiable_vjp(self, trajectory: Any, end: Any, upper: Any, cotangent: Tensor) -> Any:
            return {"c": cotangent.sum()}

    c = U["c"].clone().requires_grad_()
    response = hg.best_response(run({"c": c}), {"c": c}, method=Twice(lambda: None))["w"].sum()
    with pytest.raises(ValueError, match=r"Twice\.differentiable_vjp.*'c' of shape \(\)"):
        torch.autograd.grad(response, c, create_graph=True)


def solution(x: Tensor) -> hg.Solution:
    none = torch.zeros((), dtype=torch.int64)
    return hg.Solution(x, none, none, none, torch.zeros(()))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda b: b, r"Solves\.solve must return an hg\.Solution\(x, .*got Tensor"),
        (lambda b: solution(b.sum()), r"Solves\.solve returned x of shape \(\); b has \(2,\)"),
    ],
)
def test_what_a_solver_returns_is_checked(what: Any, message: str) -> None:
    method = hg.Implicit(Solves(what))
    with pytest.raises(ValueError, match=message):
        gradient(method)
    c = U["c"].clone().requires_grad_()
    response = hg.best_response(run({"c": c}), {"c": c}, method=method)["w"].sum()
    with pytest.raises(ValueError, match=message):
        torch.autograd.grad(response, c, create_graph=True)


# --- tensors, modes, functions ----------------------------------------------------------------------------------------


def by_detach(w: Tensor) -> Tensor:
    return w.detach()


def by_no_grad(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w.exp()


@torch.no_grad()
def by_decorator(w: Tensor) -> Tensor:
    return w.exp()


def by_data(w: Tensor) -> Tensor:
    return w.data


def by_straight_through(w: Tensor) -> Tensor:
    return w + ((w > 0.5).to(w.dtype) - w).detach()


@pytest.mark.parametrize("stop", [by_detach, by_no_grad, by_decorator, by_data, by_straight_through])
def test_a_stop_gradient_in_a_loss_is_taken_as_autograd_takes_it(stop: Any) -> None:
    def loss(w: Any, u: Any, b: Any) -> Tensor:
        return ((w["w"] - 0.5 * stop(w["w"]) * u["c"]) ** 2).sum()

    with pytest.warns(UserWarning, match=r"the lower loss: a \.detach\(\) or torch\.no_grad\(\) holds back"):
        hg.check_product(loss, W, U)


def test_what_a_loss_logs_of_a_stop_gradient_carries_no_graph() -> None:
    log: list[Tensor] = []

    def loss(w: Any, u: Any, b: Any) -> Tensor:
        held = w["w"].detach()
        log.append(held)
        assert held.numpy().shape == (2,)
        return ((w["w"] - 0.5 * held * u["c"]) ** 2).sum()

    with pytest.warns(UserWarning, match="holds back"):
        hg.check_product(loss, W, U)
    assert log
    assert not any(x.requires_grad for x in log)


@pytest.mark.parametrize("seed", range(5))
def test_steps_and_constant_losses_are_no_wrong_products(seed: int) -> None:
    """Their gradients' difference quotients are zero, and products are rounding or a straight-through rule's."""
    generator = torch.Generator().manual_seed(seed)
    lower = {"w": torch.randn(6, 1, generator=generator)}
    target = torch.randn(6, 1, generator=generator)

    def normalized(w: Any, u: Any, b: Any) -> Tensor:
        return (F.normalize(w["w"], dim=1) * target * u["c"][0]).sum()

    def quantized(w: Any, u: Any, b: Any) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(w["w"], 0.5, 0, -8, 7)
        return ((rounded - target * u["c"][0]) ** 2).sum()

    for loss in (normalized, quantized):
        hg.check_product(loss, lower, U)


def test_a_bend_sharper_than_any_difference_is_no_wrong_product() -> None:
    sharp = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}

    def bent(w: Any, u: Any, b: Any) -> Tensor:
        x = 1e9 * (w["w"] - sharp["w"])
        return torch.logaddexp(x + 0.1, -x - 0.1).sum() + (u["c"] ** 2).sum()

    hg.check_product(bent, sharp, U)


def test_a_stop_gradient_hides_no_wrong_product() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.x = x.detach()
            return x**3

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 3 * ctx.x**2 * grads[0]

    def loss(w: Any, u: Any, b: Any) -> Tensor:
        value: Tensor = ((Once.apply(w["w"]) - w["w"].detach() * u["c"]) ** 2).sum()  # type: ignore[no-untyped-call]
        return value

    with pytest.raises(ValueError, match=r"wrong.*stop-gradient.*average.*meant.*product_check=False.*culprits"):
        hg.check_product(loss, W, U)


def test_inference_mode_is_named() -> None:
    traj = run()
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"torch\.inference_mode\(\).*Leave it.*no_grad"):
            run()
        with pytest.raises(ValueError, match=r"torch\.inference_mode"):
            hg.hypergradient(upper_loss, traj, U, method=hg.Unrolled())
        with pytest.raises(ValueError, match=r"torch\.inference_mode"):
            hg.best_response(traj, U, method=hg.Unrolled())
        with pytest.raises(ValueError, match=r"torch\.inference_mode"):
            engine()
    with torch.no_grad():
        gradient(hg.Unrolled())


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Implicit(hg.CG(3)), hg.FiniteDifference()])
def test_tensors_from_inference_mode_are_taken_like_others(method: hg.Method) -> None:
    with torch.inference_mode():
        lower, upper = {"w": W["w"].clone()}, {"c": U["c"].clone()}
    grad = hg.hypergradient(upper_loss, run(upper, lower), upper, method=method).grad["c"]
    torch.testing.assert_close(grad, gradient(method)["c"], rtol=0, atol=0)


def test_a_complex_parameter_is_told_of_view_as_real() -> None:
    with pytest.raises(ValueError, match=r"lower\['w'\] has dtype torch\.complex64.*view_as_real.*view_as_complex"):
        run(lower={"w": torch.ones(2, dtype=torch.complex64)})


def test_a_loss_with_other_arguments_is_named_with_its_signature() -> None:
    with pytest.raises(ValueError, match=r"upper_loss must take \(lower, upper, batch\), got a function of \(w, u\)"):
        hg.hypergradient(lambda w, u: w["w"].sum(), run(), U, method=hg.Unrolled())  # type: ignore[arg-type]


def test_a_function_that_can_take_the_arguments_is_taken() -> None:
    def loose(w: Any, u: Any = None, b: Any = None, scale: float = 1.0) -> Tensor:
        return scale * (w["w"] ** 2).sum()

    for loss in (loose, lambda *every: loose(*every), torch.no_grad()(loose)):
        try:
            hg.hypergradient(loss, run(), U, method=hg.Unrolled())
        except ValueError as error:
            assert "must take" not in str(error)  # noqa: PT017 - the last one has no gradient


def test_a_loss_of_the_users_own_type_error_passes() -> None:
    def broken(w: Any, u: Any, b: Any) -> Tensor:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        hg.hypergradient(broken, run(), U, method=hg.Unrolled())


# --- problems ---------------------------------------------------------------------------------------------------------

DATA = [torch.ones(2, 3)]


def low(net: nn.Module | None = None, **options: Any) -> hg.Problem:
    net = net or nn.Linear(3, 1)
    optimizer = options.pop("optimizer", torch.optim.SGD)(net.parameters(), lr=0.1)
    given = {"loss": lambda m, x: ((m.net(x) - m.up(x)) ** 2).mean(), "data": DATA, "method": hg.Unrolled()}
    return hg.Problem("net", module=net, optimizer=optimizer, **{**given, **options})


def engine(**options: Any) -> hg.Engine:
    up = nn.Linear(3, 1)
    top = hg.Problem(
        "up",
        module=up,
        loss=lambda m, x: (m.net(x) ** 2).mean(),
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        data=DATA,
    )
    return hg.Engine([low(**options), top])


def test_a_module_built_in_inference_mode_is_named() -> None:
    with torch.inference_mode():
        net = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"'net': its parameter 'weight' was created in torch\.inference_mode"):
        engine(net=net)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_is_named_until_it_has_run() -> None:
    for lazy in (nn.LazyLinear(1), nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())):
        with pytest.raises(ValueError, match=r"problem 'net': \[.*weight'.*lazy.*Run the module once"):
            low(lazy)
        lazy(DATA[0])
        low(lazy)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lr": lambda models, step: 0.1}, r"'net': hyper\['lr'\] takes the step's index.*hg\.descend"),
        ({"lr": lambda models, step=0: 0.1}, r"'net': hyper\['lr'\] takes the step's index"),
        ({"lr": lambda: 0.1}, r"'net': hyper\['lr'\] must take \(models\), got a function of \(\)"),
    ],
)
def test_a_hyper_function_of_other_arguments_is_named(hyper: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        low(hyper=hyper)


def test_betas_are_told_their_two_names() -> None:
    with pytest.raises(ValueError, match=r"'net': hyper\['betas'\] is a tuple in Adam.*'beta1' and 'beta2'"):
        engine(optimizer=torch.optim.Adam, hyper={"betas": lambda m: (m.up.bias.sigmoid().sum(), 0.999)})
    engine(optimizer=torch.optim.Adam, hyper={"beta1": lambda m: m.up.bias.sigmoid().sum()})


@pytest.mark.parametrize("method", [hg.FiniteDifference, hg.OneStep])
def test_an_unknown_optimizer_is_told_of_step_size(method: Any) -> None:
    with pytest.raises(ValueError, match=r"'net'.*Rprop cannot be differentiated.*FiniteDifference.*step_size="):
        engine(optimizer=torch.optim.Rprop, method=method())
    engine(optimizer=torch.optim.Rprop, method=method(step_size=0.1)).step()


@pytest.mark.parametrize(
    ("option", "function", "message"),
    [
        ("loss", lambda models: 0.0, r"'net': loss must take \(models, batch\), got a function of \(models\)"),
        ("response", lambda models: 0.0, r"'net': response must take \(models, batch\)"),
        ("start", lambda: {}, r"'net': start must take \(models\)"),
        ("project", lambda params, step: params, r"'net': project must take \(params\)"),
        ("split", lambda batch: [batch], r"'net': split must take \(batch, count\)"),
    ],
)
def test_a_problems_function_of_other_arguments_is_named(option: str, function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        low(**{option: function, "method": hg.Implicit(hg.CG(3))})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lower_loss": lambda lower, upper: 0.0},
            r"lower_loss must take \(lower, upper, batch\), got",
        ),
        ({"response": lambda lower, upper: 0.0}, r"response must take \(lower, upper, batch\)"),
        ({"start": lambda: {}}, r"start must take \(upper\)"),
        ({"project": lambda: {}}, r"project must take \(lower\)"),
        ({"hyper": {"lr": lambda: 0.1}}, r"hyper\['lr'\] must take \(upper\)"),
    ],
)
def test_a_function_of_descend_of_other_arguments_is_named(options: Any, message: str) -> None:
    given = {"lower_loss": lower_loss, **options}
    with pytest.raises(ValueError, match=message):
        hg.descend(given.pop("lower_loss"), W, U, optimizer=SGD, batches=[None], **given)


def test_a_derivative_of_a_hypergradient_is_not_zero_without_a_word() -> None:
    run = hg.descend(lower_loss, W, U, optimizer=SGD, batches=[None])

    def value(u: Any) -> Any:
        return hg.hypergradient(lower_loss, run, u, method=hg.Unrolled(), throw=False).value

    with pytest.raises(ValueError, match=r"is constant: the derivative would be zero.*best_response"):
        torch.func.grad(value)(U)
