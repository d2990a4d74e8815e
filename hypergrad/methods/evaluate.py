"""`hypergradient` and `best_response`: a record of a lower run in, derivatives in the upper parameters out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils import _pytree as pytree

from hypergrad._calls import under_way
from hypergrad._flat import Params, as_params, check_params
from hypergrad._functional import check_signature, in_transform
from hypergrad._result import Result, SolveError, Stats
from hypergrad._tape import vjp
from hypergrad._untouched import going_on_from, untouched
from hypergrad.methods._solve import applied, breakdowns_raise
from hypergrad.methods.base import (
    Method,
    ResponseMethod,
    Total,
    UpperLoss,
    check_cotangents,
    check_pulled,
    finite_code,
)
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Hypergradient:
    """The outcome of `hypergradient`.

    Attributes:
        grad: d upper_loss / d upper, direct term included, named and shaped like `upper`.
        value: the upper loss, detached, a scalar.
        stats: what it took: `num_products`, `num_steps`, `residual_norm`, ... as the method reports them.
        result: a `Result`; under `throw=False` its integer tensor, unread.
        state: what warm-starts the next call, or None.
    """

    grad: Params
    value: Tensor
    stats: Stats
    result: Result | Tensor
    state: Tensor | None = None


def _flatten(h: Hypergradient) -> tuple[list[Any], bool]:
    leaves = [h.grad, h.value, h.stats, h.result]
    return (leaves, False) if h.state is None else ([*leaves, h.state], True)


def _unflatten(values: Iterable[Any], _has_state: bool) -> Hypergradient:
    return Hypergradient(*values)


pytree.register_pytree_node(Hypergradient, _flatten, _unflatten, serialized_type_name="hypergrad.Hypergradient")


def hypergradient(
    upper_loss: UpperLoss,
    traj: Trajectory,
    upper: Mapping[str, Tensor],
    *,
    method: Method,
    batch: Any = None,
    state: Tensor | None = None,
    throw: bool = True,
) -> Hypergradient:
    r"""Return the derivative of an upper loss whose lower parameters respond to the upper ones.

    .. math:: \frac{d}{du} f(w^*(u), u) = \partial_u f + \Big(\frac{dw^*}{du}\Big)^T \partial_w f

    with upper loss f, upper parameters u and lower solution w*. The direct term costs one gradient of the upper loss;
    what the second one costs, and where it is biased, is the method's choice. What is returned is constant; for its
    derivatives, differentiate f at `best_response` twice.

    Args:
        upper_loss: pure function (lower, upper, batch) -> scalar.
        traj: the lower run, from `descend`, `solved` or `solved_root`.
        upper: the upper parameters that the run was made with, name -> tensor.
        method: how to differentiate through the lower level, `Implicit(CG(20))` for instance.
        batch: passed to `upper_loss` as it is.
        state: `h.state` of the last call, which warm-starts a method that asks for it.
        throw: raise `SolveError` on a breakdown, which reads one number back; False leaves the code unread.

    Returns:
        Hypergradient: `.grad`, `.value`, `.stats`, `.result`, `.state`.

    Raises:
        ValueError: for input the method cannot serve; the message says which one can.
        SolveError: under `throw`, if the solve broke down (negative curvature, divergence, non-finite values).

    Example:
        >>> import torch, hypergrad as hg
        >>> def lower_loss(lower, upper, batch):
        ...     return ((lower["w"] - upper["c"]) ** 2).sum()
        >>> def upper_loss(lower, upper, batch):
        ...     return (lower["w"] ** 2).sum()
        >>> upper = {"c": torch.ones(2)}
        >>> sgd = hg.optim.SGD(lr=0.25)
        >>> traj = hg.descend(lower_loss, {"w": torch.zeros(2)}, upper, optimizer=sgd, batches=[None] * 40)
        >>> hg.hypergradient(upper_loss, traj, upper, method=hg.Implicit(hg.CG(5))).grad["c"]
        tensor([2., 2.])
    """
    check_arguments(traj, upper, method)
    method.check_functional()
    if not callable(upper_loss):
        raise ValueError(f"upper_loss must be a function (lower, upper, batch) -> scalar, got {upper_loss!r}.")
    check_signature(upper_loss, "lower, upper, batch", "upper_loss")
    if not torch.compiler.is_compiling() and any(map(_functorch.is_gradtrackingtensor, upper.values())):
        raise ValueError(
            "hypergradient was called inside torch.func.grad, vjp, jvp or a Jacobian over `upper`, and what it returns "
            "is constant: the derivative would be zero. Differentiate the upper loss at hg.best_response(traj, upper, "
            "method=...) instead."
        )
    if throw and in_transform():
        raise ValueError(
            "throw=True reads the solve's result back, which is not possible inside torch.func transforms or "
            "torch.compile. Pass throw=False and look at h.result afterwards."
        )
    with under_way(), untouched(traj.layout.device):
        total = method.total(upper_loss, traj, as_params(upper), batch, state)
    check_pulled(method, total, upper, Total)
    grad = _like(upper, total.grad)
    code = finite_code(total.result, total.value, grad)
    return Hypergradient(grad, total.value, total.stats, read(code) if throw else code, total.state)


def _like(upper: Mapping[str, Tensor], grad: Params) -> Params:
    """Return `grad` in the order and the dtypes of `upper`, zero where it has no entry."""
    return {name: grad[name].to(u.dtype) if name in grad else torch.zeros_like(u) for name, u in upper.items()}


def best_response(traj: Trajectory, upper: Mapping[str, Tensor], *, method: Method, throw: bool = True) -> Params:
    """Return the lower solution as a differentiable function of `upper`: `.backward()` reaches `upper` by the method.

    The value is `traj.end`; the derivative is the method's rule. Second derivatives work for methods whose rule is
    itself differentiable (`Unrolled`, `Implicit`). The rule runs once per backward pass.

    Args:
        traj: the lower run, from `descend`, `solved` or `solved_root`.
        upper: the upper parameters that the run was made with; those that require grad receive it.
        method: a `ResponseMethod`.
        throw: raise `SolveError` in the backward pass if the solve broke down (outside transforms).

    Raises:
        ValueError: if `method` has no best response (`Penalty`).

    Example:
        >>> import torch, hypergrad as hg
        >>> def lower_loss(lower, upper, batch):
        ...     return ((lower["w"] - upper["c"]) ** 2).sum()
        >>> upper = {"c": torch.ones(2, requires_grad=True)}
        >>> traj = hg.solved(lower_loss, {"w": torch.ones(2)})
        >>> lower = hg.best_response(traj, upper, method=hg.Implicit(hg.CG(5)))
        >>> (lower["w"] ** 2).sum().backward()
        >>> upper["c"].grad
        tensor([2., 2.])
    """
    check_arguments(traj, upper, method)
    if not isinstance(method, ResponseMethod):
        raise ValueError(
            f"{type(method).__name__} has no best response: it yields d(upper loss)/d(upper) only. Use "
            "hg.hypergradient, or a method with a rule such as hg.Implicit or hg.Unrolled."
        )
    names = tuple(upper)

    def rule(end: Tensor, tensors: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
        params = dict(zip(names, tensors, strict=True))
        if method.differentiable and (in_transform() or torch.is_grad_enabled()):
            around = untouched(traj.layout.device) if traj.buffers else contextlib.nullcontext()
            with under_way(), breakdowns_raise(throw), around, going_on_from(traj.buffers):
                pulled = method.differentiable_vjp(traj, end, params, cotangent)
            check_cotangents(method, pulled, params, "differentiable_vjp")
        elif in_transform() or torch.is_grad_enabled():
            return list(applied(_Once, once, cotangent, *tensors))
        else:
            return once(cotangent, tensors)
        return list(_like(params, pulled).values())

    def once(cotangent: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        params = as_params(dict(zip(names, tensors, strict=True)))
        with under_way(), untouched(traj.layout.device), going_on_from(traj.buffers):
            outcome = method.vjp(traj, params, cotangent.detach())
        check_pulled(method, outcome, params)
        if throw and not in_transform():
            read(finite_code(outcome.result, cotangent.detach().sum(), outcome.grad))
        return list(_like(params, outcome.grad).values())

    if torch.compiler.is_compiling():
        if _traced_in_transform():
            raise ValueError(
                "best_response inside torch.compile(torch.func.grad(f)) or another compiled transform: torch.compile "
                "would drop its derivative without a word. Compile the plain function and call .backward() on its "
                "result, or leave the transform uncompiled."
            )
        flat: Tensor = applied(_BestResponse, rule, traj.end_flat, *upper.values())
    else:
        _refuse_nested_forward()
        flat = _BestResponseWithPush.apply(rule, traj.end_flat, *upper.values())  # type: ignore[no-untyped-call]
    return traj.named(flat)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _traced_in_transform() -> bool:
    """Return whether the region that is being traced runs inside a `torch.func` transform."""
    return _functorch.maybe_current_level() is not None


def _refuse_nested_forward() -> None:
    """Raise a ValueError inside two forward-mode transforms: PyTorch drops the second one's part of our functions."""
    stack = _functorch.get_interpreter_stack() or []
    if sum(level.key() == _functorch.TransformType.Jvp for level in stack) > 1:
        raise ValueError(
            "best_response inside forward mode inside forward mode (jacfwd of jacfwd, jvp of jvp): PyTorch would leave "
            "out a part of the second derivative. Use torch.func.hessian, which is jacfwd of jacrev."
        )


