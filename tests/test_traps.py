"""Traps that libraries for bilevel optimization fall into, one by one: what DESIGN calls known has a test here."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

import hypergrad as hg
from hypergrad.testing import quadratic, relative_error

Params = dict[str, Tensor]
SGD = hg.optim.SGD(lr=0.1)
UPPER = {"penalty": torch.tensor(-2.0), "shift": torch.zeros(3)}
METHODS = {
    "CG": hg.Implicit(hg.CG(5), damping=1.0),
    "CG-batches": hg.Implicit(hg.CG(5), damping=1.0, batches=2),
    "Neumann": hg.Implicit(hg.Neumann(4), damping=1.0),
    "MINRES": hg.Implicit(hg.MINRES(4), damping=1.0),
    "GMRES": hg.Implicit(hg.GMRES(4), damping=1.0),
    "Unrolled": hg.Unrolled(),
    "Unrolled-retain": hg.Unrolled(retain=1.0),
    "Unrolled-checkpoint": hg.Unrolled(checkpoint="sqrt", retain=0.4),
    "Forward": hg.ForwardUnrolled(),
    "OneStep": hg.OneStep(),
    "FD": hg.FiniteDifference(),
    "SAMA": hg.SAMA(),
    "Penalty": hg.Penalty(5.0, steps=3),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.head = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(3, 4, 8)
        return self.head(self.norm(self.attention(x, x, x)[0])).view(12, 3)


class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).view(3, 4, 24).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v)).view(12, 3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[None])[0][0])


class Tied(nn.Module):
    """A shared weight, an unused one and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head, self.unused = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
            nn.Linear(2, 2),
        )
        self.second.weight = self.first.weight
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)),
    "group-norm": lambda: nn.Sequential(nn.Linear(8, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.Linear(6, 3)),
    "convolution": convolutional,
    "attention": Attention,
    "scaled-dot-product": ScaledDotProduct,
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(0, (3, 4)),
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        nn.Flatten(0, 1),
        nn.Linear(8, 3),
    ),
    "lstm": Recurrent,
    "tied": Tied,
    "spectral-norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 3)),
}


