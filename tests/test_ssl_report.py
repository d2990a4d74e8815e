"""Tables, results.json, figures and the command line of the SSL systems."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from ssl_tasks import cli, experiment, report
from ssl_tasks.__main__ import main
from ssl_tasks.recipes import PRESETS


def _rows() -> list[report.Row]:
    table = {"a": [50.0, 52.0, 51.0], "b": [53.0, 54.0, 55.0]}
    return [
        report.Row(arm, seed, 1.0, {"probe": value, "fine_tuned": value + 5})
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
    assert str(estimate) == "3.5 +- 1.3" and str(report.Estimate.of([2.0])) == "2.0"
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
    assert lines[3].split() == ["b", "54.0", "+-", "0.6", "1.0", "+-", "0.0", "3.0", "+-", "0.6", "1.3"]


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    report.write_json(path, {"estimate": report.Estimate.of([2.0]), "list": (1, math.inf)})
    assert json.loads(path.read_text()) == {
        "estimate": {"mean": 2.0, "stderr": None, "count": 1},
        "list": [1, None],
    }
    with pytest.raises(TypeError):
        report.write_json(path, {"bad": object()})
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert json.loads(path.read_text())["list"] == [1, None]


def test_the_environment_names_versions_and_no_path() -> None:
    found = report.environment()
    assert {"python", "torch", "cores", "threads", "gpu", "commit"} <= set(found)
    assert not any("/" in str(value) for value in found.values())


def test_the_conventional_run_leaves_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["conventional", "--preset", "tiny", "--data", "digits", "--seeds", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in experiment.controls())
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["options"]["data"] == "digits" and len(found["rows"]) == 6
    assert found["options"]["seeds"] == [0, 1]
    assert set(found["summary"]) == set(experiment.controls())
    assert found["paired_probe_gain"][experiment.EXTRA_STEPS][experiment.CONVENTIONAL]["gain"]["count"] == 2
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    again = tmp_path / "again"
    assert main([*arguments[:5], "--seeds", "1", "--out", str(again)]) == 0
    repeated = json.loads((again / "results.json").read_text())["rows"]
    assert [row["measures"] for row in repeated] == [row["measures"] for row in found["rows"][:3]]


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["conventional", "--preset", "tiny", "--data", "fashion-full", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("ssl_tasks: 'fashion-full' needs the folder")
    with pytest.raises(SystemExit):
        cli.parse(["conventional", "--seeds", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(["bissl", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--preset", "--data", "--folder", "--seeds", "--first-seed", "--out", "--device", "--method"):
        assert option in text
    assert all(method in text for method in cli.METHODS) and all(preset in text for preset in PRESETS)


def test_options_are_typed() -> None:
    options = cli.parse(["bissl", "--method", "cg", "neumann", "cg", "--seeds", "5"])
    assert options.method == ("cg", "neumann") and options.seeds == 5 and options.out == Path("runs/bissl")
    assert "out" not in options.record()


def test_a_run_wants_its_reference_and_a_seed(tmp_path: Path) -> None:
    recipe = PRESETS["tiny"]
    with pytest.raises(ValueError, match="the arm 'conventional' is what gains are measured against"):
        experiment.run("x", {}, recipe, data="digits", seeds=[0], out=tmp_path)
    with pytest.raises(ValueError, match="at least one seed"):
        experiment.run("x", experiment.controls(), recipe, data="digits", seeds=[], out=tmp_path)
