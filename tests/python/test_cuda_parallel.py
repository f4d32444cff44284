"""Ranks on real NCCL: on one GPU processes that share it, on several the threads of one process.

What they answer is judged as one GPU's answers are (see gpu.py), and beside those of one rank.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from gpu import CUDA, TOKEN_NOISE, WORSE, ids_of, load, needs_gpu, rms, transformers_logits
from longspan._core import EngineConfig as NativeConfig
from longspan._core import plan_memory
from ranks import answers, launch, outputs_of, said
from test_families import MISTRAL, QWEN2, QWEN3, repack

needs_two_gpus = pytest.mark.skipif(
    CUDA.detail.count("cuda:") < 2, reason="needs two GPUs of one machine"
)

#: Seconds after which no rank may wait any more for one that was killed.
GONE_S = 10
#: A part of the card for each of those that share it, as a count of blocks.
BLOCKS = 128
LLAMA = "Llama"
SPLIT = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
SEVERAL_TO_A_KV_HEAD = {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257}
#: Steps of prefill by the kernels for Hopper, and sums of megabytes.
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 5001,
    "max_position_embeddings": 4096,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, sizes, options
    "llama": (LLAMA, SPLIT | {"vocab_size": 331, "attention_bias": True, "mlp_bias": True}, {}),
    "mistral": (MISTRAL, SPLIT | {"sliding_window": None, "tie_word_embeddings": True}, {}),
    "qwen2": (QWEN2, SEVERAL_TO_A_KV_HEAD, {}),
    "qwen3": (QWEN3, SPLIT | {"head_dim": 24, "num_key_value_heads": 2}, {}),
    "prefix-cache": (LLAMA, SPLIT, {"enable_prefix_caching": True, "max_prefill_token_num": 48}),
    "wide": (LLAMA, WIDE, {"session_len": 2200}),
}


def make_case(
    path: Path | str, vocab: int, count: int, hf: str = "", **options: Any
) -> dict[str, Any]:
    """hf: the same model as transformers reads it, where that is another directory."""
    ids = ids_of(count, vocab)
    # The second prompt leaves a block of the third half-way.
    prompts = [ids[:3], ids[:96] + ids_of(20, vocab, seed=1), ids[:140]]
    common = {"session_len": 320, "max_batch_size": 4, "cache_max_entry_count": BLOCKS}
    return {
        "path": str(path),
        "hf": hf or str(path),
        "options": common | options,
        "ids": ids,
        "positions": sorted({0, count // 3, count // 2, count - 1}),
        "prompts": prompts,
    }


def cases(tmp_path: Path) -> list[dict[str, Any]]:
    made = []
    for name, (family, sizes, options) in CASES.items():
        hf, path = oracle.tiny(family, **sizes)
        made.append(
            make_case(path, hf.config.vocab_size, 2000 if name == "wide" else 200, **options)
        )
    _, llama = oracle.tiny(LLAMA, **SPLIT)
    repack(llama, tmp_path)
    return [*made, make_case(tmp_path, oracle.TINY_SIZES["vocab_size"], 150, hf=llama)]


def answers_of(case: dict[str, Any], device: str, dtype: str = "bfloat16", **options: Any) -> Any:
    with load(case["path"], device, dtype, **(case["options"] | options)) as engine:
        return answers(engine, case)


def check_answers(case: dict[str, Any], given: dict[str, Any], one: dict[str, Any]) -> None:
    """one: what one rank says on the same card."""
    name = f"{case['path']} {case['options']}"
    truth = np.array(answers_of(case, "cpu", "float32")["logits"])
    yardstick = rms(transformers_logits(case["hf"], case["ids"], case["positions"]) - truth)
    error = rms(np.array(given["logits"]) - truth)
    assert error <= WORSE * yardstick, f"{name}: {error:.3g}, not {yardstick:.3g}"
    assert given["nll"] == pytest.approx(
        one["nll"], abs=4 * TOKEN_NOISE / np.sqrt(len(case["ids"]))
    ), name
    # Where the best two are closer than what rounding moves them by, either may be taken, and the
    # texts part.
    for tokens, expected, margins in zip(
        given["tokens"], one["tokens"], one["margins"], strict=True
    ):
        for token, best, margin in zip(tokens, expected, margins, strict=True):
            if token != best:
                assert margin < 6 * yardstick, f"{name}: {tokens}, not {expected}"
                break


def check_processes(made: list[dict[str, Any]], tp: int, cp: int = 1) -> None:
    asked = [case | {"options": case["options"] | {"tp": tp, "cp": cp}} for case in made]
    processes = launch(tp, json.dumps(asked))
    outputs = outputs_of(processes, 60)
    assert [process.returncode for process in processes] == [0] * tp, outputs
    given = [json.loads(line) for line in said(outputs[0][0])]
    assert len(given) == len(made)
    for case, answer in zip(made, given, strict=True):
        check_answers(case, answer, answers_of(case, "cuda"))


@needs_gpu
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (4, 1), (4, 2)])
def test_processes_answer_as_one_rank(tp: int, cp: int, tmp_path: Path) -> None:
    check_processes(cases(tmp_path), tp, cp)


@needs_gpu
@pytest.mark.parametrize(("tp", "cp"), [(3, 1), (2, 2)])
def test_processes_with_smollm2(tp: int, cp: int, smollm2_dir: Path) -> None:
    check_processes([make_case(smollm2_dir, 49000, 300)], tp, cp)


@needs_gpu
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(killed: int, tmp_path: Path) -> None:
    _, path = oracle.tiny(LLAMA, **SPLIT)
    case = make_case(path, oracle.TINY_SIZES["vocab_size"], 200, tp=4)
    processes = launch(4, json.dumps([case]), "--forever")
    while not processes[0].stdout.readline().startswith("> {"):
        assert processes[0].poll() is None, processes[0].stderr.read()
    time.sleep(0.5)
    processes[killed].send_signal(signal.SIGKILL)
    left = [process for rank, process in enumerate(processes) if rank != killed]
    outputs = outputs_of(left, GONE_S)
    if killed == 0:
        assert [process.returncode for process in left] == [1, 1, 1], outputs
        assert all("ParallelError: rank 0: expected a living process" in e for _, e in outputs)
    else:
        assert left[0].returncode == 0, outputs
        assert said(outputs[0][0])[0].startswith("rank 1: expected a living process")
        assert [process.returncode for process in left[1:]] == [1, 1], outputs
        assert all("ParallelError: rank 1: expected" in error for _, error in outputs[1:])


@needs_gpu
@needs_two_gpus
def test_threads_answer_as_one_rank(tmp_path: Path) -> None:
    for case in cases(tmp_path):
        check_answers(case, answers_of(case, "cuda", tp=2), answers_of(case, "cuda"))


@needs_gpu
@needs_two_gpus
def test_threads_give_the_memory_of_all_gpus_back(tmp_path: Path) -> None:
    _, path = oracle.tiny(LLAMA, **WIDE)
    case = make_case(path, WIDE["vocab_size"], 500, session_len=1000)

    def free() -> list[int]:
        configs = [NativeConfig(device=f"cuda:{i}") for i in (0, 1)]
        return [plan_memory(str(path), config).device_bytes for config in configs]

    answers_of(case, "cuda", tp=2)  # the driver's and NCCL's own come with the first use
    before = free()
    for _ in range(3):
        answers_of(case, "cuda", tp=2)
    assert all(b - a < 100 << 20 for b, a in zip(before, free(), strict=True))