class Bench:
    """A network as a lower level: functional losses, data, and what must be found untouched."""

    def __init__(self, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = make().to(dtype)
        self.x, self.held = torch.randn(12, 8).to(dtype), torch.randn(12, 8).to(dtype)
        self.y = torch.randint(0, 3, (12,))
        self.lower = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        self.upper = {n: u.to(dtype) for n, u in UPPER.items()}

    def lower_loss(self, w: Params, u: Params, batch: Any) -> Tensor:
        outputs = functional_call(self.net, w, (self.x,)) + u["shift"]
        return F.cross_entropy(outputs, self.y) + u["penalty"].exp() * sum(p.square().sum() for p in w.values())

    def upper_loss(self, w: Params, u: Params, batch: Any) -> Tensor:
        return F.cross_entropy(functional_call(self.net, w, (self.held,)), self.y)

    def descend(self, method: hg.Method | None = None, steps: int = 4, **options: Any) -> hg.Trajectory:
        recording = None if method is None else method.recording(steps)
        return hg.descend(
            self.lower_loss,
            self.lower,
            self.upper,
            batches=[None] * steps,
            recording=recording,
            **{"optimizer": SGD, **options},
        )

    def hypergradient(self, trajectory: hg.Trajectory, method: hg.Method, **options: Any) -> Any:
        return hg.hypergradient(self.upper_loss, trajectory, self.upper, method=method, throw=False, **options)


@contextlib.contextmanager
def nothing_changes(*modules: nn.Module, tensors: tuple[Tensor, ...] = ()) -> Iterator[None]:
    """Check that modules, tensors, gradients, modes and all generators are left as they were found."""
    watched = [*tensors, *(p for m in modules for p in (*m.parameters(), *m.buffers()))]
    values = [(t, t.detach().clone(), t.requires_grad, t.grad, t._version) for t in watched]
    places = [(m, dict(m._parameters), dict(m._buffers), m.training) for top in modules for m in top.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    yield
    for tensor, value, required, grad, version in values:
        assert torch.equal(tensor, value) and tensor.requires_grad == required
        assert tensor.grad is grad and tensor._version == version
    for module, parameters, buffers, training in places:
        assert module.training == training
        assert all(module._parameters[n] is p for n, p in parameters.items())
        assert all(module._buffers[n] is b for n, b in buffers.items())
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(generators[0], torch.get_rng_state()) and generators[1] == random.getstate()
    assert generators[2] == np.random.get_state()[1].tolist() and generators[3] == np.random.get_state()[2]
    assert not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_method_runs_twice_alike_and_leaves_everything_as_found(network: str, method: str) -> None:
    if method == "Forward" and network in ("transformer", "lstm"):
        pytest.skip("slow; attention and tied cover forward mode")
    bench, rule = Bench(NETWORKS[network]), METHODS[method]
    tensors = (*bench.lower.values(), *bench.upper.values(), bench.x, bench.held)
    with nothing_changes(bench.net, tensors=tensors):
        trajectory = bench.descend(rule)
        first = bench.hypergradient(trajectory, rule)
        second = bench.hypergradient(trajectory, rule)
    assert all(torch.isfinite(g).all() for g in first.grad.values())
    assert relative_error(first.grad, second.grad) == 0.0
    with nothing_changes(bench.net, tensors=tensors):
        again = bench.descend(rule)
    assert torch.equal(again.end_flat, trajectory.end_flat)


@pytest.mark.parametrize("network", ["batch-norm", "dropout", "attention", "spectral-norm"])
def test_best_response_leaves_everything_as_found(network: str) -> None:
    bench = Bench(NETWORKS[network])
    for rule in (METHODS["CG"], METHODS["Unrolled"], METHODS["OneStep"]):
        upper = {n: u.clone().requires_grad_() for n, u in bench.upper.items()}
        trajectory = bench.descend()
        response = hg.best_response(trajectory, upper, method=rule, throw=False)
        with nothing_changes(bench.net, tensors=tuple(bench.lower.values())):
            sum(w.square().sum() for w in response.values()).backward()
        assert upper["penalty"].grad is not None


def test_existing_gradients_stay_the_same_objects() -> None:
    bench = Bench(NETWORKS["batch-norm"])
    for p in bench.net.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in bench.net.parameters()]
    for rule in METHODS.values():
        bench.hypergradient(bench.descend(rule), rule)
    assert all(
        p.grad is g and torch.equal(g, torch.ones_like(g)) for p, g in zip(bench.net.parameters(), kept, strict=True)
    )


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_left_as_found_even_if_a_loss_changes_them(training: bool) -> None:
    bench = Bench(NETWORKS["batch-norm"])
    bench.net.train(training)
    bench.net[1].train(not training)

    def rude(w: Params, u: Params, batch: Any) -> Tensor:
        bench.net.train(not bench.net.training)
        return bench.lower_loss(w, u, batch)

    with nothing_changes(bench.net):
        trajectory = hg.descend(rude, bench.lower, bench.upper, optimizer=SGD, batches=[None] * 3)
        hg.hypergradient(rude, trajectory, bench.upper, method=METHODS["CG"], throw=False)


def test_a_loss_that_raises_leaves_everything_as_found() -> None:
    bench = Bench(NETWORKS["batch-norm"])
    calls = []

    def failing(w: Params, u: Params, batch: Any) -> Tensor:
        torch.rand(3), np.random.rand(), random.random()
        calls.append(bench.lower_loss(w, u, batch))
        if len(calls) == 3:
            raise KeyError("mine")
        return calls[-1]

    with nothing_changes(bench.net), pytest.raises(KeyError, match="mine"):
        hg.descend(failing, bench.lower, bench.upper, optimizer=SGD, batches=[None] * 5)


# --- dropout and other draws ---------------------------------------------------------------------------------


def test_cg_converges_with_dropout() -> None:
    bench = Bench(NETWORKS["dropout"], torch.float64)
    trajectory = bench.descend(steps=200)
    h = bench.hypergradient(trajectory, hg.Implicit(hg.CG(100, rtol=1e-10), damping=0.5))
    assert h.result == hg.Result.SUCCESS
    assert h.stats.residual_norm < 1e-8


def test_the_lower_tape_replays_the_draws_of_the_last_step() -> None:
    """Stationarity at the end, with the last step's mask, is what a hand-written evaluation with that mask gives."""
    bench = Bench(NETWORKS["dropout"], torch.float64)
    torch.manual_seed(5)
    trajectory = bench.descend(steps=3)
    h = bench.hypergradient(trajectory, METHODS["CG"])
    torch.manual_seed(5)
    for _ in range(2):
        bench.lower_loss(trajectory.end, bench.upper, None)
    leaves = {n: w.clone().requires_grad_() for n, w in trajectory.end.items()}
    grads = torch.autograd.grad(bench.lower_loss(leaves, bench.upper, None), list(leaves.values()))
    assert float(h.stats.stationarity) == pytest.approx(
        float(torch.cat([g.reshape(-1) for g in grads]).norm()), rel=1e-12
    )


@pytest.mark.parametrize("method", [hg.FiniteDifference(1e-4), hg.SAMA(1e-4)], ids=["FD", "SAMA"])
def test_finite_differences_draw_one_mask(method: hg.Method) -> None:
    """With two masks the quotient would be noise divided by epsilon."""
    bench = Bench(NETWORKS["dropout"], torch.float64)
    trajectory = bench.descend()
    exact = bench.hypergradient(trajectory, hg.OneStep())
    assert relative_error(bench.hypergradient(trajectory, method).grad, exact.grad) < 1e-6


def test_draws_of_numpy_and_python_are_replayed_too() -> None:
    p = quadratic(4)

    def noisy(w: Params, u: Params, batch: Any) -> Tensor:
        return p.lower_loss(w, u, None) * (1 + np.random.rand() + random.random())

    trajectory = hg.descend(noisy, p.lower, p.upper, optimizer=SGD, batches=[None] * 5)
    methods = (hg.Unrolled(), hg.Unrolled(checkpoint=3), hg.ForwardUnrolled())
    grads = [hg.hypergradient(p.upper_loss, trajectory, p.upper, method=m).grad for m in methods]
    assert all(relative_error(g, grads[0]) < 1e-12 for g in grads)


# --- buffers ---------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Multiplies by the number of its calls, which a buffer counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def test_buffers_advance_within_a_run_and_not_beyond() -> None:
    """Each step finds what the step before wrote; the module itself, and the next run, find what was there."""
    counting = Counting()

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return (counting(w["w"]) * u["u"]).sum()

    lower, upper = {"w": torch.zeros(2).double()}, {"u": torch.ones(2).double()}
    for _ in range(2):
        with nothing_changes(counting):
            run = hg.descend(loss, lower, upper, optimizer=hg.optim.SGD(lr=1.0), batches=[None] * 3)
        assert torch.equal(run.end["w"], torch.full((2,), -6.0).double())
    assert counting.count == 0


class Noting(nn.BatchNorm1d):
    """Notes at each call how many it has seen."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(int(self.num_batches_tracked))
        return super().forward(x)


@pytest.mark.parametrize("retain", [0.0, 0.5])
def test_a_run_that_its_record_does_not_hold_is_refused(retain: float) -> None:
    """Its loss draws from a generator of its own, which nobody replays; a run that keeps its tapes needs no replay."""
    generator = torch.Generator()

    def loss(w: Any, u: Any, b: Any) -> Tensor:
        return ((w["w"] - u["c"] * torch.randn(3, generator=generator)) ** 2).sum()

    lower, upper = {"w": torch.zeros(3)}, {"c": torch.ones(3)}
    for method in (hg.Unrolled(retain=retain), hg.Unrolled(retain=1.0)):
        recording = method.recording(4)
        run = hg.descend(loss, lower, upper, optimizer=hg.optim.Adam(lr=0.1), batches=[None] * 4, recording=recording)
        refused = pytest.raises(ValueError, match=r"cannot be taken again from its record: step \d ends .* generator")
        with refused if method.retain < 1 else contextlib.nullcontext():
            hg.hypergradient(lambda w, u, b: w["w"].sum(), run, upper, method=method)


def test_a_hypergradient_inside_a_loss_leaves_everything_as_found() -> None:
    """The inner one finds the buffers as the outer one's calls left them; neither leaves its copies behind."""
    norm = Noting(6)
    bench = Bench(lambda: nn.Sequential(nn.Linear(8, 6), norm, nn.Tanh(), nn.Linear(6, 3)))

    def upper_loss(w: Params, u: Params, batch: Any) -> Tensor:
        value = bench.upper_loss(w, u, batch)
        traj = hg.solved(bench.lower_loss, {name: p.detach() for name, p in w.items()})
        inner = hg.hypergradient(bench.upper_loss, traj, u, method=hg.OneStep(0.1), throw=False)
        return value + sum(g.sum() for g in inner.grad.values())

    traj = hg.solved(bench.lower_loss, bench.lower)
    with nothing_changes(bench.net):
        hg.hypergradient(upper_loss, traj, bench.upper, method=hg.OneStep(0.1), throw=False)
    outer, *inside, last = norm.seen
    assert (outer, inside[0], last) == (0, 1, 1)
    assert inside == sorted(inside) and inside[-1] > 1


def test_buffers_given_to_functional_call_stay() -> None:
    bench = Bench(NETWORKS["batch-norm"])
    buffers = {n: b.clone() for n, b in bench.net.named_buffers()}
    before = {n: b.clone() for n, b in buffers.items()}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        outputs = functional_call(bench.net, (w, buffers), (bench.x,))
        return F.cross_entropy(outputs, bench.y) + u["penalty"] * w["0.bias"].sum()

    with nothing_changes(bench.net):
        trajectory = hg.descend(loss, bench.lower, bench.upper, optimizer=SGD, batches=[None] * 3)
        hg.hypergradient(loss, trajectory, bench.upper, method=METHODS["CG-batches"], throw=False)
    assert all(torch.equal(buffers[n], before[n]) for n in buffers)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_lower_problems(method: str, dtype: torch.dtype) -> None:
    """The vectors are float32, the model stays half, and the result is that of float32 up to the model's rounding."""
    half, single = (
        Bench(lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), d) for d in (dtype, torch.float32)
    )
    half.upper = single.upper
    single.net.load_state_dict({n: p.float() for n, p in half.net.state_dict().items()})
    rule = METHODS[method]
    trajectory = half.descend(rule)
    h = half.hypergradient(trajectory, rule)
    assert trajectory.end_flat.dtype == torch.float32
    assert all(w.dtype == dtype for w in trajectory.end.values())
    assert all(g.dtype == torch.float32 for g in h.grad.values())
    assert all(torch.isfinite(g).all() for g in h.grad.values())
    if method not in ("FD", "SAMA", "Penalty"):  # differences of half-precision losses are mostly rounding
        reference = single.hypergradient(single.descend(rule), rule)
        assert relative_error(h.grad, reference.grad) < 200 * torch.finfo(dtype).eps


