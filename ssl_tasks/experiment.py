"""A comparison: for every seed one pretrained backbone, and from it every arm, measured alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from ssl_tasks import report
from ssl_tasks.datasets import Data, load
from ssl_tasks.pipeline import Backbone, measure, pretrain, pretrained, views
from ssl_tasks.recipes import Recipe

COLUMNS = {
    "probe": "probe %",
    "fine_tuned": "fine-tuned %",
    "knn": "k-NN %",
    "effective_rank": "rank",
    "seconds": "s",
}
CONVENTIONAL, EXTRA_STEPS, EXTRA_COST = "conventional", "extra pretext steps", "extra pretext, same cost"


@dataclass(frozen=True)
class Trial:
    """What an arm receives: a backbone of its own to train, the data, the recipe, the seed, the progress bar.

    `noted` takes numbers that the arm wants beside its measures in results.json.
    """

    backbone: Backbone
    data: Data
    recipe: Recipe
    seed: int
    advance: Callable[[], None]
    noted: dict[str, float] = field(default_factory=dict)


Arm = Callable[[Trial], nn.Module]
"""Trains on from the trial's backbone and returns the encoder that is measured."""


def conventional(trial: Trial) -> nn.Module:
    """Return the pretrained encoder as it is: pretrain, then fine-tune."""
    return trial.backbone.encoder


def more_pretraining(steps: Callable[[Recipe], int]) -> Arm:
    """Return the arm that trains on for `steps(recipe)` pretext steps, at a third of the first learning rate."""

    def arm(trial: Trial) -> nn.Module:
        own = trial.recipe.pretraining
        pretrain(
            trial.backbone,
            views(own, trial.data, seed=trial.seed + 10_000),
            steps=steps(trial.recipe),
            learning_rate=own.learning_rate / 3,
            temperature=own.temperature,
            advance=trial.advance,
        )
        return trial.backbone.encoder

    return arm


def same_steps(recipe: Recipe) -> int:
    """Return the pretext steps that the BiSSL stage takes at its lower level."""
    return recipe.alignment.alternations * recipe.alignment.lower_steps


def same_gradients(recipe: Recipe) -> int:
    """Return the pretext steps that cost as many gradients as the BiSSL stage, a Hessian product counted as two.

    A turn: N_L lower gradients, the tape (two), and for each upper step its products and two downstream
    gradients.
    """
    own = recipe.alignment
    return own.alternations * (own.lower_steps + 2 + own.upper_steps * (2 * own.products + 2))


def controls() -> dict[str, Arm]:
    """Return the arms that every method is compared with."""
    return {
        CONVENTIONAL: conventional,
        EXTRA_STEPS: more_pretraining(same_steps),
        EXTRA_COST: more_pretraining(same_gradients),
    }


def run(
    title: str,
    arms: Mapping[str, Arm],
    recipe: Recipe,
    *,
    data: str,
    folder: str | None = None,
    seeds: Sequence[int],
    out: Path,
    device: str = "cpu",
    options: Mapping[str, object] | None = None,
) -> list[report.Row]:
    """Run every arm under every seed, print the table, write results.json and figure.png, return the rows.

    results.json is rewritten after every seed, so that a run that is cut short leaves what it had.

    Args:
        title: of the run, the progress bar and the figure.
        arms: name -> arm; "conventional" must be among them, gains are over it.
        recipe: sizes and steps.
        data: name for `ssl_tasks.datasets.load`.
        folder: for "fashion-full".
        seeds: at least one; each draws splits, weights, batches and augmentations.
        out: folder for results.json and figure.png.
        device: where everything runs.
        options: what the command line said, for the record.
    """
    if CONVENTIONAL not in arms:
        raise ValueError(f"the arm {CONVENTIONAL!r} is what gains are measured against; got {list(arms)}.")
    if not seeds:
        raise ValueError("at least one seed is needed.")
    rows: list[report.Row] = []
    began = time.perf_counter()
    with report.progress(len(seeds) * _steps(recipe, arms), title) as advance:
        for seed in seeds:
            sets = load(
                data,
                seed=seed,
                folder=folder,
                size=recipe.size,
                shift=recipe.shift,
                num_labels=recipe.num_labels,
                num_validation=recipe.num_validation,
                num_pretext=recipe.num_pretext,
            ).to(device)
            advance(0, f"seed {seed}, pretraining")
            backbone = pretrained(recipe.pretraining, sets, seed=seed, advance=advance)
            for name, arm in arms.items():
                advance(0, f"seed {seed}, {name}")
                start = time.perf_counter()
                trial = Trial(copy.deepcopy(backbone), sets, recipe, seed, advance)
                trained = arm(trial)
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                measures = {**measure(trained, sets, recipe, seed=seed), **trial.noted}
                rows.append(report.Row(name, seed, seconds, measures))
            _record(out, rows, recipe, data, seeds, options, time.perf_counter() - began)
    print(report.table(rows, over=CONVENTIONAL, columns=COLUMNS, paired="probe"))
    shown = {"probe": "linear probe, before fine-tuning", "fine_tuned": "fine-tuned"}
    if len(arms) > 1:
        heading = f"{title}: {data}, shifted domain"
        report.figure(out / "figure.png", rows, over=CONVENTIONAL, measures=shown, title=heading)
    return rows


def _steps(recipe: Recipe, arms: Mapping[str, Arm]) -> int:
    """Return what the bar counts for one seed: lower steps, of pretraining and of every arm but the first."""
    others = len([name for name in arms if name not in (CONVENTIONAL, EXTRA_COST)])
    return recipe.pretraining.steps + others * same_steps(recipe) + (EXTRA_COST in arms) * same_gradients(recipe)


def _record(
    out: Path,
    rows: Sequence[report.Row],
    recipe: Recipe,
    data: str,
    seeds: Sequence[int],
    options: Mapping[str, object] | None,
    seconds: float,
) -> None:
    arms = {row.arm for row in rows}
    paired: dict[str, dict[str, dict[str, object]]] = {}
    for over in [name for name in (CONVENTIONAL, EXTRA_STEPS, EXTRA_COST) if name in arms]:
        for arm, values in report.gains(rows, over=over, measure="probe").items():
            estimate = report.Estimate.of(values)
            bound = estimate.lower_bound()
            paired.setdefault(arm, {})[over] = {"gain": estimate, "lower_bound_95": bound, "values": values}
    report.write_json(
        out / "results.json",
        {
            "options": {**(options or {}), "data": data, "seeds": list(seeds)},
            "recipe": asdict(recipe),
            "environment": report.environment(),
            "seconds": seconds,
            "rows": [asdict(row) for row in rows],
            "summary": report.summary(rows),
            "paired_probe_gain": paired,
        },
    )
