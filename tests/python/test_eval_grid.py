"""Grids: their axes, their journal, and that an interrupted one ends as an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from longspan import InvalidArgument
from longspan.cli.app import app
from longspan.eval import axes, needle, watch
from longspan.eval.fingerprint import fingerprint
from longspan.eval.journal import Journal
from typer.testing import CliRunner

TinyLlama = Callable[..., Path]

#: What differs from run to run.
TIMES = ("seconds", "prefill_tokens_per_s", "tokens_per_s", "cached_tokens")


def call(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="longspan")


def without_times(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in results]


def test_axes() -> None:
    assert axes.lengths("16k,2k, 3000,1M") == [2048, 3000, 16384, 2**20]
    assert axes.depths("100,0,12.5") == [0.0, 12.5, 100.0]
    assert axes.even_depths(5) == [0.0, 25.0, 50.0, 75.0, 100.0]
    assert axes.even_depths(1) == [50.0]
    assert axes.factors("4,0,2.5") == [4.0, 0.0, 2.5]


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        (axes.lengths, "2k,long", "length: expected token counts .*, got long"),
        (axes.lengths, "2k,", "length: expected token counts .*, got '2k,'"),
        (axes.lengths, "1", "got 1"),
        (axes.lengths, "-5", "got -5"),
        (axes.lengths, "2.5k", "got 2.5k"),
        (axes.lengths, "2k,2048", "expected each once, got 2048 twice"),
        (axes.depths, "0,101", r"depths: expected percentages in \[0, 100\].*, got 101"),
        (axes.depths, "nan", "got nan"),
        (axes.factors, "0.5", "rope_scaling_factor: expected 0 or a number >= 1, got 0.5"),
        (axes.factors, "inf", "got inf"),
        (axes.even_depths, 0, "num_depths: expected an integer >= 1, got 0"),
    ],
)
def test_bad_axes(parse: Callable[[Any], Any], text: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse(text)


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    identity = {"settings": {"seed": 1}, "model": "abc"}

    def open_it() -> Journal:
        return Journal(path, "needle", identity, ("length", "depth"))

    with open_it() as journal:
        assert journal.notes is None
        journal.begin({"model": {"layers": 2}})
        assert journal.add({"length": 5, "depth": 0.5}, {"score": 1.5, "length": 7}) == {
            "length": 5,
            "depth": 0.5,
            "score": 1.5,
        }
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"length": 6, "dep')  # the power failed here
    with open_it() as journal:
        assert journal.notes == {"model": {"layers": 2}}
        assert journal.result({"length": 5, "depth": 0.5})["score"] == 1.5
        assert journal.result({"length": 6, "depth": 0.5}) is None
        journal.begin({"model": {"layers": 3}})
        journal.add({"length": 6, "depth": 0.5}, {"score": 2.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_bytes().startswith(whole)
    assert lines[2] == {"length": 6, "depth": 0.5, "score": 2.5}
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("kind", "identity", "words"),
    [
        ("passkey", {}, "kind: expected the 'passkey' of this run, got 'needle'"),
        ("needle", {"model": "b"}, "model: expected the 'b' of this run, got 'a'"),
        ("needle", {"settings": {"seed": 2}}, "settings.seed: expected the 2 .*, got 1"),
        ("needle", {"settings": {"seed": 1, "x": 3}}, "settings.x: expected the 3 .*, got None"),
        ("needle", {"settings": {}}, "settings: expected"),
    ],
)
def test_a_journal_of_another_run_is_refused(
    tmp_path: Path, kind: str, identity: dict[str, Any], words: str
) -> None:
    path = tmp_path / "cells.jsonl"
    ours = {"model": "a", "settings": {"seed": 1}}
    with Journal(path, "needle", ours, ("length",)) as journal:
        journal.begin({})
        journal.add({"length": 5}, {"score": 1.0})
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match=words):
        Journal(path, kind, ours | identity, ("length",))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["a book\n", "[1]\n", '{"length": 5}\n', "{}\n"])
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"notes\.txt: "):
        Journal(path, "needle", {}, ("length",))
    assert path.read_text() == content
    with pytest.raises(InvalidArgument, match="expected to write it"):
        Journal(tmp_path, "needle", {}, ("length",))


def test_an_interrupted_grid_ends_as_an_uninterrupted_one(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, jsonl, out = tiny_llama(), tmp_path / "cells.jsonl", tmp_path / "out.json"
    command = ["eval", "needle", model, "--lengths", "600,900", "--depths", "0,50,100"]
    command += ["--rope-scaling-factor", "0,2", "--max-new-tokens", 8]
    result = call(*command, "--json", tmp_path / "whole.json")
    assert result.exit_code == 0, result.output
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert len(whole["results"]) == 12

    asked: list[int] = []
    ask = needle.Test.ask

    def until_the_fifth(self: Any, *args: Any) -> Any:
        asked.append(args[1])
        if len(asked) == 5:
            raise KeyboardInterrupt
        return ask(self, *args)

    monkeypatch.setattr(needle.Test, "ask", until_the_fifth)
    plot = tmp_path / "part.png"
    result = call(*command, "--jsonl", jsonl, "--json", out, "--plot", plot)
    assert result.exit_code == 130
    part = json.loads(out.read_text())
    assert part["complete"] is False
    assert without_times(part["results"]) == without_times(whole["results"][:4])
    assert len(jsonl.read_text().splitlines()) == 1 + 4
    assert plot.read_bytes().startswith(b"\x89PNG")

    asked[:] = [0] * 5
    result = call(*command, "--jsonl", jsonl, "--json", out)
    assert result.exit_code == 0, result.output
    assert "4 of 12 cells are done" in result.output
    assert len(asked) == 5 + 8
    resumed = json.loads(out.read_text())
    assert resumed["complete"] is True
    assert without_times(resumed["results"]) == without_times(whole["results"])
    for key in ("kind", "model", "options", "engine", "settings", "summary", "schema"):
        assert resumed[key] == whole[key], key

    # All done: nothing is loaded. A larger grid takes what there is.
    monkeypatch.setattr("longspan.eval.grid.pipeline", None)
    assert call(*command, "--jsonl", jsonl, "--json", out).exit_code == 0
    again = json.loads(out.read_text())
    assert again["results"] == resumed["results"] and again["model"] == resumed["model"]
    monkeypatch.undo()
    larger = [c if c != "0,50,100" else "0,50,75,100" for c in command]
    result = call(*larger, "--jsonl", jsonl)
    assert result.exit_code == 0 and "12 of 16 cells are done" in result.output

    for other, words in (
        (["--seed", 3], "settings.seed: expected the 3 of this run, got 0"),
        (["--raw"], "settings.chat_template: expected the False"),
        (["--rope-length", "session"], "options.rope_length: expected the 'session'"),
        (["--dtype", "float32"], "options.dtype: expected the 'float32' of this run, got 'auto'"),
    ):
        result = call(*command, *other, "--jsonl", jsonl)
        assert result.exit_code == 1
        assert words in result.stderr and result.stdout == ""
    result = call("eval", "needle", tiny_llama(seed=1), *command[3:], "--jsonl", jsonl)
    assert "cells.jsonl: model: expected the" in result.stderr


def test_cells_of_a_length_share_a_rope_profile(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    command = ["eval", "passkey", tiny_llama(), "--lengths", "500,700", "--num-depths", 3]
    command += ["--rounds", 2, "--rope-scaling-factor", "0,4", "--json", out, "--plot", plot]
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert plot.stat().st_size > 20_000
    record = json.loads(out.read_text())
    assert len(record["results"]) == 2 * 2 * 3 * 2
    keys = {}
    for line in record["results"]:
        assert line["rope_profile"]["length"] == line["context_length"]
        assert line["rope_profile"]["factor"] == (line["rope_scaling_factor"] or 1.0)
        assert line["depth"] == pytest.approx(line["depth_percent"] / 100, abs=0.35)
        assert line["depth_percent"] not in (0.0, 100.0) or (
            line["depth"] == line["depth_percent"] / 100
        )
        keys.setdefault(line["round"], set()).add(line["key"])
    assert all(len(found) == 1 for found in keys.values()) and len(keys) == 2
    assert record["settings"]["depths"] == [0.0, 50.0, 100.0]
    assert record["options"] == {"max_batch_size": 1, "enable_prefix_caching": True}
    assert "session_len" not in record["engine"]
    assert [part["rounds"] for part in record["summary"]["lengths"]] == [6] * 4

    command = ["eval", "passkey", command[2], "--length", 500, "--depths", "0,100", "--rounds", 1]
    result = call(*command, "--rope-length", 600, "--json", out)
    assert result.exit_code == 0, result.output
    lengths = {line["rope_profile"]["length"] for line in json.loads(out.read_text())["results"]}
    assert lengths == {600}


def test_a_depth_sweep_computes_what_its_prompts_share_once(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    """Prompts share all up to the shallower needle, and blocks of 64 tokens are cached."""
    out = tmp_path / "out.json"
    command = ["eval", "needle", tiny_llama(), "--lengths", "4k", "--depths", "0,25,50,75,100"]
    command += ["--rounds", 2, "--rope-scaling-factor", 4, "--json", out]
    lines = {}
    for choice in ("--prefix-caching", "--no-prefix-caching"):
        result = call(*command, choice)
        assert result.exit_code == 0, result.output
        lines[choice] = json.loads(out.read_text())["results"]
    cached, cold = lines.values()
    assert without_times(cached) == without_times(cold)
    assert {line["cached_tokens"] for line in cold} == {0}
    assert cached[0]["cached_tokens"] == 0
    for line in cached[1:]:
        shared = line["depth"] * line["prompt_tokens"]
        assert line["cached_tokens"] % 64 == 0
        # All but the frame, the needle and a block; what stands before the haystack comes on top.
        assert shared - 400 < line["cached_tokens"] < shared + 200
    assert call(*command).exit_code == 0  # on unless told otherwise
    again = json.loads(out.read_text())
    assert [r["cached_tokens"] for r in again["results"]] == [r["cached_tokens"] for r in cached]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["passkey", "--length", "x"], "error: length: expected token counts"),
        (["needle", "--lengths", "2k,1"], "error: length: expected token counts"),
        (["needle", "--lengths", "100"], "error: length: expected at least"),
        (["needle", "--lengths", "2k", "--depths", "0,200"], "error: depths: expected percentages"),
        (["needle", "--lengths", "2k", "--haystack", "/no/book"], "error: /no/book: expected"),
        (["needle", "--lengths", "1000000m"], "error: length: expected at most"),
        (["needle", "--lengths", "2k", "--plot", "/no/dir/x.png"], "error: plot: expected"),
        (["needle", "--lengths", "2k", "--plot", "x.jpg"], "error: plot: expected a .png"),
        (["needle", "--lengths", "2k", "--jsonl", "/no/x"], "error: /no/x: expected to write it"),
        (
            ["needle", "--lengths=2k", "--rounds=2", "--needle=a", "--question=c", "--answer=a"],
            "error: rounds: expected 1 for a needle of your own",
        ),
        (["passkey", "--length", "2k", "--plot", "x.png"], "error: plot: expected --depths"),
        (["ppl", "--length", "2k", "--form", "half"], "error: form: expected one of whole"),
        (["ppl", "--length", "2k", "--stride", "5"], "error: stride: expected with --form"),
        (
            ["ppl", "--length", "2k", "--form", "sliding", "--stride", "4096"],
            "error: stride: expected an integer in [1, 2048], got 4096",
        ),
    ],
)
def test_a_bad_grid_is_told_before_the_model_is_loaded(
    tiny_llama: TinyLlama, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.eval.grid.pipeline", None)
    name, *rest = arguments
    result = call("eval", name, tiny_llama(), *rest)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(words)
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["needle", "--lengths", "2k", "--depths", "0", "--num-depths", "2"],
        ["needle", "--lengths", "2k", "--needle", "a b"],
        ["needle"],
        ["passkey"],
        ["ppl"],
    ],
)
def test_wrong_usage(tiny_llama: TinyLlama, arguments: list[str]) -> None:
    name, *rest = arguments
    assert call("eval", name, tiny_llama(), *rest).exit_code == 2


@pytest.mark.parametrize("name", ["needle", "passkey", "ppl"])
def test_help_names_the_axes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = call("eval", name, "--help").output
    for option in ("--lengths", "--rope-scaling-factor", "--json", "--jsonl", "--plot"):
        assert option in text


def test_a_needle_of_ones_own(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    out, book = tmp_path / "out.json", tmp_path / "book.txt"
    book.write_text("One sentence. Another one. ")
    command = ["eval", "needle", tiny_llama(), "--length", 500, "--depths", 50, "--raw"]
    command += ["--needle", "Ada's cat is Tom.", "--question", "Who is Ada's cat?"]
    command += ["--answer", "Tom", "--haystack", book, "--json", out]
    result = call(*command)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    (line,) = record["results"]
    assert line["needle"] == "Ada's cat is Tom." and line["keyword"] == "Tom"
    assert line["prompt_tokens"] == 500 - 32
    assert line["haystack_times"] > 5
    assert record["settings"]["needle"] == {
        "text": "Ada's cat is Tom.",
        "question": "Who is Ada's cat?",
        "keyword": "Tom",
    }


def test_the_fingerprint_tells_models_apart(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = tiny_llama()
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    first = fingerprint(model)
    assert fingerprint(copy) == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(copy) != first
    assert fingerprint(tiny_llama(rope_theta=5e5)) != first
    assert fingerprint(tiny_llama(seed=1)) != first


def test_the_time_left_follows_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [100.0], []
    monkeypatch.setattr("longspan.eval.watch.time.monotonic", lambda: clock[0])
    # Without weights a cell costs the square of its tokens alone: 1, 4 and 16 units.
    model = SimpleNamespace(num_parameters=0, num_layers=1, num_heads=1, head_dim=1)
    model.backend, model.dtype, model.rope = "cpu", "float32", "default"
    cells = [{"n": 1000}, {"n": 2000}, {"n": 4000}]
    shown = watch.Watch(cells, lambda c: c["n"], lambda c: f"cell {c['n']}", lines.append)
    with shown.shown(model):
        assert lines == ["cpu, float32; RoPE: default"]
        lines.clear()
        assert shown.seconds_left() is None
        with shown.cell(cells[0]):
            clock[0] += 3.0
        assert shown.seconds_left() == pytest.approx(20 * 3.0)
        with shown.cell(cells[1]) as progress:
            clock[0] += 12.0
            assert shown.seconds_left(2000, 12.0) == pytest.approx(16 * 3.0)
            state = {"prefill_done": 2000, "prefill_total": 2000}
            state |= {"tokens_per_s": 9.5, "flops_per_s": 2e9}
            progress([SimpleNamespace(**state)])
        assert lines == [
            "2 of 3: cell 2000: 2,000 of 2,000 tokens, 10 tokens/s, 0.002 TFLOP/s, 48 s left in all"
        ]
    with shown.shown(model):
        assert len(lines) == 1  # what the last engine was too
    assert [watch.duration(s) for s in (0.4, 89, 100, 6000, 11_100)] == [
        "0 s",
        "89 s",
        "2 min",
        "1 h 40 min",
        "3 h 5 min",
    ]
