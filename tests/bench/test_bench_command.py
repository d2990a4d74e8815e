"""The command: a user's own problem from end to end, going on after a kill, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypergrad.__main__ import main
from hypergrad.bench import claims_report, pool, report, results
from hypergrad.bench.claims.base import Claim

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OWN = "bench_cases:problem"


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))


def bench(out: Path, *arguments: str) -> int:
    common = ["--contender", "hypergrad", "--threads", "1", "--repeats", "2", "--out", str(out)]
    return main(["bench", *common, *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that was killed after its first row and then went on."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "hypergrad", "bench", "--contender", "hypergrad", "--threads", "1"]
    command += ["--repeats", "2", "--out", str(out), "--problem", OWN, "--method", "CG", "OneStep"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path = out / "results.json"
    while process.poll() is None and not (path.exists() and json.loads(path.read_text())["rows"]):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / "before.json").write_text(path.read_text())
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return out


def test_a_killed_run_goes_on_where_it_was(finished) -> None:
    before = json.loads((finished / "before.json").read_text())["rows"]
    after = json.loads((finished / "results.json").read_text())["rows"]
    assert 1 <= len(before) < len(after)
    assert after[: len(before)] == before, "what was measured is not measured again"
    labels = [row["method"] for row in after]
    assert len(labels) == len(set(labels))


def test_results_follow_the_schema(finished) -> None:
    content = json.loads((finished / "results.json").read_text())
    assert content["schema"] == results.SCHEMA
    assert set(content) == {"schema", "run", "hardware", "versions", "commit", "problems", "skipped", "rows"}
    assert {"cpu", "cores", "memory_gib", "system"} == set(content["hardware"])
    assert {"python", "torch", "numpy", "hypergrad"} <= set(content["versions"])
    facts = content["problems"][OWN]
    assert (facts["kind"], facts["num_lower"], facts["num_upper"]) == ("implicit", 6, 6)
    assert "dense Hessian" in facts["reference"]["how"]
    row = {row["method"]: row for row in content["rows"]}["CG 20"]
    assert row["error"] is None
    assert row["relative_error"] < 1e-5, "6 unknowns, float32"
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert len(row["seconds"]) == 2
    assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
    assert row["num_products"] == 6
    assert row["num_gradients"] == 1
    assert row["peak_bytes"] >= 0
    again = results.load(finished / "results.json")
    assert [r.encode() for r in again.rows] == content["rows"]


def test_the_report_shows_table_and_figure(finished) -> None:
    text = (finished / "report.md").read_text()
    assert f"## {OWN}" in text
    assert "| hypergrad | CG 20 |" in text.replace("**", "")
    assert " | **" in text, "somebody is on the front"
    assert "bench_cases-problem.png" in text
    assert (finished / "bench_cases-problem.png").stat().st_size > 5000


def test_another_run_in_the_same_folder_is_refused(finished, capsys) -> None:
    assert bench(finished, "--problem", OWN, "--seed", "7") == 2
    message = capsys.readouterr().err
    assert re.search(r"was begun with seed 0, and now it is 7.*--restart", message)


def test_a_file_that_is_no_results_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "results.json").write_text("{")
    assert bench(tmp_path, "--problem", OWN) == 2
    assert "is not a results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"schema": 0}')
    assert bench(tmp_path, "--problem", OWN) == 2
    assert "is not of schema 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "huge"], r"no suite 'huge'. Known are: quick, full"),
        (["--problem", "rigde"], r"no problem 'rigde'. Known are: .*logistic.*ridge.*module:function"),
        (["--contender", "higer"], r"no contender 'higer'. Known are: hypergrad"),
        (["--claims", "speed"], r"no claim 'speed'. Known are: .*scaling.*all"),
        (["--repeats", "0"], r"--repeats must be positive, got 0"),
        (["--out", "/proc/nowhere"], r"cannot write to the folder '/proc/nowhere'.*--out"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path, capsys) -> None:
    given = arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path)]
    assert main(["bench", *given]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_environment_names_make_rivals(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(pool, "_ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(pool, "rivals", lambda: ["higher"])
    assert pool.chosen(None) == (["hypergrad"], ["higher"])
    with pytest.raises(ValueError, match=r"'higher' has no environment: .*make rivals.*make rival-higher"):
        pool.chosen(["higher"])


def test_problems_that_fail_are_reported(tmp_path, capsys) -> None:
    names = ["bench_cases:broken", "bench_cases:not_a_task", "bench_cases:absent", "no_such_module:f"]
    assert bench(tmp_path, "--problem", *names) == 0
    errors = {row.problem: row.error for row in results.load(tmp_path / "results.json").rows}
    assert "no data here" in errors[names[0]]
    assert "must return a Task" in errors[names[1]]
    assert "has no function 'absent'" in errors[names[2]]
    assert "module 'no_such_module' cannot be imported" in errors[names[3]]
    assert "failed: " in report.markdown(results.load(tmp_path / "results.json"))
    capsys.readouterr()


def test_claims_are_kept_and_tabled(monkeypatch, tmp_path, capsys) -> None:
    claims = [Claim("faster", 3.2, (3.0, 3.4), ">= 3", True, "a against b"), Claim("lean", 2.0, None, "<= 1", False)]
    monkeypatch.setattr(claims_report.catalogue, "measured", lambda name, threads: claims)
    assert claims_report.measure(["speed"], tmp_path, threads=None) == 1
    said = capsys.readouterr().out
    assert "kept: faster: 3.2 (3 to 3.4), promised >= 3. a against b" in said
    assert "NOT KEPT: lean" in said
    table = (tmp_path / "claims.md").read_text()
    assert "| lean | 2 |  | <= 1 | **no** |  |" in table
    assert [Claim.decode(claim.encode()) for claim in claims] == claims


def test_list_names_everything(capsys) -> None:
    assert main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("ridge", "hypergrad", "scaling"))
