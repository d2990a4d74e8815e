"""A scale that follows what float16 can hold: lowered by an overflow, whose step is left out, and raised again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg


class Half(torch.autograd.Function):
    """The identity, whose cotangents pass through float16: above 65504 they overflow."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent.half().to(cotangent.dtype)


def half(x: Tensor) -> Tensor:
    return Half.apply(x)


class Point(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(values))


def single(scale: Any, **options: Any) -> tuple[hg.Engine, Point]:
    """Return an engine whose gradient is `at`, 1 and 2 in the beginning."""
    net = Point(1.0, 2.0)
    problem = hg.Problem(
        "net",
        module=net,
        loss=lambda models, b: 0.5 * half(models.net.at).square().sum() * b,
        optimizer=torch.optim.Adam(net.parameters(), lr=2.0**-4),
        data=[torch.tensor(1.0)],
        loss_scale=scale,
    )
    return hg.Engine([problem], **options), net


def test_an_overflow_halves_the_scale_and_leaves_out_the_step() -> None:
    """2 * 2^15 is beyond 65504. Powers of two round nothing, so that the steps taken are those without a scale."""
    engine, net = single(hg.DynamicScale(initial=2.0**17, interval=100))
    scales = []
    for taken in (0, 0, 0, 1, 2):
        scales.append(engine.step()["net.loss_scale"])
        plain, point = single(None)
        for _ in range(taken):
            plain.step()
        assert torch.equal(net.at, point.at)
    assert scales == [2.0**16, 2.0**15, 2.0**14, 2.0**14, 2.0**14]
    assert engine.runners["net"].num_steps == 5
    assert engine.graph.problems["net"].optimizer.state_dict()["state"][0]["step"] == 2


def test_it_grows_after_an_interval_of_good_steps() -> None:
    engine, _ = single(hg.DynamicScale(initial=2.0, factor=4.0, interval=3))
    assert engine.run(7)["net.loss_scale"] == [2.0, 2.0, 8.0, 8.0, 8.0, 32.0, 32.0]


def test_it_is_saved() -> None:
    engine, other = (single(hg.DynamicScale(initial=2.0**17, interval=4))[0] for _ in range(2))
    engine.run(5)
    other.load_state_dict(engine.state_dict())
    assert other.runners["net"].losses.scale == engine.runners["net"].losses.scale
    assert other.run(4)["net.loss_scale"] == engine.run(4)["net.loss_scale"] == [2.0**14, *[2.0**15] * 3]
    with pytest.raises(ValueError, match="'net': one of this problem and the saved one has a loss_scale"):
        single(None)[0].load_state_dict(engine.state_dict())


def test_at_its_smallest_the_policy_decides() -> None:
    engine, _ = single(hg.DynamicScale(initial=2.0**17, smallest=2.0**16))
    engine.step()
    with pytest.raises(hg.NonFiniteError, match="problem 'net'.*2 of 2 entries for 'at' are not finite at step 1"):
        engine.step()
    engine, net = single(hg.DynamicScale(initial=2.0**17, smallest=2.0**16), on_nonfinite="skip")
    engine.run(4)
    assert net.at.tolist() == [1.0, 2.0] and engine.runners["net"].losses.scale.value == 2.0**16


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_scale() -> None:
    engine, net = single(hg.DynamicScale(initial=4.0))
    net.at.data[0] = float("inf")
    with pytest.raises(hg.NonFiniteError, match="its loss is inf"):
        engine.step()
    assert engine.runners["net"].losses.scale.value == 4.0


def two_levels(
    method: hg.Method, scale: Any, *, first: float, steps: int, upper_first: float = 1.0
) -> tuple[hg.Engine, Point]:
    """Return levels whose first batches are larger than the others; both losses go through float16."""
    net, top = Point(1.0, 2.0), Point(0.5, 0.25)

    def lower_loss(models: Any, b: Tensor) -> Tensor:
        return 0.5 * (half(models.net.at) * models.top.at.exp() - 1.0).square().sum() * b

    def upper_loss(models: Any, b: Tensor) -> Tensor:
        return 0.5 * half(models.net.at).square().sum() * b

    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=2.0**-6),
        data=[torch.tensor(first), *[torch.tensor(1.0)] * 20] if first else [torch.tensor(1.0)],
        steps=steps,
        method=method,
        loss_scale=scale,
    )
    upper = hg.Problem(
        "top",
        module=top,
        loss=upper_loss,
        optimizer=torch.optim.SGD(top.parameters(), lr=0.1),
        data=[torch.tensor(upper_first), *[torch.tensor(1.0)] * 20],
        loss_scale=scale,
    )
    return hg.Engine([lower, upper], product_check=False), top


RULE = hg.DynamicScale(initial=2.0**10, interval=1000)


@pytest.mark.parametrize(
    "method",
    [
        hg.Unrolled(),
        hg.Unrolled(truncate=2),
        hg.Unrolled(checkpoint=3),
        hg.Unrolled(retain=1.0),
        hg.ForwardUnrolled(),
    ],
    ids=str,
)
def test_a_sweep_passes_over_an_own_step_that_was_left_out(method: hg.Method) -> None:
    engine, top = two_levels(method, RULE, first=100.0, steps=4)
    record = engine.step()
    assert record["net.loss_scale"] == 2.0**9
    plain, expected = two_levels(method, None, first=0.0, steps=3)
    plain.step()
    torch.testing.assert_close(top.at.grad, expected.at.grad, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("method", [hg.Implicit(hg.CG(3)), hg.Unrolled(), hg.OneStep()], ids=str)
def test_an_overflow_of_the_hypergradient_lowers_the_scales_that_took_part(method: hg.Method) -> None:
    engine, top = two_levels(method, RULE, first=1.0, steps=2, upper_first=1e4)
    before = top.at.detach().clone()
    record = engine.step()
    assert record["top.result"] == int(hg.Result.NON_FINITE)
    assert record["net.loss_scale"] == record["top.loss_scale"] == 2.0**9
    assert torch.equal(top.at, before)
    engine.step()
    assert not torch.equal(top.at, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0.0}, "DynamicScale: initial must be a finite number > 0"),
        ({"smallest": -1.0}, "DynamicScale: smallest must be a finite number > 0"),
        ({"factor": 1.0}, "DynamicScale: factor must be > 1, got 1.0"),
        ({"interval": 0}, "DynamicScale: interval must be an int >= 1, got 0"),
        ({"smallest": 2.0**20}, "smallest=1048576.0 is above initial=65536.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hg.DynamicScale(**options)
