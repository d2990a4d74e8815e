"""What happens around an engine's steps: autocast, threads, and what users do to modules and optimizers in between."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad as hg

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 2
METHODS = {"Unrolled": hg.Unrolled(), "Implicit": hg.Implicit(hg.CG(3), damping=1.0), "SAMA": hg.SAMA()}


class Rate(nn.Module):
    """A weight of the penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.tensor(-1.0))


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def penalized(m: Any, batch: Any) -> Tensor:
    penalty = torch.stack([p.square().sum() for p in m.net.parameters()]).sum()
    return F.cross_entropy(m.net(X), Y) + m.up.r.exp() * penalty


def validated(m: Any, batch: Any) -> Tensor:
    return F.cross_entropy(m.net(X.flip(0)), Y)


def build(
    net: nn.Module, optimizer: Any = None, *, up: nn.Module | None = None, above: Any = validated, **options: Any
) -> hg.Engine:
    up = Rate() if up is None else up
    options = {"loss": penalized, "data": [None], "steps": 5, "method": hg.Unrolled(), **options}
    trained = [p for p in net.parameters() if p.requires_grad]
    lower = hg.Problem("net", module=net, optimizer=optimizer or torch.optim.SGD(trained, lr=0.5), **options)
    sgd = torch.optim.SGD([up.r], lr=0.0)
    upper = hg.Problem("up", module=up, loss=above, optimizer=sgd, data=[None])
    return hg.Engine([lower, upper])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_inside_autocast_casts_the_parameters_that_its_steps_have_moved(method: str, dtype: Any) -> None:
    found = []
    for enabled in (False, True):
        net, up = network(), Rate()
        engine = build(net, up=up, method=METHODS[method])
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            engine.step()
            assert torch.is_autocast_cache_enabled()
            outputs = net(X)  # after the step, within the same region
        torch.testing.assert_close(outputs.float(), net(X), rtol=0.02, atol=0.02)
        found.append((up.r.grad, net[0].weight.detach()))
    (grad, weight), (cast_grad, cast_weight) = found
    torch.testing.assert_close(cast_weight, weight, rtol=0.02, atol=0.01)
    torch.testing.assert_close(cast_grad, grad, rtol=0.05, atol=1e-4)


def unfreeze(net: nn.Sequential, optimizer: Any) -> None:
    net[0].requires_grad_(True)


def hold_more(net: nn.Sequential, optimizer: Any) -> None:
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters())})


def replace_layer(net: nn.Sequential, optimizer: Any) -> None:
    net[2] = nn.Linear(4, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "held", "message"),
    [
        (unfreeze, True, r"'net': its optimizer holds \['0\.weight', '0\.bias'\], which did not train"),
        (hold_more, False, r"'net': its optimizer holds \['0\.weight', '0\.bias'\], which did not train"),
        (replace_layer, True, r"'net': its parameter '2\.weight' has been replaced"),
    ],
    ids=["unfreeze", "hold more", "replace a layer"],
)
def test_other_parameters_between_steps_are_refused(
    method: str, change: Callable[[Any, Any], None], held: bool, message: str
) -> None:
    net = network()
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters() if held else net[2].parameters(), lr=0.1)
    engine = build(net, optimizer, method=METHODS[method])
    engine.step()
    change(net, optimizer)
    with pytest.raises(ValueError, match=message):
        engine.step()


def test_unfreezing_the_top_is_refused() -> None:
    net, up = network(), Rate()
    up.s = nn.Parameter(torch.zeros(()), requires_grad=False)
    lower = hg.Problem(
        "net", module=net, loss=penalized, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), method=hg.Unrolled()
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, _: F.cross_entropy(m.net(X), Y) + m.up.s,
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        data=[None],
    )
    engine = hg.Engine([lower, upper])
    engine.step()
    up.s.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'up': its optimizer holds \['s'\]"):
        engine.step()


