"""A strongly convex lower problem (condition below 1e2) with samples to share, and every method on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hypergrad as hg

STEPS = 8


def lower_loss(lower: dict[str, Tensor], upper: dict[str, Tensor], batch: Any) -> Tensor:
    x, y = batch
    margins = x @ lower["w"] + lower["b"] - y
    weights = torch.sigmoid(x @ upper["weights"])
    decay = (upper["decay"].exp() * lower["w"] ** 2).sum() + 0.2 * lower["b"] ** 2
    return (weights * torch.log(torch.cosh(margins))).mean() + 0.3 * decay


def upper_loss(lower: dict[str, Tensor], upper: dict[str, Tensor], batch: Any) -> Tensor:
    x, y = batch
    return ((x @ lower["w"] + lower["b"] - y) ** 2).mean() + 0.01 * (upper["decay"] ** 2).sum()


COMPOSITE = hg.Composite(
    outputs=lambda lower, upper, batch: batch[0] @ lower["w"] + lower["b"] - batch[1],
    criterion=lambda outputs, upper, batch: (
        torch.sigmoid(batch[0] @ upper["weights"]) * torch.log(torch.cosh(outputs))
    ).mean(),
    penalty=lambda lower, upper, batch: 0.3 * ((upper["decay"].exp() * lower["w"] ** 2).sum() + 0.2 * lower["b"] ** 2),
)


def data(dtype: torch.dtype, *, samples: int = 32, features: int = 5) -> tuple[list[Any], Any]:
    generator = torch.Generator().manual_seed(3)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(samples, features, generator=generator, dtype=torch.float64)
        y = x[:, 0] - 0.5 * x[:, 1] + 0.1 * torch.randn(samples, generator=generator, dtype=torch.float64)
        return x.to(dtype), y.to(dtype)

    return [batch() for _ in range(STEPS)], batch()


def start(dtype: torch.dtype, features: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    lower = {"w": torch.zeros(features, dtype=dtype), "b": torch.zeros((), dtype=dtype)}
    upper = {
        "decay": torch.linspace(-1.0, 0.5, features, dtype=dtype),
        "weights": torch.linspace(0.3, -0.3, features, dtype=dtype),
    }
    return lower, upper


METHODS: dict[str, hg.Method] = {
    "cg": hg.Implicit(hg.CG(8, rtol=1e-14)),
    "cg_batches": hg.Implicit(hg.CG(8, rtol=1e-14), batches=3),
    "neumann": hg.Implicit(hg.Neumann(20)),
    "nystrom": hg.Implicit(hg.Nystrom(rank=4), damping=0.1),
    "minres": hg.Implicit(hg.MINRES(8)),
    "gmres": hg.Implicit(hg.GMRES(8)),
    "exact": hg.Implicit(hg.Exact()),
    "gauss_newton": hg.Implicit(hg.CG(8, rtol=1e-14), curvature="gauss_newton"),
    "unrolled": hg.Unrolled(),
    "unrolled_sqrt": hg.Unrolled(checkpoint="sqrt"),
    "unrolled_retain": hg.Unrolled(retain=0.5),
    "truncated": hg.Unrolled(truncate=3),
    "forward": hg.ForwardUnrolled(),
    "one_step": hg.OneStep(),
    "finite_difference": hg.FiniteDifference(epsilon=1e-3),
    "sama": hg.SAMA(epsilon=1e-3),
    "penalty": hg.Penalty(strength=10.0, steps=10),
}


def losses(name: str) -> tuple[Any, Any]:
    return (COMPOSITE if name == "gauss_newton" else lower_loss), upper_loss
