"""Modules compiled by the user: what each kind of method does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg

METHODS: dict[str, hg.Method] = {
    "implicit": hg.Implicit(hg.CG(3), damping=1.0),
    "unrolled": hg.Unrolled(),
    "retained": hg.Unrolled(retain=1.0),
    "forward": hg.ForwardUnrolled(),
    "one step": hg.OneStep(),
    "finite difference": hg.FiniteDifference(),
    "SAMA": hg.SAMA(),
    "penalty": hg.Penalty(strength=5.0, steps=2),
}


def run(method: str, compiled: bool) -> list[float]:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    scale = nn.Linear(1, 1).double()
    if compiled:
        net.compile(backend="aot_eager")
    x = torch.randn(8, 3, dtype=torch.float64)

    def lower_loss(models: Any, x: Tensor) -> Tensor:
        return ((models.net(x) - models.scale.weight) ** 2).mean()

    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[x],
        steps=2,
        method=METHODS[method],
    )
    upper = hg.Problem(
        "scale",
        module=scale,
        loss=lambda models, x: (models.net(x) - 1.0).square().mean(),
        optimizer=torch.optim.SGD(scale.parameters(), lr=0.1),
        data=[x],
    )
    engine = hg.Engine([lower, upper])
    for _ in range(2):
        engine.step()
    return [*net[0].weight.flatten().tolist(), *scale.weight.flatten().tolist(), scale.weight.grad.item()]


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_module_gives_the_numbers_of_the_plain_one(method: str) -> None:
    assert run(method, compiled=True) == pytest.approx(run(method, compiled=False), rel=1e-9)
