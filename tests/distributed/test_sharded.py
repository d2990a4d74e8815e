"""First-order methods on modules sharded by `fully_shard` make the steps of one process on the whole batches."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_engines as sh
import shared_engines as ec
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn

import hypergrad as hg

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in sh.METHODS},
    "whole upper": ("finite_difference", {"upper_sharded": False}),
    "whole upper, penalty": ("penalty", {"upper_sharded": False}),
    "micro-batches": ("sama", {"micro_batches": 2}),
    "clipped": ("finite_difference", {"lower_options": {"clip_norm": 0.1}}),
    "clipped values": ("sama", {"lower_options": {"clip_value": 0.01}}),
}


FAST = [*sh.METHODS, "whole upper, penalty", "micro-batches"]


def _run_all(names: list[str], steps: int, dtype: torch.dtype) -> dict[str, Any]:
    return {name: sh.run(steps, CASES[name][0], dtype, **CASES[name][1]) for name in names}


def _gaps(size: int, names: list[str], steps: int, dtype: torch.dtype) -> dict[str, list[float]]:
    several = run_ranks(size, _run_all, names, steps, dtype)
    alone = _run_all(names, steps, dtype)
    for name in names:
        assert all(rank[name] == several[0][name] for rank in several), f"{name}: the ranks differ"
    return {name: ec.gap(several[0][name], alone[name]) for name in names}


def test_two_ranks_make_the_steps_of_one() -> None:
    for name, gaps in _gaps(2, FAST, 2, torch.float64).items():
        assert max(gaps) <= 1e-10, (name, gaps)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(size: int, name: str) -> None:
    assert max(_gaps(size, [name], 20, torch.float64)[name]) <= 1e-10


# --- left as found -----------------------------------------------------------------------------------------------


def _bits(modules: dict[str, nn.Module]) -> list[bytes]:
    """Return every parameter's and gradient's part held here, as bytes, and which gradients there are."""
    held = []
    for module in modules.values():
        for p in module.parameters():
            for t in (p.detach(), p.grad):
                t = t.to_local() if hasattr(t, "to_local") else t
                held.append(b"none" if t is None else t.contiguous().numpy().tobytes())
    return held


class Failing:
    """A loss that raises at its n-th evaluation."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.left, self.values = loss, 10**9, []

    def __call__(self, models: Any, batch: Any) -> Any:
        self.left -= 1
        value, metrics = self.loss(models, batch)
        self.values.append(value.item())
        if self.left < 0:
            raise RuntimeError("the loss gives up")
        return value, metrics


def _interrupted(method: str) -> dict[str, Any]:
    kept: list[Failing] = []

    def wrap(loss: Any) -> Failing:
        kept.append(Failing(loss))
        return kept[-1]

    engine, modules = sh.build(method, torch.float64, wrap=wrap, upper_sharded=False)
    (loss,) = kept
    engine.step()
    for p in modules["net"].parameters():
        p.grad = torch.full_like(p, 0.25)  # somebody's own
    same, evaluations = [], []
    runner, top = engine.runners["net"], engine.runners["weights"]
    batch = ec.batches(1, torch.float64, samples=8)[0]
    for left in (10**9, 0, 1, 2):
        loss.left = left
        loss.values.clear()
        before = _bits(modules)
        trajectory = runner.trajectory()
        try:
            engine._pull(
                top,
                {"net": trajectory},
                runner,
                {key: torch.ones_like(v) for key, v in trajectory.end.items()},
                batch=batch,
                random=None,
                record=hg.Record(step=0),
            )
            outcome = "returned"
        except RuntimeError as error:
            outcome = str(error)
        same.append((outcome, _bits(modules) == before))
        evaluations.append(list(loss.values))
    loss.left = 10**9
    engine.step()
    return {"same": same, "evaluations": evaluations}


@pytest.mark.parametrize("method", ["finite_difference", "sama", "penalty"])
def test_shards_and_gradients_are_put_back_bit_for_bit_also_after_an_error(method: str) -> None:
    for found in run_ranks(2, _interrupted, method):
        (whole, *cut), evaluations = found["same"], found["evaluations"]
        assert whole == ("returned", True)
        assert all(same for _, same in cut)
        assert cut[0] == ("the loss gives up", True)
        assert len(set(evaluations[0])) >= 2, "it was evaluated away from where the run ended"


def _stale() -> list[float]:
    """An evaluation without backward leaves whole parameters behind, which the next step must not use."""
    values = []
    for looks in (False, True):
        engine, modules = sh.build("finite_difference", torch.float64)
        for _ in range(2):
            if looks:
                with torch.no_grad():
                    modules["net"](ec.batches(1, torch.float64)[0][0])
            engine.step()
        values.append(sum(float(sh.whole(p).sum()) for p in modules["net"].parameters()))
    return values


def test_looking_at_a_sharded_module_changes_nothing() -> None:
    for without, looked in run_ranks(2, _stale):
        assert without == looked


