"""The same engine on a GPU (see gpu.py for what it is judged by)."""

from __future__ import annotations

import ast
import math
import pydoc_data.topics
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu import CUDA, TOKEN_NOISE, check_logits, ids_of, load, logits, needs_gpu, rms
from longspan import EngineConfig, pipeline
from longspan._core import (
    BackendUnavailable,
    GenerationConfig,
    InvalidArgument,
    Unsupported,
    plan_memory,
)
from longspan._core import EngineConfig as NativeConfig
from longspan.eval import passkey
from longspan.eval.record import sha256_of_ids


@needs_gpu
@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128},
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32},
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ],
    ids=lambda shape: "-".join(str(v) for v in shape.values()),
)
@pytest.mark.parametrize("count", [1, 17, 300])
def test_logits_of_tiny_models(tiny_llama: Callable[..., Path], shape: Any, count: int) -> None:
    path = tiny_llama(**shape)
    with load(path, "cpu") as engine:
        vocab = engine.model.vocab_size
    check_logits(path, ids_of(count, vocab))


@needs_gpu
@pytest.mark.parametrize("count", [1, 17, 512, 3000])
def test_logits_of_smollm2(smollm2_dir: Path, count: int) -> None:
    check_logits(smollm2_dir, ids_of(count, 49000))


@needs_gpu
@pytest.mark.parametrize("options", [{"max_prefill_token_num": 100}, {"cache_block_seq_len": 256}])
def test_chunks_and_blocks_do_not_matter(smollm2_dir: Path, options: dict[str, Any]) -> None:
    ids = ids_of(1500, 49000)
    with load(smollm2_dir, "cuda") as engine, load(smollm2_dir, "cuda", **options) as other:
        a, b = (e.score(ids).wait().nll_sum / (len(ids) - 1) for e in (engine, other))
    assert a == pytest.approx(b, abs=4 * TOKEN_NOISE / math.sqrt(len(ids)))


@needs_gpu
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8", "int8_fp8", "int8_int4", "int4"])
def test_kv_formats_score_as_on_the_cpu(smollm2_dir: Path, kv_cache_dtype: str) -> None:
    ids = ids_of(1500, 49000)
    nll = []
    for device in ("cuda", "cpu"):
        with load(smollm2_dir, device, kv_cache_dtype=kv_cache_dtype) as engine:
            nll.append(engine.score(ids).wait().nll_sum / (len(ids) - 1))
    assert nll[0] == pytest.approx(nll[1], abs=4 * TOKEN_NOISE / math.sqrt(len(ids)))


@needs_gpu
def test_company_does_not_matter(smollm2_dir: Path) -> None:
    """Each request of a crowd of mixed lengths scores as it does alone."""
    crowd = [ids_of(n, 49000, seed=n) for n in (2, 15, 16, 17, 128, 700, 1000, 2500)]
    with load(smollm2_dir, "cuda", max_batch_size=8) as engine:
        alone = [engine.score(ids).wait().nll_sum / (len(ids) - 1) for ids in crowd]
        handles = [engine.score(ids) for ids in crowd]
        together = [h.wait().nll_sum / (len(i) - 1) for h, i in zip(handles, crowd, strict=True)]
    for ids, a, b in zip(crowd, alone, together, strict=True):
        assert a == pytest.approx(b, abs=4 * TOKEN_NOISE / math.sqrt(len(ids) - 1)), len(ids)


@needs_gpu
def test_sampling_repeats_with_its_seed(smollm2_dir: Path) -> None:
    config = GenerationConfig(max_new_tokens=40, do_sample=True, temperature=0.9, top_p=0.9, seed=7)
    with load(smollm2_dir, "cuda") as engine:
        ids = ids_of(50, 49000)
        first, second = (engine.generate(ids, config).wait().token_ids for _ in range(2))
    assert first == second and len(first) > 0


