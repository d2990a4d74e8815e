"""A run that is cut short: what was finished is whole, going on gives what one piece would have given."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_tasks import experiment
from ssl_tasks.__main__ import main
from ssl_tasks.encoders import encoder
from ssl_tasks.experiment import Run, run
from ssl_tasks.methods.conventional import Conventional
from ssl_tasks.saving import save_backbone, whole
from ssl_tasks.store import Row, Store
from ssl_tasks.system import Arm, Experiment, Trial

TINY = Conventional.presets()["tiny"]


def _noisy(trial: Trial) -> nn.Module:
    """Draw from the global generator, so that a result would show what ran before."""
    with torch.no_grad():
        for p in trial.backbone.encoder.parameters():
            p.add_(0.01 * torch.randn_like(p))
    trial.noted["drawn"] = float(torch.rand(()))
    return trial.backbone.encoder


def _experiment(broken: bool = False) -> Experiment:
    def breaks(trial: Trial) -> nn.Module:
        if broken and trial.seed == 1:
            raise KeyboardInterrupt
        return _noisy(trial)

    arms = {"start": Arm(lambda trial: trial.backbone.encoder), "one": Arm(_noisy), "two": Arm(breaks)}
    return Experiment(
        title="test",
        source=TINY.source,
        pretraining=TINY.pretraining,
        evaluation=TINY.evaluation,
        arms=arms,
        over="start",
    )


def test_an_interrupted_run_goes_on_with_identical_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment.figures, "draw", lambda *_: [])
    whole_run = run(_experiment(), Run(seeds=2), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(_experiment(broken=True), Run(seeds=2), tmp_path / "cut")
    left = json.loads((tmp_path / "cut" / "seeds" / "seed-1.json").read_text())
    assert [row["arm"] for row in left["rows"]] == ["start", "one"]
    calls: list[int] = []
    monkeypatch.setattr(experiment, "pretrained", _counted(experiment.pretrained, calls))
    resumed = run(_experiment(), Run(seeds=2, resume=True), tmp_path / "cut")
    assert calls == [1]  # seed 0 was whole
    assert [(r.arm, r.seed, r.measures, r.plane) for r in resumed] == [
        (r.arm, r.seed, r.measures, [list(p) for p in r.plane]) for r in whole_run
    ]
    assert list((tmp_path / "cut").rglob(".*")) == []


def _counted(function, calls: list[int]):  # type: ignore[no-untyped-def]
    def counted(recipe, data, *, seed, advance):  # type: ignore[no-untyped-def]
        calls.append(seed)
        return function(recipe, data, seed=seed, advance=advance)

    return counted


def test_resume_refuses_other_options_and_damage(tmp_path: Path) -> None:
    store = Store(tmp_path, {"method": "x", "pretraining": {"steps": 20}})
    store.put(0, [Row("a", 0, 1.0, {"probe": float("nan")})])
    assert str(store.rows(0)[0].measures["probe"]) == "nan" and store.rows(3) == []
    with pytest.raises(
        ValueError, match=r"made with other options: pretraining\.steps was 20, now 40\. Give the options"
    ):
        Store(tmp_path, {"method": "x", "pretraining": {"steps": 40}}).begin(resume=True)
    (tmp_path / "seed-1.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        store.begin(resume=True)
    store.begin(resume=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device.*file\.json"), whole(path) as part:
            part.write_text("after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["file.json"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        arguments = ["conventional", "--preset", "tiny", "--keep", "none", "--out", str(tmp_path / "out")]
        assert main(arguments) == 1
    assert "No space left on device while writing" in capsys.readouterr().err
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_a_backbone_is_loaded_in_two_lines(tmp_path: Path) -> None:
    net = encoder("resnet18", (3, 16, 16), widths=(8,), norm="batch", seed=0)
    save_backbone(tmp_path / "net.safetensors", net, {"encoder": "resnet18", "seed": 0})
    other = encoder("resnet18", (3, 16, 16), widths=(8,), norm="batch", seed=1)
    from safetensors import safe_open
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / "net.safetensors"))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(net.eval()(images), other.eval()(images))
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata() == {"encoder": '"resnet18"', "seed": "0"}