def test_mixed_dtypes() -> None:
    lower = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3)}
    upper = {"u": torch.ones(3), "v": torch.ones(2, dtype=torch.float64)}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return ((w["a"] - u["v"]) ** 2).sum() + ((w["b"] - 2 * u["u"]) ** 2).sum()

    trajectory = hg.solved(loss, {"a": torch.ones(2, dtype=torch.float64), "b": 2 * torch.ones(3)})
    for method in (hg.Implicit(hg.CG(5)), hg.Implicit(hg.Exact())):
        h = hg.hypergradient(lambda w, u, b: w["a"].sum() + w["b"].sum(), trajectory, upper, method=method)
        assert {n: g.dtype for n, g in h.grad.items()} == {n: u.dtype for n, u in upper.items()}
        assert torch.allclose(h.grad["u"], torch.full((3,), 2.0)) and torch.allclose(
            h.grad["v"], torch.ones(2).double()
        )
    run = hg.descend(loss, lower, upper, optimizer=SGD, batches=[None] * 2)
    assert {n: w.dtype for n, w in run.end.items()} == {n: w.dtype for n, w in lower.items()}


@pytest.mark.parametrize("method", [*METHODS.values(), hg.BOME(), hg.SOBA()], ids=lambda m: type(m).__name__)
def test_gradients_have_the_dtypes_of_upper(method: hg.Method) -> None:
    """A 0-dim float32 tensor does not take part in torch's promotion, so that what it multiplies is float64."""
    lower, upper = {"w": torch.ones(3).double()}, {"s": torch.tensor(0.5)}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return ((w["w"] - 1) ** 2).sum() + u["s"].exp() * (w["w"] ** 2).sum()

    def above(w: Params, u: Params, batch: Any) -> Tensor:
        return (w["w"] ** 2).sum()

    def found(s: Tensor) -> Tensor:
        run = hg.descend(loss, lower, {"s": s}, optimizer=SGD, batches=[None] * 2)
        return hg.hypergradient(above, run, {"s": s}, method=method, throw=False).grad["s"]

    assert found(upper["s"]).dtype == torch.float32
    assert torch.func.vmap(found)(torch.ones(2)).dtype == torch.float32
    if isinstance(method, hg.ResponseMethod):
        run = hg.descend(loss, lower, upper, optimizer=SGD, batches=[None] * 2)
        assert (
            torch.func.grad(lambda s: above(hg.best_response(run, {"s": s}, method=method, throw=False), {}, None))(
                upper["s"]
            ).dtype
            == torch.float32
        )


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("method", ["CG", "Unrolled", "Forward"])
def test_torch_losses(loss: Any, method: str) -> None:
    """jvp(grad) fails on mse_loss; reverse over reverse does not."""
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.rand(6)
    upper = {"u": torch.zeros(2)}

    def lower_loss(w: Params, u: Params, batch: Any) -> Tensor:
        return loss(x @ w["w"], y) + (u["u"].exp() * w["w"] ** 2).sum()

    rule = METHODS[method]
    run = hg.descend(lower_loss, {"w": torch.ones(2)}, upper, optimizer=SGD, batches=[None] * 3)
    plain = hg.hypergradient(lambda w, u, b: (w["w"] ** 2).sum(), run, upper, method=rule, throw=False).grad

    def slope(u: Tensor) -> Tensor:
        inner = hg.descend(lower_loss, {"w": torch.ones(2)}, {"u": u}, optimizer=SGD, batches=[None] * 3)
        return hg.hypergradient(lambda w, v, b: (w["w"] ** 2).sum(), inner, {"u": u}, method=rule, throw=False).grad[
            "u"
        ]

    assert torch.allclose(torch.func.vmap(slope)(upper["u"][None])[0], plain["u"], atol=1e-6)


