"""Each public header compiles alone, without a warning, as plain C++20."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).resolve().parents[2] / "cpp" / "include"
HEADERS = sorted(p.relative_to(INCLUDE).as_posix() for p in INCLUDE.rglob("*.h"))


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(header: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    # Twice, for the include guard.
    source = f"#include <{header}>\n#include <{header}>\n"
    result = subprocess.run(
        [compiler, *flags, "-I", str(INCLUDE), "-x", "c++", "-"],
        input=source,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
