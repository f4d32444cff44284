"""What the wheel holds, and what importing it costs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points, metadata, version
from pathlib import Path

import longspan
import native
from longspan import _core


def test_one_version() -> None:
    declared = re.search(
        r"project\(longspan VERSION ([\d.]+)", Path(native.ROOT, "CMakeLists.txt").read_text()
    )
    assert declared
    assert version("longspan") == longspan.__version__ == _core.version() == declared[1]


def test_layout() -> None:
    root = Path(_core.__file__).parent
    for path in ["lib/liblongspan.so", "include/longspan/engine.h"]:
        assert (root / path).is_file(), path
    assert (root / "lib/cmake/longspan/longspan-config.cmake").is_file()


def test_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="longspan")
    assert callable(command.load())


def test_torch_and_transformers_are_test_requirements_only() -> None:
    for requirement in metadata("longspan").get_all("Requires-Dist"):
        if re.match(r"(torch|transformers)\b", requirement):
            assert 'extra == "test"' in requirement


def test_import_is_light() -> None:
    """The heavy optional packages are imported only by what needs them."""
    program = (
        "import sys, longspan;"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_the_api_is_exported() -> None:
    """Internals stay hidden: every symbol of the library belongs to a public name."""
    library = Path(_core.__file__).parent / "lib" / "liblongspan.so"
    listed = native.run(native.tool("nm"), "-DC", "--defined-only", library)
    headers = "".join(p.read_text() for p in (native.ROOT / "cpp/include/longspan").glob("*.h"))
    for symbol in re.findall(
        r" [TDBR] (?:(?:vtable|typeinfo|typeinfo name) for )?(longspan::\w+)", listed
    ):
        assert re.search(rf"\b{symbol.split('::')[1]}\b", headers), symbol
