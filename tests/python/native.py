"""Building C++ from a test, with the tools of this environment before those of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def skip(reason: str) -> None:
    """Skips, except in CI, which must run everything."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must not skip")
    pytest.skip(reason)


def tool(name: str) -> str:
    path = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if path is None:
        skip(f"needs {name}")
    return str(path)


def run(*command: str | Path, timeout: float = 1200.0, **options: object) -> str:
    """The standard output of a command; on failure, a test failure that shows everything."""
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        **options,
    )
    if result.returncode != 0:
        pytest.fail(f"{command}: {result.stdout[-8000:]}\n{result.stderr[-8000:]}", pytrace=False)
    return result.stdout


def configure(source: Path, build: Path, **definitions: str) -> str:
    """Configures with CMake and Ninja; returns what CMake said."""
    if os.environ.get("CXX") is None:
        tool("c++")
    return run(
        tool("cmake"),
        *("-S", source, "-B", build, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-D{name}={value}" for name, value in definitions.items()),
    )


def build(directory: Path) -> None:
    run(tool("cmake"), "--build", directory, "-j", jobs())


def jobs() -> str:
    return str(len(os.sched_getaffinity(0)))
