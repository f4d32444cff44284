"""What must not change a result: chunk and block size, batch company, thread count, history.

On the CPU the promise is bit for bit, so every comparison here is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from longspan._core import Engine, EngineConfig, GenerationConfig

NATIVE = 512  # of the shortened SmolLM2 and of the tiny model: past it, scaling sets in
SHORTENED = '{"max_position_embeddings": 512}'
DTYPES = ("float32", "bfloat16")


@dataclass
class Result:
    tokens: list[int]
    nll: float
    logits: npt.NDArray[np.float32]

    def assert_same(self, other: Result) -> None:
        assert self.tokens == other.tokens
        assert self.nll == other.nll
        np.testing.assert_array_equal(self.logits, other.logits)


def load(path: str, dtype: str, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"dtype": dtype, "session_len": 1024, "max_batch_size": 1}
    return Engine.load(path, EngineConfig(**(defaults | options)))


def ask(engine: Engine, ids: list[int], new_tokens: int = 24) -> Result:
    """Greedy tokens, the nll sum and some logits of a prompt."""
    generation = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True)
    return Result(
        engine.generate(ids, generation).wait().token_ids,
        engine.score(ids).wait().nll_sum,
        engine.logits(ids, oracle.spread_positions(len(ids), 9)).wait().logits,
    )


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def model(request: pytest.FixtureRequest) -> tuple[str, list[int]]:
    """A model directory and 700 ids for it. SmolLM2's first layers: the shapes of a real model."""
    if request.param == "smollm2":
        return oracle.smollm2_start_dir(4), oracle.prose(700)
    hf, path = oracle.tiny_llama(
        **oracle.ODD_HEADS,
        max_position_embeddings=NATIVE,
    )
    return path, oracle.random_ids(700, hf.config.vocab_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_size(model: tuple[str, list[int]], dtype: str) -> None:
    path, ids = model
    results = []
    for chunk in (512, 64, 100, 4096):
        with load(path, dtype, max_prefill_token_num=chunk) as engine:
            results.append(ask(engine, ids))
    for result in results[1:]:
        results[0].assert_same(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_one_token(model: tuple[str, list[int]], dtype: str) -> None:
    path, ids = model
    with load(path, dtype) as whole, load(path, dtype, max_prefill_token_num=1) as single:
        ask(whole, ids[:130]).assert_same(ask(single, ids[:130]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_size(model: tuple[str, list[int]], dtype: str) -> None:
    path, ids = model
    results = []
    for block_len in (64, 128, 256):
        with load(path, dtype, cache_block_seq_len=block_len) as engine:
            results.append(ask(engine, ids))
    for result in results[1:]:
        results[0].assert_same(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count(model: tuple[str, list[int]], dtype: str) -> None:
    path, ids = model
    results = []
    for threads in (1, 2, 3):
        with load(path, dtype, num_threads=threads) as engine:
            results.append(ask(engine, ids[:300]))
    for result in results[1:]:
        results[0].assert_same(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_company(model: tuple[str, list[int]], dtype: str) -> None:
    """Seven prompts at once, on both sides of the native window so that RoPE profiles mix, against
    each alone in an engine of batch size one."""
    path, ids = model
    options = {"rope_scaling_factor": 4.0, "hf_overrides": SHORTENED}
    prompts = [ids[:n] for n in (1, 17, 640, 64, 520, 333, 700)]
    generation = GenerationConfig(max_new_tokens=24, ignore_eos=True)
    with load(path, dtype, **options) as engine:
        alone_single = engine.generate(prompts[0], generation).wait().token_ids
        alone = [ask(engine, p) for p in prompts[1:]]
    with load(path, dtype, max_batch_size=8, max_prefill_token_num=150, **options) as engine:
        handles = [engine.generate(p, generation) for p in prompts]
        outputs = [handle.wait() for handle in handles]
        scores = [engine.score(p) for p in prompts[1:]]
        logits = [engine.logits(p, oracle.spread_positions(len(p), 9)) for p in prompts[1:]]
        together = [
            Result(out.token_ids, score.wait().nll_sum, logit.wait().logits)
            for out, score, logit in zip(outputs[1:], scores, logits, strict=True)
        ]
    assert {out.rope_profile.length > NATIVE for out in outputs} == {True, False}
    assert outputs[0].token_ids == alone_single
    for result, expected in zip(together, alone, strict=True):
        result.assert_same(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_the_native_window_scaling_changes_nothing(
    model: tuple[str, list[int]], dtype: str
) -> None:
    """Also right after a long, scaled request: no profile leaks into the next."""
    path, ids = model
    with load(path, dtype, hf_overrides=SHORTENED) as engine:
        plain = ask(engine, ids[:400])
        unscaled = ask(engine, ids)
    with load(path, dtype, hf_overrides=SHORTENED, rope_scaling_factor=4.0) as engine:
        ask(engine, ids[:400]).assert_same(plain)
        scaled = ask(engine, ids)
        ask(engine, ids[:400]).assert_same(plain)
    assert scaled.nll != unscaled.nll, "past the window the factor must matter"


def test_generation_across_the_native_window_is_one_forward(model: tuple[str, list[int]]) -> None:
    """Policy "request": 480 + 64 tokens cross 512, and every one of them lives under the profile of
    544. Judged by HF without a cache under that profile."""
    path, ids = model
    prompt = ids[:480]
    with load(path, "float32", hf_overrides=SHORTENED, rope_scaling_factor=4.0) as engine:
        generation = GenerationConfig(max_new_tokens=64, ignore_eos=True)
        out = engine.generate(prompt, generation).wait()
    assert out.rope_profile.length == 544
    hf = oracle.at(path)
    with oracle.native_length(hf, NATIVE):
        logits, _ = hf.run(
            prompt + out.token_ids[:-1], list(range(479, 543)), length=544, factor=4.0
        )
        assert out.token_ids == logits.argmax(axis=1).tolist()
        stale, _ = hf.run(prompt + out.token_ids[:-1], list(range(479, 543)), length=480)
    assert np.abs(stale - logits).max() > 0.1, "the test must be able to tell the profiles apart"
