"""Networks in their lower losses, through `torch.func.functional_call`: what compiled regions and op counts run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Params = dict[str, Tensor]
Loss = Callable[[Params, Params, Any], Tensor]


class TiedNet(nn.Module):
    """An MLP with batch normalization whose decoder is the transpose of its encoder: one tensor, two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.decoder = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.decoder.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.encoder(x)))
        return self.head(self.again(torch.tanh(self.decoder(hidden))))


def mlp(depth: int, width: int = 6) -> nn.Module:
    """Return a network of `depth` linear layers without bias, that is of `depth` parameter tensors."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, width, bias=False))


def convnet(channels: int = 8) -> nn.Module:
    """Return two convolutions and a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.GroupNorm(2, channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels, 10),
    )


def losses(net: nn.Module) -> tuple[Loss, Loss]:
    """Return a lower loss with a learned weight decay and one logit a class in `upper`, and an upper loss.

    Buffers are passed as clones, so that a call changes none.
    """

    def predict(lower: Params, x: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        return functional_call(net, {**lower, **buffers}, (x,))

    def lower_loss(lower: Params, upper: Params, batch: Any) -> Tensor:
        x, y = batch
        fit = F.cross_entropy(predict(lower, x) + upper["logits"], y)
        return fit + 1e-2 * upper["decay"].exp() * sum((p**2).sum() for p in lower.values())

    def upper_loss(lower: Params, upper: Params, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(predict(lower, x), y) + 1e-3 * (upper["logits"] ** 2).sum()

    return lower_loss, upper_loss


def upper_parameters(num_classes: int, dtype: torch.dtype) -> Params:
    """Return the upper parameters that `losses` read."""
    return {
        "decay": torch.zeros((), dtype=dtype),
        "logits": torch.linspace(-0.1, 0.1, num_classes, dtype=dtype),
    }


def parameters_of(net: nn.Module) -> Params:
    """Return the network's parameters, detached copies, tied ones once."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}