def test_weights_as_views_and_expanded_tensors() -> None:
    p = quadratic(6)
    storage = torch.zeros(4, 6, dtype=torch.float64)
    views = {"weight": storage.T[:, 1].view(3, 2) if storage.T[:, 1].is_contiguous() else storage.T[:, 1].reshape(3, 2)}
    strided = {"weight": torch.zeros(2, 3, dtype=torch.float64).T}
    expanded = {"weight": torch.zeros(1, dtype=torch.float64).expand(3, 2)}
    expected = hg.descend(p.lower_loss, p.lower, p.upper, optimizer=SGD, batches=[None] * 4)
    for lower in (views, strided, expanded):
        run = hg.descend(p.lower_loss, lower, p.upper, optimizer=SGD, batches=[None] * 4)
        assert torch.equal(run.end_flat, expected.end_flat)
        assert torch.count_nonzero(lower["weight"]) == 0


def test_unused_and_frozen_parameters_get_zero_and_stay() -> None:
    lower = {"used": torch.ones(2), "unused": torch.ones(3)}
    upper = {"read": torch.ones(2), "unread": torch.ones(4)}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return ((w["used"] - u["read"]) ** 2).sum()

    run = hg.descend(loss, lower, upper, optimizer=SGD, batches=[None] * 2)
    assert torch.equal(run.end["unused"], lower["unused"])
    for method in [m for name, m in METHODS.items() if name != "Penalty"]:
        h = hg.hypergradient(lambda w, u, b: (w["used"] ** 2).sum(), run, upper, method=method, throw=False)
        assert torch.count_nonzero(h.grad["unread"]) == 0 and h.grad["unread"].shape == (4,)
        assert torch.count_nonzero(h.grad["read"]) == 2