Rule = Callable[[Tensor, Sequence[Tensor], Tensor], list[Tensor]]


class _BestResponse(torch.autograd.Function):
    """The identity on the lower solution, with a method's rule as its derivative in the upper parameters."""

    generate_vmap_rule = True

    @staticmethod
    def forward(_rule: Rule, end: Tensor, *_upper: Tensor) -> Tensor:
        return end.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and _functorch.is_legacy_batchedtensor(cotangents[0]):
            raise ValueError(
                "best_response does not serve is_grads_batched=True, nor torch.autograd.functional.jacobian with "
                "vectorize=True. Use torch.func.jacrev, or jacobian(vectorize=False)."
            )
        end, *upper = ctx.saved_tensors
        return (None, None, *ctx.rule(end, upper, cotangents[0]))


class _BestResponseWithPush(_BestResponse):
    """The same with a forward derivative, by double vjp of the rule; `torch.compile` does not take one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        end, *upper = ctx.saved_tensors
        _, push = vjp(lambda c: tuple(ctx.rule(end, upper, c)), torch.zeros_like(end))
        directions = zip(upper, tangents[2:], strict=True)
        pushed: Tensor = push(tuple(torch.zeros_like(u) if t is None else t for u, t in directions))[0]
        return pushed


class _Once(torch.autograd.Function):
    """A rule that has no derivative of its own: a second one is refused, not taken to be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        once: Callable[[Tensor, Sequence[Tensor]], list[Tensor]], cotangent: Tensor, *upper: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(once(cotangent, upper))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        _refuse_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:  # noqa: ARG004
        _refuse_derivative()


