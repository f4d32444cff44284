"""Ranks that share a model out, against HF transformers in float32 on tiny random models of every
family: KV heads split, one to a rank or one to several, vocabularies that no size divides; and
ranks that share the keys of every sequence (cp)."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
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
from longspan._core import Engine
from longspan._core import EngineConfig as NativeConfig
from ranks import answers, check_shared, free_port, launch, outputs_of, said, token_nll
from test_families import HEADS, MISTRAL, QWEN2, QWEN3, TOLERANCE, repack
from test_hf_parity import TOLERANCE as SMOLLM2_TOLERANCE

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
    (
        MISTRAL,
        SPLIT | {"sliding_window": None, "tie_word_embeddings": True},
        [(2, 1), (4, 1), (4, 2)],
    ),
    (QWEN2, SPLIT | {"vocab_size": 333}, [(2, 1), (4, 1), (4, 4)]),
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
        check_shared(path, ids, expected, TOLERANCE, tp=tp, cp=cp)


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (4, 1), (4, 2)])
def test_a_packed_tensor_is_cut_by_kv_heads(tp: int, cp: int, tmp_path: Path) -> None:
    hf, llama = oracle.tiny(LLAMA, **SPLIT)
    repack(llama, tmp_path)
    ids = oracle.random_ids(150, hf.config.vocab_size)
    expected, _ = hf.run(ids)
    check_shared(tmp_path, ids, expected, TOLERANCE, tp=tp, cp=cp)


#: The prompt is short; its profile is that of twice the trained length.
LENGTH, FACTOR = 16384, 2.0
SMOLLM2_OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "rope_scaling_factor": FACTOR,
    "rope_length": LENGTH,
    "session_len": LENGTH,
    "max_batch_size": 2,
    "max_prefill_token_num": 90,
    "num_threads": 2,
    "enable_prefix_caching": True,
}


def smollm2_case(layers: int, tp: int, cp: int) -> dict[str, Any]:
    path = oracle.smollm2_dir() if layers == 30 else oracle.smollm2_start_dir(layers)
    ids = oracle.prose(200)  # four blocks: two for the first of three ranks
    return {
        "path": path,
        "options": SMOLLM2_OPTIONS | {"tp": tp, "cp": cp},
        "ids": ids,
        "positions": oracle.spread_positions(len(ids)),
        "prompts": [ids],
    }


@functools.cache
def smollm2_rows(path: str, new_tokens: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """Of transformers: logits of the prompt and new tokens after it, and the prompt's mean nll."""
    hf = oracle.smollm2() if path == oracle.smollm2_dir() else oracle.at(path)
    ids = oracle.prose(200)
    rows, _ = hf.run([*ids, *new_tokens[:-1]], length=LENGTH, factor=FACTOR)
    return rows, float(np.mean(token_nll(rows, ids)))


def check_smollm2(case: dict[str, Any], given: dict[str, Any]) -> None:
    (tokens,) = given["tokens"]
    rows, nll = smollm2_rows(case["path"], tuple(tokens))
    assert tokens == rows[len(case["ids"]) - 1 :].argmax(axis=1).tolist()
    assert np.abs(given["logits"] - rows[case["positions"]]).max() < SMOLLM2_TOLERANCE
    assert given["nll"] == pytest.approx(nll, rel=1e-6)


def read_by_all(model: Any, layers: int, tp: int, cp: int) -> int:
    """Bytes of float32 that the ranks of a Llama with tied embeddings read: of the table and the
    MLPs each its own part, of attention what each of cp needs, and every norm."""
    width = model.hidden_size
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads)
    table = model.vocab_size * width
    attention = layers * heads * width * (width // model.num_attention_heads)
    mlp = layers * 3 * width * model.intermediate_size
    return 4 * (table + mlp + cp * attention + tp * (2 * layers + 1) * width)


# Where all 30 layers would say no more than the first ones, these do.
@pytest.mark.parametrize(
    ("layers", "tp", "cp"), [(30, 2, 2), (30, 3, 3), (4, 3, 1), (4, 6, 2), (4, 6, 6)]
)
def test_smollm2_past_its_trained_length(layers: int, tp: int, cp: int) -> None:
    case = smollm2_case(layers, tp, cp)
    read = (0, 0)

    def progress(done: int, total: int) -> None:
        nonlocal read
        read = (done, total)

    with Engine.load(case["path"], NativeConfig(**case["options"]), progress) as engine:
        check_smollm2(case, answers(engine, case))
        assert engine.metrics().prefix_hit_tokens == len(case["ids"]) - 1
    assert read == (read_by_all(oracle.smollm2().config, layers, tp, cp),) * 2


@pytest.mark.parametrize(("tp", "cp"), [(2, 2), (3, 3)])
def test_smollm2s_first_layers_on_processes(tp: int, cp: int) -> None:
    case = smollm2_case(4, tp, cp)
    processes = launch(tp, json.dumps([case]))
    outputs = outputs_of(processes, 120)
    assert [process.returncode for process in processes] == [0] * tp, outputs
    check_smollm2(case, json.loads(said(outputs[0][0])[0]))


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
    (tmp_path / "model.safetensors").unlink()  # nobody gets as far as the weights
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


def launch_script(
    launcher: str, tp: int, *arguments: str, cp: int = 1, size: int | None = None
) -> list[Any]:
    """The processes that a launcher would start, in order of rank."""
    size = size or tp
    known = {name for names in LAUNCHERS.values() for name in names}
    port = free_port()
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
    processes = launch_script(launcher, tp, str(split_model), cp=cp)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * tp, outputs
    tokens, ppl = json.loads(said(outputs[0][0])[0])
    assert tokens == expected
    assert np.allclose(ppl, expected_ppl, rtol=1e-5)
    assert all(said(out) == [] for out, _ in outputs[1:])


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(killed: int, split_model: Path) -> None:
    processes = launch_script("torchrun", 4, str(split_model), "forever")
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
    processes = launch_script("torchrun", 2, str(split_model), size=4)
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "tp: expected 4, the processes that the launcher started, got 2" in err
