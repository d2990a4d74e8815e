"""Engines on a strongly convex problem, to be run by one process or by several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hypergrad as hg

FEATURES = 5


def batches(count: int, dtype: torch.dtype, *, samples: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
        y = x[:, :1] - 0.5 * x[:, 1:2] + 0.1 * torch.randn(samples, 1, generator=generator, dtype=torch.float64)
        found.append((x.to(dtype), y.to(dtype)))
    return found


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(-1.0, 0.5, FEATURES))
        self.importance = nn.Linear(FEATURES, 1, bias=False)


def lower_loss(models: Any, batch: Any) -> Any:
    x, y = batch
    weight = torch.sigmoid(models.weights.importance(x))
    fit = (weight * torch.log(torch.cosh(models.net(x) - y))).mean()
    decay = (models.weights.decay.exp() * models.net.weight**2).sum() + 0.2 * models.net.bias.square().sum()
    return fit + 0.3 * decay, {"fit": fit.detach()}


def upper_loss(models: Any, batch: Any) -> Any:
    x, y = batch
    return (models.net(x) - y).square().mean() + 0.01 * models.weights.decay.square().sum()


COMPOSITE = hg.Composite(
    outputs=lambda models, batch: models.net(batch[0]) - batch[1],
    criterion=lambda outputs, models, batch: (
        torch.sigmoid(models.weights.importance(batch[0])) * torch.log(torch.cosh(outputs))
    ).mean(),
    penalty=lambda models: (
        0.3 * (models.weights.decay.exp() * models.net.weight**2).sum() + 0.06 * models.net.bias.square().sum()
    ),
)

DIFFERENCE = 3e-2
"""Length of finite differences: another order of summation changes a float32 gradient of order one by about u = 6e-8,
and their quotient by about u / DIFFERENCE = 2e-6."""

METHODS: dict[str, hg.Method] = {
    "cg": hg.Implicit(hg.CG(8, rtol=1e-13)),
    "warm": hg.Implicit(hg.CG(8, rtol=1e-13), warm_start=True, batches=2),
    "fresh": hg.Implicit(hg.CG(8, rtol=1e-13), batches=2, fresh=True),
    "neumann": hg.Implicit(hg.Neumann(10)),
    "nystrom": hg.Implicit(hg.Nystrom(rank=4), damping=0.1),
    "minres": hg.Implicit(hg.MINRES(8)),
    "gmres": hg.Implicit(hg.GMRES(8)),
    "exact": hg.Implicit(hg.Exact()),
    "gauss_newton": hg.Implicit(hg.CG(8, rtol=1e-13), curvature="gauss_newton"),
    "unrolled": hg.Unrolled(),
    "unrolled_retain": hg.Unrolled(retain=0.5),
    "truncated": hg.Unrolled(truncate=2),
    "forward": hg.ForwardUnrolled(),
    "one_step": hg.OneStep(),
    "finite_difference": hg.FiniteDifference(epsilon=DIFFERENCE),
    "sama": hg.SAMA(epsilon=DIFFERENCE),
    "penalty": hg.Penalty(strength=10.0, steps=4),
    "soba": hg.SOBA(),
    "amigo": hg.AmIGO(steps=5, batches=2),
    "stocbio": hg.StocBiO(num_products=5, batches=2),
    "f2sa": hg.F2SA(),
    "bome": hg.BOME(),
}

Setup = tuple[hg.Engine, dict[str, nn.Module]]


def two_levels(
    method: str, dtype: torch.dtype, *, micro_batches: int = 1, data: Sequence[Any] | None = None, **options: Any
) -> Setup:
    torch.manual_seed(0)
    net, weights = nn.Linear(FEATURES, 1).to(dtype), Weights().to(dtype)
    sama = method == "sama"
    lower = hg.Problem(
        "net",
        module=net,
        loss=COMPOSITE if method == "gauss_newton" else lower_loss,
        optimizer=torch.optim.Adam(net.parameters(), lr=0.03) if sama else torch.optim.SGD(net.parameters(), lr=0.3),
        data=batches(7, dtype) if data is None else data,
        steps=4,
        method=METHODS[method],
        micro_batches=micro_batches,
    )
    upper = hg.Problem(
        "weights",
        module=weights,
        loss=upper_loss,
        optimizer=torch.optim.SGD(weights.parameters(), lr=0.2, momentum=0.5),
        data=batches(5, dtype, seed=1),
        micro_batches=micro_batches,
    )
    return hg.Engine([lower, upper], **options), {"net": net, "weights": weights}


def first_order_meta(method: str, dtype: torch.dtype, **options: Any) -> Setup:
    """FOMAML and Reptile: the level begins at the one above."""
    torch.manual_seed(0)
    net, meta = nn.Linear(FEATURES, 1).to(dtype), nn.Linear(FEATURES, 1).to(dtype)

    def loss(models: Any, batch: Any) -> Tensor:
        x, y = batch
        return torch.log(torch.cosh(models.net(x) - y)).mean() + 0.1 * models.net.weight.square().sum()

    lower = hg.Problem(
        "net",
        module=net,
        loss=loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=batches(7, dtype),
        steps=3,
        method={"fomaml": hg.Unrolled(truncate=0), "maml": hg.Unrolled(), "reptile": hg.Reptile()}[method],
        start=lambda models: dict(models.meta.named_parameters()),
    )
    upper = hg.Problem(
        "meta",
        module=meta,
        loss=lambda models, batch: (models.net(batch[0]) - batch[1]).square().mean(),
        optimizer=torch.optim.SGD(meta.parameters(), lr=0.1),
        data=batches(5, dtype, seed=1),
    )
    return hg.Engine([lower, upper], **options), {"net": net, "meta": meta}


def three_levels(inner: hg.Method, dtype: torch.dtype, **options: Any) -> Setup:
    """A prior above penalties above weights; the middle level's curvature needs the lowest one's response."""
    torch.manual_seed(0)
    net, weights, prior = nn.Linear(FEATURES, 1).to(dtype), Weights().to(dtype), nn.Linear(1, 1).to(dtype)

    def middle_loss(models: Any, batch: Any) -> Tensor:
        x, y = batch
        fit = (models.net(x) - y).square().mean()
        drawn = (models.weights.decay - models.prior.weight.squeeze()).square().sum()
        return fit + 0.2 * models.prior.bias.exp().squeeze() * drawn + models.weights.importance.weight.square().sum()

    problems = [
        hg.Problem(
            "net",
            module=net,
            loss=lower_loss,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.3),
            data=batches(7, dtype),
            steps=4,
            method=inner,
        ),
        hg.Problem(
            "weights",
            module=weights,
            loss=middle_loss,
            optimizer=torch.optim.SGD(weights.parameters(), lr=0.1),
            data=batches(5, dtype, seed=1),
            steps=2,
            method=hg.Implicit(hg.CG(4, rtol=1e-10), damping=0.5),
        ),
        hg.Problem(
            "prior",
            module=prior,
            loss=lambda models, batch: (models.net(batch[0]) - batch[1]).square().mean(),
            optimizer=torch.optim.SGD(prior.parameters(), lr=0.1),
            data=batches(3, dtype, seed=2),
        ),
    ]
    return hg.Engine(problems, **options), {"net": net, "weights": weights, "prior": prior}


def tasks(dtype: torch.dtype, *, tasks: int = 4, **options: Any) -> Setup:
    """MAML; ranks share the tasks."""
    torch.manual_seed(0)
    net, meta = nn.Linear(FEATURES, 1).to(dtype), nn.Linear(FEATURES, 1).to(dtype)
    data = [tuple(t.view(tasks, 4, -1) for t in batch) for batch in batches(6, dtype, samples=4 * tasks)]

    def loss(models: Any, batch: Any) -> Tensor:
        return torch.log(torch.cosh(models.net(batch[0]) - batch[1])).mean()

    lower = hg.Problem(
        "net",
        module=net,
        loss=loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        steps=3,
        tasks=tasks,
        method=hg.Unrolled(),
        start=lambda models: dict(models.meta.named_parameters()),
        select=lambda batch, step: tuple(t[:, :2] for t in batch),
        chunk=2,
    )
    upper = hg.Problem("meta", module=meta, loss=loss, optimizer=torch.optim.SGD(meta.parameters(), lr=0.1), data=data)
    return hg.Engine([lower, upper], **options), {"meta": meta}


def run(build: Callable[..., Setup], steps: int, *arguments: Any, **options: Any) -> list[dict[str, list[float]]]:
    """Return after each upper step every parameter's and the gradient's values, and the loss."""
    engine, modules = build(*arguments, **options)
    top = list(modules)[-1]
    seen = []
    for _ in range(steps):
        record = engine.step()
        values = {
            f"{name}.{key}": p.detach().flatten().tolist()
            for name, module in modules.items()
            for key, p in module.named_parameters()
        }
        values |= {f"grad {key}": p.grad.flatten().tolist() for key, p in modules[top].named_parameters()}
        seen.append(values | {"loss": [float(record[f"{top}.loss"])]})
    return seen


def gap(one: list[dict[str, list[float]]], other: list[dict[str, list[float]]]) -> list[float]:
    """Return at each step the largest difference of any entry, relative to the largest entry of its tensor.

    That of the step for losses and hypergradients; for parameters that of the whole run: a bias, one number, may pass
    through zero, where nothing is large beside its rounding.
    """
    largest: dict[str, float] = {}
    for theirs in other:
        for key, values in theirs.items():
            largest[key] = max(largest.get(key, 0.0), *map(abs, values))
    gaps = []
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        worst = 0.0
        for key, values in ours.items():
            a, b = torch.tensor(values, dtype=torch.float64), torch.tensor(theirs[key], dtype=torch.float64)
            of_step = key == "loss" or key.startswith("grad ")
            size = float(b.abs().max()) if of_step else largest[key]
            worst = max(worst, float((a - b).abs().max()) / max(size, 1e-12))
        gaps.append(worst)
    return gaps
