"""The demo, small: a tiny random model, trained for 256 tokens."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from longspan import InvalidArgument, Unsupported, demo
from longspan.eval import passkey
from rich.console import Console

TinyLlama = Callable[..., Path]


def test_lengths() -> None:
    assert demo.lengths_up_to(16384) == [2048, 8192, 16384]
    assert demo.lengths_up_to(65536) == [2048, 8192, 16384, 32768, 65536]
    assert demo.lengths_up_to(20000) == [2048, 8192, 16384, 20000]
    assert demo.lengths_up_to(512) == [512]


def small_demo(model: Path, out: Path, terminal: bool = False) -> tuple[demo.Demo, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100, highlight=False)
    return demo.Demo(
        model=str(model), max_length=3000, rounds=2, output_dir=out, console=console
    ), screen


def test_measures_without_and_with_scaling(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    run, screen = small_demo(tiny_llama(max_position_embeddings=2048), tmp_path)
    run.run()
    record = json.loads((tmp_path / "longspan-demo.json").read_text())
    assert record["complete"] is True
    cells = [(c["length"], c["rope_scaling_factor"]) for c in record["results"]]
    assert cells == [(2048, 0.0), (3000, 0.0), (3000, 4.0)]
    for cell in record["results"]:
        assert len(cell["rounds"]) == 2 and len(cell["windows"]) == 3000 // cell["length"]
        for step in (*cell["rounds"], *cell["windows"]):
            scaled = step["rope_profile"]["type"] == "dynamic"
            assert scaled == (cell["rope_scaling_factor"] > 0)
    plain, scaled = record["results"][1:]
    for one, other in zip(plain["rounds"], scaled["rounds"], strict=True):
        assert one["prompt_sha256"] == other["prompt_sha256"]
    assert (tmp_path / "longspan-demo.png").read_bytes().startswith(b"\x89PNG")
    lines = screen.getvalue().splitlines()
    assert sum("dynamic NTK x4:   passkey" in line for line in lines) == 1
    assert sum("no scaling:       passkey" in line for line in lines) == 2
    assert "\x1b" not in screen.getvalue()


def test_on_a_terminal_a_table_fills(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    run, screen = small_demo(tiny_llama(max_position_embeddings=2048), tmp_path, terminal=True)
    run.run()
    assert "\x1b" in screen.getvalue()
    final = screen.getvalue().rpartition("\x1b[?25h")[2]  # what the live display leaves behind
    words = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", final).splitlines()]
    rows = {row[0]: row for row in words if row and row[0] in ("2,048", "3,000")}
    assert rows["2,048"][2:4] == ["of", "2"] and rows["2,048"][5:7] == ["same", "same"]
    assert rows["3,000"][2:4] == ["of", "2"] == rows["3,000"][6:8]


def test_an_interruption_leaves_what_is_finished(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = passkey.run

    def interrupted(pipe, length, *rest):
        yield next(measure(pipe, length, *rest))
        if length == 3000:
            raise KeyboardInterrupt
        yield from measure(pipe, length, *rest)

    monkeypatch.setattr(passkey, "run", interrupted)
    run, screen = small_demo(tiny_llama(max_position_embeddings=2048), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    record = json.loads((tmp_path / "longspan-demo.json").read_text())
    assert record["complete"] is False
    assert [len(cell["rounds"]) for cell in record["results"]] == [2, 1]
    assert (tmp_path / "longspan-demo.png").exists()
    assert "what was finished until then is kept" in screen.getvalue()


def test_without_matplotlib_it_does_not_even_start(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Unsupported, match=r"matplotlib.*pip install 'longspan\[demo\]'"):
        small_demo(tiny_llama(), tmp_path)


def test_a_missing_folder_is_refused_at_once(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="output_dir: expected a directory"):
        demo.Demo(model=str(tiny_llama()), output_dir=tmp_path / "none")
