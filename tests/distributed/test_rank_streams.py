"""What a rollback does to random draws: they go on, each rank's own apart and the common ones alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor, nn

import hypergrad as hg
from hypergrad._random import random_state, replaying


def _rolled_back() -> dict[str, Any]:
    torch.manual_seed(0)
    net, scale = nn.Linear(8, 1), nn.Linear(1, 1)
    masks: list[list[bool]] = []
    evaluations = 0

    def lower_loss(models: Any, x: Tensor) -> Tensor:
        nonlocal evaluations
        mask = torch.rand(8) > 0.5
        if torch.is_grad_enabled() and not torch._C._functorch.maybe_current_level():
            masks.append(mask.tolist())
        evaluations += 1
        broken = evaluations == fails_at and dist.get_rank() == 1
        return ((models.net(x * mask) - models.scale.weight) ** 2).mean() * (float("nan") if broken else 1.0)

    fails_at = -1
    data = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4, shuffle=True)
    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05),
        data=data,
        steps=2,
        method=hg.FiniteDifference(),
    )
    upper = hg.Problem(
        "scale",
        module=scale,
        loss=lambda models, x: models.net(x).square().mean(),
        optimizer=torch.optim.SGD(scale.parameters(), lr=0.05),
        data=data,
    )
    engine = hg.Engine([lower, upper], distributed=True, on_nonfinite="rollback")
    engine.step()
    masks.clear()
    evaluations, fails_at = 0, 2  # the second own step of the next window, on one rank
    record = engine.step()
    with replaying(engine._stream):
        own = torch.rand(4).tolist()
    with replaying(random_state(torch.device("cpu"))):
        common = torch.rand(4).tolist()
    values = [p.tolist() for p in [*net.parameters(), *scale.parameters()]]
    return {"rollbacks": record.get("rollbacks"), "masks": masks, "own": own, "common": common, "values": values}


def test_draws_go_on_after_a_rollback_each_ranks_own_apart() -> None:
    first, second = run_ranks(2, _rolled_back)
    for found in (first, second):
        assert found["rollbacks"] == 1
        failed, again = found["masks"][:2], found["masks"][2:4]
        assert failed != again, "the step taken again has other draws: the same might fail again"
    assert first["masks"] != second["masks"] and first["own"] != second["own"]
    assert first["common"] == second["common"] and first["values"] == second["values"]
