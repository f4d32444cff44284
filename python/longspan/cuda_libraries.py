"""Where pip put CUDA's libraries, for the engine to find when it first needs a GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

#: Directories, separated by colons, that the engine searches for cuBLASLt.
VARIABLE = "LONGSPAN_CUDA_LIB_PATH"


def directories() -> list[str]:
    """The lib folders of the nvidia-* wheels of this interpreter, none where there are none."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else spec.submodule_search_locations or []
    return sorted(str(path) for root in roots for path in Path(root).glob("*/lib") if path.is_dir())


def tell_engine() -> None:
    """Sets the variable, unless the user has."""
    if VARIABLE not in os.environ and (found := directories()):
        os.environ[VARIABLE] = ":".join(found)