@needs_gpu
@pytest.mark.timeout(900)
def test_perplexity_of_32k_is_that_of_the_cpu(smollm2_gguf: Path) -> None:
    text = "\n".join(pydoc_data.topics.topics.values())
    values = []
    for device in ("cuda", "cpu"):
        config = EngineConfig(
            device=device, dtype="bfloat16", session_len=32768, rope_scaling_factor=4.0
        )
        with pipeline(str(smollm2_gguf), config) as pipe:
            ids = pipe.tokenizer.encode(text)[:32768]
            values.append(pipe.get_ppl(ids)[0])
    assert len(ids) == 32768
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@needs_gpu
@pytest.mark.timeout(600)
def test_passkeys_at_32k_are_those_of_transformers(smollm2_gguf: Path) -> None:
    """Ten, at four times the trained length: the same number is read as by the model in float32."""
    oracle = pytest.importorskip("oracle")
    length, factor = 32768, 4.0
    config = EngineConfig(
        device="cuda", session_len=length, max_batch_size=1, rope_scaling_factor=factor
    )
    with pipeline(str(smollm2_gguf), config) as pipe:
        tokenizer = pipe.tokenizer
        rounds = list(passkey.run(pipe, length, 10))
    reference = oracle.at(oracle.smollm2_dir())
    reference.model.cuda()
    for r in rounds:
        ids = passkey.build_prompt(tokenizer, length, r.key, r.depth).ids
        assert sha256_of_ids(ids) == r.prompt_sha256
        drawn = reference.greedy(ids, passkey.ANSWER_TOKENS, length, factor)
        expected = tokenizer.decode(drawn)
        assert passkey.is_found(expected, r.key) == r.found, (r.key, r.answer, expected)
        assert re.findall(r"\d+", r.answer)[:1] == re.findall(r"\d+", expected)[:1]
    assert sum(r.found for r in rounds) >= 9


@needs_gpu
def test_a_thousand_cancelled_requests_leave_nothing(smollm2_dir: Path) -> None:
    rng = random.Random(0)
    with load(smollm2_dir, "cuda", max_batch_size=4, session_len=4096) as engine:
        total = engine.metrics().total_blocks
        ids = ids_of(3000, 49000)
        config = GenerationConfig(max_new_tokens=50)
        for _ in range(100):
            handles = [engine.generate(ids[: rng.randrange(1, 3000)], config) for _ in range(10)]
            for handle in handles:
                handle.cancel()
            for handle in handles:
                handle.wait()
        engine.generate(ids[:10], config).wait()
        assert engine.metrics().free_blocks == total


@needs_gpu
def test_close_gives_the_memory_back(smollm2_dir: Path) -> None:
    def free() -> int:
        return plan_memory(str(smollm2_dir), NativeConfig(device="cuda")).device_bytes

    free()  # the driver's context comes with the first use
    before = free()
    with load(smollm2_dir, "cuda") as engine:
        engine.score(ids_of(1000, 49000)).wait()
        assert free() < before
    assert before - free() < 100 << 20


