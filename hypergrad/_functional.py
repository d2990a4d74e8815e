"""Pure evaluation of user code: what a loss is, and what may be asked of it where."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from hypergrad._flat import Params

Residual = Callable[[Tensor, Params], Tensor]
"""F(lower, upper) -> vector over flat lower parameters; for a loss, the lower gradient."""

Loss = Callable[[Params, Params, Any], Tensor]
"""(lower, upper, batch) -> scalar."""


def in_transform() -> bool:
    """Return whether this runs inside `torch.func` transforms or a compiled region, where nothing may be read back."""
    return torch.compiler.is_compiling() or _functorch.maybe_current_level() is not None


def arity(function: Callable[..., Any], default: int) -> int:
    """Return how many positional arguments `function` is to be called with, `default` where that cannot be told.

    A last one that has a default keeps it, unless that is None, or those before it have defaults too.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        return default
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return default
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required, most = sum(p.default is p.empty for p in positional), len(positional)
    if most < default:
        return most
    if required == default - 1 and (most > default or positional[required].default is not None):
        return required  # F.mse_loss takes two, and options after them; lambda w, u, lam=lam: ... has bound its third
    return max(required, default)


def check_signature(function: Callable[..., Any], expected: str, what: str) -> None:
    """Raise a ValueError that names `what` if `function` cannot be called with the `expected`, "models, batch" say.

    A function whose signature cannot be told passes.
    """
    if torch.compiler.is_compiling():
        return
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*expected.split(", "))
    except TypeError:
        raise ValueError(
            f"{what} must take ({expected}), got a function of {signature}. Let it take these, also what it does not "
            "use."
        ) from None


def second_name(function: Callable[..., Any]) -> str | None:
    """Return the name of the second parameter of `function`, None where there is none or it cannot be told."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names[1] if len(names) > 1 else None


def scalar(value: Any, what: str) -> Tensor:
    """Return `value` if it is a scalar floating-point tensor, else raise a ValueError that names `what`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must return a scalar Tensor, got {type(value).__name__}.")
    if value.dim() != 0:
        raise ValueError(
            f"{what} must return a scalar (0-dim) Tensor, got shape {tuple(value.shape)}. Reduce it with .mean() or "
            f".sum()."
        )
    if not value.is_floating_point():
        raise ValueError(f"{what} must return a floating-point scalar, got dtype {value.dtype}.")
    return value
