"""What watches a run: lines of JSON, the progress display, requests to stop, Weights & Biases, the figure."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_callbacks import engine

import hypergrad as hg
from hypergrad.__main__ import main as command


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_lines_hold_the_record_and_the_time_of_each_phase(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "log.jsonl"
    history = engine().run(5, callbacks=[hg.callbacks.JSONLines(file, every=2)])
    found = lines(file)
    assert [line["step"] for line in found] == [0, 2, 4]
    for line in found:
        record = history[line["step"]]
        assert line["upper.loss"] == record["upper.loss"] and line["lower.residual_norm"] == record.read(
            "lower.residual_norm"
        )
        assert {"seconds.data", "seconds.lower.response", "seconds.upper.step"} <= set(line)
        assert all(v >= 0 for key, v in line.items() if key.startswith("seconds."))


def test_json_lines_go_on_where_the_run_does_and_drop_a_line_cut_short(tmp_path: Path) -> None:
    file, saved = tmp_path / "log.jsonl", tmp_path / "saved"

    def callbacks() -> list[hg.callbacks.Callback]:
        return [hg.callbacks.JSONLines(file, every=1), hg.callbacks.Checkpoint(saved, every=2)]

    whole = engine().run(6)["upper.loss"]
    engine().run(4, callbacks=callbacks())
    file.write_text(file.read_text() + '{"step": 4, "upper.loss": 9}\n{"step": 5, "upp')  # steps never saved
    engine().run(6, callbacks=callbacks(), resume=saved)
    assert [line["step"] for line in lines(file)] == list(range(6))
    assert [line["upper.loss"] for line in lines(file)] == whole
    engine().run(1, callbacks=[hg.callbacks.JSONLines(file)])
    assert [line["step"] for line in lines(file)] == [0]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    """The limit on the size of files stands in for the disk; once there is room, nothing is missing."""
    file = tmp_path / "log.jsonl"

    class Fill(hg.callbacks.Callback):
        def on_step(self, engine: Any, record: hg.Record) -> None:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (700 if 2 <= record["step"] < 5 else hard, hard))

    with pytest.warns(RuntimeWarning, match="log.jsonl could not be written: .*File too large.*The run goes on"):
        history = engine().run(8, callbacks=[Fill(), hg.callbacks.JSONLines(file, every=1)])
    assert len(history) == 8
    assert [line["step"] for line in lines(file)] == list(range(8))


def test_lines_that_were_not_written_whole_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": -1}\n{"step": -\x00\x00\n\n{"step": -2}\n{"step"')
    engine().run(1, callbacks=[hg.callbacks.JSONLines(file, every=1)])
    assert [line["step"] for line in lines(file)] == [-1, -2, 0]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log, record = hg.callbacks.JSONLines(tmp_path / "log.jsonl", every=1), hg.Record(0)
    record.put("a", "loss", float("nan"))
    record["a.note"] = "words are left out"
    run = engine()
    log.on_start(run, 1)
    log.on_step(run, record)
    log.on_end(run, hg.History())
    assert lines(tmp_path / "log.jsonl")[0]["a.loss"] is None


def test_values_are_read_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    record = hg.Record(3)
    for k in range(4):
        record[f"a.{k}"] = torch.tensor(float(k), dtype=torch.float32 if k % 2 else torch.float64)
    record["a.many"], record["a.code"] = torch.ones(2), torch.tensor(7)
    reads: list[int] = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t.numel()), original(t))[1])
    for name in ("item", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda t: pytest.fail("a second transfer"))
    assert record.numbers() == {"step": 3, "a.0": 0, "a.1": 1, "a.2": 2, "a.3": 3, "a.code": 7}
    assert reads == [5]


def test_the_display_shows_levels_values_shares_and_the_time_left() -> None:
    stream = Terminal()
    engine().run(3, callbacks=[hg.callbacks.Progress(interval=1e-9, stream=stream)])
    blocks = stream.getvalue().split("\x1b[5F")
    assert len(blocks) == 4, "drawn at each step and at the end, each time over the five lines before"
    head, titles, upper, lower, data = blocks[-1].replace("\x1b[K", "").splitlines()
    assert head.startswith("step 3/3") and "━" * 24 in head and "left" in head
    assert titles.split() == ["loss", "hypergradient", "residual", "time"]
    assert upper.startswith("1  upper") and lower.startswith("0  lower") and data.split()[0] == "data"
    shares = [int(row.split()[-1].rstrip("%")) for row in (upper, lower, data)]
    assert abs(sum(shares) - 100) <= 2
    assert len(upper.split()) == 5 and len(lower.split()) == 5  # the top has no residual, the lowest no hypergradient


def test_a_file_ends_the_run_and_is_removed(tmp_path: Path) -> None:
    stop = hg.callbacks.StopOnRequest(file=tmp_path / "STOP", signals=(), interval=0.0)
    (tmp_path / "STOP").touch()
    assert len(engine().run(5, callbacks=[stop])) == 1
    assert stop.request == str(tmp_path / "STOP") and not (tmp_path / "STOP").exists()
    assert len(engine().run(2, callbacks=[stop])) == 2


class Send(hg.callbacks.Callback):
    """Sends this process a signal in the middle of a step's callbacks."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_step(self, engine, record):
        if record["step"] == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(number: signal.Signals, tmp_path: Path, capfd) -> None:
    before = signal.getsignal(number)
    stop = hg.callbacks.StopOnRequest()
    callbacks = [stop, Send(number), hg.callbacks.Checkpoint(tmp_path, every=100)]
    assert len(engine().run(5, callbacks=callbacks)) == 2
    assert stop.request == number.name and signal.getsignal(number) is before
    assert f"{number.name}: the run ends after this step" in capfd.readouterr().err
    run = engine()
    assert len(run.run(5, callbacks=[hg.callbacks.Checkpoint(tmp_path)], resume=tmp_path)) == 3
    whole = engine()
    whole.run(5)
    for one, other in zip(run.graph.problems.values(), whole.graph.problems.values(), strict=True):
        assert all(map(torch.equal, one.module.state_dict().values(), other.module.state_dict().values()))


