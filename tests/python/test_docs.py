"""What the pages say to run, runs; where they point to, something is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import write_tiny_llama
from longspan import pipeline
from longspan.cli.app import app
from native import ROOT
from typer.main import get_command

PAGES = sorted(
    page for folder in ("", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_the_examples_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, context = blocks(ROOT / "README.md", "python")
    (tmp_path / "model").mkdir()
    write_tiny_llama(tmp_path / "model")
    (tmp_path / "book.txt").write_text("A dog slept all day under the oak. " * 30)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(first.replace("path/to/model", "model"), names)
    names["pipe"].close()  # type: ignore[attr-defined]
    config = names["TurbomindEngineConfig"](  # type: ignore[operator]
        session_len=4096, enable_prefix_caching=True, rope_scaling_factor=4.0, rope_length=4096
    )
    with pipeline("model", config) as pipe:
        exec(context, names | {"pipe": pipe, "book": (tmp_path / "book.txt").read_text()})
    assert "cached_tokens=10" in capsys.readouterr().out  # of the 1050 letters, whole blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match("[a-z]+:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_know_their_options(page: Path) -> None:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||;", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["longspan"]:
                    check(words[1:], line)


def check(words: list[str], line: str) -> None:
    command = get_command(app)
    while words and (inner := getattr(command, "commands", {}).get(words[0])):
        command, words = inner, words[1:]
    known = {name for option in command.params for name in option.opts + option.secondary_opts}
    assert {word for word in words if word.startswith("--")} <= known, line
