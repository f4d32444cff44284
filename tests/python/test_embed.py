"""A C++ program finds the installed package with plain CMake and generates without Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import native
import pytest
from longspan import _core
from longspan.build_info import get_cmake_dir, get_include_dir

EXAMPLE = native.ROOT / "cpp" / "examples"
IDS = [5, 17, 250, 99, 3, 42]


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("embed")
    native.configure(EXAMPLE, build, longspan_DIR=get_cmake_dir())
    native.build(build)
    return build / "embed"


def test_example_is_short() -> None:
    assert len((EXAMPLE / "embed.cc").read_text().splitlines()) < 50


def test_headers_are_installed() -> None:
    installed = {p.name for p in (Path(get_include_dir()) / "longspan").glob("*.h")}
    assert installed == {p.name for p in (native.ROOT / "cpp/include/longspan").glob("*.h")}


def test_embed_generates_what_python_does(embed: Path, tiny_llama: Callable[..., Path]) -> None:
    model = tiny_llama()
    printed = native.run(embed, model, "12", *map(str, IDS), timeout=60.0)
    with _core.Engine.load(str(model)) as engine:
        handle = engine.generate(IDS, _core.GenerationConfig(max_new_tokens=12))
        assert [int(word) for word in printed.split()] == handle.wait().token_ids


def test_embed_reports_errors(embed: Path, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"error: .*config\.json"):
        native.run(embed, tmp_path, "1", "5", timeout=60.0)


def test_no_python_is_linked(embed: Path) -> None:
    linked = native.run("ldd", embed)
    assert "liblongspan.so" in linked
    assert "not found" not in linked
    assert "python" not in linked.lower().replace(str(Path(_core.__file__).parent).lower(), "")
