"""Ranks that share every batch make the steps of one process on the whole batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shared_engines as ec
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn

import hypergrad as hg

CASES: dict[str, tuple[Callable[..., ec.Setup], tuple[Any, ...]]] = {
    **{name: (ec.two_levels, (name,)) for name in ec.METHODS},
    **{name: (ec.first_order_meta, (name,)) for name in ("fomaml", "maml", "reptile")},
    "three levels, implicit": (ec.three_levels, (hg.Implicit(hg.CG(8, rtol=1e-13)),)),
    "three levels, unrolled": (ec.three_levels, (hg.Unrolled(),)),
    "tasks": (ec.tasks, ()),
}


def _run_all(names: list[str], steps: int, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    return {name: ec.run(CASES[name][0], steps, *CASES[name][1], dtype, **options) for name in names}


def _check(size: int, names: list[str], steps: int) -> None:
    several = run_ranks(size, _run_all, names, steps, torch.float64)
    alone = _run_all(names, steps, torch.float64, distributed=False)
    for name in names:
        assert all(rank[name] == several[0][name] for rank in several), f"{name}: the ranks differ"
        assert max(ec.gap(several[0][name], alone[name])) <= 1e-10, name


FAST = ["cg", "neumann", "gauss_newton", "unrolled", "one_step", "sama", "penalty", "bome", "reptile", "tasks"]


def test_two_ranks_make_the_steps_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hg.Engine, "__init__", _distributed(hg.Engine.__init__))
    _check(2, FAST, 3)
    _check(2, ["three levels, implicit"], 2)


def _distributed(init: Callable[..., None]) -> Callable[..., None]:
    """Return Engine's constructor, data parallel wherever there are ranks and nothing else is said."""

    def wrapped(self: hg.Engine, problems: Any, **options: Any) -> None:
        init(self, problems, **({"distributed": dist.is_initialized()} | options))

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_method_over_twenty_steps(size: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hg.Engine, "__init__", _distributed(hg.Engine.__init__))
    _check(size, [name], 20)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_method_in_float32(size: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hg.Engine, "__init__", _distributed(hg.Engine.__init__))
    several = run_ranks(size, _run_all, [name], 20, torch.float32)
    alone = _run_all([name], 20, torch.float32, distributed=False)
    gaps = ec.gap(several[0][name], alone[name])
    assert gaps[0] <= 1e-5, gaps[0]
    assert max(gaps) <= 1e-3, max(gaps)


def _count(methods: list[str]) -> dict[str, list[int]]:
    """Return for each method the all-reduces of a lower step, and of an upper step beyond them, and the products."""
    counted: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        counted.append(tensor.numel())
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = counting
    found = {}
    for method in methods:
        engine, _ = ec.two_levels(method, torch.float64, distributed=True)
        engine.step()
        counted.clear()
        record = engine.step()
        found[method] = [len(counted), int(record["net.num_products"]) if "net.num_products" in record else 0]
    return found


def test_one_all_reduce_a_product() -> None:
    methods = ["cg", "neumann", "one_step", "finite_difference", "sama", "unrolled", "unrolled_retain"]
    counts = run_ranks(2, _count, methods)[0]
    lower, outer, mixed = 4, 1, 1
    for method in ("cg", "neumann"):
        total, products = counts[method]
        assert products > 0
        assert total == lower + outer + products + mixed, method
    assert counts["one_step"][0] == lower + outer + mixed
    assert counts["finite_difference"][0] == lower + outer + mixed
    assert counts["sama"][0] == lower + outer + 1 + mixed  # and the gradient that its preconditioner is taken at
    for method in ("unrolled", "unrolled_retain"):
        assert counts[method][0] == lower + outer + 4  # a product with both derivatives for each step


# --- losses that compare samples ---------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch statistics of all ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        everyone = hg.all_gather(x)
        return (x - everyone.mean(0)) / (everyone.var(0, unbiased=False) + 1e-3).sqrt()


