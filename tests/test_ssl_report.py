"""Tables, results.json, figures and the command line of the SSL systems."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from scipy import stats

from ssl_tasks import cli, report
from ssl_tasks.__main__ import main
from ssl_tasks.controls import CONTROLS, CONVENTIONAL, SAME_STEPS
from ssl_tasks.methods.bissl import BiSSL
from ssl_tasks.methods.conventional import Conventional
from ssl_tasks.saving import write_json
from ssl_tasks.store import Row


def _rows() -> list[Row]:
    table = {"a": [50.0, 52.0, 51.0], "b": [53.0, 54.0, 55.0]}
    return [
        Row(arm, seed, 1.0, {"probe": value, "fine_tuned": value + 5})
        for arm, values in table.items()
        for seed, value in enumerate(values)
    ]


def test_estimates_are_mean_standard_error_and_the_t_bound() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    estimate = report.Estimate.of(values)
    assert (estimate.mean, estimate.count) == (3.5, 4)
    assert estimate.stderr == pytest.approx(stats.sem(values))
    low, _ = stats.t.interval(0.9, 3, loc=3.5, scale=stats.sem(values))
    assert estimate.lower_bound() == pytest.approx(low)
    assert str(estimate) == "3.5 +- 1.3" and str(report.Estimate.of([2.0])) == "2.00"
    assert math.isnan(report.Estimate.of([2.0]).lower_bound())
    with pytest.raises(ValueError, match="at least one value"):
        report.Estimate.of([])


def test_gains_are_paired_by_seed() -> None:
    assert report.gains(_rows(), over="a", measure="probe") == {"b": [3.0, 2.0, 4.0]}
    with pytest.raises(ValueError, match="no rows of 'c'"):
        report.gains(_rows(), over="c", measure="probe")


def test_the_table_has_a_line_for_each_arm() -> None:
    text = report.table(_rows(), over="a", columns={"probe": "probe %", "seconds": "s"}, paired="probe")
    lines = text.splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["b", "54.0", "+-", "0.6", "1.00", "+-", "0.00", "3.0", "+-", "0.6", "1.3"]


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_json(path, {"estimate": report.Estimate.of([2.0]), "list": (1, math.inf)})
    assert json.loads(path.read_text()) == {
        "estimate": {"mean": 2.0, "stderr": None, "count": 1},
        "list": [1, None],
    }
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert json.loads(path.read_text())["list"] == [1, None]


def test_the_environment_names_versions_and_no_path() -> None:
    found = report.environment()
    assert {"python", "torch", "cores", "threads", "gpu", "commit"} <= set(found)
    assert not any("/" in str(value) for value in found.values())


def test_the_conventional_run_leaves_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conventional", "--preset", "tiny", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CONTROLS)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["source"]["data"] == "digits" and len(found["rows"]) == 6
    assert found["options"]["seeds"] == [0, 1]
    assert set(found["summary"]) == set(CONTROLS)
    assert found["paired_gain"]["probe"][SAME_STEPS][CONVENTIONAL]["gain"]["count"] == 2
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mistakes = {
        ("conventional", "--data", "fashion-full"): "ssl_tasks: 'fashion-full' needs the folder that holds train-im",
        ("conventional", "--data", "folder", "--folder", str(tmp_path / "no")): "is no folder; 'folder' is read from",
        ("conventional", "--size", "100"): "ssl_tasks: size must lie between 1 and 16 for 'digits', got 100",
        ("conventional", "--seeds", "0"): "ssl_tasks: --seeds must be at least 1, got 0",
        ("bissl", "--method", "unrolled"): "problem 'pretext': every=2 lets the upper parameters move on",
        (
            "bissl",
            "--method",
            "reptile",
        ): "problem 'pretext': Reptile moves the level above towards the run's end; give",
    }
    for arguments, message in mistakes.items():
        assert main([*arguments, "--preset", "tiny", "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simclr"], "unknown method 'simclr'; expected one of bissl, "),
        (["bissl", "--preset", "huge"], "bissl has no preset 'huge'; expected one of tiny, small, paper"),
        (["bissl", "--data", "mnist"], "mnist"),
        ([], "usage: python -m ssl_tasks NAME"),
    ],
)
def test_a_wrong_word_ends_with_the_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and message in printed.out + printed.err


def test_help_explains_every_option_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    for name, system in cli.systems().items():
        with pytest.raises(SystemExit) as stop:
            cli.parse([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for option in ("--preset", "--data", "--folder", "--seeds", "--resume", "--out", "--device"):
            assert option in text
        for option in fields(system):  # type: ignore[arg-type]
            assert option.name in ("source", "maml", "guide") or f"--{option.name.replace('_', '-')}" in text
        documented = "Attributes:" in (system.__doc__ or "")
        assert documented and all(f"\n        {f.name}: " in system.__doc__ for f in fields(system))  # type: ignore
        assert {"tiny", "small", "paper"} <= set(system.presets())
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    text = capsys.readouterr().out
    assert all(system.about in text for system in cli.systems().values())


def test_options_are_typed_and_begin_at_the_preset() -> None:
    how, system = cli.parse(["bissl", "--method", "cg", "neumann", "--seeds", "5", "--size", "10"])
    assert isinstance(system, BiSSL) and system.method == ("cg", "neumann") and system.source.size == 10
    assert how.seeds == 5 and how.preset == "small" and not how.resume
    _, system = cli.parse(["conventional", "--preset", "tiny", "--pretraining.steps", "3"])
    assert isinstance(system, Conventional) and system.pretraining.steps == 3 and system.steps == 4


def test_what_gains_are_over_must_be_an_arm() -> None:
    own = Conventional().experiment()
    with pytest.raises(ValueError, match=r"gains are measured against \['nothing'\], which are not among the arms"):
        replace(own, over="nothing")
    with pytest.raises(ValueError, match=r"the measures \['sigma'\] are drawn or compared, but are no columns"):
        replace(own, paired="sigma")
