"""Derivatives of runs: finite differences, every transform, zero gradients, no read-backs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import CASES, SMOOTH, Case, case_id, gradient, hypers, ours, run, start
from torch import Tensor

from hypergrad.optim import SGD, Adam

Hyper = dict[str, Tensor]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
COMPILED = [
    pytest.param(case, id=case[0], marks=() if quick else pytest.mark.slow)
    for quick, case in (
        (True, ("SGD", {"momentum": 0.5, "nesterov": True, "maximize": True})),
        (True, ("Adam", {"amsgrad": True})),
        (False, ("AdamW", {})),
        (False, ("NAdam", {"decoupled_weight_decay": True})),
        (True, ("RAdam", {})),
        (False, ("Adamax", {})),
        (True, ("RMSprop", {"centered": True})),
        (False, ("Adagrad", {})),
        (False, ("Adadelta", {})),
    )
]
# torch's own import at the first forward-mode derivative
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
ADAPTIVE = [case for case in SMOOTH if case[0] not in ("SGD",) and "initial_accumulator_value" not in case[1]]


def objective(case: Case, params: Tensor, hyper: Hyper, steps: int = 8) -> Tensor:
    """A scalar of a run's end and of its final state."""
    end, state = run(ours(case), params, hyper, steps)
    weights = torch.linspace(1.0, -0.6, end.numel(), dtype=end.dtype)
    value = (weights * end.sin()).sum()
    for tensor in state.values():
        if isinstance(tensor, Tensor):
            value = value + 0.1 * (tensor * tensor).mean()
    return value


def difference(f: Callable[[float], Tensor], size: float = 1e-4) -> Tensor:
    """The derivative at 0 by fourth-order differences: error about size**4 * f''''' + 1e-16 / size."""
    return (8 * (f(size) - f(-size)) - (f(2 * size) - f(-2 * size))) / (12 * size)


@pytest.mark.parametrize("case", SMOOTH, ids=case_id)
def test_unrolled_derivatives_equal_finite_differences(case: Case) -> None:
    params, hyper = start(), hypers(ours(case))
    in_params, in_hyper = torch.func.grad(lambda p, h: objective(case, p, h), argnums=(0, 1))(params, hyper)
    for name, value in hyper.items():
        slope = difference(lambda t, n=name, v=value: objective(case, params, {**hyper, n: v + t}))
        torch.testing.assert_close(in_hyper[name], slope, rtol=1e-6, atol=1e-9)
    for i, direction in enumerate(torch.eye(params.numel(), dtype=params.dtype)):
        slope = difference(lambda t, d=direction: objective(case, params + t * d, hyper))
        torch.testing.assert_close(in_params[i], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", SMOOTH, ids=case_id)
@forward_mode
def test_transforms_agree(case: Case) -> None:
    params, hyper = start(), hypers(ours(case))

    def f(p: Tensor, h: Hyper) -> Tensor:
        return objective(case, p, h)

    gradients = torch.func.grad(f, argnums=(0, 1))
    in_params, in_hyper = gradients(params, hyper)

    leaves = [params.clone().requires_grad_(), *(value.clone().requires_grad_() for value in hyper.values())]
    by_autograd = torch.autograd.grad(f(leaves[0], dict(zip(hyper, leaves[1:], strict=True))), leaves)
    torch.testing.assert_close(by_autograd, (in_params, *in_hyper.values()), **TIGHT)

    tangents = (torch.cos(params), {name: value * 0.7 for name, value in hyper.items()})
    _, forward = torch.func.jvp(f, (params, hyper), tangents)
    expected = (in_params * tangents[0]).sum() + sum((in_hyper[n] * tangents[1][n]).sum() for n in hyper)
    torch.testing.assert_close(forward, expected, **TIGHT)

    scales = torch.tensor([1.0, 0.9, 1.05], dtype=torch.float64)
    many = torch.vmap(gradients)(scales[:, None] * params, {name: scales * value for name, value in hyper.items()})
    for i, scale in enumerate(scales):
        alone = gradients(scale * params, {name: scale * value for name, value in hyper.items()})
        torch.testing.assert_close(many[0][i], alone[0], **TIGHT)
        torch.testing.assert_close({n: v[i] for n, v in many[1].items()}, alone[1], **TIGHT)


@pytest.mark.parametrize("case", COMPILED)
def test_updates_compile_in_one_graph_and_are_differentiated_there(case: Case) -> None:
    optimizer, hyper = ours(case), hypers(ours(case))
    params, state = run(optimizer, start(), hyper, steps=3)
    grad = gradient(params)
    leaves = [tensor.requires_grad_() for tensor in (params, grad, *hyper.values())]

    def end(p: Tensor, g: Tensor, h: Hyper) -> Tensor:
        return optimizer.update(p, g, state, h)[0].sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(end, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(params, grad, hyper), leaves),
        torch.autograd.grad(end(params, grad, hyper), leaves),
        **TIGHT,
    )


def test_a_transform_of_updates_compiles_in_one_graph() -> None:
    case: Case = ("SGD", {"momentum": 0.5})
    params, hyper = start(), hypers(ours(case))

    def pulled(p: Tensor, h: Hyper) -> Any:
        value, pull = torch.func.vjp(lambda q, k: objective(case, q, k, steps=2), p, h)
        return value, pull(torch.ones_like(value))

    torch._dynamo.reset()
    compiled = torch.compile(pulled, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(params, hyper), pulled(params, hyper), **TIGHT)


