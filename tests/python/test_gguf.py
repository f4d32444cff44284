"""A converted GGUF file against what transformers and gguf-py read from the same file."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from longspan import CheckpointError, EngineConfig, GenerationConfig, Unsupported, pipeline
from longspan.gguf import cached_model_dir, convert
from longspan.tokenizer import Tokenizer
from probes import PROBES
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers


def test_every_weight_is_what_transformers_reads(smollm2_gguf: Path, smollm2_dir: Path) -> None:
    pytest.importorskip("torch")
    oracle = pytest.importorskip("oracle")
    expected = oracle.smollm2().model.state_dict()
    weights = load_file(smollm2_dir / "model.safetensors")
    assert set(expected) - set(weights) == {"lm_head.weight"}  # tied
    for name, weight in weights.items():
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, expected[name].numpy(), err_msg=name)


def test_config_is_what_transformers_reads(smollm2_dir: Path) -> None:
    oracle = pytest.importorskip("oracle")
    expected = oracle.smollm2().config
    config = json.loads((smollm2_dir / "config.json").read_text())
    theta = config.pop("rope_theta")
    assert theta == expected.rope_parameters["rope_theta"]
    for name in set(config) - {"architectures", "torch_dtype"}:
        assert config[name] == getattr(expected, name), name


def test_tokens_are_those_of_transformers(smollm2_dir: Path) -> None:
    oracle = pytest.importorskip("oracle")
    expected = copy.deepcopy(oracle.smollm2_tokenizer())
    # transformers takes vocabulary and merges from the file and passes over tokenizer.ggml.pre,
    # "smollm", which also sets digits (and other numbers, such as ½) apart.
    splitter = expected.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, splitter])
    tokenizer = Tokenizer.from_dir(smollm2_dir)
    for text in PROBES:
        assert tokenizer.encode(text) == expected.encode(text), text
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert tokenizer.bos_token_id == expected.bos_token_id


def write_gguf(path: Path, **changes: object) -> Path:
    """A Llama of one layer and two heads as llama.cpp would write it."""
    writer = GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_block_count(1)
    writer.add_head_count(changes.get("heads", 2))
    writer.add_head_count_kv(1)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
        writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(["a", "b", "ab", "<s>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(changes.get("merges", ["a b"]))
    writer.add_bos_token_id(changes.get("bos", 3))
    writer.add_add_bos_token(True)
    rng = np.random.default_rng(0)
    dtype = changes.get("dtype", np.float32)
    shapes = {
        "token_embd": (4, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8),
        "blk.0.ffn_down": (8, 12),
        **changes.get("tensors", {}),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("block", [1, 1 << 20])  # bytes written at a time
def test_half_precision_stays_as_it_is_and_rows_are_reordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("longspan.gguf._BLOCK", block)
    source = write_gguf(tmp_path / "m.gguf", dtype=np.float16)
    convert(source, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    assert q.dtype == np.float16
    raw = next(t for t in GGUFReader(source).tensors if t.name == "blk.0.attn_q.weight").data
    # llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face (i, i + 2) in heads of four rows.
    np.testing.assert_array_equal(q, raw[[0, 2, 1, 3, 4, 6, 5, 7]])
    np.testing.assert_array_equal(
        weights["model.layers.0.self_attn.v_proj.weight"],
        next(t for t in GGUFReader(source).tensors if t.name == "blk.0.attn_v.weight").data,
    )


def test_a_tokenizer_that_begins_texts_still_does(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    tokenizer = Tokenizer.from_dir(tmp_path / "out")
    assert tokenizer.encode("abb") == [3, 2, 1]
    assert tokenizer.encode("abb", add_bos=False) == [2, 1]
    assert tokenizer.encode("abb", add_special_tokens=False) == [2, 1]


def test_linear_rope_scaling_is_kept(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", scaling=gguf.RopeScalingType.LINEAR)
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture": "qwen2"}, "architecture llama, got qwen2"),
        ({"scaling": gguf.RopeScalingType.YARN}, "none or linear, got yarn"),
        ({"tokenizer": "llama"}, "expected gpt2, got llama"),
        ({"pre": "falcon"}, "expected one of gpt-2, smollm, llama-bpe, qwen2, got falcon"),
        ({"tensors": {"rope_freqs": (4,)}}, "frequency factors"),
        ({"tensors": {"blk.0.ffn_gate_inp": (4, 8)}}, "got blk.0.ffn_gate_inp.weight"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict, expected: str) -> None:
    source = write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(Unsupported, match=expected):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bos": 4}, r"bos_token_id: expected an id in \[0, 4\), got 4"),
        ({"merges": ["a z"]}, "merges"),
        ({"merges": ["a b c"]}, "merges"),
        ({"heads": 0}, r"head_count: expected a count in \[1, 2\^31\), got 0"),
        ({"tensors": {"blk.0.attn_q": (6, 8)}}, "multiples of 4, got 6"),
        ({"tensors": {"blk.0.attn_v": (0, 8)}}, "attn_v.weight: expected at least 1 value"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, changes: dict, expected: str) -> None:
    source = write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=expected):
        convert(source, tmp_path / "out")


def test_truncated_anywhere_is_a_checkpoint_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(whole), 97):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            convert(cut, tmp_path / "out")


def test_an_offset_that_wraps_around_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    data = bytearray(source.read_bytes())
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8 + 4  # after its dimensions and type
    assert data[at : at + 8] == bytes(8)
    data[at : at + 8] = (2**64 - 128).to_bytes(8, "little")
    source.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight: expected 128 bytes"):
        convert(source, tmp_path / "out")


def test_random_damage_is_typed(tmp_path: Path) -> None:
    """Whatever a flipped byte turns the header into: a conversion, or a typed error."""
    whole = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    outcomes = set()
    for trial in range(150):
        data = bytearray(whole)
        for _ in range(4):
            data[rng.integers(0, len(whole) - 1024)] = rng.integers(0, 256)
        damaged.write_bytes(data)
        try:
            convert(damaged, tmp_path / f"out{trial}")
            outcomes.add("converted")
        except (CheckpointError, Unsupported) as error:
            outcomes.add(type(error).__name__)
    assert "CheckpointError" in outcomes


def test_conversion_is_done_once_and_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_gguf(tmp_path / "m.gguf")
    calls: list[int] = []
    found: list[Path] = []

    def work() -> None:
        found.append(cached_model_dir(source, lambda done, total: calls.append(total)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(calls) == 11  # tensors, each written once
    os.utime(source, ns=(1, 1))  # another file under the same name
    assert cached_model_dir(source) != found[0]


def test_a_gguf_file_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_gguf(tmp_path / "m.gguf")
    for _ in range(2):
        with pipeline(source, EngineConfig(dtype="float32", cache_max_entry_count=8)) as pipe:
            assert pipe("abba", GenerationConfig(max_new_tokens=3)).input_token_len == 4


def test_an_interrupted_conversion_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_gguf(tmp_path / "m.gguf")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_model_dir(source, interrupt)
    left = list((tmp_path / "cache" / "longspan" / "gguf").iterdir())
    assert [path.suffix for path in left] == [".lock"]
    assert (cached_model_dir(source) / "config.json").exists()
