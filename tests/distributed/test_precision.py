"""Losses in half precision under float32 vectors, compiled modules, and checkpointed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hypergrad as hg


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


METHODS = [hg.Implicit(hg.CG(5), damping=1.0), hg.Unrolled(), hg.FiniteDifference(epsilon=0.1)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("module", [Convnet, Transformer])
def test_bfloat16_losses_keep_the_direction(module: Callable[[], nn.Module], method: hg.Method) -> None:
    torch.manual_seed(0)
    net = module()
    full = _hypergradient(net, method, None)
    assert torch.cosine_similarity(_hypergradient(net, method, torch.bfloat16), full, dim=0) > 0.99


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
