"""Engines on modules that are sharded where there are ranks, and whole in a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import shared_engines as ec
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hypergrad as hg

HIDDEN = 7
"""Odd, so that shards differ in size; and one bias of one entry leaves all ranks but one without a part of it."""

METHODS: dict[str, Callable[[], hg.Method]] = {
    "finite_difference": lambda: hg.FiniteDifference(epsilon=1e-3),
    "sama": lambda: hg.SAMA(epsilon=1e-3),
    "penalty": lambda: hg.Penalty(strength=10.0, steps=4),
    "fomaml": lambda: hg.Unrolled(truncate=0),
    "reptile": lambda: hg.Reptile(),
}


class Net(nn.Module):
    """Returns outputs and half the sum of its squared weights; what reads parameters runs in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(ec.FEATURES, HIDDEN), nn.Linear(HIDDEN, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += 1.0
        return self.second(self.first(x).tanh()), 0.5 * self.second.weight.square().sum()


def sharded(module: nn.Module) -> nn.Module:
    """Shard the module over all ranks, its first layer apart; in a single process leave it whole."""
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for child in list(module.children())[:1]:
            fully_shard(child)
        fully_shard(module)
    return module


def build(
    method: str,
    dtype: torch.dtype,
    *,
    upper_sharded: bool = True,
    micro_batches: int = 1,
    wrap: Callable[[Any], Any] = lambda loss: loss,
    choice: hg.Method | None = None,
    lower_options: dict[str, Any] | None = None,
    **options: Any,
) -> ec.Setup:
    torch.manual_seed(0)
    starts = method in ("fomaml", "reptile")
    net = Net().to(dtype)
    weights: nn.Module = Net().to(dtype) if starts else ec.Weights().importance.to(dtype)
    sharded(net)
    if upper_sharded:
        sharded(weights)

    def lower_loss(models: Any, batch: Any) -> Any:
        x, y = batch
        out, decay = models.net(x)
        each = torch.log(torch.cosh(out - y))
        weight = 1.0 if starts else torch.sigmoid(models.weights(x))
        return (weight * each).mean() + 0.1 * decay, {"fit": each.mean().detach()}

    def upper_loss(models: Any, batch: Any) -> Tensor:
        out, _ = models.net(batch[0])
        direct = 0.0 if starts else 0.01 * models.weights(batch[0]).square().mean()
        return (out - batch[1]).square().mean() + direct

    optimizer: Any = torch.optim.Adam if method == "sama" else torch.optim.SGD
    lower = hg.Problem(
        "net",
        module=net,
        loss=wrap(lower_loss),
        optimizer=optimizer(net.parameters(), lr=0.05, weight_decay=0.01),
        method=METHODS[method]() if choice is None else choice,
        micro_batches=micro_batches,
        start=(lambda models: dict(models.weights.named_parameters())) if starts else None,
        **({"steps": 4, "data": ec.batches(7, dtype)} | (lower_options or {})),
    )
    upper = hg.Problem(
        "weights",
        module=weights,
        loss=upper_loss,
        optimizer=torch.optim.SGD(weights.parameters(), lr=0.2, momentum=0.5),
        data=ec.batches(5, dtype, seed=1),
        micro_batches=micro_batches,
        clip_norm=0.5,
    )
    distributed = {"distributed": True} if dist.is_initialized() else {}
    return hg.Engine([lower, upper], **(distributed | options)), {"net": net, "weights": weights}


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor, whoever holds its parts."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def run(steps: int, method: str, dtype: torch.dtype, **options: Any) -> list[dict[str, list[float]]]:
    """Return after each upper step every parameter's and upper gradient's values, buffers and what was recorded."""
    engine, modules = build(method, dtype, **options)
    seen = []
    for _ in range(steps):
        record = engine.step()
        values = {
            f"{name}.{key}": whole(t).flatten().tolist()
            for name, module in modules.items()
            for key, t in [*module.named_parameters(), *module.named_buffers()]
        }
        values |= {f"grad {key}": whole(p.grad).flatten().tolist() for key, p in modules["weights"].named_parameters()}
        for key in ("weights.loss", "weights.grad_norm", "net.fit"):
            values[key] = [float(record[key])]
        seen.append(values)
    return seen


def interrupted(folder: Any, damage: Any) -> tuple[list[Any], list[Any], list[str]]:
    """Return where a run ends, where one resumed from the folder ends, and the checkpoint's files."""

    def end(engine: hg.Engine) -> list[Any]:
        held = []
        for runner in engine.runners.values():
            problem = runner.problem
            state = [t for s in problem.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
            held += [whole(t).flatten().tolist() for t in [*problem.module.state_dict().values(), *state]]
        return held

    options: dict[str, Any] = {"lower_options": {"steps": 2, "after": "continue"}}
    one, _ = build("sama", torch.float64, **options)
    one.run(5)
    two, _ = build("sama", torch.float64, **options)
    two.run(3, callbacks=[hg.callbacks.Checkpoint(folder, keep=2)])
    dist.barrier()  # the first rank seals it after the others have gone on
    saved = folder / "step-00000003"
    files = sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
    dist.barrier()
    damage(folder)
    three, _ = build("sama", torch.float64, **options)
    for module in (r.problem.module for r in three.runners.values()):
        for p in module.parameters():
            p.data.mul_(0.5)
    three.run(5, callbacks=[hg.callbacks.Checkpoint(folder, keep=2)], resume=folder)
    return end(one), end(three), files
