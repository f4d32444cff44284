"""The scripts of benchmarks/ that need a GPU, on a model small enough for a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import random_model

        random_model.write(path, random_model.REFERENCE_JOB | TINY)
    finally:
        sys.path.remove(str(BENCHMARKS))
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