def test_embedding() -> None:
    table = nn.Embedding(5, 2)
    index = torch.tensor([0, 3, 3])

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return (functional_call(table, w, (index,)) - u["u"]).square().sum() + 0.1 * (w["weight"] ** 2).sum()

    lower, upper = dict(table.named_parameters()), {"u": torch.ones(2)}
    run = hg.descend(loss, lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[None] * 100)
    exact = hg.hypergradient(lambda w, u, b: w["weight"].sum(), run, upper, method=hg.Implicit(hg.Exact())).grad
    unrolled = hg.hypergradient(lambda w, u, b: w["weight"].sum(), run, upper, method=hg.Unrolled()).grad
    assert relative_error(exact, unrolled) < 1e-4


# --- curvature that is not positive definite -----------------------------------------------------------------


def saddle(w: Params, u: Params, batch: Any) -> Tensor:
    return 0.5 * (w["w"] ** 2 * torch.tensor([2.0, 1.0, -1.0])).sum() - (w["w"] * u["u"]).sum()


def test_an_indefinite_hessian_raises_or_returns_the_last_good_iterate() -> None:
    upper = {"u": torch.ones(3)}
    solved = hg.solved(saddle, {"w": torch.ones(3)})
    objective = lambda w, u, b: (w["w"] * torch.tensor([1.0, 1.0, 0.2])).sum()  # noqa: E731
    with pytest.raises(hg.SolveError, match="negative curvature.*damping") as caught:
        hg.hypergradient(objective, solved, upper, method=hg.Implicit(hg.CG(10)))
    assert caught.value.result == hg.Result.NEGATIVE_CURVATURE
    h = hg.hypergradient(objective, solved, upper, method=hg.Implicit(hg.CG(10)), throw=False)
    assert isinstance(h.result, Tensor) and h.result.dtype == torch.int64 and h.result == hg.Result.NEGATIVE_CURVATURE
    assert torch.isfinite(h.grad["u"]).all() and torch.count_nonzero(h.grad["u"])
    for solver in (hg.MINRES(10), hg.GMRES(10), hg.Exact()):
        exact = hg.hypergradient(objective, solved, upper, method=hg.Implicit(solver)).grad["u"]
        assert torch.allclose(exact, torch.tensor([0.5, 1.0, -0.2]), atol=1e-5)
    damped = hg.hypergradient(objective, solved, upper, method=hg.Implicit(hg.CG(10), damping=2.0)).grad["u"]
    assert torch.allclose(damped, torch.tensor([1 / 4, 1 / 3, 0.2]), atol=1e-5)


