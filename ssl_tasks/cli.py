"""The command line: `python -m ssl_tasks SYSTEM ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ssl_tasks.datasets import NAMES
from ssl_tasks.recipes import PRESETS

SYSTEMS = {
    "conventional": "pretrain, probe, fine-tune: the pipeline that every system is compared with",
    "bissl": "BiSSL: align a pretrained backbone with its downstream task (arXiv 2410.02387)",
}
METHODS = {
    "cg": "conjugate gradients with the effective lambda = lambda + delta, as released",
    "damped": "conjugate gradients with delta as plain damping",
    "neumann": "a truncated Neumann series, effective lambda",
    "first-order": "the inverse curvature replaced by the identity",
    "no-implicit": "the same alternation with the implicit term left out",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line said."""

    system: str
    preset: str
    data: str
    folder: str | None
    seeds: int
    first_seed: int
    method: tuple[str, ...]
    out: Path
    device: str
    threads: int | None

    def record(self) -> dict[str, object]:
        """Return the options for results.json, without paths of the machine."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "folder")}


def parser() -> argparse.ArgumentParser:
    """Return the parser; `--help` tells every option and its default."""
    top = argparse.ArgumentParser(
        prog="python -m ssl_tasks",
        description="Self-supervised systems on real images, built on hypergrad.",
        epilog="Every run prints a table and writes results.json and figure.png into --out.",
    )
    systems = top.add_subparsers(dest="system", required=True, metavar="SYSTEM")
    for name, text in SYSTEMS.items():
        own = systems.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        own.add_argument("--preset", choices=list(PRESETS), default="small", help="sizes and steps")
        own.add_argument(
            "--data",
            choices=NAMES,
            default="fashion",
            help="fashion: the images of the package; digits: scikit-learn's; fashion-full: from --folder",
        )
        own.add_argument("--folder", help="folder with Fashion-MNIST's four idx.gz files, for fashion-full")
        own.add_argument("--seeds", type=_positive, default=3, help="how many seeds; arms are paired by seed")
        own.add_argument("--first-seed", type=int, default=0, help="the first of them")
        own.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for results.json and figure.png")
        own.add_argument("--device", default="cpu", help="a torch device, for example cuda")
        own.add_argument("--threads", type=_positive, help="torch threads; torch's own choice if not given")
        if name == "bissl":
            own.add_argument(
                "--method",
                nargs="+",
                choices=list(METHODS),
                default=list(METHODS),
                help="; ".join(f"{method}: {what}" for method, what in METHODS.items()),
            )
    return top


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return the options that `arguments` (default: the process's) spell; exit with the usage if they do not."""
    said = vars(parser().parse_args(arguments))
    return Options(**{**said, "method": tuple(dict.fromkeys(said.get("method", ())))})


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