def contrastive(method: str, dtype: torch.dtype, **options: Any) -> ec.Setup:
    """Every rank scores its own samples against those of all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(ec.FEATURES, 4), BatchNorm(), nn.Linear(4, 3)).to(dtype)
    scale = nn.Linear(ec.FEATURES, 1, bias=False).to(dtype)

    def lower_loss(models: Any, batch: Any) -> torch.Tensor:
        x, _ = batch
        z = models.net(x)
        near = models.net(x * (1 + 0.1 * models.scale.weight))
        scores = z @ hg.all_gather(near).T
        ranks = hg.distributed.active_ranks()
        first = 0 if ranks is None else ranks.rank * len(x)
        target = torch.arange(first, first + len(x))
        decay = sum(p.square().sum() for p in models.net.parameters())
        return nn.functional.cross_entropy(scores, target) + 0.1 * decay

    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=ec.batches(5, dtype),
        steps=3,
        method={"gmres": hg.Implicit(hg.GMRES(6), damping=0.5), "unrolled": hg.Unrolled()}[method],
    )
    upper = hg.Problem(
        "scale",
        module=scale,
        loss=lambda models, batch: (models.net(batch[0]).mean(1, keepdim=True) - batch[1]).square().mean(),
        optimizer=torch.optim.SGD(scale.parameters(), lr=0.1),
        data=ec.batches(3, dtype, seed=1),
    )
    return hg.Engine([lower, upper], **options), {"net": net, "scale": scale}


@pytest.mark.parametrize("method", ["gmres", "unrolled"])
def test_gathered_samples_make_the_union_batch(method: str) -> None:
    def run(**options: Any) -> Any:
        return ec.run(contrastive, 3, method, torch.float64, **options)

    several = run_ranks(2, lambda: run(distributed=True))
    assert several[0] == several[1]
    assert max(ec.gap(several[0], run())) <= 1e-10


# --- what the ranks agree on -------------------------------------------------------------------------------------


def _agreements() -> dict[str, Any]:
    torch.manual_seed(5 + dist.get_rank())
    engine, modules = ec.two_levels("cg", torch.float64, distributed=True, data=_noisy_data())
    begun = [p.tolist() for p in modules["net"].parameters()]
    if dist.get_rank() == 1:
        engine.signals.request("stop")
    history = engine.run(5)
    draws = [torch.rand(()).item()]
    with engine._own_draws():
        own = torch.rand(()).item()
    return {"begun": begun, "steps": len(history["weights.loss"]), "draws": draws, "own": own}


def _stopped_twice() -> list[int]:
    engine, _ = ec.two_levels("cg", torch.float64, distributed=True)

    def stopping() -> list[hg.callbacks.Callback]:
        return [hg.callbacks.EarlyStopping("weights.loss", patience=2, min_change=1e9)]

    counts = []
    for steps, callbacks in ((6, stopping()), (2, []), (3, stopping()), (2, [])):
        counts.append(len(engine.run(steps, callbacks=callbacks)))
    return counts


def test_a_request_to_stop_ends_no_later_run() -> None:
    """Ranks stop one step after the callback asks, and where that is the last step anyway nothing is left over."""
    assert run_ranks(2, _stopped_twice) == [[4, 2, 3, 2]] * 2


def _metrics_that_differ() -> list[dict[str, float]]:
    """Return the records of ranks of which the second names a metric of its own, and at times one less."""
    torch.manual_seed(0)
    net, second, step = nn.Linear(3, 1), dist.get_rank() == 1, -1

    def loss(models: Any, x: torch.Tensor) -> Any:
        nonlocal step
        value = models.net(x).square().mean()
        if torch.is_grad_enabled():
            step += 1
        metrics: dict[str, Any] = {"rank": float(dist.get_rank()), "word": "here"}
        if second:
            metrics["mine"] = 7.0
            if step % 2:
                del metrics["rank"]
        if step == 2:
            metrics["late"] = float(second)
        return value, metrics

    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    problem = hg.Problem("net", module=net, loss=loss, optimizer=sgd, data=[torch.ones(4, 3)])
    engine = hg.Engine([problem], distributed=True)
    step = -1
    return [record.numbers() for record in engine.run(3)]


def test_metrics_are_means_over_the_ranks_that_name_them() -> None:
    first, second = run_ranks(2, _metrics_that_differ)
    for records in (first, second):
        assert [record["net.rank"] for record in records] == [0.5, 0.0, 0.5]
        assert [record["net.mine"] for record in records] == [7.0] * 3
    assert ["net.late" in record for record in first] == [False, False, True]
    assert (first[2]["net.late"], second[2]["net.late"]) == (0.0, 1.0), "named too late: each rank's own"


def _noisy_data() -> Any:
    x, y = (torch.cat(tensors) for tensors in zip(*ec.batches(4, torch.float64), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)


class Watching(nn.Module):
    """Keeps what it saw: in place, by assigning anew, on one rank alone, and as batch norm does, without a mark."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(ec.FEATURES, 1).double()
        for name in ("in_place", "anew", "alone"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.norm = nn.BatchNorm1d(ec.FEATURES).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.norm(x)
            self.in_place.add_(x.mean())
            self.anew = 0.5 * self.anew + x.mean()
            if dist.get_rank() == 1:
                self.alone.fill_(x.mean())
        found: torch.Tensor = self.layer(x)
        return found


def _buffers() -> tuple[dict[str, float], list[float]]:
    torch.manual_seed(0)
    net = Watching()
    x = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64).unsqueeze(1).expand(4, ec.FEATURES)
    problem = hg.Problem(
        "net",
        module=net,
        loss=lambda models, batch: models.net(batch).square().mean(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[x],
    )
    engine = hg.Engine([problem], distributed=True)
    alone = []
    for _ in range(2):
        engine.step()
        alone.append(float(net.alone))
    return {name: float(buffer.double().mean()) for name, buffer in net.named_buffers()}, alone


def test_buffers_are_means_over_the_ranks_however_they_are_written() -> None:
    first, second = run_ranks(2, _buffers)
    assert first == second
    found, alone = first
    assert found["in_place"] == 3.0 and found["anew"] == 2.25
    assert found["norm.running_mean"] == pytest.approx(0.9 * 0.15 + 0.15)
    assert alone == [1.0, 1.5]  # of (0, 2), then of (1, 2)


def test_ranks_agree_on_signals_parameters_and_data() -> None:
    first, second = run_ranks(2, _agreements)
    assert first["steps"] == second["steps"] == 1  # one rank asked to stop
    assert first["begun"] == second["begun"]
    assert first["draws"] == second["draws"]  # the stream that data are drawn from
    assert first["own"] != second["own"]


def _refusals() -> list[str]:
    messages = []
    for build in (
        lambda: ec.two_levels("cg", torch.float64),
        lambda: ec.two_levels("cg", torch.float64, distributed=True, data=ec.batches(3, torch.float64, samples=5)),
        lambda: ec.two_levels("cg", torch.float64, distributed="yes"),
        lambda: _other_modules(),
        lambda: _odd_tasks(),
    ):
        try:
            build()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def _other_modules() -> None:
    net = nn.Linear(2 + dist.get_rank(), 1)
    problem = hg.Problem(
        "net",
        module=net,
        loss=lambda models, x: models.net.weight.square().sum(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[None],
    )
    hg.Engine([problem], distributed=True)


def _odd_tasks() -> None:
    ec.tasks(torch.float64, tasks=3, distributed=True)


def test_what_is_refused() -> None:
    for messages in run_ranks(2, _refusals):
        assert "torch.distributed is initialised with 2 processes. Say what they are for" in messages[0]
        assert "a batch of 5 samples does not divide into 2 equal parts" in messages[1]
        assert "distributed must be None, True, False or a torch.distributed process group, got 'yes'" in messages[2]
        assert "built another module than rank" in messages[3]
        assert "tasks=3 do not divide among 2 ranks" in messages[4]


def test_refusals_of_one_process() -> None:
    with pytest.raises(ValueError, match=r"not initialised. Start the script with torchrun"):
        hg.distributed.world()
    with pytest.raises(ValueError, match="was not started by torchrun"):
        ec.two_levels("cg", torch.float64, distributed=True)
    with pytest.raises(ValueError, match="along the first dimension, got a scalar"):
        hg.all_gather(torch.zeros(()))
    with pytest.raises(ValueError, match="signal must be one of"):
        hg.distributed.Signals().request("halt")
