"""The tables of methods, solvers and optimizers that the tests of this folder run over, and small problems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hypergrad as hg
from hypergrad.solvers import HutchinsonDiagonal, NystromPreconditioner, SecondMoment

Params = dict[str, Tensor]


def solvers(check_every: Any = None) -> dict[str, hg.Solver]:
    """Return every solver but SciPy, options that change its course included."""
    every = {"check_every": check_every}
    return {
        "CG": hg.CG(4, **every),
        "CG-hutchinson": hg.CG(4, preconditioner=HutchinsonDiagonal(2), **every),
        "CG-second-moment": hg.CG(4, preconditioner=SecondMoment(eps=0.1), **every),
        "CG-nystrom": hg.CG(4, preconditioner=NystromPreconditioner(3), **every),
        "CG-nystrom-damped": hg.CG(4, preconditioner=NystromPreconditioner(3, damping=0.1), **every),
        "Neumann": hg.Neumann(4),
        "Neumann-step": hg.Neumann(4, step_size=0.1),
        "Nystrom": hg.Nystrom(3),
        "MINRES": hg.MINRES(4, **every),
        "GMRES": hg.GMRES(4, **every),
        "GMRES-restarted": hg.GMRES(4, restart=2, **every),
        "Exact": hg.Exact(),
    }


def methods(check_every: Any = None) -> dict[str, hg.Method]:
    """Return every method, `Implicit` once for each solver, options that change its course included."""
    cg = hg.CG(4, check_every=check_every)
    implicit = {f"Implicit-{name}": hg.Implicit(solver, damping=0.3) for name, solver in solvers(check_every).items()}
    return {
        **implicit,
        "Implicit-warm": hg.Implicit(cg, damping=2.0, warm_start=True),
        "Implicit-recycle": hg.Implicit(cg, damping=5.0, recycle=2),
        "Implicit-recycle-warm": hg.Implicit(cg, damping=5.0, warm_start=True, recycle=2),
        "Implicit-over": hg.Implicit(cg, damping=0.5, over=["a"]),
        "Implicit-batches": hg.Implicit(cg, damping=0.5, batches=2),
        "Unrolled": hg.Unrolled(),
        "Unrolled-truncated": hg.Unrolled(truncate=2),
        "Unrolled-checkpointed": hg.Unrolled(checkpoint=2),
        "Unrolled-retained": hg.Unrolled(retain=0.5),
        "ForwardUnrolled": hg.ForwardUnrolled(),
        "OneStep": hg.OneStep(),
        "OneStep-step": hg.OneStep(step_size=0.1),
        "FiniteDifference": hg.FiniteDifference(),
        "SAMA": hg.SAMA(),
        "SOBA": hg.SOBA(),
        "SOBA-step": hg.SOBA(step_size=0.1),
        "AmIGO": hg.AmIGO(steps=3, batches=2),
        "StocBiO": hg.StocBiO(num_products=3, step_size=0.1, batches=2),
        "F2SA": hg.F2SA(5.0, growth=0.5, steps=2),
        "BOME": hg.BOME(),
        "BOME-value": hg.BOME(step_size=0.1, barrier="value"),
        "Penalty": hg.Penalty(strength=5.0, optimizer=hg.optim.SGD(lr=0.1), steps=3),
    }


OPTIMIZERS: dict[str, hg.optim.Optimizer] = {
    "SGD": hg.optim.SGD(lr=0.1),
    "SGD-momentum": hg.optim.SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "SGD-nesterov": hg.optim.SGD(lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "SGD-schedule": hg.optim.SGD(lr=lambda step: 0.1 / (1 + step)),
    "Adam": hg.optim.Adam(lr=0.1),
    "Adam-amsgrad": hg.optim.Adam(lr=0.1, amsgrad=True, weight_decay=0.1),
    "AdamW": hg.optim.AdamW(lr=0.1, weight_decay=0.1),
    "NAdam": hg.optim.NAdam(lr=0.1),
    "RAdam": hg.optim.RAdam(lr=0.1),
    "RMSprop": hg.optim.RMSprop(lr=0.1),
    "RMSprop-centered": hg.optim.RMSprop(lr=0.1, centered=True, momentum=0.5),
    "Adagrad": hg.optim.Adagrad(lr=0.1),
    "Adadelta": hg.optim.Adadelta(lr=0.1),
    "Adamax": hg.optim.Adamax(lr=0.1),
}


def data(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets: random on the CPU, else uninitialized."""
    if torch.device(device).type != "cpu":
        return torch.empty(4, 5, device=device, dtype=dtype), torch.empty(4, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, dtype=dtype, generator=generator), torch.randn(4, dtype=dtype, generator=generator)


def parameters(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Params, Params]:
    """Return lower and upper parameters of `lower_loss`."""
    shapes = {"b": (3,), "a": (5, 3)}
    if torch.device(device).type != "cpu":
        lower = {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    else:
        generator = torch.Generator().manual_seed(1)
        lower = {name: 0.5 * torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}
    upper = {
        "decay": torch.zeros((), device=device, dtype=dtype),
        "shift": torch.full((4,), 0.1, device=device, dtype=dtype),
    }
    return lower, upper


def outputs(lower: Params, upper: Params, batch: Any) -> Tensor:
    return torch.tanh(batch[0] @ lower["a"]) @ lower["b"]


def criterion(predictions: Tensor, upper: Params, batch: Any) -> Tensor:
    return ((predictions - batch[1] - upper["shift"]) ** 2).mean()


def penalty(lower: Params, upper: Params) -> Tensor:
    return 0.1 * upper["decay"].exp() * sum((p**2).sum() for p in lower.values())


composite = hg.Composite(outputs, criterion, penalty)


def lower_loss(lower: Params, upper: Params, batch: Any) -> Tensor:
    """A small network with one target shift an example and a learned penalty."""
    return criterion(outputs(lower, upper, batch), upper, batch) + penalty(lower, upper)


def upper_loss(lower: Params, upper: Params, batch: Any) -> Tensor:
    """The same network's error on other data; reads `upper` directly too."""
    return ((outputs(lower, upper, batch) - batch[1]) ** 2).mean() + 0.01 * (upper["shift"] ** 2).sum()
