"""A three-level run with everything that has a state; as a script, a server of processes that tests kill."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg

END = "end.pt"


def build(*, every: int = 1, seed: int = 0, nested: bool = False) -> hg.Engine:
    """Return an engine with dropout, BatchNorm, Adam, schedulers, shuffled loaders, warm starts at three levels."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
    weights, prior = nn.Linear(3, 1), nn.Linear(1, 1)
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(46, 3, generator=draw), torch.randint(0, 2, (46,), generator=draw)
    own = torch.Generator().manual_seed(2)

    def loader(part: slice, **options: Any) -> Any:
        return DataLoader(TensorDataset(x[part], y[part]), batch_size=5, shuffle=True, drop_last=True, **options)

    def net_loss(m: Any, batch: Any) -> Tensor:
        each = F.cross_entropy(m.net(batch[0]), batch[1], reduction="none")
        return (torch.sigmoid(m.weights(batch[0]))[:, 0] * each).mean() + 0.05 * sum(
            (p**2).sum() for p in m.net.parameters()
        )

    def weights_loss(m: Any, batch: Any) -> Any:
        loss = F.cross_entropy(m.net(batch[0]), batch[1])
        return loss + 0.1 * ((m.weights.weight - m.prior.weight) ** 2).sum(), {"error": loss}

    def prior_loss(m: Any, batch: Any) -> Tensor:
        return F.cross_entropy(m.net(batch[0]), batch[1]) + 0.1 * ((m.weights.weight - m.prior.bias) ** 2).sum()

    lower = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
    middle = torch.optim.Adam(weights.parameters(), lr=0.02)
    upper = torch.optim.SGD(prior.parameters(), lr=0.02, momentum=0.9)
    implicit = hg.Implicit(hg.CG(3), damping=5.0, warm_start=True)
    return hg.Engine(
        [
            hg.Problem(
                "net",
                module=net,
                loss=net_loss,
                optimizer=lower,
                scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(lower, 50),
                data=loader(slice(0, 20)),
                steps=2,
                method=implicit,
            ),
            hg.Problem(
                "weights",
                module=weights,
                loss=weights_loss,
                optimizer=middle,
                scheduler=[torch.optim.lr_scheduler.StepLR(middle, 4, 0.9)],
                data=loader(slice(20, 35), generator=own),
                steps=2,
                every=every,
                method=implicit,
            ),
            hg.Problem("prior", module=prior, loss=prior_loss, optimizer=upper, data=loader(slice(30, 46))),
        ],
        on_breakdown="skip",
        partial_hessian=not nested,
        product_check=False,
    )


def run(folder: Path, num_steps: int) -> None:
    """Run to the end, going on from whatever the folder holds, and save the state at the end."""
    engine = build(seed=len(list(folder.glob("saved/step-*"))))  # each from elsewhere: all comes from the file
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    callbacks = [
        hg.callbacks.EarlyStopping("prior.loss", patience=10_000),
        hg.callbacks.Checkpoint(folder / "saved", every=1, keep=3),
    ]
    engine.run(num_steps, callbacks=callbacks, resume=folder / "saved")
    torch.save(engine.state_dict(), folder / "writing")
    (folder / "writing").rename(folder / END)


def serve() -> None:
    """Fork a process for each line "FOLDER STEPS" and print its id; for "wait ID", print how that one ended."""
    build().run(1)  # what is imported late is imported once
    for line in sys.stdin:
        first, second = line.split()
        if first == "wait":
            print(os.waitpid(int(second), 0)[1], flush=True)
            continue
        child = os.fork()
        if not child:
            run(Path(first), int(second))
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    serve()
