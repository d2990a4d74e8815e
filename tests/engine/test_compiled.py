"""Compiled methods in the engine: same gradients, and one compilation for a whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import engine
from torch import Tensor, nn

import hypergrad as hg


def build(method: hg.Method) -> tuple[nn.Module, hg.Engine]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    up = nn.Linear(3, 1).double()
    x = torch.randn(8, 3).double()

    def loss(m: Any, batch: Tensor) -> Tensor:
        return (m.up(batch).sigmoid() * (m.net(batch) - 1) ** 2).mean()

    lower = hg.Problem(
        "net",
        module=net,
        loss=loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1),
        data=[x],
        steps=2,
        method=method,
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, batch: (m.net(batch) ** 2).mean(),
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        data=[x],
    )
    return up, engine(lower, upper)


def gradient(method: hg.Method) -> Tensor:
    up, run = build(method)
    run.run(10)  # torch gives up after eight compilations of one function
    return torch.cat([p.grad.reshape(-1) for p in up.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore")
def test_compiled_implicit_with_batch_norm_equals_eager() -> None:
    eager = gradient(hg.Implicit(hg.CG(5), damping=1.0))
    compiled = gradient(hg.Implicit(hg.CG(5), damping=1.0, compile="aot_eager"))
    assert torch.allclose(eager, compiled, rtol=1e-10)
