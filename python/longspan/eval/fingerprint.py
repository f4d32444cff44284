"""What tells one model from another without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from longspan._core import CheckpointError

#: Read as a whole.
_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: Of a weight file: this many pieces, evenly spaced, the first and the last byte included.
_PIECES, _PIECE_BYTES = 64, 2**16


def fingerprint(model_dir: Path) -> str:
    """SHA-256, in hex, over configuration and tokenizer, and over name, size and 4 MiB of samples
    of every safetensors file. Files named otherwise do not count. Throws CheckpointError."""
    digest = hashlib.sha256()
    try:
        for name in _TEXTS:
            path = model_dir / name
            if path.is_file():
                text = path.read_bytes()
                digest.update(f"{name} {len(text)}\n".encode() + text)
        for path in sorted(model_dir.glob("*.safetensors")):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            _sample(path, digest.update)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: expected to read it, {error.strerror}") from error
    return digest.hexdigest()


def _sample(path: Path, update: Callable[[bytes], object]) -> None:
    last = max(path.stat().st_size - _PIECE_BYTES, 0)
    with path.open("rb") as file:
        for i in range(_PIECES):
            file.seek(last * i // (_PIECES - 1))
            update(file.read(_PIECE_BYTES))