@needs_gpu
def test_products_in_eight_bits_are_those_of_the_dtype(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(num_attention_heads=4, num_key_value_heads=2, head_dim=128)
    results = {}
    for name, options in {
        "native": {},
        "int8": {"prefill_attention": "int8"},
        "chunks": {"prefill_attention": "int8", "max_prefill_token_num": 100},
        "int8 cache": {"prefill_attention": "int8", "kv_cache_dtype": "int8"},
        "int8_fp8": {"prefill_attention": "int8_fp8"},
        "int8_fp8 of a cache": {"prefill_attention": "int8_fp8", "kv_cache_dtype": "int8_int4"},
    }.items():
        with load(path, "cuda", session_len=1500, **options) as engine:
            ids = ids_of(1500, engine.model.vocab_size)
            results[name] = engine.score(ids).wait().nll_sum / (len(ids) - 1)
    native = results.pop("native")
    assert native not in results.values()
    for name, value in results.items():
        assert value == pytest.approx(native, abs=4 * TOKEN_NOISE / math.sqrt(len(ids))), name


needs_hopper = pytest.mark.skipif(
    "sm_90" not in CUDA.detail, reason=f"needs compute capability 9.0: {CUDA.detail}"
)


@needs_gpu
@needs_hopper
@pytest.mark.parametrize("count", [1, 17, 300])
def test_logits_of_linears_in_int8(tiny_llama: Callable[..., Path], count: int) -> None:
    path = tiny_llama()
    results = []
    for device, dtype, options in (
        ("cpu", "float32", {}),
        ("cuda", "bfloat16", {"linear_dtype": "int8"}),
        ("cuda", "bfloat16", {"linear_dtype": "int8", "max_prefill_token_num": 100}),
    ):
        with load(path, device, dtype, session_len=count + 1, **options) as engine:
            ids = ids_of(count, engine.model.vocab_size)
            results.append(logits(engine, ids, sorted({0, count // 2, count - 1})))
    truth, *others = results
    for other in others:
        # A code is off by 0.3 steps of some 40 (rms), as are weights: 1 % of a product.
        assert 0.002 < rms(other - truth) / rms(truth) < 0.05


@needs_gpu
@needs_hopper
def test_perplexity_of_linears_in_int8(smollm2_gguf: Path) -> None:
    text = "\n".join(pydoc_data.topics.topics.values())
    nll, weights = [], []
    for linear_dtype in ("auto", "int8"):
        config = EngineConfig(device="cuda", session_len=8192, linear_dtype=linear_dtype)
        with pipeline(str(smollm2_gguf), config) as pipe:
            ids = pipe.tokenizer.encode(text)[:8192]
            nll.append(pipe.get_ppl(ids)[0].mean_nll)
            weights.append(pipe.engine.plan.weight_bytes)
            # Steps of one row, recorded and repeated, choose what a prefill would have chosen.
            short = GenerationConfig(max_new_tokens=16, ignore_eos=True)
            tokens = pipe.engine.generate(ids[:100], short).wait().token_ids
            rows = logits(pipe.engine, ids[:100] + tokens, list(range(99, 115)))
            assert (rows.argmax(axis=1) == tokens).sum() >= 13  # others are close to ties
    assert weights[1] < 0.7 * weights[0]  # tables, 21 % of the weights, stay in bfloat16
    assert 0 < abs(nll[1] - nll[0]) < 0.01


@needs_gpu
def test_what_a_gpu_does_not_do_is_refused(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama()
    with pytest.raises(Unsupported, match="deterministic"):
        load(path, "cuda", deterministic=True)
    with pytest.raises(Unsupported, match="dtype"):
        load(path, "cuda", "float32")
    with pytest.raises(Unsupported, match="prefill_attention"):
        load(path, "cuda", prefill_attention="int8")
    with pytest.raises(BackendUnavailable, match="cuda:99"):
        load(path, "cuda:99")
    with pytest.raises(Unsupported, match="head_dim: expected a multiple of 8 up to 256"):
        load(tiny_llama(head_dim=20), "cuda")


def test_the_list_of_what_needs_a_gpu_is_true() -> None:
    here = Path(__file__).parent
    listed = (here.parent / "skipped_without_gpu.txt").read_text().splitlines()
    marked = [
        f"tests/python/{source.name}::{node.name}"
        for source in sorted(here.glob("test_*.py"))
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "needs_gpu" for d in node.decorator_list)
    ]
    assert [line for line in listed if "::" in line] == marked


def test_names_of_devices_are_checked(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama()
    for name in ("cuda:", "cuda:x", "cudax", "gpu"):
        with pytest.raises(InvalidArgument, match="device"):
            load(path, name)


@pytest.mark.skipif(CUDA.available, reason="has a GPU")
def test_without_a_gpu_the_reason_is_told(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama()
    assert re.search("driver|GPU|CUDA library", CUDA.detail)
    with pytest.raises(BackendUnavailable) as error:
        load(path, "cuda")
    assert CUDA.detail in str(error.value)
    with load(path, "auto") as engine:
        assert engine.model.backend.startswith("cpu")
