"""Callbacks are told what happens, and can end a run."""

from __future__ import annotations

import builtins
import io

import pytest
import torch
from torch import nn

import hypergrad as hg


def engine() -> hg.Engine:
    torch.manual_seed(0)
    lower, upper = nn.Linear(2, 1), nn.Linear(2, 1)
    x = torch.randn(8, 2)

    def lower_loss(models, batch):
        return ((models.lower(batch) - models.upper(batch)) ** 2).mean() + 0.1 * (models.lower.weight**2).sum()

    def upper_loss(models, batch):
        loss = ((models.lower(batch) - 1.0) ** 2).mean()
        return loss, {"mean": models.lower(batch).mean()}

    sgd = torch.optim.SGD(lower.parameters(), lr=0.1)
    adam = torch.optim.Adam(upper.parameters(), lr=0.1)
    method = hg.Implicit(hg.CG(5))
    return hg.Engine(
        [
            hg.Problem("lower", module=lower, loss=lower_loss, optimizer=sgd, data=[x], steps=5, method=method),
            hg.Problem("upper", module=upper, loss=upper_loss, optimizer=adam, data=[x]),
        ]
    )


class Spy(hg.callbacks.Callback):
    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[str] = []
        self.stop_after = stop_after

    def on_start(self, engine, num_steps):
        self.events.append(f"start {num_steps}")

    def on_step(self, engine, record):
        self.events.append(f"step {record['step']}")
        self.should_stop = self.stop_after == record["step"]

    def on_end(self, engine, history):
        self.events.append(f"end {len(history)}")


def test_a_callback_is_told_of_start_steps_and_end() -> None:
    spy = Spy()
    engine().run(3, callbacks=[spy])
    assert spy.events == ["start 3", "step 0", "step 1", "step 2", "end 3"]


def test_a_callback_can_end_the_run() -> None:
    spy = Spy(stop_after=1)
    history = engine().run(10, callbacks=[spy])
    assert len(history) == 2 and spy.events[-1] == "end 2"


def test_callbacks_are_told_of_the_end_when_a_step_fails() -> None:
    run, spy = engine(), Spy()
    run.graph.problems["upper"].module.weight.data.fill_(float("nan"))
    with pytest.raises(hg.SolveError, match="not finite"):
        run.run(3, callbacks=[spy])
    assert spy.events == ["start 3", "end 0"]


def test_history_gives_quantities_by_name_and_names_what_it_has() -> None:
    history = engine().run(4)
    assert len(history["upper.loss"]) == len(history["upper.mean"]) == 4
    assert history[0]["step"] == 0
    with pytest.raises(KeyError, match="no quantity 'nothing'.*upper.loss"):
        history["nothing"]


def test_early_stopping_counts_steps_without_improvement() -> None:
    stopper = hg.callbacks.EarlyStopping("upper.loss", patience=2, min_change=1e9)
    assert len(engine().run(10, callbacks=[stopper])) == 3
    assert len(engine().run(10, callbacks=[stopper])) == 3


def test_early_stopping_maximizes_when_asked() -> None:
    stopper = hg.callbacks.EarlyStopping("upper.loss", patience=1, minimize=False)
    assert len(engine().run(10, callbacks=[stopper])) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hg.callbacks.EarlyStopping("a.loss", patience=0), "patience must be >= 1"),
        (lambda: hg.callbacks.EarlyStopping("a.loss", patience=1, min_change=-1.0), "min_change must be >= 0"),
        (lambda: hg.callbacks.Progress(interval=0.0), "interval must be > 0"),
        (lambda: hg.callbacks.TensorBoard("nowhere", every=0), "every must be >= 1"),
    ],
)
def test_options_out_of_range_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_early_stopping_names_what_is_recorded() -> None:
    with pytest.raises(ValueError, match="no 'upper.los'.*'upper.loss'"):
        engine().run(2, callbacks=[hg.callbacks.EarlyStopping("upper.los", patience=1)])


def test_progress_draws_the_last_step_with_its_losses() -> None:
    stream = io.StringIO()
    engine().run(3, callbacks=[hg.callbacks.Progress(interval=100.0, stream=stream)])
    text = stream.getvalue()
    assert "step 3/3" in text and "upper.loss" in text and text.endswith("\n")


def test_tensorboard_that_is_not_installed_is_named(monkeypatch) -> None:
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        hg.callbacks.TensorBoard("nowhere")


def test_tensorboard_writes_every_nth_record(monkeypatch, tmp_path) -> None:
    written: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            assert log_dir == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert isinstance(value, float)
            written.append((name, step))

        def flush(self) -> None:
            written.append(("flush", -1))

    import sys
    import types

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    engine().run(4, callbacks=[hg.callbacks.TensorBoard(tmp_path, every=2)])
    assert {step for name, step in written if name == "upper/loss"} == {0, 2}
    assert written[-1] == ("flush", -1)
