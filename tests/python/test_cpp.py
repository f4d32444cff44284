"""Builds the C++ tests and runs them, wherever GoogleTest is installed or can be downloaded."""

from __future__ import annotations

import re

import native
import pytest


@pytest.mark.timeout(1800)
def test_cpp() -> None:
    directory = native.ROOT / "build" / "tests"  # kept: the next run builds what changed
    said = native.configure(native.ROOT, directory, CMAKE_BUILD_TYPE="Release", LONGSPAN_TESTS="ON")
    missing = re.search(r"GoogleTest is neither .*", said)
    if missing:
        native.skip(missing[0])
    native.build(directory)
    said = native.run(
        native.tool("ctest"),
        *("--test-dir", directory, "--output-on-failure", "--no-tests=error"),
        *("-j", native.jobs()),
    )
    print(re.search(r"100% tests passed.*", said)[0])
