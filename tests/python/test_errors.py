"""What is wrong with a model, an option or a prompt is said in a typed error, and costs nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import longspan
import numpy as np
import pytest
from longspan import (
    BackendUnavailable,
    CapacityError,
    CheckpointError,
    ContextTooLong,
    Engine,
    EngineConfig,
    GenerationConfig,
    InvalidArgument,
    LongspanError,
    Pipeline,
    Unsupported,
    pipeline,
)

FAST = EngineConfig(dtype="float32", cache_max_entry_count=16)


def test_errors_are_also_pythons_own() -> None:
    for kind, base in {
        InvalidArgument: ValueError,
        Unsupported: NotImplementedError,
        ContextTooLong: ValueError,
        CapacityError: MemoryError,
        CheckpointError: RuntimeError,
    }.items():
        assert issubclass(kind, base) and issubclass(kind, LongspanError)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    from conftest import write_tiny_llama

    path = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(path)
    with pipeline(path, FAST) as pipe:
        yield pipe


BAD_PROMPTS: list[tuple[Any, str]] = [
    (None, "got NoneType"),
    (7, "got int"),
    (b"bytes", "prompts"),
    ({"role": "user", "content": "x"}, "got dict"),
    ([None], r"prompts\[0\]: expected"),
    (["ok", 7], r"prompts\[1\]: expected"),
    (["ok", {"role": "user", "content": "x"}], r"prompts\[1\]: expected"),
    (["ok", []], r"prompts\[1\]: expected at least 1 token id"),
    ([[1, 2], [3, "x"]], r"prompts\[1\]: expected"),
    ([1.5, 2.0], r"prompts\[0\]: expected one dimension of integer"),
    ([1, [2]], r"prompts\[0\]: expected"),
    ([True, False], r"prompts\[0\]: expected .* bool"),
    ([1, -1], r"prompts\[0\]: expected token ids in \[0, 260\), got -1"),
    ([1, 260], r"prompts\[0\]: expected token ids in \[0, 260\), got 260"),
    ([1, 2**70], r"prompts\[0\]: expected"),
    (np.zeros((2, 2, 2), int), "1 or 2 dimensions, got 3"),
    (np.zeros(3), "expected one dimension of integer token ids"),
    (np.zeros((2, 0), int), "at least 1 token id"),
    ([{"role": "user"}], r"messages\[0\].content"),
]


@pytest.mark.parametrize(("prompt", "expected"), BAD_PROMPTS)
def test_bad_prompts_are_refused(pipe: Pipeline, prompt: Any, expected: str) -> None:
    before = pipe.engine.metrics().steps
    with pytest.raises(InvalidArgument, match=expected):
        pipe(prompt)
    assert pipe.engine.metrics().steps == before
    assert pipe("hi", GenerationConfig(max_new_tokens=1, ignore_eos=True)).generate_token_len == 1


@pytest.mark.parametrize("ids", [[], [[1]], [[1, 2], [3]], ["text"], [[1.0, 2.0]], None])
def test_bad_sequences_to_score_are_refused(pipe: Pipeline, ids: Any) -> None:
    if ids == []:
        assert pipe.get_ppl(ids) == []
        return
    with pytest.raises(InvalidArgument):
        pipe.get_ppl(ids)


def test_a_single_id_cannot_be_scored(pipe: Pipeline) -> None:
    with pytest.raises(InvalidArgument, match="expected at least 2 token ids, got 1"):
        pipe.get_ppl([5])


def test_too_long_says_how_long_it_may_be(pipe: Pipeline) -> None:
    for call in (pipe, pipe.get_ppl, pipe.get_logits):
        with pytest.raises(ContextTooLong, match="300") as caught:
            call([65] * 300)
        assert caught.value.prompt_tokens == 300
        assert caught.value.session_len == 256


def test_a_session_the_cache_cannot_hold_is_refused_with_the_largest_it_can(
    tiny_llama: Callable[..., Path],
) -> None:
    path = tiny_llama(max_position_embeddings=1024)
    with pytest.raises(CapacityError, match=r"expected at most 128 tokens.* got 1024"):
        pipeline(path, EngineConfig(dtype="float32", cache_max_entry_count=2))
    config = EngineConfig(dtype="float32", session_len=128, cache_max_entry_count=2)
    with pipeline(path, config) as pipe:
        assert len(pipe.get_ppl([65] * 128)) == 1


def test_models_that_are_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "absent", tmp_path / "absent.gguf"):
        with pytest.raises(CheckpointError, match="absent"):
            pipeline(missing)
    with pytest.raises(CheckpointError):
        pipeline(tmp_path)  # empty
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.gguf"):
        pipeline(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        pipeline(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float8"}, InvalidArgument),
        ({"dtype": "float16"}, Unsupported),
        ({"device": "cuda"}, BackendUnavailable),
        ({"device": "tpu"}, InvalidArgument),
        ({"cache_block_seq_len": 63}, InvalidArgument),
        ({"session_len": 10**9, "cache_max_entry_count": 16}, CapacityError),
    ],
)
def test_options_the_engine_refuses(
    tiny_llama: Callable[..., Path], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="got"):
        pipeline(tiny_llama(), EngineConfig(**options))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 3},
        {"vocab_size": 2**40},
        {"intermediate_size": 97},
        {"rms_norm_eps": "nan"},
        {"rope_scaling": {"rope_type": "warp", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "extra": 1}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
        {"hidden_act": "gelu"},
    ],
)
def test_bad_configs_are_refused(tiny_llama: Callable[..., Path], changes: dict[str, Any]) -> None:
    path = tiny_llama()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((CheckpointError, Unsupported, InvalidArgument)):
        pipeline(path, FAST)


def hostile_header(data: bytes, **entry: Any) -> bytes:
    """The same safetensors file with the first tensor described otherwise."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name] = {**header[name], **entry}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "header beyond the file": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "not JSON": lambda data: data[:8] + b"x" * (len(data) - 8),
    "offset beyond the file": lambda data: hostile_header(data, data_offsets=[0, 2**60]),
    "negative offset": lambda data: hostile_header(data, data_offsets=[-4, 0]),
    "wrong shape": lambda data: hostile_header(data, shape=[1, 1]),
    "overflowing shape": lambda data: hostile_header(data, shape=[2**40, 2**40]),
    "unknown dtype": lambda data: hostile_header(data, dtype="F4"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_refused(tiny_llama: Callable[..., Path], name: str) -> None:
    path = tiny_llama()
    weights = path / "model.safetensors"
    weights.write_bytes(DAMAGES[name](weights.read_bytes()))
    with pytest.raises((CheckpointError, Unsupported), match=r"safetensors"):
        pipeline(path, FAST)


def test_weights_that_are_not_finite_are_refused(tiny_llama: Callable[..., Path]) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny_llama()
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(LongspanError, match=r"layers\.1\.mlp\.down_proj"):
        pipeline(path, FAST)


def test_native_options_may_be_the_dataclasses(tiny_llama: Callable[..., Path]) -> None:
    path = str(tiny_llama())
    assert longspan.plan_memory(path, FAST).num_blocks == 16
    with Engine.load(path, FAST) as engine:
        config = GenerationConfig(max_new_tokens=3, ignore_eos=True)
        assert len(engine.generate([1, 2, 3], config).wait().token_ids) == 3
    with pytest.raises(TypeError):
        Engine.load(path, {"dtype": "float32"})  # type: ignore[arg-type]


def test_backends_say_why() -> None:
    backends = {b.name: b for b in longspan.backends()}
    assert backends["cpu"].available
    assert all(b.available or b.detail for b in backends.values())
