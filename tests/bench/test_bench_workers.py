"""Workers: what is timed and counted, and failures that stay in the process that fails."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_cases import problem

import hypergrad as hg
from hypergrad.bench import measure, pareto, report, serving
from hypergrad.bench.contenders import ladder
from hypergrad.bench.measure import Row
from hypergrad.bench.pool import Pool
from hypergrad.bench.protocol import Offer, Request, Response
from hypergrad.bench.weighing import peak_bytes
from hypergrad.bench.worker import Hypergrad


class Fixed(serving.Contender):
    """Answers with what a test wants."""

    def __init__(self, function):
        self.function = function

    def offers(self, task, size):
        return [Offer("fixed", {"a": 1})]

    def prepare(self, task, method, settings):
        return lambda: self.function(task)

    def versions(self):
        return {"fixed": "1"}


def attempt(function, tmp_path, **options) -> Response:
    request = Request("own", method="fixed", out=str(tmp_path), repeats=1, **options)
    return serving._attempt(Fixed(function), problem(), request)


def exact(task):
    matrix, w = task.lower_batches[0], task.lower["w"]
    return serving.Outcome({"u": torch.linalg.solve(matrix, w - task.upper_batch) + 0.2 * task.upper["u"]})


def wrong(task):
    return serving.Outcome({"u": -2 * exact(task).gradient["u"]})


def test_messages_survive_the_wire() -> None:
    request = Request("ridge", method="CG", settings={"K": 3}, out="x")
    assert Request.decode(request.encode()) == request
    response = Response(ok=True, seconds=[0.1], offers=[Offer("a", {"b": 1})], facts={"kind": "implicit"})
    assert Response.decode(response.encode()) == response
    assert Response.decode("warming up ...") is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda task: 1 / 0, "ZeroDivisionError"),
        (lambda task: os.kill(os.getpid(), signal.SIGKILL), "without an answer .signal SIGKILL"),
        (lambda task: time.sleep(30), "did not finish within 0.5 s"),
    ],
)
def test_a_failure_stays_in_its_process(function, message, tmp_path, capfd) -> None:
    response = attempt(function, tmp_path, limit=0.5)
    assert not response.ok
    assert re.search(message, response.error)
    assert attempt(exact, tmp_path).ok, "the next attempt is unharmed"


def test_a_wrong_rival_is_shown_as_wrong_and_not_as_fast(tmp_path) -> None:
    truth = {name: g.numpy() for name, g in exact(problem(dtype=torch.float64)).gradient.items()}
    rows = []
    for library, function, seconds in (("ours", exact, 0.2), ("rival", wrong, 0.1)):
        response = replace(attempt(function, tmp_path), seconds=[seconds])
        rows.append(measure.row("own", library, Offer("fixed"), response, tmp_path, truth))
    ours, rival = rows
    assert ours.relative_error < 1e-5
    assert rival.relative_error == pytest.approx(3, rel=1e-5)
    assert rival.cosine == pytest.approx(-1, rel=1e-5)
    assert pareto.front(rows) == [ours], "the wrong one is faster, and does not count"
    lines = report.table(rows)
    assert any(line.startswith("| ours | **fixed** |") for line in lines)
    assert any(line.startswith("| rival | fixed | 3.0e+00 | -1.0000 |") and "*wrong*" in line for line in lines)


def test_a_gradient_that_is_not_finite_has_no_error_but_a_remark() -> None:
    error, cosine = measure.compare({"u": np.array([np.nan, 1.0])}, {"u": np.ones(2)})
    assert error is None and cosine is None
    row = Row("p", "rival", "m", seconds=[1.0], median=1.0, lower_quartile=1.0, upper_quartile=1.0)
    assert "*wrong*: not finite" in report.table([row])[-1]
    assert pareto.front([row]) == []


def test_a_gradient_with_other_names_is_an_error(tmp_path) -> None:
    response = attempt(lambda task: serving.Outcome({"v": torch.ones(2)}), tmp_path)
    row = measure.row("own", "rival", Offer("fixed"), response, tmp_path, {"u": np.ones(2)})
    assert row.error == "the gradient has entries ['v'], the reference ['u']"


def test_the_front_is_cheapest_for_each_accuracy() -> None:
    def row(name, error, seconds):
        return Row("p", "a", name, relative_error=error, median=seconds)

    rows = [row("slow", 1e-6, 3.0), row("mid", 1e-2, 2.0), row("beaten", 1e-2, 2.5), row("fast", 0.5, 1.0)]
    assert [r.method for r in pareto.front(rows)] == ["fast", "mid", "slow"]


def test_memory_of_a_call_is_seen() -> None:
    taken = peak_bytes(lambda: torch.ones(16 * 2**20 // 4).sum())
    assert 15 * 2**20 < taken < 24 * 2**20


def test_every_exported_method_is_a_contender() -> None:
    offered = set()
    task = problem()
    for kind in ("implicit", "unrolled", "tasks"):
        for size in ("quick", "full"):
            offered |= {type(m) for m in ladder(replace(task, kind=kind, steps=10), size).values()}
    exported = {m for m in vars(hg.methods).values() if isinstance(m, type) and issubclass(m, hg.Method)}
    concrete = {m for m in exported if not m.__abstractmethods__}
    assert concrete - offered == {hg.Reptile}, "Reptile yields a direction, not a gradient"


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="no method 'CGG' for problem 'own'. Known are: CG 5"):
        Hypergrad().prepare(problem(), "CGG", {})
    with pytest.raises(ValueError, match="must be an hg.Method"):
        Hypergrad().prepare(problem(), "bench_cases:problem", {})


def test_a_worker_that_dies_is_reported_and_started_again(tmp_path, monkeypatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys; print('noise', flush=True); print('out of luck', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr("hypergrad.bench.pool._command", lambda library: [sys.executable, str(script)])
    with Pool(Path(tmp_path / "logs")) as workers:
        for _ in range(2):
            answer = workers.ask("rival", Request("ridge"))
            assert not answer.ok
            assert "'rival' ended with exit status 3: out of luck" in answer.error
