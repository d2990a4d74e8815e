"""Losses in half precision under float32 vectors, compiled modules, and checkpointed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hypergrad as hg
from hypergrad.bench.claims._problems import long_run
from hypergrad.bench.problems import transformer


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, 1, 8, 8))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x.view(-1, 8, 8))).mean(1))


def _hypergradient(net: nn.Module, method: hg.Method, cast: torch.dtype | None) -> Tensor:
    """Return the gradient in per-class weights and a decay, and check that its vectors are float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator)
    y = torch.randint(4, (32,), generator=generator)

    def logits(lower: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            return torch.func.functional_call(net, lower, (x,)).float()

    def lower_loss(lower: dict[str, Tensor], upper: dict[str, Tensor], batch: Any) -> Tensor:
        losses = upper["weights"].sigmoid()[y] * nn.functional.cross_entropy(logits(lower), y, reduction="none")
        decay = sum(p.square().sum() for p in lower.values())
        return losses.mean() + upper["decay"].exp() * decay

    def upper_loss(lower: dict[str, Tensor], upper: dict[str, Tensor], batch: Any) -> Tensor:
        return nn.functional.cross_entropy(logits(lower), y.flip(0))

    lower = {name: p.detach() for name, p in net.named_parameters()}
    upper = {"weights": torch.zeros(4), "decay": torch.tensor(-4.0)}
    run = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[None] * 5)
    assert run.end_flat.dtype is torch.float32
    grad = hg.hypergradient(upper_loss, run, upper, method=method).grad
    return torch.cat([g.flatten() for g in grad.values()])


DAMPING = 20.0
"""Above the convnet's negative curvature, for it is not trained."""
METHODS: dict[str, hg.Method] = {
    "cg": hg.Implicit(hg.CG(5), damping=DAMPING),
    "neumann": hg.Implicit(hg.Neumann(5), damping=DAMPING),
    "nystrom": hg.Implicit(hg.Nystrom(rank=10), damping=DAMPING),
    "minres": hg.Implicit(hg.MINRES(5), damping=1.0),
    "gmres": hg.Implicit(hg.GMRES(5), damping=1.0),
    "unrolled": hg.Unrolled(),
    "truncated": hg.Unrolled(truncate=2),
    "retained": hg.Unrolled(retain=1.0),
    "one step": hg.OneStep(),
    "soba": hg.SOBA(),
    "amigo": hg.AmIGO(steps=5),
    "stocbio": hg.StocBiO(num_products=5),
    "finite difference": hg.FiniteDifference(epsilon=0.1),
    "sama": hg.SAMA(epsilon=0.1),
    "penalty": hg.Penalty(strength=1.0, steps=5),
    "f2sa": hg.F2SA(steps=5),
}
"""A short difference or a strong penalty subtracts gradients that agree in most of bfloat16's 8 bits; docs/scaling.md
has the numbers. `BOME`'s direction is zero where its constraint is slack, as it is here."""
SMALL = ("cg", "unrolled", "finite difference")


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("module", [Convnet, Transformer])
def test_bfloat16_losses_keep_the_direction(module: Callable[[], nn.Module], method: str) -> None:
    torch.manual_seed(0)
    net, chosen = module(), METHODS[method]
    full = _hypergradient(net, chosen, None)
    assert torch.cosine_similarity(_hypergradient(net, chosen, torch.bfloat16), full, dim=0) > 0.99


def _of_the_suite(task: Any, method: hg.Method, cast: bool) -> Tensor:
    """Return the hypergradient of a benchmark problem after three steps, its losses in bfloat16 where asked."""

    def within(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def value(lower: dict[str, Tensor], upper: dict[str, Tensor], batch: Any) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                return loss(lower, upper, batch).float()

        return value

    run = hg.descend(
        within(task.lower_loss),
        task.lower,
        task.upper,
        optimizer=hg.optim.SGD(lr=0.05),
        batches=(task.lower_batches * 3)[:3],
        recording=method.recording(3),
    )
    grad = hg.hypergradient(within(task.upper_loss), run, task.upper, method=method, batch=task.upper_batch).grad
    return torch.cat([g.flatten() for g in grad.values()])


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        *(("transformer", method) for method in METHODS),
        *(pytest.param("convnet", method, marks=[] if method in SMALL else pytest.mark.slow) for method in METHODS),
    ],
)
def test_bfloat16_keeps_the_direction_on_the_suite(problem: str, method: str) -> None:
    task = transformer.build(size="quick") if problem == "transformer" else long_run()
    full, cast = (_of_the_suite(task, METHODS[method], cast) for cast in (False, True))
    assert not torch.equal(full, cast)
    assert torch.cosine_similarity(cast, full, dim=0) > 0.99


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(lambda z: self.first(z).tanh(), x, use_reentrant=False))


def test_checkpointed_modules_are_refused_when_the_engine_is_built() -> None:
    """Recomputing inside a functional call would read other parameters: the product is wrong, and found to be."""
    torch.manual_seed(0)
    net, scale = Checkpointed(), nn.Linear(1, 1)
    x = torch.randn(8, 3)
    lower = hg.Problem(
        "net",
        module=net,
        loss=lambda models, x: ((models.net(x) - models.scale.weight) ** 2).mean(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[x],
        method=hg.Implicit(hg.CG(3)),
    )
    upper = hg.Problem(
        "scale",
        module=scale,
        loss=lambda models, x: models.net(x).square().mean(),
        optimizer=torch.optim.SGD(scale.parameters(), lr=0.1),
        data=[x],
    )
    with pytest.raises(ValueError, match="checkpoint"):
        hg.Engine([lower, upper])
