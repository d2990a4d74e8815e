"""Where one rank's part of a batch overflows, the scales of all ranks fall alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor, nn

import hypergrad as hg


def _trained() -> dict[str, Any]:
    torch.manual_seed(0)
    net, top = nn.Linear(4, 1), nn.Linear(4, 1)
    data = [torch.randn(8, 4) for _ in range(3)]
    data[1][7] *= 1e5  # the last sample, rank 1's

    def lower_loss(models: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            fit = models.net(x.clamp(-3e4, 3e4)) - models.top(x.clamp(-1.0, 1.0))
        return 1e-4 * fit.float().square().mean()

    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=1e-6),
        data=data,
        steps=3,
        method=hg.Implicit(hg.CG(2), damping=1.0),
        loss_scale=hg.DynamicScale(initial=2.0**12),
    )
    upper = hg.Problem(
        "top",
        module=top,
        loss=lambda models, x: models.net(x.clamp(-1.0, 1.0)).square().mean(),
        optimizer=torch.optim.SGD(top.parameters(), lr=0.1),
        data=data[:1],
    )
    options = {"distributed": True} if dist.is_initialized() else {}
    engine = hg.Engine([lower, upper], product_check=False, **options)
    scales = engine.run(2)["net.loss_scale"]
    return {"scales": scales, "values": [p.tolist() for p in [*net.parameters(), *top.parameters()]]}


def test_the_scales_of_all_ranks_fall_alike() -> None:
    first, second = run_ranks(2, _trained)
    assert first == second
    assert first["scales"][0] < 2.0**12
    assert all(torch.isfinite(torch.tensor(v)).all() for v in first["values"])