class Whole(nn.Module):
    """An upper module that holds the lower one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.r = net, nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_lower_module_read_through_one_that_holds_it() -> None:
    apart, up = network(), Rate()
    build(apart, up=up).step()
    net = network()
    whole = Whole(net)
    build(net, up=whole, above=lambda m, _: F.cross_entropy(m.up(X.flip(0)), Y)).step()
    torch.testing.assert_close(whole.r.grad, up.r.grad)
    assert whole.r.grad.abs() > 1e-3


def test_what_start_returns_beside_the_variables_is_let_be() -> None:
    """Buffers, other names, and what the module holds anyway; what would be lost is refused."""
    net, up = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), nn.Module()
    net[0].requires_grad_(False)
    up.net, up.r = copy.deepcopy(net).requires_grad_(True), nn.Parameter(torch.tensor(-1.0))

    def start(m: Any) -> dict[str, Tensor]:
        own = {key: p.clone() for key, p in net[0].named_parameters(prefix="0")}
        return {**dict(m.up.net.named_parameters()), **dict(m.up.net.named_buffers()), "rate": m.up.r, **own}

    build(net, up=up, start=start, after="restart").step()


def test_parametrizing_a_parameter_between_steps_is_refused() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    net = network()
    engine = build(net, method=METHODS["Implicit"])
    engine.step()
    nn.utils.parametrize.register_parametrization(net[0], "weight", Twice())
    with pytest.raises(ValueError, match=r"'net': its parameter '0\.weight' has been replaced"):
        engine.step()


class Attributes(dict):
    """A dict whose entries are attributes."""

    __getattr__ = dict.__getitem__


def test_batches_of_a_class_of_their_own_stay_that() -> None:
    def loss(m: Any, batch: Any) -> Tensor:
        penalty = torch.stack([p.square().sum() for p in m.net.parameters()]).sum()
        return F.cross_entropy(m.net(batch.x), batch.y) + m.up.r.exp() * penalty

    build(network(), loss=loss, data=[Attributes(x=X, y=Y)]).step()


def test_a_batch_that_is_changed_to_what_it_was_is_no_other() -> None:
    def loss(m: Any, batch: Any) -> Tensor:
        return penalized(m, None) + 0.0 * batch.clamp_(-9, 9).sum()

    build(network(), loss=loss, data=[X.clone()]).step()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_may_pop_entries_of_its_batch(method: str) -> None:
    class Popped:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield {"x": X, "labels": Y}

    def popping(m: Any, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        penalty = torch.stack([p.square().sum() for p in m.net.parameters()]).sum()
        return F.cross_entropy(m.net(batch["x"]), labels) + m.up.r.exp() * penalty

    grads = []
    for options in ({}, {"loss": popping, "data": Popped()}):
        up = Rate()
        build(network(), up=up, method=METHODS[method], **options).step()
        grads.append(up.r.grad)
    torch.testing.assert_close(*grads)


def test_a_hook_on_an_upper_parameter_is_refused() -> None:
    """It would be called on the direct part of the gradient alone."""
    up = Rate()
    up.r.register_hook(lambda g: 0.0 * g)
    with pytest.raises(ValueError, match=r"'up': 'r' has a hook that changes its gradient, which Unrolled"):
        build(network(), up=up)


def test_a_sparse_embedding_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    words = torch.arange(36).view(12, 3) % 7

    def loss(m: Any, _: Any) -> Tensor:
        return F.cross_entropy(m.net(words), Y) + m.up.r.exp() * m.net[2].weight.square().sum()

    with pytest.raises(ValueError, match="problem 'net': its module '0' has sparse=True"):
        build(net, loss=loss, method=hg.SAMA())


# --- threads ----------------------------------------------------------------------------------------------------------

W, U = {"w": torch.zeros(3)}, {"c": torch.ones(3)}


def overlapping(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Open a run in one thread, another in a second, close the first, then the second; call each when it is open."""
    opened, both, closed = threading.Event(), threading.Event(), threading.Event()

    def run(begun: threading.Event, other: threading.Event, calls: Callable[[], object]) -> None:
        def loss(w: Any, u: Any, _: Any) -> Tensor:
            begun.set()
            assert other.wait(30)
            calls()
            return ((w["w"] - u["c"]) ** 2).sum()

        hg.descend(loss, W, U, optimizer=hg.optim.SGD(lr=0.1), batches=[None])

    def one() -> None:
        run(opened, both, first)
        closed.set()

    def two() -> None:
        assert opened.wait(30)
        run(both, closed, second)

    threads = [threading.Thread(target=one), threading.Thread(target=two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_runs_that_overlap_in_two_threads_leave_no_trace() -> None:
    train, hooks = nn.Module.train, len(nn.modules.module._global_forward_pre_hooks)
    nets = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    before = copy.deepcopy([net.state_dict() for net in nets])
    overlapping(lambda: nets[0].eval()(X), lambda: nets[1](X))
    assert nn.Module.train is train
    assert len(nn.modules.module._global_forward_pre_hooks) == hooks
    for net, state in zip(nets, before, strict=True):
        assert net.training
        for key, value in net.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_another_thread_trains_its_own_modules_meanwhile() -> None:
    norm, other = nn.BatchNorm1d(3), nn.Dropout()
    inside, done = threading.Event(), threading.Event()

    def train() -> None:
        assert inside.wait(30)
        for _ in range(10):
            norm(X)
        other.eval()
        done.set()

    def loss(w: Any, u: Any, _: Any) -> Tensor:
        inside.set()
        assert done.wait(30)
        return ((w["w"] - u["c"]) ** 2).sum()

    thread = threading.Thread(target=train)
    thread.start()
    hg.descend(loss, W, U, optimizer=hg.optim.SGD(lr=0.1), batches=[None])
    thread.join()
    assert int(norm.num_batches_tracked) == 10
    assert not other.training
