"""Ranks that share a model out, against HF transformers in float32 on tiny random models of every
family: KV heads split, one to a rank or one to several, vocabularies that no size divides; and
ranks that share the keys of every sequence (cp)."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import write_tiny_llama
from longspan import EngineConfig, GenerationConfig, InvalidArgument, pipeline, plan_memory
from test_families import HEADS, MISTRAL, QWEN2, QWEN3, TOLERANCE, logits_of, repack

LLAMA = "Llama"
SPLIT = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
#: Of tp, and of tp x cp.
CASES: list[tuple[str, dict[str, Any], list[tuple[int, int]]]] = [
    (
        LLAMA,
        SPLIT | {"vocab_size": 331, "mlp_bias": True, "attention_bias": True},
        [(2, 1), (4, 1), (4, 2)],
    ),
    (LLAMA, HEADS["gqa-9-3"] | {"intermediate_size": 96}, [(3, 1), (2, 2)]),
    (MISTRAL, SPLIT | {"sliding_window": None, "tie_word_embeddings": True}, [(2, 1), (4, 1)]),
    (QWEN2, SPLIT | {"vocab_size": 333}, [(2, 1), (4, 1)]),
    (
        QWEN2,
        HEADS["mqa"] | {"intermediate_size": 96, "vocab_size": 257},
        [(2, 1), (4, 1), (8, 1), (8, 4)],
    ),
    (QWEN3, SPLIT | {"head_dim": 20, "num_key_value_heads": 2}, [(2, 1), (4, 1), (2, 2)]),
]


@pytest.mark.parametrize(("family", "sizes", "ranks"), CASES)
def test_logits_are_those_of_transformers(
    family: str, sizes: dict[str, Any], ranks: list[tuple[int, int]]
) -> None:
    hf, path = oracle.tiny(family, **sizes)
    ids = oracle.random_ids(150, hf.config.vocab_size)
    expected, _ = hf.run(ids)
    for tp, cp in ranks:
        logits = logits_of(path, ids, tp=tp, cp=cp, device="cpu", num_threads=2)
        assert np.abs(logits - expected).max() < TOLERANCE, f"tp {tp}, cp {cp}"


@pytest.mark.parametrize("tp", [2, 4])
def test_a_packed_tensor_is_cut_by_kv_heads(tp: int, tmp_path: Path) -> None:
    hf, llama = oracle.tiny(LLAMA, **SPLIT)
    repack(llama, tmp_path)
    ids = oracle.random_ids(100, hf.config.vocab_size)
    expected, _ = hf.run(ids)
    logits = logits_of(tmp_path, ids, tp=tp, device="cpu", num_threads=2)
    assert np.abs(logits - expected).max() < TOLERANCE


def test_pipeline_answers_and_scores_alike(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, num_attention_heads=8, num_key_value_heads=2, intermediate_size=96)
    generation = GenerationConfig(max_new_tokens=20, ignore_eos=True, logprobs=3)
    prompts = [list(range(5, 5 + n)) for n in (3, 70, 130)]

    def run(tp: int, cp: int) -> tuple[Any, Any]:
        config = EngineConfig(
            tp=tp, cp=cp, device="cpu", dtype="float32", session_len=512, num_threads=2
        )
        with pipeline(tmp_path, config) as pipe:
            return pipe.infer(prompts, generation), pipe.get_ppl(prompts[1:])

    expected, expected_ppl = run(1, 1)
    for tp, cp in ((2, 1), (4, 1), (4, 2)):
        responses, ppl = run(tp, cp)
        assert [r.token_ids for r in responses] == [r.token_ids for r in expected]
        for one, other in zip(ppl, expected_ppl, strict=True):
            assert math.isclose(one, other, rel_tol=1e-5)


def test_a_size_that_does_not_divide_the_model_is_refused_with_those_that_do(
    tmp_path: Path,
) -> None:
    write_tiny_llama(tmp_path, num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    for tp in (2, 4, 6):
        config = EngineConfig(tp=tp, device="cpu")
        with pytest.raises(InvalidArgument, match=f"^tp: expected one of 1, 3 .* got {tp}$"):
            plan_memory(str(tmp_path), config.native())
        with pytest.raises(InvalidArgument, match=r"^tp: expected one of 1, 3 "):
            pipeline(tmp_path, config)
    config = EngineConfig(tp=6, cp=3, device="cpu")
    with pytest.raises(InvalidArgument, match=r"^cp: expected one of 2, 6 with tp=6 .* got 3$"):
        pipeline(tmp_path, config)


#: What it says begins with "> ", as nothing does that an editable install says while it builds.
SCRIPT = """
import json, sys
from longspan import EngineConfig, GenerationConfig, ParallelError, pipeline
config = EngineConfig(tp={tp}, cp={cp}, device="cpu", dtype="float32", session_len=512,
                      num_threads=1, enable_prefix_caching=True)
