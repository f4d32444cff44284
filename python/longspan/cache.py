"""Model directories made once from something else, in the user's cache."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def root() -> Path:
    """$XDG_CACHE_HOME/longspan, else ~/.cache/longspan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"


def cached_dir(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """<kind>/<name> under root(); made by `make` in a directory beside it the first time, so that
    an interrupted attempt leaves nothing.

    name: says all that the content depends on.
    """
    folder = root() / kind
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if target.exists():
        return target
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits and finds the work done
        if not target.exists():
            partial = folder / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                make(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target
