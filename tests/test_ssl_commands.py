"""Every method from one command, on real images inside the package: a table, results.json, figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssl_tasks import cli, speed
from ssl_tasks.__main__ import main
from ssl_tasks.methods.bmssl import BMSSL


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cli.systems()))
def test_every_method_runs_from_one_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [name, "--preset", "tiny", "--seeds", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--ablate"] if name == "gessl" else arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    printed = capsys.readouterr().out
    assert all(row["arm"] in printed for row in found["rows"]) and (tmp_path / "figure.png").stat().st_size > 1000
    if name == "gessl":
        cost = {row["arm"]: row["measures"].get("megabytes") for row in found["rows"]}
        assert cost["depth 4"] > cost["depth 1"] > 0


@pytest.mark.slow
def test_one_vmap_is_not_slower_than_a_loop() -> None:
    """The measurement behind docs/bmssl.md on smaller tasks; its bounds hold on an idle machine only."""
    found = speed.measure(BMSSL(tasks=8, ways=4), "mlp", turns=5)
    assert [ratio.choice for ratio in found] == ["vmap", "chosen"] and found[0].median > 1
    assert "x (" in str(found[0])