def test_a_second_interrupt_ends_at_once() -> None:
    class Twice(hg.callbacks.Callback):
        def on_step(self, engine, record):
            for _ in range(2):  # handed to whoever handles it: two signals raised in a row may arrive as one
                handler: Any = signal.getsignal(signal.SIGINT)
                handler(signal.SIGINT, None)

    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            engine().run(5, callbacks=[hg.callbacks.StopOnRequest(signals=(signal.SIGINT,)), Twice()])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


def test_signals_outside_the_main_thread_are_refused() -> None:
    found: list[BaseException] = []

    def work() -> None:
        try:
            engine().run(1, callbacks=[hg.callbacks.StopOnRequest()])
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread only" in str(found[0])


def test_early_stopping_goes_on_counting(tmp_path: Path) -> None:
    def callbacks() -> list[hg.callbacks.Callback]:
        stopper = hg.callbacks.EarlyStopping("upper.loss", patience=4, min_change=1e9)
        return [stopper, hg.callbacks.EarlyStopping("lower.loss", patience=100), hg.callbacks.Checkpoint(tmp_path)]

    engine().run(3, callbacks=callbacks())
    run = engine()
    assert len(run.run(100, callbacks=callbacks(), resume=tmp_path)) == 2  # the fifth step is the fourth stale one
    assert len(engine().run(100, callbacks=callbacks(), resume=tmp_path)) == 0, "it stays stopped"


def test_weights_and_biases_logs_to_the_same_run_after_a_resume(monkeypatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, sorted(values)[:1]))

        def finish(self) -> None:
            calls.append("finish")

    module = types.ModuleType("wandb")
    module.init = lambda **options: (calls.append(options), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)

    def callbacks() -> list[hg.callbacks.Callback]:
        return [hg.callbacks.WandB(every=2, project="p"), hg.callbacks.Checkpoint(tmp_path)]

    engine().run(3, callbacks=callbacks())
    assert calls == [{"project": "p"}, (0, ["lower/loss"]), (2, ["lower/loss"]), "finish"]
    calls.clear()
    engine().run(5, callbacks=callbacks(), resume=tmp_path)
    assert calls[0] == {"project": "p", "id": "abc", "resume": "allow"} and calls[1][0] == 4


def test_weights_and_biases_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        hg.callbacks.WandB()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hg.callbacks.JSONLines("nowhere", every=0), "every must be >= 1"),
        (lambda: hg.callbacks.WandB(every=0), "every must be >= 1"),
        (lambda: hg.callbacks.Checkpoint("nowhere", every=0), "every must be >= 1"),
        (lambda: hg.callbacks.Checkpoint("nowhere", keep=0), "keep must be >= 1"),
        (lambda: hg.callbacks.StopOnRequest(interval=-1.0), "interval must be >= 0"),
        (lambda: hg.callbacks.EarlyStopping("a.loss", patience=1, every=0), "every must be >= 1"),
    ],
)
def test_options_out_of_range_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_plot_draws_what_the_lines_hold(tmp_path: Path, capsys) -> None:
    from hypergrad import plot

    engine().run(4, callbacks=[hg.callbacks.JSONLines(tmp_path / "log.jsonl", every=1)])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "upper.loss": null}\n{"step": 5, "cut')
    drawn = plot.panels(plot.read(tmp_path / "log.jsonl"))
    assert list(drawn) == [
        "losses",
        "hypergradient norms",
        "residuals of the solves",
        "stationarity of the solutions",
        "metrics",
        "share of the host's time, %",
    ]
    steps, values = drawn["losses"]["upper"]
    assert steps == [0, 1, 2, 3, 4] and values[4] != values[4], "a value that is not finite is a gap"
    assert command(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no file of JSON lines"),
        ({"a.jsonl": "", "b.jsonl": ""}, r"holds 2 files \(a.jsonl, b.jsonl\)"),
        ({"a.jsonl": ""}, "has no whole line"),
        ({"a.jsonl": "no json\n"}, "line 1 is no JSON"),
        ({"a.jsonl": '{"loss": 1}\n'}, "line 1 has no step"),
    ],
)
def test_plot_says_what_it_cannot_draw(content: dict[str, str], message: str, tmp_path: Path, capsys) -> None:
    import re

    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert command(["plot", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)
