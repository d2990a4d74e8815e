"""Scaled losses: the same derivatives to any order, and float16 that keeps what it would lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg

Params = dict[str, Tensor]
SIZE, SCALE = 1e-6, 2.0**16
"""Of the lower loss, a mean over 32 samples whose derivatives are then lost in float16; and what brings them back."""
METHODS: dict[str, hg.Method] = {
    "implicit": hg.Implicit(hg.CG(4), damping=1.0),
    "unrolled": hg.Unrolled(),
    "retained": hg.Unrolled(retain=1.0),
    "forward": hg.ForwardUnrolled(),
}


def curved(lower: Params, upper: Params, x: Any) -> Tensor:
    return ((lower["w"] ** 3 * upper["c"]).sum() * x).sin() + (upper["c"] ** 2 * lower["w"]).sum()


def slopes(loss: Callable[..., Tensor], w: Tensor, c: Tensor) -> list[Tensor]:
    """Return derivatives of order 1 to 3, in both parameters, along fixed directions."""
    direction = torch.linspace(-1.0, 1.0, 3, dtype=torch.float64)
    value = loss({"w": w}, {"c": c}, 0.7)
    found = [value]
    for _ in range(3):
        parts = torch.autograd.grad(value, [w, c], create_graph=True)
        found += parts
        value = (parts[0] * direction).sum() + (parts[1] * direction.square()).sum()
    return found


@pytest.mark.parametrize("scale", [2.0**12, 2.0**-7])
def test_derivatives_of_every_order_are_those_of_the_loss(scale: float) -> None:
    w = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([1.1, 0.4, -0.9], dtype=torch.float64, requires_grad=True)
    for found, expected in zip(slopes(hg.ScaledLoss(curved, scale), w, c), slopes(curved, w, c), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)


def test_transforms_take_a_scaled_loss() -> None:
    w, c = torch.rand(2, 3, dtype=torch.float64), {"c": torch.ones(3, dtype=torch.float64)}

    def hessian(loss: Callable[..., Tensor]) -> Tensor:
        slope = torch.func.grad(lambda x: loss({"w": x}, c, 0.7))
        each: Tensor = torch.func.vmap(torch.func.jacrev(slope))(w)
        return each

    torch.testing.assert_close(hessian(hg.ScaledLoss(curved, 64.0)), hessian(curved), rtol=1e-14, atol=0.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores


def hypergradient(method: hg.Method, scale: float | None, half: bool, *, micro_batches: int = 1) -> Tensor:
    """Return the gradient, by an engine, in a module that weighs the samples of a small lower loss."""
    torch.manual_seed(0)
    net, weigh = Net(), nn.Linear(6, 1)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def losses(models: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            scores = models.net(x)
        return nn.functional.cross_entropy(scores.float(), y, reduction="none")

    def lower_loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            weights = models.weigh(batch[0]).squeeze(1)
        return SIZE * (weights.float().sigmoid() * losses(models, *batch)).mean()

    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1),
        data=[(x, y)],
        steps=2,
        method=method,
        loss_scale=scale,
        micro_batches=micro_batches,
    )
    upper = hg.Problem(
        "weigh",
        module=weigh,
        loss=lambda models, b: losses(models, b[0], b[1].flip(0)).mean(),
        optimizer=torch.optim.SGD(weigh.parameters(), lr=1e-3),
        data=[(x, y)],
    )
    hg.Engine([lower, upper]).step()
    assert weigh.weight.grad is not None
    assert weigh.bias.grad is not None
    return torch.cat([weigh.weight.grad.flatten(), weigh.bias.grad]) / SIZE


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_float16_loses_a_small_loss_and_a_scale_keeps_it(method: str, micro_batches: int) -> None:
    chosen = METHODS[method]
    full = hypergradient(chosen, None, half=False)
    kept = hypergradient(chosen, SCALE, half=True, micro_batches=micro_batches)
    assert torch.cosine_similarity(kept, full, dim=0) > 0.99
    assert float(kept.norm()) == pytest.approx(float(full.norm()), rel=0.05)
    assert torch.count_nonzero(hypergradient(chosen, None, half=True, micro_batches=micro_batches)) == 0


def test_scales_leave_float32_alone() -> None:
    """A power of two rounds nothing, so that own steps and hypergradients are the same to the bit."""
    for method in METHODS.values():
        scaled, plain = (hypergradient(method, scale, half=False) for scale in (SCALE, None))
        assert torch.equal(scaled, plain)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), "dynamic"])
def test_scales_out_of_range_are_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"scale must be a finite number > 0, such as 2.0\*\*12, got"):
        hg.ScaledLoss(curved, scale)
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="problem 'net': loss_scale must be a finite number > 0, such as 2.0"):
        hg.Problem(
            "net", module=net, loss=lambda m, b: m, optimizer=torch.optim.SGD(net.parameters()), loss_scale=scale
        )


def test_composites_and_tasks_are_refused() -> None:
    parts = hg.Composite(lambda m, b: m.net(b), lambda z, b: z.square().mean())
    with pytest.raises(ValueError, match="pass the whole as one function"):
        hg.ScaledLoss(parts, 2.0)
    net, top = nn.Linear(1, 1), nn.Linear(1, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not reach the parts of a Composite"):
        hg.Problem("net", module=net, loss=parts, optimizer=sgd, loss_scale=2.0)
    lower = hg.Problem(
        "net",
        module=net,
        loss=lambda m, b: m.net(b).sum(),
        optimizer=sgd,
        tasks=2,
        method=hg.Unrolled(),
        loss_scale=2.0,
    )
    upper = hg.Problem("top", module=top, loss=lambda m, b: m.net(b), optimizer=torch.optim.SGD(top.parameters()))
    with pytest.raises(ValueError, match="is not served in a graph with tasks="):
        hg.Engine([lower, upper])


@pytest.mark.parametrize("method", [hg.Implicit(hg.CG(2), compile="aot_eager"), hg.Unrolled(compile="aot_eager")])
def test_compiled_products_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match="does not take a scaled loss, and loss_scale=2.0"):
        hypergradient(method, 2.0, half=False)
    c, sgd = {"c": torch.ones(2)}, hg.optim.SGD(lr=0.1)
    loss = hg.ScaledLoss(lambda w, u, _: (w["w"] ** 2 * u["c"]).sum(), 2.0)
    traj = hg.descend(loss, {"w": torch.ones(2)}, c, optimizer=sgd, batches=[None])
    with pytest.raises(ValueError, match="compile=True does not take a scaled loss"):
        hg.hypergradient(lambda w, u, _: w["w"].sum(), traj, c, method=method)