pipe = pipeline(sys.argv[1], config, log_level="ERROR")
generation = GenerationConfig(max_new_tokens=20, ignore_eos=True)
prompts = [list(range(5, 5 + n)) for n in (3, 70, 130)]
tokens = [r.token_ids for r in pipe.infer(prompts, generation)]
print(">", json.dumps([tokens, [float(p) for p in pipe.get_ppl(prompts[1:])]]), flush=True)
if len(sys.argv) > 2:  # until another rank is killed
    try:
        while True:
            pipe.infer(prompts, generation)
    except ParallelError as error:
        print(">", error, flush=True)
    try:
        pipe.infer(prompts, generation)
    except ParallelError as error:
        print(">", error, flush=True)
pipe.close()
"""
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": tuple(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def launch(
    launcher: str, tp: int, *arguments: str, cp: int = 1, size: int | None = None
) -> list[Any]:
    """The processes that a launcher would start, in order of rank."""
    size = size or tp
    known = {name for names in LAUNCHERS.values() for name in names}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        values = dict(zip(LAUNCHERS[launcher], map(str, (rank, size, rank, size)), strict=True))
        environment = {k: v for k, v in os.environ.items() if k not in known} | values
        environment |= {"MASTER_ADDR": "127.0.0.1", "LONGSPAN_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT.format(tp=tp, cp=cp), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def said(output: str) -> list[str]:
    return [line[2:] for line in output.splitlines() if line.startswith("> ")]


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split")
    write_tiny_llama(path, num_attention_heads=8, num_key_value_heads=2, intermediate_size=96)
    return path


@pytest.mark.parametrize(
    ("launcher", "tp", "cp"), [("torchrun", 2, 1), ("mpirun", 4, 2), ("srun", 2, 2)]
)
def test_processes_of_a_launcher_are_the_ranks(
    launcher: str, tp: int, cp: int, split_model: Path
) -> None:
    config = EngineConfig(device="cpu", dtype="float32", session_len=512)
    prompts = [list(range(5, 5 + n)) for n in (3, 70, 130)]
    with pipeline(split_model, config) as pipe:
        generation = GenerationConfig(max_new_tokens=20, ignore_eos=True)
        expected = [r.token_ids for r in pipe.infer(prompts, generation)]
        expected_ppl = pipe.get_ppl(prompts[1:])
    processes = launch(launcher, tp, str(split_model), cp=cp)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * tp, outputs
    tokens, ppl = json.loads(said(outputs[0][0])[0])
    assert tokens == expected
    assert np.allclose(ppl, expected_ppl, rtol=1e-5)
    assert all(said(out) == [] for out, _ in outputs[1:])


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(killed: int, split_model: Path) -> None:
    processes = launch("torchrun", 4, str(split_model), "forever")
    while not processes[0].stdout.readline().startswith("> ["):
        assert processes[0].poll() is None
    time.sleep(0.2)
    processes[killed].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=60) for process in processes]
    if killed == 0:
        assert all(process.returncode == 1 for process in processes[1:])
        assert all("rank 0: expected a living process" in err for _, err in outputs[1:])
    else:
        assert processes[0].returncode == 0, outputs[0]
        first, second = said(outputs[0][0])
        assert first.startswith("rank 1: expected a living process")
        assert second.endswith("load the engine again")
        assert all("rank 1: expected" in outputs[rank][1] for rank in (2, 3))


def test_another_number_of_processes_than_tp_is_refused(split_model: Path) -> None:
    processes = launch("torchrun", 2, str(split_model), size=4)
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "tp: expected 4, the processes that the launcher started, got 2" in err
