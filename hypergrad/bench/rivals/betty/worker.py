"""betty-ml: two `ImplicitProblem`s in an `Engine`, and one upper backward pass as its `Problem.step` makes it.

.rivals/betty/bin/python hypergrad/bench/rivals/betty/worker.py < requests
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem, IterativeProblem

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder that holds `bench`
from bench.problems.base import Task
from bench.protocol import Offer
from bench.rivals.curvature import step_size
from bench.rivals.holder import Holder, solved_loss
from bench.serving import Contender, Outcome, serve

PRODUCTS = {"cg": "cg_iterations", "neumann": "neumann_iterations"}
"""Methods whose products one option counts."""


class Betty(Contender):
    """Its conjugate gradients, Neumann series and finite difference; its unrolled problems for a lower run."""

    def offers(self, task: Task, size: str) -> list[Offer]:
        """Return conjugate gradients with the right scale and with that of the library's tests, and the others."""
        if task.kind == "unrolled":
            return [] if task.hyper else [Offer("iterative")]
        if task.kind == "tasks":
            return []
        step = step_size(task)
        few = size == "quick"
        return [
            *(Offer("cg", {"cg_iterations": n, "cg_alpha": 1.0}) for n in ((20,) if few else (1, 5, 10, 20, 40, 80))),
            Offer("cg", {"cg_iterations": 20, "cg_alpha": 0.1}),
            *(
                Offer("neumann", {"neumann_iterations": n, "neumann_alpha": step})
                for n in ((20, 160) if few else (10, 40, 160))
            ),
            Offer("darts", {"darts_alpha": 0.01}),
        ]

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
        """Return the upper problem's backward pass."""
        lower_loss, unroll = solved_loss(task), task.kind == "unrolled"

        class Lower(IterativeProblem if unroll else ImplicitProblem):  # type: ignore[misc]
            def training_step(self, batch: Any) -> torch.Tensor:
                loss = task.lower_loss if unroll else lower_loss
                return self.module(loss, self.upper.module.named(), batch)

            def get_batch(self) -> Any:
                return task.lower_batches[0]

        class Upper(ImplicitProblem):  # type: ignore[misc]
            def training_step(self, batch: Any) -> torch.Tensor:
                return task.upper_loss(self.lower.module.named(), self.module.named(), batch)

            def get_batch(self) -> Any:
                return task.upper_batch

        kind = "darts" if unroll else method
        lower_module, upper_module = Holder(task.lower), Holder(task.upper)
        lower = Lower(
            name="lower",
            module=lower_module,
            optimizer=torch.optim.SGD(
                lower_module.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay
            ),
            config=Config(type=kind, unroll_steps=max(task.steps, 1), **settings),
        )
        upper = Upper(
            name="upper",
            module=upper_module,
            optimizer=torch.optim.SGD(upper_module.parameters(), lr=0.0),
            config=Config(type=kind, retain_graph=True),
        )
        Engine(
            problems=[upper, lower],
            config=EngineConfig(strategy="cpu"),
            dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
        )
        lower.cur_batch = lower.get_batch()

        def run() -> Outcome:
            for _ in task.lower_batches if unroll else ():
                lower.step()
            loss, _ = upper.get_loss(upper.get_batch())
            upper.backward(
                loss=loss,
                params=upper.trainable_parameters(),
                paths=upper.paths,
                retain_graph=upper.config.retain_graph,
            )
            grads = {name: u.grad.clone() for name, u in upper_module.named().items()}
            upper.zero_grad()
            return Outcome(grads, settings.get(PRODUCTS.get(method, "")))

        return run

    def versions(self) -> dict[str, str]:
        """Return those of the library and of PyTorch."""
        return {"betty-ml": version("betty-ml"), "torch": torch.__version__}


if __name__ == "__main__":
    serve(Betty())
