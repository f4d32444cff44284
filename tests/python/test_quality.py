"""Does the model still understand past its trained 8192 tokens? SmolLM2, as users run it."""

from __future__ import annotations

import math
import re
from typing import Any

import oracle
import pytest
from longspan import EngineConfig, pipeline
from longspan.eval import passkey
from shipped import smollm2_gguf


def passkeys_found(length: int, **options: Any) -> int:
    """Of two rounds those in which the key, as five digits or fewer, is the first thing the model
    says."""
    config = EngineConfig(
        session_len=length,
        max_batch_size=1,
        enable_prefix_caching=True,  # prompts are alike up to the first key
        **options,
    )
    with pipeline(str(smollm2_gguf()), config) as pipe:
        results = list(passkey.run(pipe, length, 2))
    assert all(length - 64 < r.prompt_tokens <= length for r in results)
    return sum(re.match(rf"\W*{r.key}(?!\d)", r.answer) is not None for r in results)


@pytest.mark.timeout(1200)
def test_every_passkey_is_found_at_twice_the_trained_length() -> None:
    assert passkeys_found(16384, rope_scaling_factor=4.0) == 2


@pytest.mark.timeout(1200)
def test_without_scaling_none_is_found_past_the_trained_length() -> None:
    assert passkeys_found(12288) == 0


@pytest.mark.timeout(1200)
def test_perplexity_at_16k_is_that_of_hf() -> None:
    """bf16 engine, factor 2, against float32 HF under the same profile: within 0.5 %."""
    ids, _, _, expected = oracle.smollm2_reference(16384, 2.0)
    config = EngineConfig(
        dtype="bfloat16", session_len=16384, max_batch_size=1, rope_scaling_factor=2.0
    )
    with pipeline(str(smollm2_gguf()), config) as pipe:
        perplexity = pipe.get_ppl(ids)[0]
    assert perplexity.num_tokens == len(ids) - 1
    assert perplexity == pytest.approx(math.exp(expected / (len(ids) - 1)), rel=5e-3)
