"""Scripts of benchmarks/ that take a GPU or hours, on a model small enough for a CPU."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    random_model = script("random_model")
    random_model.write(path, random_model.REFERENCE_JOB | TINY)
    return path


def run_million(folder: Path, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    script, record = BENCHMARKS / "cuda_million.py", tmp_path / "record.json"
    command = [sys.executable, script, folder, "--device", "cpu", "--kv-cache-dtype", "auto"]
    done = subprocess.run(
        [*map(str, command), "--json", str(record), *options], capture_output=True, text=True
    )
    assert record.exists(), done.stderr
    return done.returncode, json.loads(record.read_text())


def test_a_round_fills_the_session_and_is_timed(folder: Path, tmp_path: Path) -> None:
    code, record = run_million(folder, tmp_path, "--session-len", "4000", "--get-ppl", "500")
    one = record["passkey"]
    assert code == 0 and one["complete"]
    assert 4000 - 1100 < one["prompt_tokens"] < 4000
    assert one["generated_tokens"] == 16
    assert 0 < one["prefill_s"] < one["pipe_s"]
    assert record["get_ppl"]["tokens"] == 500
    # Random weights know nothing: close to the logarithm of the vocabulary.
    assert 5 < record["get_ppl"]["mean_nll"] < 10


def test_a_round_that_is_out_of_time_says_how_far_it_came(folder: Path, tmp_path: Path) -> None:
    options = ("--session-len", "300000", "--chunk", "512", "--max-seconds", "4")
    code, record = run_million(folder, tmp_path, *options)
    one = record["passkey"]
    assert code == 1 and not one["complete"]
    assert 0 < one["prefilled_tokens"] < one["prompt_tokens"]
    assert one["prefill_s"] > 0


def test_what_kv_formats_cost_is_recorded_window_by_window(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_formats = script("kv_formats")
    path = tmp_path / "record.json"
    options = ["--length", "400", "--windows", "2", "--passkeys", "1", "--formats", "int8,int4"]
    monkeypatch.setattr(sys, "argv", ["kv_formats.py", *options, "--json", str(path)])
    monkeypatch.setattr(kv_formats, "gguf_path", lambda: folder)
    code = kv_formats.main()
    record = json.loads(path.read_text())
    assert code == (0 if kv_formats.holds(record["summary"]) else 1)
    assert record["complete"] and record["environment"]["cpu"]
    rows = record["results"]
    order = [(row["format"], row.get("window")) for row in rows]
    formats = ["auto", "int8", "int4"]
    assert order == [(f, w) for w in (0, 1, None) for f in formats]
    # Random weights know nothing, so a format costs little; but no two hold the same numbers.
    assert len({row["mean_nll"] for row in rows[:6]}) == 6
    for format in formats[1:]:
        part = record["summary"][format]
        assert part["windows"] == 2 and abs(part["rise_percent"]) < 1
        assert 0 < part["standard_error"] < 1 and part["passkeys_found"] == 0


def test_a_rise_over_its_limit_or_a_key_lost_is_told() -> None:
    kv_formats = script("kv_formats")

    def row(format: str, window: int, rise: float) -> dict[str, Any]:
        return {"format": format, "window": window, "mean_nll": 2 + math.log1p(rise / 100)}

    rows = [row("auto", 0, 0), row("auto", 1, 0), row("int8", 0, 0.05), row("int8", 1, 0.21)]
    rows += [{"format": f, "passkey": 7, "found": True} for f in ("auto", "int8")]
    summary = kv_formats.summarize(rows)
    assert summary["auto"]["perplexity"] == pytest.approx(math.exp(2))
    assert summary["int8"]["rise_percent"] == pytest.approx(0.13)
    assert summary["int8"]["standard_error"] == pytest.approx(0.08)  # 0.16 / 2
    assert kv_formats.holds(summary)
    # Of a run that was cut, only windows of both count.
    assert kv_formats.summarize(rows[:3])["int8"]["rise_percent"] == pytest.approx(0.05)
    assert kv_formats.summarize(rows[:3])["int8"]["standard_error"] is None
    assert not kv_formats.holds(kv_formats.summarize([rows[0], row("int8", 0, 0.16)]))
    rows[-1]["found"] = False
    assert not kv_formats.holds(kv_formats.summarize(rows))


def test_the_rise_of_linears_in_int8_stands_beside_its_error() -> None:
    nll = {"auto": [2.0, 2.0], "int8": [2 + math.log1p(0.001), 2 + math.log1p(0.003)]}
    summary = script("cuda_int8_linear").rise(nll)
    assert summary["perplexity"] == pytest.approx(math.exp(2))
    assert summary["rise_percent"] == pytest.approx(0.2)
    assert summary["standard_error"] == pytest.approx(0.1)  # 0.2 / 2
    times = [{"linear_dtype": d, "load_s": s, "weight_bytes": 9} for d, s in (("a", 6), ("b", 5))]
    record = {"summary": summary, "results": [{"mean_nll": []}, *times]}
    rise, load = script("cuda_table").int8_linear(record)
    assert rise[1:] == ("+0.20 %", "bfloat16", "", "0.5", "met")
    assert load[1:] == ("5 s", "bfloat16 6", "1.20", "", "")
