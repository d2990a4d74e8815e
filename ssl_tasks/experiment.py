"""The run: every arm under every seed, from one start, measured alike, recorded at once, reported at the end."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

import hypergrad as hg
from ssl_tasks import evaluate, figures, report
from ssl_tasks.datasets import Data
from ssl_tasks.pipeline import Advance, downstream, pretrained, start
from ssl_tasks.pretext import Backbone
from ssl_tasks.saving import save_backbone, write_json
from ssl_tasks.store import Row, Store
from ssl_tasks.system import Arm, Experiment, Trial


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a comparison is run.

    Attributes:
        preset: the settings that the other options start from: small for two cores and five minutes, paper as published
            (GPUs), tiny for a test.
        seeds: how many; arms are paired by seed.
        first_seed: the first of them.
        out: folder for the results; runs/NAME if not given.
        resume: go on with what an interrupted run left in the folder; the results are those of a run in one piece.
        keep: whose backbones are saved as safetensors: of the first seed, of all, of none.
        device: a torch device, for example cuda.
        threads: torch threads; torch's own choice if not given.
    """

    preset: str = "small"
    seeds: int = 2
    first_seed: int = 0
    out: Path | None = None
    resume: bool = False
    keep: Literal["first", "all", "none"] = "first"
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("seeds", self.seeds), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")


def run(experiment: Experiment, how: Run, out: Path, settings: Mapping[str, Any] | None = None) -> list[Row]:
    """Run every arm under every seed, print the table, write results and figures into `out`, return the rows.

    After each arm its seed's file is rewritten, so that a run that is cut short leaves what it had; `how.resume` goes
    on from there. An arm's results depend on its seed and the options only, not on the arms before it.

    Args:
        experiment: what is compared.
        how: seeds, device, resuming.
        out: folder for results.json, figure.png, seeds/ and backbones/.
        settings: everything that decides a result, for the record and for `resume`.
    """
    seeds = range(how.first_seed, how.first_seed + how.seeds)
    store = Store(out / "seeds", {**(settings or {}), "device": how.device})
    store.begin(resume=how.resume)
    began = time.perf_counter()
    _check(experiment, how)
    rows: list[Row] = []
    steps = experiment.pretraining.steps + sum(arm.steps for arm in experiment.arms.values())
    with report.progress(len(seeds) * steps, experiment.title) as advance:
        for seed in seeds:
            done = {row.arm: row for row in store.rows(seed)}
            if set(done) >= set(experiment.arms):
                advance(steps, f"seed {seed}, already there")
            else:
                for row in _arms(experiment, how, out, seed, set(done), advance):
                    done[row.arm] = row
                    store.put(seed, [done[name] for name in experiment.arms if name in done])
            rows += [done[name] for name in experiment.arms]
            _record(out, rows, experiment, how, settings, time.perf_counter() - began)
    print(report.table(rows, over=experiment.over, columns=experiment.columns, paired=experiment.paired))
    figures.draw(out, rows, experiment)
    return rows


def _check(experiment: Experiment, how: Run) -> None:
    """Let every arm that can build its graph on an untrained backbone, so that what does not fit is said at once."""
    if any(arm.check for arm in experiment.arms.values()):
        data = experiment.load(how.first_seed).to(how.device)
        with _seeded(how.first_seed):
            begun = start(experiment.pretraining, data, seed=how.first_seed)
            for arm in experiment.arms.values():
                if arm.check:
                    arm.check(Trial(copy.deepcopy(begun), data, how.first_seed))


def _arms(experiment: Experiment, how: Run, out: Path, seed: int, done: set[str], advance: Advance) -> Iterator[Row]:
    """Yield the rows of one seed's arms that are not done yet, each as soon as it is there."""
    data = experiment.load(seed).to(how.device)
    advance(0, f"seed {seed}, pretraining")
    with _seeded(seed):
        begun = pretrained(experiment.pretraining, data, seed=seed, advance=advance)
    for name, arm in experiment.arms.items():
        advance(arm.steps if name in done else 0, f"seed {seed}, {name}")
        if name not in done:
            with _seeded(seed):
                yield _row(experiment, how, out, name, arm, begun, data, seed, advance)


def _row(
    experiment: Experiment,
    how: Run,
    out: Path,
    name: str,
    arm: Arm,
    begun: Backbone,
    data: Data,
    seed: int,
    advance: Advance,
) -> Row:
    board = _Board(out / "tensorboard" / f"{_slug(name)}-seed-{seed}")
    trial = Trial(copy.deepcopy(begun), data, seed, advance, (_Advance(advance), board))
    clock = time.perf_counter()
    trained = arm.train(trial)
    if data.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - clock
    measures = downstream(trained, data, experiment.evaluation, experiment.pretraining, seed=seed)
    measures |= dict(experiment.extra(trained, trial)) if experiment.extra else {}
    first = seed == how.first_seed
    if how.keep == "all" or (how.keep == "first" and first):
        own = experiment.pretraining
        about = {"arm": name, "seed": seed, "encoder": own.encoder, "widths": own.widths, "norm": own.norm}
        path = out / "backbones" / f"{_slug(name)}-seed-{seed}.safetensors"
        save_backbone(path, trained, {**about, "image_shape": data.image_shape})
    chosen = data.test.images[:500]
    plane = evaluate.plane(trained, chosen) if first else torch.empty(0, 2)
    labels = data.test.labels[: len(plane)].tolist()
    points = [[round(x, 4), round(y, 4), label] for (x, y), label in zip(plane.tolist(), labels, strict=True)]
    return Row(name, seed, seconds, {**measures, **trial.noted}, trial.curves, points)


class _Advance(hg.callbacks.Callback):
    """Moves the progress bar with the engine."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step(self, engine: Any, record: Any) -> None:  # noqa: ARG002
        self.advance()


class _Board(hg.callbacks.Callback):
    """TensorBoard's curves of an engine's run, where it is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inner = hg.callbacks.Callback()

    def on_start(self, engine: Any, num_steps: int) -> None:
        if find_spec("tensorboard") is not None:
            self.inner = hg.callbacks.TensorBoard(self.folder)
        self.inner.on_start(engine, num_steps)

    def on_step(self, engine: Any, record: Any) -> None:
        self.inner.on_step(engine, record)

    def on_end(self, engine: Any, history: Any) -> None:
        self.inner.on_end(engine, history)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run with the global generators at `seed` and put them back: an arm draws the same whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _record(
    out: Path,
    rows: Sequence[Row],
    experiment: Experiment,
    how: Run,
    settings: Mapping[str, Any] | None,
    seconds: float,
) -> None:
    against = tuple(dict.fromkeys((experiment.over, *experiment.controls)))
    write_json(
        out / "results.json",
        {
            "options": {"preset": how.preset, "seeds": sorted({row.seed for row in rows}), "device": how.device},
            "settings": settings or {},
            "environment": report.environment(),
            "seconds": seconds,
            "rows": [
                {"arm": row.arm, "seed": row.seed, "seconds": row.seconds, "measures": row.measures} for row in rows
            ],
            "summary": report.summary(rows),
            "paired_gain": {
                measure: report.paired(rows, over=against, measure=measure)
                for measure in experiment.columns
                if measure != "seconds"
            },
        },
    )
