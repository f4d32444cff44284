"""Model directories made once from something else, in the user's cache."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cached_dir(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """$XDG_CACHE_HOME/longspan/<kind>/<name>, else ~/.cache/longspan/<kind>/<name>; made by `make`
    in a directory beside it the first time, so that an interrupted attempt leaves nothing.

    name: says all that the content depends on.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan" / kind
    root.mkdir(parents=True, exist_ok=True)
    target = root / name
    if target.exists():
        return target
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits and finds the work done
        if not target.exists():
            partial = root / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                make(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target
