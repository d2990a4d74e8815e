"""Values that are not finite, data that raises, disks that are full: what happens is what is said."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg
from hypergrad import Stats, store


class Data:
    """Batches 0, 1, 2, ...; those in `bad` hold a NaN, and `fails` raises instead once."""

    def __init__(self, bad: tuple[int, ...] = (), fails: int | None = None) -> None:
        self.bad, self.fails = bad, fails

    def __iter__(self) -> Iterator[Tensor]:
        for k in range(40):
            if k == self.fails:
                self.fails = None
                raise OSError("the disk is gone")
            yield torch.full((4,), float("nan") if k in self.bad else 0.1 * k)


def build(
    lower: Data, upper: Data | None = None, *, steps: int = 3, method: hg.Method | None = None, **options: Any
) -> hg.Engine:
    torch.manual_seed(0)
    net, weight = nn.Linear(4, 1), nn.Linear(4, 1)

    def lower_loss(m: Any, batch: Tensor) -> Tensor:
        return ((m.net(batch) - m.weight(batch)) ** 2).mean() + 0.1 * (m.net.weight**2).sum()

    def upper_loss(m: Any, batch: Tensor) -> Tensor:
        return ((m.net(batch) - 1.0) ** 2).mean()

    return hg.Engine(
        [
            hg.Problem(
                "net",
                module=net,
                loss=lower_loss,
                optimizer=torch.optim.Adam(net.parameters(), lr=0.05),
                data=lower,
                steps=steps,
                method=method or hg.Implicit(hg.CG(3), damping=0.1),
            ),
            hg.Problem(
                "weight",
                module=weight,
                loss=upper_loss,
                optimizer=torch.optim.Adam(weight.parameters(), lr=0.05),
                data=upper or Data(),
            ),
        ],
        product_check=False,
        **options,
    )


def values(engine: hg.Engine) -> list[Tensor]:
    return [p.detach().clone() for r in engine.runners.values() for p in r.problem.module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_a_loss_that_is_not_finite_names_level_own_step_and_step() -> None:
    engine = build(Data(bad=(7,)))
    engine.run(2)
    with pytest.raises(hg.NonFiniteError, match=r"loss of problem 'net' \(level 0\), own step 1, is nan at step 2: "):
        engine.step()
    assert all(v.isfinite().all() for v in values(engine)), "found before its step was taken"


def test_a_hypergradient_that_is_not_finite_names_the_tensor() -> None:
    engine = build(Data(), Data(bad=(1,)))
    engine.step()
    with pytest.raises(hg.NonFiniteError, match=r"hypergradient of problem 'weight' \(level 1\), its loss is nan at"):
        engine.step()
    engine = build(Data())
    sharp = engine.graph.problems["weight"].module.weight
    sharp.register_hook(lambda g: g)  # the value is finite, one entry of its derivative is not
    engine.runners["weight"].problem.module.bias.data.fill_(0.0)

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.tensor([1.0, float("inf"), 1.0, 1.0])

    def loss(m: Any, batch: Tensor) -> Tensor:
        return ((m.net(batch) - 1.0) ** 2).mean() + Spoil.apply(m.weight.weight).sum()

    object.__setattr__(engine.graph.problems["weight"], "loss", loss)
    with pytest.raises(hg.NonFiniteError, match=r"'weight' \(level 1\), 1 of 4 entries for 'weight' are not finite at"):
        engine.step()


def test_a_residual_that_is_not_finite_is_named() -> None:
    from hypergrad.faults import Faults, Gradient

    engine = build(Data())
    faults = Faults("raise", None)
    gradient = Gradient(
        engine.runners["weight"],
        torch.tensor(1.0),
        {"weight": torch.ones(4)},
        [],
        None,
        True,
        {"net": torch.tensor(float("nan"))},
    )
    with pytest.raises(hg.NonFiniteError, match="the residual of the solve for 'net' is nan"):
        faults.admits(gradient, hg.Record(0))


def test_entries_whose_norm_alone_overflows_are_finite() -> None:
    from hypergrad.faults import Faults, Gradient

    engine, record = build(Data()), hg.Record(0)
    huge = {"weight": torch.full((4,), 3e38)}
    gradient = Gradient(engine.runners["weight"], torch.tensor(1.0), huge, [], None, True, {})
    assert Faults("raise", None).admits(gradient, record) and record["weight.result"] == int(hg.Result.SUCCESS)


def test_skip_leaves_out_the_own_step_alone() -> None:
    engine, other = build(Data(bad=(1,)), on_nonfinite="skip"), build(Data(bad=(1,)), on_nonfinite="skip")
    record = engine.step()
    assert record["weight.result"] < int(hg.Result.NEGATIVE_CURVATURE)
    found = other.runners["net"]
    taken: list[Tensor] = []
    original = found.apply
    found.apply = lambda grad, value, batch: (taken.append(value), original(grad, value, batch))  # type: ignore
    other.step()
    assert [float(v) for v in taken] == [float(v) for v in taken if v.isfinite()] and len(taken) == 2
    assert same(values(engine), values(other)) and found.num_steps == 3


def test_skip_leaves_out_an_upper_step() -> None:
    engine = build(Data(), Data(bad=(1,)), on_nonfinite="skip")
    engine.step()
    before = values(engine)[2:]
    record = engine.step()
    assert record["weight.result"] == int(hg.Result.NON_FINITE) and same(before, values(engine)[2:])
    engine.step()
    assert not same(before, values(engine)[2:])


def test_rollback_takes_the_step_again_with_the_batches_that_follow() -> None:
    """What it leaves is what a run leaves whose data never had the batches of the step that failed."""
    engine = build(Data(bad=(4,)), on_nonfinite="rollback")
    history = engine.run(3)
    assert [record.get("rollbacks") for record in history] == [None, 1, None]
    assert [record["step"] for record in history] == [0, 1, 2]

    class Without(Data):
        def __iter__(self) -> Iterator[Tensor]:
            return (batch for k, batch in enumerate(Data().__iter__()) if k not in (3, 4))

    plain = build(Without())
    plain.run(3)
    assert same(values(engine), values(plain))


def test_rollback_undoes_the_lower_levels_of_a_failed_upper_step() -> None:
    engine = build(Data(), Data(bad=(1,)), on_nonfinite="rollback")
    assert [record.get("rollbacks") for record in engine.run(2)] == [None, 1]
    assert engine.runners["net"].num_steps == 6 and engine.runners["weight"].num_steps == 2
    assert engine.graph.problems["net"].optimizer.state_dict()["state"][0]["step"] == 6


def test_rollback_gives_up_where_the_batches_are_not_to_blame() -> None:
    engine = build(Data(bad=tuple(range(4, 40))), on_nonfinite="rollback")
    engine.step()
    with pytest.raises(hg.NonFiniteError, match="loss of problem 'net'"):
        engine.step()


def test_rollback_catches_a_gradient_that_is_not_finite_behind_a_finite_loss() -> None:
    engine = build(Data(), on_nonfinite="rollback")
    engine.step()
    tensor = next(iter(engine.graph.problems["net"].module.parameters()))
    spoil = [True]
    tensor.register_hook(lambda g: g * float("nan") if spoil and spoil.pop() else g)
    record = engine.step()
    assert record["rollbacks"] == 1 and all(v.isfinite().all() for v in values(engine))


def test_nonfinite_does_as_breakdown_says_unless_told() -> None:
    engine = build(Data(bad=(1,)), on_breakdown="skip")
    engine.run(2)
    assert all(v.isfinite().all() for v in values(engine))
    with pytest.warns(RuntimeWarning) as found:
        build(Data(bad=(1,)), on_breakdown="warn").step()
    assert ["loss" in str(w.message) or "hypergradient" in str(w.message) for w in found] == [True] * len(found)
    with pytest.raises(ValueError, match="on_nonfinite must be 'raise', 'skip', 'rollback' or None, got 'ignore'"):
        build(Data(), on_nonfinite="ignore")


def test_flags_of_own_steps_are_read_with_the_code_of_the_next_hypergradient() -> None:
    """On an accelerator: one read a hypergradient, and the own step that failed is named."""
    from hypergrad.faults import Faults

    engine = build(Data())
    faults, runner = Faults("raise", None), engine.runners["net"]
    reads: list[int] = []
    faults._pending = [(runner, k, torch.tensor(k != 1)) for k in range(3)]
    original = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t.numel()), original(t))[1])
        with pytest.raises(hg.NonFiniteError, match=r"'net' \(level 0\), own step 1, is not finite at step 0"):
            faults._read([hg.Result.SUCCESS.tensor("cpu")])
    assert reads == [4] and not faults._pending


def test_data_that_raises_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    engine = build(Data(fails=7))
    with pytest.raises(
        hg.DataError, match=r"'net'.*OSError.*batch 7.*disk is gone.*level 0, own step 1 of step 2"
    ) as e:
        engine.run(4, callbacks=[hg.callbacks.Checkpoint(tmp_path)])
    assert isinstance(e.value.__cause__.__cause__, OSError)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="step 2 was not completed"):
        engine.state_dict()
    assert [p.name for p in store.saved(tmp_path)] == ["step-00000001", "step-00000002"]
    again, whole = build(Data()), build(Data())
    again.run(4, callbacks=[hg.callbacks.Checkpoint(tmp_path)], resume=tmp_path)
    whole.run(4)
    assert same(values(again), values(whole))


def test_a_full_disk_warns_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    """The limit on the size of files stands in for the disk: writing fails in the middle, as there."""

    class Fill(hg.callbacks.Callback):
        def on_step(self, engine: Any, record: hg.Record) -> None:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if record["step"] in (2, 3) else hard, hard))

    engine = build(Data())
    with pytest.warns(RuntimeWarning, match="could not be written to .*File too large") as found:
        history = engine.run(5, callbacks=[Fill(), hg.callbacks.Checkpoint(tmp_path, keep=2)])
    assert len(history) == 5 and len(found) == 2
    assert [p.name for p in store.saved(tmp_path)] == ["step-00000002", "step-00000005"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    for path in store.saved(tmp_path):
        store.check(path)


def test_a_folder_that_cannot_be_made_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        build(Data()).run(1, callbacks=[hg.callbacks.Checkpoint(tmp_path / "file" / "saved")])


def test_a_folder_of_a_later_run_is_refused(tmp_path: Path) -> None:
    build(Data()).run(3, callbacks=[hg.callbacks.Checkpoint(tmp_path)])
    with pytest.raises(ValueError, match=r"holds step-00000003, and this run is at step 0.*resume="):
        build(Data()).run(3, callbacks=[hg.callbacks.Checkpoint(tmp_path)])
    finished = build(Data())
    assert finished.run(3, callbacks=[hg.callbacks.Checkpoint(tmp_path)], resume=tmp_path) == []
    assert finished.num_steps == 3


def test_state_and_names_of_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint: the name of one is"):
        store.step_of(tmp_path)
    writing = store.Writing(tmp_path, 1)
    written = writing.commit({"a": writing.put("a", [1])}, {})
    text = (written / store.MANIFEST).read_bytes().partition(b"\n")[2].replace(b'"format": 1', b'"format": 9')
    import hashlib

    (written / store.MANIFEST).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    with pytest.raises(ValueError, match="has format 9, this version reads 1"):
        store.check(written)
    again = store.Writing(tmp_path, 1)  # the same step once more takes its place
    assert again.commit({"a": again.put("a", [2])}, {}) == written
    store.check(written)
    assert store.read(written, "a") == [2]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


class Spoiled(hg.ResponseMethod):
    """`OneStep`, spoiled at its second call: an entry of what it pulls back, or the residual it reports."""

    def __init__(self, what: str) -> None:
        self.what, self.calls = what, 0

    def vjp(self, trajectory: Any, upper: Any, cotangent: Tensor, state: Tensor | None = None) -> hg.Pulled:
        pulled = hg.OneStep(step_size=0.1).vjp(trajectory, upper, cotangent, state)
        self.calls += 1
        if self.calls != 2 or "loss" in self.what:
            return pulled
        if self.what == "residual":
            return replace(pulled, stats=Stats(residual_norm=torch.tensor(float("inf"))))
        grad = {name: g.clone() for name, g in pulled.grad.items()}
        next(iter(grad.values())).view(-1)[0] = float("nan")
        return replace(pulled, grad=grad)


NAMED = {
    "loss": r"loss of problem 'net' \(level 0\), own step 0, is nan at step 1",
    "upper loss": r"hypergradient of problem 'weight' \(level 1\), its loss is nan at step 1",
    "hypergradient": r"problem 'weight' \(level 1\), 1 of 4 entries for 'weight' are not finite at step 1",
    "residual": r"'weight' \(level 1\), the residual of the solve for 'net' is inf at step 1",
}


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
@pytest.mark.parametrize("fault", NAMED)
def test_every_fault_has_the_outcome_of_the_policy(fault: str, policy: Any) -> None:
    """The fault comes in the second step: what is left out, or taken again, is what the policy says."""
    lower, upper = Data(bad=(3,) if fault == "loss" else ()), Data(bad=(1,) if fault == "upper loss" else ())
    engine = build(lower, upper, on_nonfinite=policy, method=Spoiled(fault))
    engine.step()
    before = values(engine)
    if policy == "raise":
        with pytest.raises(hg.NonFiniteError, match=NAMED[fault]):
            engine.step()
        assert all(v.isfinite().all() for v in values(engine))
        return
    record = engine.step()
    net, top = (engine.graph.problems[name].optimizer.state_dict()["state"][0]["step"] for name in ("net", "weight"))
    if policy == "rollback":
        assert record["rollbacks"] == 1 and (net, top) == (6, 2)
    elif fault == "loss":
        assert (net, top) == (5, 2)
    else:
        assert (net, top) == (6, 1) and same(before[2:], values(engine)[2:])
    engine.run(2)
    assert all(v.isfinite().all() for v in values(engine))
    assert not same(before[2:], values(engine)[2:])
