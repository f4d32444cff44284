"""What the user names a model by, turned into a model directory."""

from __future__ import annotations

import os
from pathlib import Path

from longspan._core import CheckpointError, Unsupported
from longspan.progress import Bar


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """A directory is itself; a GGUF file is converted into the user's cache the first time.

    Throws CheckpointError when there is no such path, Unsupported for a Hugging Face hub id.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: expected a model directory or a .gguf file")
        from longspan.gguf import cached_model_dir

        with Bar(f"Converting {path.name}", "MB") as bar:
            return cached_model_dir(path, lambda done, total: bar.update(done / 1e6, total / 1e6))
    if str(model).count("/") == 1 and not path.parent.exists():
        raise Unsupported(f"{model}: expected a directory or GGUF file; hub ids come later")
    raise CheckpointError(f"{path}: expected a model directory or a .gguf file, got nothing there")