def test_a_singular_hessian_is_reported() -> None:
    upper = {"u": torch.ones(2)}
    solved = hg.solved(lambda w, u, b: (w["w"][0] - u["u"][0]) ** 2, {"w": torch.ones(2)})
    with pytest.raises(hg.SolveError, match="singular"):
        hg.hypergradient(lambda w, u, b: w["w"].sum(), solved, upper, method=hg.Implicit(hg.Exact()))


def test_reaching_max_steps_is_recorded_and_not_raised() -> None:
    p = quadratic(20, condition=100.0)
    solved = hg.solved(p.lower_loss, p.solved_at())
    h = hg.hypergradient(p.upper_loss, solved, p.upper, method=hg.Implicit(hg.CG(2)))
    assert h.result is hg.Result.MAX_STEPS and h.stats.num_steps == 2


def test_values_that_are_not_finite_are_never_silent() -> None:
    p = quadratic(4)
    bad = {name: torch.full_like(w, float("nan")) for name, w in p.lower.items()}
    for name, method in METHODS.items():
        run = hg.descend(p.lower_loss, bad, p.upper, optimizer=SGD, batches=[None] * 2)
        with pytest.raises(hg.SolveError, match="not finite"):
            hg.hypergradient(p.upper_loss, run, p.upper, method=method)
        code = hg.hypergradient(p.upper_loss, run, p.upper, method=method, throw=False).result
        assert code >= hg.Result.NEGATIVE_CURVATURE, name


# --- second derivatives that do not exist, or are silently wrong -----------------------------------------------------


class Cube(torch.autograd.Function):
    """x^3, with a backward that can be used once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class CubeOnContext(torch.autograd.Function):
    """x^3, its input kept where autograd does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.x**2 * grad


@pytest.mark.parametrize("method", ["CG", "Unrolled", "Forward"])
def test_once_differentiable_functions_raise(method: str) -> None:
    upper = {"u": torch.ones(2)}
    loss = lambda w, u, b: (Cube.apply(w["w"]) * u["u"]).sum()  # noqa: E731
    run = hg.descend(loss, {"w": torch.ones(2)}, upper, optimizer=SGD, batches=[None])
    with pytest.raises(ValueError, match="no second derivative.*hg.FiniteDifference"):
        hg.hypergradient(lambda w, u, b: w["w"].sum(), run, upper, method=METHODS[method])
    for first_order in ("FD", "SAMA", "Penalty"):
        hg.hypergradient(lambda w, u, b: w["w"].sum(), run, upper, method=METHODS[first_order])


@pytest.mark.parametrize("method", ["CG", "Unrolled", "Forward", "retained"])
def test_once_differentiable_functions_raise_where_the_loss_is_linear_behind_them(method: str) -> None:
    chosen = METHODS.get(method, hg.Unrolled(retain=1.0))
    upper = {"u": torch.ones(2)}
    loss = lambda w, u, b: Cube.apply(w["w"]).sum() + (w["w"] * u["u"]).square().sum()  # noqa: E731
    with pytest.raises(ValueError, match="no second derivative.*hg.FiniteDifference"):
        run = hg.descend(
            loss, {"w": torch.ones(2)}, upper, optimizer=SGD, batches=[None] * 2, recording=chosen.recording(2)
        )
        hg.hypergradient(lambda w, u, b: w["w"].sum(), run, upper, method=chosen)