@pytest.mark.parametrize("case", SMOOTH, ids=case_id)
def test_second_derivatives_equal_finite_differences(case: Case) -> None:
    params, hyper = start(), hypers(ours(case))
    slope = torch.func.grad(lambda lr: objective(case, params, {**hyper, "lr": lr}))
    second = torch.func.grad(slope)(hyper["lr"])
    torch.testing.assert_close(second, difference(lambda t: slope(hyper["lr"] + t)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_gradient_entry_of_exactly_zero_leaves_every_derivative_finite(case: Case, dtype: torch.dtype) -> None:
    optimizer = ours((case[0], {key: value for key, value in case[1].items() if key != "weight_decay"}))

    def end(params: Tensor) -> Tensor:
        return run(optimizer, params, {}, steps=3)[0]

    jacobian = torch.func.jacrev(end)(start().to(dtype))
    assert jacobian.isfinite().all()
    decay = 1.0
    if optimizer.decay().decoupled:
        assert isinstance(optimizer.lr, float)
        decay = (1.0 - optimizer.lr * float(optimizer.decay().decoupled)) ** 3
    torch.testing.assert_close(jacobian[-1], torch.tensor([0.0, 0.0, 0.0, 0.0, decay], dtype=dtype))


@pytest.mark.parametrize("case", ADAPTIVE, ids=case_id)
@forward_mode
def test_the_derivative_in_a_gradient_that_was_always_zero_is_zero(case: Case) -> None:
    optimizer, params, zero = ours(case), start(), torch.zeros(5, dtype=torch.float64)
    state = optimizer.init(params)
    for _ in range(8):
        params, state = optimizer.update(params, zero, state, {"weight_decay": 0.0})

    def step(grad: Tensor) -> Tensor:
        return optimizer.update(params, grad, state, {"weight_decay": 0.0})[0]

    assert torch.equal(torch.func.jacrev(step)(zero), torch.zeros(5, 5, dtype=torch.float64))
    assert torch.equal(torch.func.jacfwd(step)(zero), torch.zeros(5, 5, dtype=torch.float64))


def test_sgd_keeps_its_derivative_at_a_zero_gradient() -> None:
    zero = torch.zeros(3)
    slope = torch.func.jacrev(lambda grad: SGD(lr=0.5).update(zero, grad, {"step": 0})[0])(zero)
    assert torch.equal(slope, -0.5 * torch.eye(3))


def test_rmsprop_takes_the_root_of_a_variance_that_rounds_below_zero_as_zero() -> None:
    optimizer = ours(("RMSprop", {"centered": True, "alpha": 0.5, "eps": 1.0, "lr": 1.0}))
    ones = torch.ones(2)
    state = {"step": 5, "square_avg": ones, "grad_avg": ones * (1 + 1e-6)}
    end, slope = torch.func.vjp(lambda grad: optimizer.update(ones, grad, state)[0], ones)
    torch.testing.assert_close(end, torch.zeros(2))
    assert slope(ones)[0].isfinite().all()


@forward_mode
@pytest.mark.parametrize("case", SMOOTH, ids=case_id)
def test_transforms_differentiate_where_grad_mode_is_off(case: Case) -> None:
    params, hyper = start(), hypers(ours(case))
    tangent = torch.cos(params)
    expected = torch.func.jvp(lambda p: objective(case, p, hyper), (params,), (tangent,))
    with torch.no_grad():
        values = torch.func.jvp(lambda p: objective(case, p, hyper), (params,), (tangent,))
    torch.testing.assert_close(values, expected, **TIGHT)


@pytest.mark.parametrize("case", SMOOTH, ids=case_id)
def test_nothing_is_read_back_from_the_device(case: Case) -> None:
    optimizer = ours(case)
    hyper = {name: torch.empty((), device="meta") for name in hypers(optimizer)}
    params = torch.empty(5, device="meta")
    state = optimizer.init(params)
    for step in (0, torch.empty((), device="meta")):
        end, _ = optimizer.update(params, torch.empty(5, device="meta"), {**state, "step": step}, hyper)
        assert end.device.type == "meta"


def test_a_field_that_requires_grad_keeps_its_gradient() -> None:
    lr, beta1 = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.9))
    end, _ = run(Adam(lr, betas=(beta1, 0.99)), start(), {})
    by_field = torch.autograd.grad(end.sum(), (lr, beta1))
    end, _ = run(Adam(betas=(0.9, 0.99)), start(), {"lr": lr, "beta1": beta1})
    torch.testing.assert_close(by_field, torch.autograd.grad(end.sum(), (lr, beta1)), **TIGHT)


def test_a_schedule_is_asked_for_each_step_from_zero_and_keeps_its_gradient() -> None:
    peak = torch.tensor(0.3, requires_grad=True)
    asked: list[int] = []

    def schedule(step: int) -> Tensor:
        asked.append(step)
        return peak / (1 + step)

    end, _ = run(SGD(schedule), start().float(), {}, steps=3)
    assert asked == [0, 1, 2]
    by_hand = start().float()
    for step in range(3):
        by_hand = by_hand - peak / (1 + step) * gradient(by_hand)
    torch.testing.assert_close(end, by_hand)
    (slope,) = torch.autograd.grad(end.sum(), peak)
    assert slope != 0
