"""Checkpoints on disk: written whole or not at all, checked when read, the oldest removed.

One checkpoint is one folder, `step-00000120`, of a few files saved by `torch.save` and a manifest with the size and the
SHA-256 of each, itself under a checksum. It is written under another name and renamed once everything is on the disk,
so that a folder of that name is complete. One flipped bit passes `torch.load` silently; it does not pass the checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _ASIDE = ".writing-", ".damaged"


class DamagedCheckpoint(RuntimeError):
    """A checkpoint on disk is incomplete, or not what was written."""


class Writing:
    """A checkpoint being written: `put` each part, then `commit`; until then nothing of it counts."""

    def __init__(self, folder: Path, step: int) -> None:
        """Make a folder under a name that does not count."""
        self.step = step
        self.target = folder / f"step-{step:08d}"
        self.path = folder / f"{_WRITING}{self.target.name}"
        folder.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)

    def put(self, name: str, part: Any) -> dict[str, Any]:
        """Write one part and return its entry in the manifest."""
        with open(self.path / name, "wb") as file:
            hashed: Any = _Hashed(file)
            try:
                torch.save(part, hashed)
            except RuntimeError:
                if hashed.error is not None:  # torch.save hides what the disk said
                    raise hashed.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": hashed.size, "sha256": hashed.digest.hexdigest()}

    def commit(self, files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
        """Seal the checkpoint and return where it is: from here on it counts.

        Args:
            files: the parts' entries, as `put` returned them.
            facts: what a reader may want to know without opening the parts.
        """
        body = {"format": _FORMAT, "step": self.step, "torch": torch.__version__, **facts, "files": files}
        text = json.dumps(body, indent=1).encode()
        with open(self.path / MANIFEST, "wb") as file:
            file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
            file.flush()
            os.fsync(file.fileno())
        _sync(self.path)
        if self.target.exists():  # saved before at this step
            older = self.target.with_name(f"{_WRITING}replaced-{self.target.name}")
            shutil.rmtree(older, ignore_errors=True)
            self.target.rename(older)
        self.path.rename(self.target)
        _sync(self.target.parent)
        remove_leftovers(self.target.parent)
        return self.target

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.path, ignore_errors=True)


def entry_of(file: Path) -> dict[str, Any]:
    """Return the entry in the manifest of a file as it is on the disk."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


class _Hashed:
    """A file that is written in order, its checksum and size counted on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            self.file.write(view)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self.file.flush()


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def saved(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, whether intact or not."""
    path = Path(folder)
    found = [(int(match[1]), p) for p in path.iterdir() if (match := _NAME.fullmatch(p.name))] if path.is_dir() else []
    return [p for _, p in sorted(found)]


def step_of(path: Path) -> int:
    """Return the step at which a checkpoint was saved, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is no checkpoint: the name of one is step-<number>.")
    return int(match[1])


def manifest(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        DamagedCheckpoint: if it is missing or not what was written.
    """
    file = Path(path) / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error.strerror}): the checkpoint is incomplete") from error
    digest, _, text = content.partition(b"\n")
    if digest != hashlib.sha256(text).hexdigest().encode():
        raise DamagedCheckpoint(f"{file} is not what was written: its checksum differs")
    found: dict[str, Any] = json.loads(text)
    if found["format"] != _FORMAT:
        raise ValueError(f"{file} has format {found['format']}, this version reads {_FORMAT}. Install a newer one.")
    return found


def check(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's manifest once every file of it is found to be what was written.

    Raises:
        DamagedCheckpoint: naming the file that is missing, cut short or altered.
    """
    facts = manifest(path)
    for name, entry in facts["files"].items():
        file = Path(path) / name
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise DamagedCheckpoint(f"{file} has {size} bytes, {entry['bytes']} were written")
            found = entry_of(file)
        except OSError as error:
            raise DamagedCheckpoint(f"{file} cannot be read ({error.strerror})") from error
        if found["sha256"] != entry["sha256"]:
            raise DamagedCheckpoint(f"{file} is not what was written: its checksum differs")
    return facts


def read(path: str | Path, name: str) -> Any:
    """Return one part of a checkpoint that `check` found intact. Nothing but tensors and plain containers is loaded.

    Tensors come back on the device they were on, or on this process's own of that kind, or on the CPU.
    """
    return torch.load(Path(path) / name, weights_only=True, map_location=_place)


def _place(storage: Any, location: str) -> Any:
    if not location.startswith("cuda"):
        return None
    return storage.cuda(torch.cuda.current_device()) if torch.cuda.is_available() else storage


def newest(folder: str | Path, *, set_aside: bool = False) -> Path | None:
    """Return the newest intact checkpoint of a folder, or None; warn of each damaged one passed over.

    Args:
        folder: where checkpoints are.
        set_aside: rename damaged ones, so that they no longer count and are kept for inspection.
    """
    for path in reversed(saved(folder)):
        try:
            check(path)
        except DamagedCheckpoint as damage:
            moved = ""
            if set_aside:
                aside = path.with_name(path.name + _ASIDE)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                moved = f" It was renamed to {aside.name}."
            warnings.warn(
                f"checkpoint {path} is damaged and the one before is used: {damage}.{moved}",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        return path
    return None


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints."""
    for path in saved(folder)[:-keep]:
        hidden = path.with_name(f"{_WRITING}removed-{path.name}")  # a folder half removed must not count
        with suppress(OSError):
            path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what processes that were killed left half written."""
    path = Path(folder)
    if path.is_dir():
        for leftover in path.iterdir():
            if leftover.name.startswith(_WRITING):
                shutil.rmtree(leftover, ignore_errors=True)