def test_a_kernel_without_second_derivative_is_named() -> None:
    upper = {"u": torch.ones(4)}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        x = (w["w"] * u["u"]).view(1, 1, 2, 2)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(x, x, x).square().sum()

    run = hg.descend(loss, {"w": torch.ones(4)}, upper, optimizer=SGD, batches=[None])
    with pytest.raises(ValueError, match="no second derivative.*flash_attention.*hg.FiniteDifference"):
        hg.hypergradient(lambda w, u, b: w["w"].sum(), run, upper, method=METHODS["CG"])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))


class Custom(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.first, self.head = function, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function.apply(self.first(x)))


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.head = (
            nn.Embedding(7, 4, **options),
            nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)),
        )
        nn.init.normal_(self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x[:, :2] * 3).long().remainder(7)).flatten(1))


WRONG = {
    "checkpoint": Checkpointed,
    "on-context": lambda: Custom(CubeOnContext),
    "weight-norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "spectral-norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 3)),
    "padding-index": lambda: Words(padding_idx=0),
}


@pytest.mark.parametrize("network", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_check_finds_what_is_silently_wrong(network: str, dtype: torch.dtype) -> None:
    bench = Bench(WRONG[network], dtype)
    with (
        nothing_changes(bench.net),
        pytest.raises(ValueError, match=r"my loss: its second derivative is wrong at lower\["),
    ):
        hg.check_product(bench.lower_loss, bench.lower, bench.upper, name="my loss")


def test_the_product_check_reports_a_function_that_is_differentiable_once() -> None:
    bench = Bench(lambda: Custom(Cube))
    with pytest.raises(ValueError, match="second derivative"):
        hg.check_product(bench.lower_loss, bench.lower, bench.upper)


RIGHT = {
    **{name: make for name, make in NETWORKS.items() if name != "spectral-norm"},
    "relu": lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)),
    "max-pool": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(18, 3)
    ),
    "words": Words,
}


@pytest.mark.parametrize("network", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_product_check_raises_no_false_alarm(network: str, dtype: torch.dtype) -> None:
    bench = Bench(RIGHT[network], dtype)
    with nothing_changes(bench.net):
        hg.check_product(bench.lower_loss, bench.lower, bench.upper)


def test_the_product_check_falls_back_where_float64_cannot_run() -> None:
    """Large errors still show in float32, and a loss in half precision is only run."""
    data = torch.randn(5, 3)
    lower, upper = {"w": torch.randn(3)}, {"u": torch.ones(())}

    def single(cube: Any) -> Any:
        def loss(w: Params, u: Params, batch: Any) -> Tensor:
            if w["w"].dtype == torch.float64:
                raise RuntimeError("no kernel for float64")
            return cube(data.to(w["w"].dtype) @ w["w"]).sum() * u["u"]

        return loss

    hg.check_product(single(lambda x: x**3), lower, upper)
    with pytest.raises(ValueError, match="in torch.float32"):
        hg.check_product(single(CubeOnContext.apply), lower, upper)
    hg.check_product(single(lambda x: x**3), {"w": lower["w"].bfloat16()}, upper)


def test_transforms_that_refuse_a_loss_name_the_way_out() -> None:
    upper = {"u": torch.ones(2)}
    loss = lambda w, u, b: (CubeOnContext.apply(w["w"]) * u["u"]).sum() + w["w"].square().sum()  # noqa: E731
    solved = hg.solved(loss, {"w": torch.ones(2)})

    def slope(u: Tensor) -> Tensor:
        method = hg.Implicit(hg.CG(2))
        return hg.hypergradient(lambda w, v, b: w["w"].sum(), solved, {"u": u}, method=method, throw=False).grad["u"]

    slope(upper["u"])
    with pytest.raises(ValueError, match="cannot run inside torch.func transforms.*Outside transforms"):
        torch.func.vmap(slope)(upper["u"][None])


@pytest.mark.parametrize("names", [["w"], ["w", "z"]], ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Implicit(hg.Exact())], ids=["unrolled", "implicit"])
def test_a_record_stays_when_the_callers_tensors_change_in_place(names: list[str], method: hg.Method) -> None:
    """As users do who copy `traj.end` into their module before they ask for the hypergradient."""

    def lower_loss(lower: Any, upper: Any, batch: Any) -> torch.Tensor:
        return sum(torch.cosh(lower[n] - upper["c"]).sum() for n in names)

    def upper_loss(lower: Any, upper: Any, batch: Any) -> torch.Tensor:
        return sum((lower[n] ** 2).sum() for n in names)

    upper = {"c": torch.tensor([0.3, -0.7], dtype=torch.float64)}
    found = []
    for changed in (False, True):
        lower = {n: torch.zeros(2, dtype=torch.float64) for n in names}
        runs = [
            hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=0.3), batches=[None] * 3),
            hg.solved(lower_loss, lower),
        ]
        for traj in runs[: 1 if isinstance(method, hg.Unrolled) else 2]:
            for tensor in lower.values():
                tensor.add_(5.0 if changed else 0.0)
            found.append(hg.hypergradient(upper_loss, traj, upper, method=method).grad["c"])
    half = len(found) // 2
    for kept, expected in zip(found[half:], found[:half], strict=True):
        assert torch.equal(kept, expected)


