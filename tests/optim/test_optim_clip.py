"""Clipping equals torch's and has finite derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hypergrad.optim import clip_norm, clip_value

GRAD = torch.tensor([3.0, -4.0, 0.0, 12.0], dtype=torch.float64)


def torchs(grad: torch.Tensor, clip: Any, limit: float) -> torch.Tensor:
    pieces = [nn.Parameter(torch.zeros(2, dtype=grad.dtype)) for _ in range(2)]
    for parameter, piece in zip(pieces, grad.split(2), strict=True):
        parameter.grad = piece.clone()
    clip(pieces, limit)
    return torch.cat([parameter.grad for parameter in pieces if parameter.grad is not None])


@pytest.mark.parametrize("limit", [0.0, 0.5, 5.0, 13.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["some", "zero"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(clip_norm, nn.utils.clip_grad_norm_), (clip_value, nn.utils.clip_grad_value_)],
    ids=["norm", "value"],
)
def test_clipping_equals_torch(ours: Any, theirs: Any, limit: float, scale: float) -> None:
    grad = scale * GRAD
    expected = torchs(grad, theirs, limit)
    torch.testing.assert_close(ours(grad, limit), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(ours(grad, torch.tensor(limit, dtype=torch.float64)), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_derivatives_equal_finite_differences(clip: Any) -> None:
    limit = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clip, (GRAD.clone().requires_grad_(), limit))
    assert torch.autograd.gradgradcheck(clip, (GRAD.clone().requires_grad_(), limit))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_derivatives_at_a_zero_gradient_are_those_of_no_clipping(clip: Any) -> None:
    zero = torch.zeros(4)
    assert torch.equal(torch.func.jacrev(lambda grad: clip(grad, 1.0))(zero), torch.eye(4))
    hessian = torch.func.hessian(lambda grad: clip(grad, 1.0).sum())(zero)
    assert torch.equal(hessian, torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("clip", "pattern"),
    [
        (clip_norm, r"clip_norm: max_norm must be at least 0, got -1.0"),
        (clip_value, r"clip_value: value must be at least 0, got -1.0"),
    ],
)
def test_a_negative_limit_is_refused(clip: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        clip(GRAD, -1.0)