def _not_finite(policy: str) -> Any:
    data = ec.batches(7, torch.float64)
    data[2][1][0] = float("inf")  # on rank 0's part of one batch

    engine, modules = sh.build(
        "finite_difference", torch.float64, lower_options={"steps": 2, "data": data}, on_nonfinite=policy
    )
    try:
        for _ in range(3):
            engine.step()
    except hg.SolveError as error:
        return str(error)
    return [sh.whole(p).tolist() for p in modules["net"].parameters()]


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
def test_ranks_agree_on_what_is_not_finite(policy: str) -> None:
    first, second = run_ranks(2, _not_finite, policy)
    assert first == second
    if policy == "raise":
        assert first.startswith("loss of problem 'net' (level 0), own step 0, is")
    else:
        assert torch.isfinite(torch.cat([torch.tensor(p).flatten() for p in first])).all()


# --- what is refused ---------------------------------------------------------------------------------------------


def _refusals() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def lone(**options: Any) -> None:
        net = nn.Linear(4, 4)
        fully_shard(net, **options)
        _engine(net, list(net.parameters()), distributed=True)

    def partly() -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        fully_shard(net[0])
        _engine(net, list(net.parameters()), distributed=True)

    def reading_outside() -> None:
        net = fully_shard(nn.Linear(4, 4))
        _engine(net, list(net.parameters()), distributed=True, loss=lambda m, x: m.net.weight.square().sum())

    def mixing() -> None:
        net = fully_shard(nn.Linear(4, 4))
        _engine(net, list(net.parameters()), distributed=True, loss=lambda m, x: (x @ m.net.weight).sum())

    def no_gradient() -> None:
        net = fully_shard(nn.Linear(4, 4))
        _engine(net, list(net.parameters()), distributed=True, loss=lambda m, x: m.net(x).detach().sum())

    refused = [
        *(lambda m=m: sh.build("finite_difference", torch.float64, choice=m) for m in REFUSED),
        lambda: lone(mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))),
        partly,
        reading_outside,
        mixing,
        no_gradient,
        lambda: sh.build("finite_difference", torch.float64, distributed=False),
        lambda: sh.build("finite_difference", torch.float64, lower_options={"project": lambda p: p}),
        lambda: sh.build("finite_difference", torch.float64, lower_options={"hyper": {"lr": lambda m: 0.1}}),
        lambda: sh.build("sama", torch.float64, lower_options={"clip_norm": 1.0}),
        lambda: sh.build("sama", torch.float64, lower_options={"loss_scale": 2.0}),
        lambda: hg.diagnose(sh.build("finite_difference", torch.float64)[0]),
    ]
    messages = []
    for build in refused:
        try:
            build()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


REFUSED = [
    hg.Implicit(hg.CG(3)),
    hg.Unrolled(),
    hg.Unrolled(truncate=1),
    hg.ForwardUnrolled(),
    hg.OneStep(),
    hg.SOBA(),
    hg.AmIGO(),
    hg.StocBiO(),
    hg.F2SA(),
    hg.BOME(),
]


def _engine(net: nn.Module, parameters: list[Any], *, loss: Any = None, **options: Any) -> hg.Engine:
    problem = hg.Problem(
        "net",
        module=net,
        loss=loss or (lambda models, x: models.net(x).square().mean()),
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        data=[torch.ones(2, 4)],
    )
    return hg.Engine([problem], **options)


def test_what_is_refused() -> None:
    for messages in run_ranks(2, _refusals):
        count = len(REFUSED)
        for method, message in zip(REFUSED, messages, strict=False):
            assert f"problem 'net': {type(method).__name__} needs a functional evaluation" in message
            assert "FSDP2" in message and "Use hg.FiniteDifference, hg.SAMA, hg.Penalty" in message
        mesh, partly, outside, mixing, detached, alone, project, hyper, clip, scaled, diagnosed = messages[count:]
        assert "on a mesh of 2 dimensions; one dimension that shards is served" in mesh
        assert "'0.weight' is a shard (of fully_shard) and '1.weight' is not" in partly
        assert "reads a sharded parameter outside its module's forward" in outside
        assert "reads a sharded parameter outside its module's forward" in mixing
        assert "its loss carries no gradient" in detached
        assert "sharded over the ranks [0, 1], and the engine trains on this process alone" in alone
        assert "is sharded, and project would see one process's part" in project
        assert "is sharded, and hyper would see one process's part" in hyper
        assert "is sharded, and clip_norm with hg.SAMA would see one process's part" in clip
        assert "loss_scale=2.0 is not served where modules are sharded" in scaled
        assert "diagnose and estimate run losses on copies" in diagnosed


def _decayed() -> list[float]:
    """A sum over all entries of a shard, taken outside the module, has the same gradient as in one process."""
    torch.manual_seed(0)
    net = sh.sharded(nn.Linear(5, 3).double())

    def loss(models: Any, x: Any) -> Any:
        decay = models.net.weight.square().sum()
        decay = decay.full_tensor() if hasattr(decay, "full_tensor") else decay
        return models.net(x).square().mean() + 0.1 * decay

    problem = hg.Problem(
        "net",
        module=net,
        loss=loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[torch.randn(4, 5, dtype=torch.float64)],
    )
    engine = hg.Engine([problem], **({"distributed": True} if dist.is_initialized() else {}))
    engine.run(3)
    return sh.whole(net.weight).flatten().tolist()


def test_sums_over_a_sharded_parameter_may_be_taken_outside_its_module() -> None:
    alone = _decayed()
    for found in run_ranks(2, _decayed):
        assert found == pytest.approx(alone, rel=1e-12)