class Tagger(nn.Module):
    """Words with padding, scored by a head of its own or by the words themselves."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(6, 4, padding_idx=0)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(1))


def tagging(*, tied: bool) -> tuple[hg.Engine, nn.Module]:
    net, up = Tagger(tied=tied).double(), nn.Linear(1, 1).double()
    x = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 1]])
    y = torch.tensor([0, 2, 4])
    lower = hg.Problem(
        "net",
        module=net,
        loss=lambda m, _: F.cross_entropy(m.net(x), y) * m.up.weight.exp().squeeze(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1),
        data=[None],
        steps=3,
        method=hg.Unrolled(),
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, _: F.cross_entropy(m.net(x), y.flip(0)),
        optimizer=torch.optim.SGD(up.parameters(), lr=0.0),
        data=[None],
    )
    return hg.Engine([lower, upper]), up


def test_padding_rows_that_rest_are_no_wrong_product() -> None:
    torch.manual_seed(1)
    values = []
    for shift in (0.0, 1e-5, -1e-5):
        torch.manual_seed(2)
        engine, up = tagging(tied=False)
        with torch.no_grad():
            up.weight += shift
        values.append(float(engine.run(1)["up.loss"][0]))
        if not shift:
            assert up.weight.grad is not None
            slope = float(up.weight.grad)
    assert slope == pytest.approx((values[1] - values[2]) / 2e-5, rel=1e-6)


def test_padding_rows_that_move_are_found() -> None:
    with pytest.raises(ValueError, match=r"problem 'net': its second derivative is wrong at lower\['words.weight'\]"):
        tagging(tied=True)


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Unrolled(retain=1.0), hg.ForwardUnrolled()], ids=str)
@pytest.mark.parametrize("names", [["w"], ["w", "z"]], ids=["one tensor", "two tensors"])
def test_a_projection_may_write_into_what_it_is_given(names: list[str], method: hg.Method) -> None:
    lower, upper = {name: torch.ones(3) for name in names}, {"shift": torch.tensor([-1.0, 0.7, 3.0])}

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return sum(((p - u["shift"]) ** 2).sum() for p in w.values())

    def found(project: Any) -> hg.Hypergradient:
        recording = method.recording(3)
        run = hg.descend(loss, lower, upper, optimizer=SGD, batches=[None] * 3, project=project, recording=recording)
        return hg.hypergradient(lambda w, u, b: (w["w"] ** 2).sum(), run, upper, method=method)

    written = found(lambda w: {name: p.clamp_(0.6, 1.2) for name, p in w.items()})
    returned = found(lambda w: {name: p.clamp(0.6, 1.2) for name, p in w.items()})
    assert torch.equal(written.grad["shift"], returned.grad["shift"]) and torch.equal(written.value, returned.value)
    assert written.grad["shift"].count_nonzero() == 1


def test_batches_may_be_generated() -> None:
    """New tensors, one tensor again and again, tensors of a transform, and others' changes before the batch is seen."""

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return ((w["w"] - u["c"] * batch["x"]) ** 2).sum()

    def end(batches: Any, c: Tensor) -> Tensor:
        return hg.descend(loss, {"w": torch.zeros(2)}, {"c": c}, optimizer=SGD, batches=batches).end["w"]

    c, same = torch.ones(2), {"x": torch.ones(2)}
    expected = end([same] * 3, c)
    assert torch.equal(end(({"x": torch.zeros(2).add_(1)} for _ in range(3)), c), expected)
    assert torch.equal(end((same for _ in range(3)), c), expected)
    with torch.inference_mode():
        frozen = {"x": torch.ones(2)}
    assert torch.equal(end((frozen for _ in range(3)), c), expected)
    ones = torch.ones(4, 2)
    many = torch.func.vmap(lambda x: end(({"x": x * 1} for _ in range(3)), c))(ones)
    torch.testing.assert_close(many, expected.expand(4, 2))
