"""What the user names a model by, turned into a model directory."""

from __future__ import annotations

import os
from pathlib import Path

from longspan._core import CheckpointError
from longspan.progress import Bar


def resolve_model(
    model: str | os.PathLike[str],
    revision: str | None = None,
    download_dir: str | None = None,
    use_safetensors: bool = True,
) -> Path:
    """A directory is itself; a GGUF file, and with use_safetensors=False a directory with torch's
    .bin files, is converted into the user's cache the first time; "organisation/name" is a model of
    the Hugging Face hub, where revision and download_dir matter.

    Throws CheckpointError when there is no such model.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: expected a model directory or a .gguf file")
        from longspan.gguf import cached_model_dir

        with Bar(f"Converting {path.name}", "MB") as bar:
            return cached_model_dir(path, lambda done, total: bar.update(done / 1e6, total / 1e6))
    if not path.is_dir():
        from longspan import hub

        if not hub.is_repo_id(str(model)) or path.parent.exists():
            raise CheckpointError(
                f"{path}: expected a model directory, a .gguf file or a hub id "
                "(organisation/name), got nothing there"
            )
        path = hub.download(str(model), revision, download_dir, use_safetensors)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: expected a model directory, got one without config.json")
    if use_safetensors:
        return path
    from longspan import torch_weights

    with Bar(f"Converting {path.name}", "MB") as bar:
        return torch_weights.cached_model_dir(
            path, lambda done, total: bar.update(done / 1e6, total / 1e6)
        )
