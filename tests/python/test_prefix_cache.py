"""The prefix cache from Python: what is reused is told, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny_llama
from longspan import EngineConfig, GenerationConfig, Pipeline, pipeline

NATIVE = 512


def config(**options: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_batch_size": 4,
        "session_len": 1024,
        "cache_max_entry_count": 64,
        "rope_scaling_factor": 4.0,
    }
    return EngineConfig(**(defaults | options))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(path, max_position_embeddings=NATIVE)
    return path


@pytest.fixture(scope="module")
def cold(model: Path) -> Iterator[Pipeline]:
    with pipeline(model, config()) as pipe:
        yield pipe


def ids_of(pipe: Pipeline, count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, pipe.engine.model.vocab_size, count).tolist()


def greedy(tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=tokens, ignore_eos=True)


def test_a_conversation_computes_only_what_is_new(model: Path, cold: Pipeline) -> None:
    prompt = ids_of(cold, 200, 1)
    with pipeline(model, config(enable_prefix_caching=True)) as pipe:
        for turn in range(3):
            response = pipe.infer(prompt, greedy(20))
            expected = cold.infer(prompt, greedy(20))
            assert response.token_ids == expected.token_ids
            assert expected.cached_tokens == 0
            # All but the answer's last token, which was never fed back, and the new ones.
            assert response.cached_tokens == (len(prompt) - 31 if turn else 0)
            assert ("cached_tokens=" in str(response)) == bool(turn)
            prompt = prompt + response.token_ids + ids_of(cold, 30, turn)
        metrics = pipe.engine.metrics()
        assert metrics.prefix_hit_tokens == 219 + 269
        assert metrics.prefix_miss_tokens == 200 + 31 + 31
        assert metrics.prefix_evictions == 0
        assert metrics.cached_blocks == (300 + 19 + 63) // 64 + 2  # and two parts that were copied


def test_a_batch_computes_its_common_document_once(model: Path, cold: Pipeline) -> None:
    document = ids_of(cold, 400, 2)
    prompts = [document + ids_of(cold, 10 + i, i) for i in range(8)]
    with pipeline(model, config(enable_prefix_caching=True)) as pipe:
        responses = pipe.infer(prompts, greedy(8))
        hit = pipe.engine.metrics().prefix_hit_tokens
    expected = cold.infer(prompts, greedy(8))
    assert [r.token_ids for r in responses] == [r.token_ids for r in expected]
    assert [r.cached_tokens >= 384 for r in responses] == [False] + [True] * 7
    assert hit == sum(r.cached_tokens for r in responses)


def test_profiles_of_different_lengths_do_not_share(model: Path, cold: Pipeline) -> None:
    """Past the native length each stated length has frequencies of its own."""
    prompt = ids_of(cold, 600, 3)
    for rope_length, shares in (("request", False), ("bucket", True), (700, True)):
        options = {"rope_length": rope_length}
        with (
            pipeline(model, config(enable_prefix_caching=True, **options)) as warm,
            pipeline(model, config(**options)) as plain,
        ):
            warm.infer(prompt, greedy(4))
            response = warm.infer(prompt, greedy(9))
            assert response.token_ids == plain.infer(prompt, greedy(9)).token_ids
            assert response.cached_tokens == (599 if shares else 0)


def test_perplexity_and_logits_are_the_same(model: Path, cold: Pipeline) -> None:
    ids = ids_of(cold, 300, 4)
    with pipeline(model, config(enable_prefix_caching=True)) as pipe:
        for _ in range(2):
            assert pipe.get_ppl(ids)[0].nll_sum == cold.get_ppl(ids)[0].nll_sum
            for positions in ([-1], [5, 299], [0]):
                np.testing.assert_array_equal(
                    pipe.get_logits(ids, positions), cold.get_logits(ids, positions)
                )