def _refuse_derivative() -> NoReturn:
    raise ValueError(
        "the rule of this best response cannot be differentiated, which second derivatives and forward mode (jvp, "
        "jacfwd, hessian) need. Use hg.Unrolled or hg.Implicit for that level, or Engine(partial_hessian=True)."
    )


def check_arguments(traj: object, upper: Mapping[str, Tensor], method: object) -> None:
    """Raise a ValueError for arguments of the wrong kind."""
    if not isinstance(traj, Trajectory):
        raise ValueError(f"traj must come from hg.descend, hg.solved or hg.solved_root, got {type(traj).__name__}.")
    if not isinstance(method, Method):
        hint = (
            f" Create it: {method.__name__}(...)."
            if isinstance(method, type)
            else " Wrap a solver: hg.Implicit(solver)."
        )
        raise ValueError(f"method must be a hypergradient method, got {method!r}.{hint}")
    check_params(upper, "upper")
    drew = traj.steps and (traj.random is not None or any(step.random is not None for step in traj.steps))
    if drew and torch.compiler.is_compiling():
        raise ValueError(
            "the lower run drew random numbers (dropout, for instance), which a compiled region cannot draw again. "
            "Call this, and the run, outside of it, or let the random numbers come with the batch."
        )
    made_with = traj.upper_layout
    if made_with is not None:
        missing = [name for name in made_with.names if name not in upper]
        if missing:
            raise ValueError(
                f"upper lacks {missing}, which the lower run was made with. Pass the upper parameters given to descend."
            )
        made_with.check_like({name: upper[name] for name in made_with.names}, "upper")


def read(code: Tensor) -> Result:
    """Return the code read back from its tensor.

    Raises:
        SolveError: if it is a breakdown.
    """
    result = Result(int(code))
    if result.is_breakdown:
        raise SolveError(result, "hypergradient: ")
    return result
