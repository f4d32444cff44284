"""Does the model still understand past its trained 8192 tokens? SmolLM2 in bf16."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
from longspan._core import Engine, EngineConfig, GenerationConfig

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def passkey_prompt(length: int, rng: np.random.Generator) -> tuple[str, list[int]]:
    """The key and the ids of LMDeploy's raw passkey prompt, just under `length` tokens."""
    tokenizer = oracle.smollm2_tokenizer()
    repeats = (length - 200) // len(tokenizer(" " + FILLER)["input_ids"])
    before = int(rng.integers(0, repeats))
    key = str(rng.integers(1, 50000))
    text = " ".join(
        [
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there.",
            *[FILLER] * before,
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            *[FILLER] * (repeats - before),
            "What is the pass key? The pass key is",
        ]
    )
    ids = tokenizer(text)["input_ids"]
    assert length - 400 < len(ids) <= length - 32
    return key, ids


def passkeys_found(length: int, rounds: int, **options: Any) -> int:
    rng = np.random.default_rng(0)
    config = EngineConfig(dtype="bfloat16", session_len=length, max_batch_size=1, **options)
    found = 0
    with Engine.load(oracle.smollm2_dir(), config) as engine:
        for _ in range(rounds):
            key, ids = passkey_prompt(length, rng)
            out = engine.generate(ids, GenerationConfig(max_new_tokens=16)).wait()
            answer = oracle.smollm2_tokenizer().decode(out.token_ids)
            found += answer.strip().startswith(key)
    return found


@pytest.mark.timeout(900)
def test_every_passkey_is_found_at_twice_the_trained_length() -> None:
    assert passkeys_found(16384, rounds=10, rope_scaling_factor=4.0) == 10


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("length", "rounds"), [(12288, 3), (16384, 2)])
def test_without_scaling_none_is_found_past_the_trained_length(length: int, rounds: int) -> None:
    assert passkeys_found(length, rounds) == 0


@pytest.mark.timeout(900)
def test_perplexity_at_16k_is_that_of_hf() -> None:
    """bf16 engine, factor 2, against float32 HF under the same profile: within 0.5 %."""
    ids, _, _, expected = oracle.smollm2_reference(16384, 2.0)
    config = EngineConfig(
        dtype="bfloat16", session_len=16384, max_batch_size=1, rope_scaling_factor=2.0
    )
    with Engine.load(oracle.smollm2_dir(), config) as engine:
        out = engine.score(ids).wait()
    perplexity = math.exp(out.nll_sum / out.nll_count)
    assert perplexity == pytest.approx(math.exp(expected / (len(ids) - 1)), rel=5e-3)
