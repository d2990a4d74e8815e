"""Files that are whole or not there, and the backbone as safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to; afterwards it takes the place of `path`, or nothing has changed.

    A reader, and a run that goes on, sees the old file or the new one, never half of it: also after an error, a full
    disk, a crash.

    Raises:
        OSError: from the writing, the temporary file removed; with `path` as its file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, whole or not at all; NaN and infinities become null."""
    text = json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """Return `value` as JSON has it: dictionaries (of dataclasses too), lists, numbers, null for NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def save_backbone(path: Path, encoder: nn.Module, about: Mapping[str, Any]) -> None:
    """Write an encoder's parameters and buffers as safetensors, `about` as the file's metadata.

    Two lines load it into a plain module of the same architecture, say `ssl_tasks.encoders.encoder(...)`:

        from safetensors.torch import load_file
        net.load_state_dict(load_file(path))

    Args:
        path: of the file.
        encoder: the backbone, without heads.
        about: what a reader should know: architecture, image shape, arm, seed.
    """
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in encoder.state_dict().items()}
    with whole(path) as part:
        save_file(tensors, part, metadata={key: json.dumps(plain(value)) for key, value in about.items()})
