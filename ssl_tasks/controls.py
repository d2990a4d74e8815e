"""The arms that every method is compared with: the start as it is, and more of the same pretext."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ssl_tasks.pipeline import pretrain, views
from ssl_tasks.recipes import Pretraining
from ssl_tasks.system import Arm, Trial

CONVENTIONAL, SAME_STEPS, SAME_COST = "conventional", "extra pretext steps", "extra pretext, same cost"
CONTROLS = (CONVENTIONAL, SAME_STEPS, SAME_COST)


def controls(pretraining: Pretraining, *, steps: int, cost: int, batch_size: int | None = None) -> dict[str, Arm]:
    """Return the three controls, all with a cosine schedule from a third of the first learning rate.

    Args:
        pretraining: the recipe that they go on with.
        steps: pretext steps that match the method's in number.
        cost: pretext steps that take as long as the method.
        batch_size: images a step, if not the recipe's: as many as a step of the method sees.
    """
    recipe = pretraining if batch_size is None else replace(pretraining, batch_size=batch_size)
    return {
        CONVENTIONAL: Arm(lambda trial: trial.backbone.encoder),
        SAME_STEPS: more_pretraining(recipe, steps),
        SAME_COST: more_pretraining(recipe, cost),
    }


def more_pretraining(recipe: Pretraining, steps: int) -> Arm:
    """Return the arm that trains on for `steps` pretext steps."""

    def train(trial: Trial) -> nn.Module:
        pretrain(
            trial.backbone,
            views(recipe, trial.data, seed=trial.seed + 10_000),
            recipe,
            steps=steps,
            learning_rate=recipe.learning_rate / 3,
            advance=trial.advance,
        )
        return trial.backbone.encoder

    return Arm(train, steps)
