"""What models and requests may ask for, on a GPU (see gpu.py for what it is judged by)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from gpu import check_logits, ids_of, load, logits, needs_gpu
from longspan import EngineConfig, GenerationConfig, pipeline
from longspan._core import GenerationConfig as NativeGeneration
from longspan._core import Request
from test_families import CASES, INTERNLM2, repack
from test_rope_logits import METHODS, tiny

#: Logits of one model at the same position, computed among other rows: what bfloat16 leaves open.
ROUNDING = 0.15


@needs_gpu
@pytest.mark.parametrize(("family", "sizes"), CASES)
def test_families(family: str, sizes: dict[str, Any]) -> None:
    if sizes.get("head_dim", 8) % 8:  # a size that only the CPU takes
        sizes = sizes | {"head_dim": 24}
    hf, path = oracle.tiny(family, **sizes)
    for length in (1, 65, 200):
        check_logits(path, ids_of(length, hf.config.vocab_size))


@needs_gpu
@pytest.mark.parametrize("name", INTERNLM2)
def test_internlm2_is_a_llama_packed_otherwise(name: str, tmp_path: Path) -> None:
    hf, llama_dir = oracle.tiny_llama(**INTERNLM2[name])
    repack(llama_dir, tmp_path)
    ids = ids_of(150, hf.config.vocab_size)
    results = []
    for path in (tmp_path, llama_dir):
        with load(path, "cuda", session_len=320) as engine:
            results.append(logits(engine, ids, [0, 70, 149]))
    assert np.array_equal(*results)


@needs_gpu
@pytest.mark.parametrize(
    "rope",
    [
        *METHODS.values(),
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5},
    ],
    ids=[*METHODS, "dynamic", "partial", "partial-yarn"],
)
def test_rope_methods(rope: dict[str, Any]) -> None:
    overrides = {"rope_parameters": rope | {"rope_theta": 10000.0}, "use_logn_attn": True}
    check_logits(tiny(), ids_of(300, 256), hf_overrides=json.dumps(overrides))


@needs_gpu
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.6},
        {"frequency_penalty": 0.7, "presence_penalty": 0.9},
        {"repetition_penalty": 1.2, "bad_sequences": [[10], [20], [30], [40]]},
    ],
)
def test_penalties_and_bans(options: dict[str, Any]) -> None:
    """Each greedy token is the best of the engine's own logits, edited here, but for rounding."""
    _, path = oracle.tiny_llama(num_key_value_heads=2)
    ids = ids_of(20, 256)
    with load(path, "cuda", session_len=128) as engine:
        config = NativeGeneration(max_new_tokens=40, ignore_eos=True, **options)
        tokens = engine.generate(ids, config).wait().token_ids
        rows = logits(engine, ids + tokens, list(range(19, 59)))
    assert len(tokens) == 40
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        seen = sorted({*ids, *tokens[:i]})
        penalty = options.get("repetition_penalty", 1.0)
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        counts = np.bincount(tokens[:i], minlength=256)
        row -= counts * options.get("frequency_penalty", 0.0)
        row -= (counts > 0) * options.get("presence_penalty", 0.0)
        for (bad,) in options.get("bad_sequences", ()):
            row[bad] = -np.inf
        assert row.max() - row[token] < ROUNDING, f"token {i}"


@needs_gpu
def test_logprobs() -> None:
    _, path = oracle.tiny_llama(num_key_value_heads=2)
    ids = ids_of(20, 256)
    with load(path, "cuda", session_len=128) as engine:
        config = NativeGeneration(max_new_tokens=8, ignore_eos=True, logprobs=4)
        output = engine.generate(ids, config).wait()
        rows = logits(engine, ids + output.token_ids, list(range(19, 27)))
    expected = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    given = np.array(output.logprobs).reshape(8, 5, 2)
    for row, token, pairs in zip(expected, output.token_ids, given, strict=True):
        assert pairs[0, 0] == token
        assert np.all(np.diff(pairs[1:, 1]) <= 0)
        assert np.abs(pairs[1:, 1] - -np.sort(-row)[:4]).max() < ROUNDING
        for listed, logprob in pairs:
            assert abs(logprob - row[int(listed)]) < ROUNDING


@needs_gpu
def test_steps_ahead_of_their_tokens_change_nothing(smollm2_dir: Path) -> None:
    """Where log probabilities are asked for, every token is waited for; else decodes run ahead."""
    prompts = [ids_of(length, 49000) for length in (5, 300, 64, 700)]
    with load(smollm2_dir, "cuda", session_len=1024, max_batch_size=4) as engine:

        def tokens(**options: Any) -> list[list[int]]:
            requests = [
                Request.generate(
                    ids,
                    NativeGeneration(
                        max_new_tokens=60 + i, do_sample=True, top_k=0, seed=i, **options
                    ),
                )
                for i, ids in enumerate(prompts)
            ]
            return [handle.wait().token_ids for handle in engine.submit(requests)]

        free = tokens(logprobs=1, ignore_eos=True)
        assert tokens(ignore_eos=True) == free
        stops = [row[10 + 5 * i] for i, row in enumerate(free)]
        stopped = tokens(logprobs=1, stop_token_ids=stops)
        assert min(map(len, stopped)) < 60
        assert tokens(stop_token_ids=stops) == stopped


def small_pipeline(path: str, **options: Any) -> Any:
    return pipeline(path, EngineConfig(device="cuda", max_batch_size=4, **options))


@needs_gpu
def test_several_sequences_repeat_with_their_seeds(smollm2_dir: Path) -> None:
    config = GenerationConfig(n=4, temperature=1.0, top_p=0.9, max_new_tokens=12, random_seed=3)
    with small_pipeline(str(smollm2_dir)) as pipe:
        first, second = (pipe("Once upon a time", config) for _ in range(2))
    texts = [[r.text for r in run] for run in (first, second)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


@needs_gpu
def test_a_shared_prefix_changes_nothing(smollm2_dir: Path) -> None:
    """A cached prefix is the same keys and values: greedy text of a fact is the same."""
    story = "The grass is green. The sky is blue. The sun is yellow. " * 60
    prompts = [f"{story}The {thing} is" for thing in ("grass", "sky", "sun")]
    config = GenerationConfig(max_new_tokens=4)
    options = {"rope_length": "session", "session_len": 4096}
    with small_pipeline(str(smollm2_dir), **options) as pipe:
        cold = [pipe(prompt, config).text for prompt in prompts]
    with small_pipeline(str(smollm2_dir), enable_prefix_caching=True, **options) as pipe:
        warm = [pipe(prompt, config) for prompt in prompts]
    assert [r.text for r in warm] == cold
    assert all(r.cached_tokens > 500 for r in warm[1:])


@needs_gpu
def test_streams_and_stop_words(smollm2_dir: Path) -> None:
    config = GenerationConfig(max_new_tokens=30)
    with small_pipeline(str(smollm2_dir)) as pipe:
        whole = pipe("List three colours.", config)
        parts = list(pipe.stream_infer("List three colours.", config))
        assert "".join(part.text for part in parts) == whole.text
        word = whole.text[len(whole.text) // 2 :][:4]
        stopped = pipe("List three colours.", replace(config, stop_words=[word]))
    assert stopped.text == whole.text[: whole.text.index(word)]
    assert stopped.finish_reason == "stop"
