"""Processes that train together save one checkpoint and go on from it alike; where one cannot write, none counts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg
from hypergrad import store


def build() -> hg.Engine:
    """Return an engine with dropout, whose draws differ from rank to rank, and BatchNorm, whose statistics do."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))
    weights = nn.Linear(3, 1)
    x, y = torch.randn(16, 3), torch.randint(0, 2, (16,))

    def lower_loss(m: Any, batch: Any) -> Tensor:
        each = F.cross_entropy(m.net(batch[0]), batch[1], reduction="none")
        return (torch.sigmoid(m.weights(batch[0]))[:, 0] * each).mean()

    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    return hg.Engine(
        [
            hg.Problem(
                "net",
                module=net,
                loss=lower_loss,
                optimizer=torch.optim.Adam(net.parameters(), lr=0.01),
                data=data,
                steps=2,
                method=hg.Implicit(hg.CG(2), damping=5.0, warm_start=True),
            ),
            hg.Problem(
                "weights",
                module=weights,
                loss=lambda m, batch: F.cross_entropy(m.net(batch[0]), batch[1]),
                optimizer=torch.optim.Adam(weights.parameters(), lr=0.02),
                data=data,
            ),
        ],
        product_check=False,
        distributed=True,
        on_breakdown="skip",
    )


def values(engine: hg.Engine) -> list[list[float]]:
    return [v.flatten().tolist() for r in engine.runners.values() for v in r.problem.module.state_dict().values()]


def interrupted(folder: Path) -> tuple[Any, Any, list[str]]:
    torch.manual_seed(3)
    whole = build()
    whole.run(5)
    torch.manual_seed(3)
    build().run(3, callbacks=[hg.callbacks.Checkpoint(folder, every=2)])
    torch.manual_seed(8)
    again = build()
    again.run(5, callbacks=[hg.callbacks.Checkpoint(folder, every=2)], resume=folder)
    return values(whole), values(again), sorted(p.name for p in store.saved(folder)[-1].iterdir())


def refused(folder: Path) -> list[str]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        original = store.Writing.put

        def put(self: store.Writing, name: str, part: Any) -> dict[str, Any]:
            if self.step == 2:
                raise OSError("No space left on device")
            return original(self, name, part)

        store.Writing.put = put  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        build().run(3, callbacks=[hg.callbacks.Checkpoint(folder)])
    return [str(w.message) for w in found if "could not be written" in str(w.message)]


def test_ranks_go_on_alike_each_with_its_own_draws(tmp_path: Path) -> None:
    first, second = run_ranks(2, interrupted, tmp_path)
    for whole, again, files in (first, second):
        assert whole == again
        assert files == ["manifest.json", "rank-0.pt", "rank-1.pt"]
    assert first[0] == second[0], "the statistics of BatchNorm are means over the ranks"
    with pytest.raises(ValueError, match="was saved by 2 processes, these are 1"):
        hg.callbacks.Checkpoint.read(store.saved(tmp_path)[-1])


def test_where_one_rank_cannot_write_no_checkpoint_counts(tmp_path: Path) -> None:
    for told in run_ranks(2, refused, tmp_path):
        assert len(told) == 1 and "step 2" in told[0] and "No space left" in told[0]
    assert [p.name for p in store.saved(tmp_path)] == ["step-00000001", "step-00000003"]
