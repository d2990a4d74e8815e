"""Steps compiled whole: any optimizer, any batch, and what has changed between runs is noticed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad as hg

AOT = "aot_eager"
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def loss(lower: hg.Params, upper: hg.Params, batch: Any) -> Tensor:
    x, scale = batch
    hidden = ((x * upper["gate"].sigmoid()) @ lower["first"]).tanh()
    return scale * (hidden @ lower["second"] - 1).square().mean()


def upper_loss(lower: hg.Params, upper: hg.Params, batch: Any) -> Tensor:  # noqa: ARG001
    return lower["first"].square().sum() + lower["second"].sum()


def gradient(method: hg.Unrolled, optimizer: Any, batches: list[Any], lower_loss: Any = loss) -> hg.Params:
    torch.manual_seed(0)
    lower, upper = {"first": drawn(3, 4), "second": drawn(4, 1)}, {"gate": drawn(3), "unread": drawn(2)}
    run = hg.descend(
        lower_loss, lower, upper, optimizer=optimizer, batches=batches, recording=method.recording(len(batches))
    )
    return hg.hypergradient(upper_loss, run, upper, method=method).grad


def assert_equal(found: hg.Params, expected: hg.Params) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


OPTIMIZERS = {
    "momentum": hg.optim.SGD(lr=lambda step: 0.1 / (step + 1), momentum=0.9, dampening=0.1, weight_decay=0.01),
    "Adam": hg.optim.Adam(lr=0.1, weight_decay=0.1),
    "RAdam": hg.optim.RAdam(lr=0.1),
}
SGD = hg.optim.SGD(lr=0.1)


@pytest.mark.parametrize("name", ["momentum", "RAdam"])
def test_steps_of_any_optimizer_equal_eager_ones(name):
    """Step counts are tensors there, and Python numbers in the eager steps; RAdam changes its rule at the sixth."""
    batches = [(drawn(6, 3), 1.0) for _ in range(7)]
    eager, compiled = (gradient(hg.Unrolled(compile=c), OPTIMIZERS[name], batches) for c in (False, AOT))
    assert_equal(compiled, eager)


def test_two_groups_with_learning_rates_of_their_own():
    values = {"first": drawn(3, 4).requires_grad_(), "second": drawn(4, 1).requires_grad_()}
    optimizer = torch.optim.SGD([{"params": [values["first"]], "lr": 0.1}, {"params": [values["second"]], "lr": 0.01}])
    bound = hg.optim.from_torch(optimizer, values)
    batches = [(drawn(6, 3), 1.0)] * 2
    eager, compiled = (gradient(hg.Unrolled(compile=c), bound, batches) for c in (False, AOT))
    assert_equal(compiled, eager)


def test_batches_may_differ_in_shapes_and_in_python_values():
    batches = [(drawn(6, 3), 1.0), (drawn(6, 3), 2.0), (drawn(6, 3), 2.0), (drawn(4, 3), 1.0)]
    eager, compiled = (gradient(hg.Unrolled(compile=c), OPTIMIZERS["Adam"], batches) for c in (False, AOT))
    assert_equal(compiled, eager)


def numbered(count: int) -> list[Any]:
    """Return batches with a temperature, a Python number that changes."""
    return [(drawn(6, 3), {"heat": 0.01 * k}) for k in range(count)]


def test_too_many_constants_are_refused_with_what_to_pass_instead():
    def cooled(lower: hg.Params, upper: hg.Params, batch: Any) -> Tensor:
        x, at = batch
        heat = at["heat"]
        factor = heat.neg().exp() if isinstance(heat, Tensor) else math.exp(-heat)
        return loss(lower, upper, (x, factor))

    batches = numbered(12)
    with pytest.raises(ValueError, match=r"batches of the lower loss.*torch\.tensor\(0\.1\) instead of.*torch\.exp"):
        gradient(hg.Unrolled(compile=AOT), SGD, batches, cooled)
    tensors = [(x, {**at, "heat": torch.tensor(at["heat"], dtype=DOUBLE)}) for x, at in batches]
    torch._dynamo.reset()
    eager = gradient(hg.Unrolled(), SGD, batches, cooled)
    assert_equal(gradient(hg.Unrolled(compile=AOT), SGD, tensors, cooled), eager)


def test_what_the_loss_sees_besides_its_arguments_may_change_between_runs():
    seen = {"scale": 1.0, "shift": drawn(3)}

    def shifted(lower: hg.Params, upper: hg.Params, batch: Any) -> Tensor:
        return seen["scale"] * loss(lower, upper, (batch[0] + seen["shift"], 1.0))

    batches = [(drawn(6, 3), 1.0)] * 2
    for scale in (1.0, 2.0):
        seen.update(scale=scale, shift=scale * drawn(3))
        eager, compiled = (gradient(hg.Unrolled(compile=c), OPTIMIZERS["Adam"], batches, shifted) for c in (False, AOT))
        assert_equal(compiled, eager)


def test_transposed_products_are_turned_round():
    from torch.fx.experimental.proxy_tensor import make_fx

    from hypergrad._transposes import TransposedProducts

    def function(x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of a linear layer with weights of its own for each task, flat; and its outputs."""
        outputs = torch.vmap(torch.nn.functional.linear)(x, weight).square()
        return torch.cat([torch.bmm(x.permute(0, 2, 1), outputs).permute(0, 2, 1).reshape(-1), outputs.reshape(-1)])

    x, weight = drawn(2, 5, 7), drawn(2, 3, 7)
    module = make_fx(function, tracing_mode="fake")(x, weight)
    before = [node.target for node in module.graph.nodes].count(torch.ops.aten.clone.default)
    TransposedProducts()(module.graph)
    module.recompile()
    torch.testing.assert_close(module(x, weight), function(x, weight), rtol=1e-12, atol=0)
    products = [node for node in module.graph.nodes if node.target is torch.ops.aten.bmm.default]
    assert [tuple(node.meta["val"].shape) for node in products] == [(2, 5, 3), (2, 3, 7)]
    assert before == 1
