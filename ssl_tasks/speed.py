"""`python -m ssl_tasks.speed`: what vmapped tasks gain over the same tasks in a loop, for BMSSL and GeSSL.

One step of the upper level, everything included, with all tasks under one vmap (`chunk` = their number), one after the
other (`chunk=1`, our own loop), and as the engine chooses by itself (`chunk=None`). The three take turns, step by step,
so that a busy machine slows all alike; a ratio is taken within a turn, its median and quartiles over the turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ssl_tasks.encoders import EncoderName
from ssl_tasks.methods.bmssl import BMSSL
from ssl_tasks.methods.gessl import GeSSL
from ssl_tasks.pipeline import start
from ssl_tasks.system import Trial

WIDTHS: dict[EncoderName, tuple[int, ...]] = {"mlp": (256, 64), "convnet": (16, 32, 64)}


@dataclass(frozen=True)
class Ratio:
    """How many times as long a step takes in a loop: median and quartiles over turns, and the median milliseconds."""

    system: str
    encoder: str
    choice: str
    median: float
    low: float
    high: float
    milliseconds: float
    loop_milliseconds: float

    def __str__(self) -> str:
        times = f"{self.milliseconds:.0f} ms against {self.loop_milliseconds:.0f} ms"
        return (
            f"{self.system} {self.encoder:8} {self.choice:12} {self.median:.2f}x ({self.low:.2f} to {self.high:.2f}), "
            f"{times}"
        )


def measure(system: BMSSL | GeSSL, encoder: EncoderName, *, turns: int = 7) -> list[Ratio]:
    """Return the ratios of `system` with an encoder: all tasks under one vmap, and the engine's own choice.

    Args:
        system: its options; `tasks`, `ways` and the inner steps are what is measured.
        encoder: "mlp" or "convnet".
        turns: how many timed steps of each.
    """
    recipe = replace(system.pretraining, encoder=encoder, widths=WIDTHS[encoder])
    data = system.source.load(0)
    engines = {}
    for choice, chunk in (("loop", 1), ("vmap", system.tasks), ("chosen", None)):
        own = replace(system, pretraining=recipe, chunk=chunk)
        engines[choice] = own.graph(Trial(start(recipe, data, seed=0), data, 0), "unrolled")
        engines[choice].step()  # the first step chooses, and warms up
    times: dict[str, list[float]] = {choice: [] for choice in engines}
    for _ in range(turns):
        for choice, engine in engines.items():
            began = time.perf_counter()
            engine.step()
            times[choice].append(time.perf_counter() - began)
    found = []
    for choice in ("vmap", "chosen"):
        ratios = [slow / fast for slow, fast in zip(times["loop"], times[choice], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = [1000 * statistics.median(times[name]) for name in (choice, "loop")]
        found.append(Ratio(system.name, encoder, choice, middle, low, high, medians[0], medians[1]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 0 if the MLP gains 2x and the convnet's own choice loses nothing."""
    turns = int((list(arguments) if arguments is not None else sys.argv[1:] or ["7"])[0])
    kept = True
    for system in (BMSSL(), GeSSL()):
        for encoder in WIDTHS:
            for ratio in measure(system, encoder, turns=turns):
                print(ratio, flush=True)
                if encoder == "mlp":
                    kept &= ratio.median >= 2
                elif ratio.choice == "chosen":
                    kept &= ratio.median >= 0.95  # within the noise of the loop itself
    print("kept" if kept else "NOT kept")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
