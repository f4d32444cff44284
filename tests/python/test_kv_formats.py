"""Formats of the KV cache, end to end: close to the native one, and bit for bit what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from longspan._core import Engine, EngineConfig, GenerationConfig

#: Root mean square of the change of logits over that of the logits, at most: a wrong scale or a row
#: misplaced changes them as much as they are large.
BOUNDS = {"int8": 0.02, "fp8": 0.08, "int8_fp8": 0.06, "int8_int4": 0.15, "int4": 0.2}


def load(path: str, format: str, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "session_len": 512}
    return Engine.load(path, EngineConfig(**(defaults | options), kv_cache_dtype=format))


@pytest.fixture(scope="module")
def model() -> tuple[str, list[int]]:
    """A model whose heads are no power of two, and 400 ids for it."""
    hf, path = oracle.tiny_llama(
        **oracle.ODD_HEADS,
        max_position_embeddings=512,
    )
    return path, oracle.random_ids(400, hf.config.vocab_size)


def logits(engine: Engine, ids: list[int]) -> Any:
    return engine.logits(ids, oracle.spread_positions(len(ids), 40)).wait().logits


@pytest.mark.parametrize("format", BOUNDS)
def test_logits_are_close_to_those_of_the_native_cache(
    model: tuple[str, list[int]], format: str
) -> None:
    path, ids = model
    with load(path, "auto") as native, load(path, format) as engine:
        assert engine.config.kv_cache_dtype == format
        assert engine.plan.block_bytes < 0.6 * native.plan.block_bytes
        expected = logits(native, ids)
        change = np.sqrt(np.mean((logits(engine, ids) - expected) ** 2))
    assert 0 < change / np.sqrt(np.mean(expected**2)) < BOUNDS[format]


@pytest.mark.parametrize("format", BOUNDS)
def test_chunks_blocks_threads_and_cached_prefixes_change_nothing(
    model: tuple[str, list[int]], format: str
) -> None:
    path, ids = model
    generation = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    ways: list[dict[str, Any]] = [
        {},
        {"max_prefill_token_num": 37, "num_threads": 3},
        {"cache_block_seq_len": 256, "max_prefill_token_num": 100},
        {"enable_prefix_caching": True},
    ]
    results = []
    for options in ways:
        with load(path, format, max_batch_size=2, **options) as engine:
            # The second time with a prefix cache the prompt leaves a cached block half-way.
            engine.generate(ids[:333], generation).wait()
            tokens = engine.generate(ids, generation).wait().token_ids
            results.append((tokens, logits(engine, ids)))
    for tokens, values in results[1:]:
        assert tokens == results[0][0]
        np.testing.assert_array_equal(values, results[0][1])
