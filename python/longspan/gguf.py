"""A GGUF file becomes a model directory, once, in the user's cache.

Weights are widened to what holds them exactly (quantised ones to float32) and put into the order
and under the names of Hugging Face's Llama; config, tokenizer and chat template come from the
metadata. A few rows at a time are in memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf as reader
import numpy as np
import numpy.typing as npt

from longspan._core import CapacityError, CheckpointError, Unsupported
from longspan.cache import cached_dir
from longspan.gguf_tokenizer import write_tokenizer

# Part of the cache's key: raise it when the files written change.
_FORMAT = 1

# Bytes written at a time.
_BLOCK = 32 << 20

#: Called while weights are written: bytes so far, bytes in all.
Progress = Callable[[int, int], None]

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Metadata:
    """The key-value part of a GGUF file, typed on access. Throws CheckpointError."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self._fields = fields

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        if key not in self._fields:
            return default
        value = self._fields[key].contents()
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"{self.path}: {key}: expected {kind.__name__}, got {value!r:.80}"
            )
        return value

    def need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: expected the key {key}, got none")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A count that is neither absurd nor zero."""
        value = self.need(key, int) if default is None else self.get(key, int, default)
        if not 1 <= value < 2**31:
            raise CheckpointError(f"{self.path}: {key}: expected a count in [1, 2^31), got {value}")
        return value


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file and what becomes of it."""

    source: reader.ReaderTensor
    name: str
    heads: int  # of a rotated projection, whose rows llama.cpp interleaves; else 0
    dtype: str  # in safetensors' words
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * (4 if self.dtype == "F32" else 2)

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The values, a few rows at a time. Throws Unsupported for a type that gguf-py cannot
        dequantise."""
        unit = self.shape[0] // self.heads if self.heads else 1
        row_bytes = self.nbytes // self.shape[0]
        rows = self.shape[0] if len(self.shape) == 1 else max(_BLOCK // row_bytes // unit, 1) * unit
        for begin in range(0, self.shape[0], rows):
            block = self._widened(self.source.data[begin : begin + rows])
            if self.heads:
                # llama.cpp pairs rows (2i, 2i+1) of a head, Hugging Face (i, i + head_dim/2).
                heads = block.reshape(-1, unit // 2, 2, *self.shape[1:])
                block = heads.swapaxes(1, 2).reshape(block.shape)
            yield np.ascontiguousarray(block)

    def _widened(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        kind = self.source.tensor_type
        if kind == reader.GGMLQuantizationType.BF16:
            return data.view(np.uint16)
        if kind in (reader.GGMLQuantizationType.F16, reader.GGMLQuantizationType.F32):
            return data
        try:
            return reader.dequantize(data, kind)
        except (ValueError, NotImplementedError) as error:
            raise Unsupported(
                f"{self.source.name}: expected a type that gguf-py can dequantise, "
                f"got {kind.name}: {error}"
            ) from error


def cached_model_dir(path: str | Path, progress: Progress | None = None) -> Path:
    """The model directory of a GGUF file, converted first if it is not in the cache yet."""
    path = Path(path)
    name = f"{path.stem}-{_fingerprint(path)}"
    return cached_dir("gguf", name, lambda target: convert(path, target, progress))


def convert(path: str | Path, model_dir: str | Path, progress: Progress | None = None) -> None:
    """Writes a Hugging Face model directory that holds the same model.

    Throws CheckpointError for a file that is malformed or truncated, Unsupported for an
    architecture, tokenizer or RoPE method that has no equivalent here.
    """
    path, model_dir = Path(path), Path(model_dir)
    file = _open(path)
    metadata = Metadata(path, file.fields)
    config = _config(metadata, file.tensors)
    tensors = [_plan(path, tensor, config) for tensor in file.tensors]
    model_dir.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(model_dir).free
    if total > free:
        raise CapacityError(f"{model_dir}: expected {total:,} free bytes to convert, got {free:,}")
    write_tokenizer(metadata, model_dir)
    _write_json(model_dir / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    _write_json(model_dir / "generation_config.json", ids)
    _write_safetensors(model_dir / "model.safetensors", tensors, progress)


def _fingerprint(path: Path) -> str:
    """Names a file's content by its size, time of change and first MiB, which spans most of the
    metadata, in 16 hex digits."""
    try:
        status = path.stat()
        with open(path, "rb") as file:
            head = file.read(1 << 20)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable GGUF file, got {error}") from error
    key = f"{_FORMAT} {status.st_size} {status.st_mtime_ns} ".encode() + head
    return hashlib.sha256(key).hexdigest()[:16]


def _open(path: Path) -> reader.GGUFReader:
    try:
        file = reader.GGUFReader(path)
    except Exception as error:  # whatever its parsing of untrusted bytes runs into
        raise CheckpointError(f"{path}: expected a complete GGUF file, got {error!r}") from error
    if file.endianess != reader.GGUFEndian.LITTLE:
        raise Unsupported(f"{path}: expected a little-endian GGUF file")
    size = path.stat().st_size
    for tensor in file.tensors:
        # An offset near 2^64 wraps around to before the data.
        if not file.data_offset <= tensor.data_offset <= size - tensor.n_bytes:
            raise CheckpointError(
                f"{path}: {tensor.name}: expected {tensor.n_bytes} bytes at {tensor.data_offset}, "
                f"got a file of {size}"
            )
    return file


def _config(metadata: Metadata, tensors: list[reader.ReaderTensor]) -> dict[str, Any]:
    """config.json, from llama.cpp's keys (gguf-py's constants name them all)."""
    path = metadata.path
    architecture = metadata.need("general.architecture", str)
    if architecture != "llama":
        raise Unsupported(f"{path}: expected a GGUF of architecture llama, got {architecture}")
    names = {tensor.name for tensor in tensors}
    for name, present in {
        "a mixture of experts": metadata.get("llama.expert_count", int, 0) > 0,
        "a sliding window": metadata.get("llama.attention.sliding_window", int, 0) > 0,
        "a file in several parts": metadata.get("split.count", int, 0) > 1,
        "RoPE frequency factors (Llama 3.1)": "rope_freqs.weight" in names,
    }.items():
        if present:
            raise Unsupported(f"{path}: {name} in a GGUF file is not supported yet")
    hidden = metadata.size("llama.embedding_length")
    heads = metadata.size("llama.attention.head_count")
    head_dim = metadata.size("llama.attention.key_length", hidden // heads)
    rotated = metadata.size("llama.rope.dimension_count", head_dim)
    if rotated != head_dim or metadata.size("llama.attention.value_length", head_dim) != head_dim:
        raise Unsupported(f"{path}: expected heads rotated whole, got {rotated} of {head_dim}")
    embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise CheckpointError(f"{path}: expected the tensor token_embd.weight, got none")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(embedding.shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": metadata.size("llama.feed_forward_length"),
        "num_hidden_layers": metadata.size("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.need("llama.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": metadata.size("llama.context_length"),
        "rope_theta": metadata.get("llama.rope.freq_base", float, 10000.0),
        "attention_bias": any(name.endswith("attn_q.bias") for name in names),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in names),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "float32",
    }
    scaling = metadata.get("llama.rope.scaling.type", str, "none")
    if scaling == "linear":
        factor = metadata.need("llama.rope.scaling.factor", float)
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise Unsupported(
            f"{path}: llama.rope.scaling.type: expected none or linear, got {scaling}"
        )
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id", int)
        if token is not None:
            config[f"{name}_token_id"] = token
    return config


def _plan(path: Path, tensor: reader.ReaderTensor, config: dict[str, Any]) -> _Tensor:
    name, heads = _hf_name(tensor.name, config)
    if name is None:
        raise Unsupported(f"{path}: expected the tensors of a Llama, got {tensor.name}")
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if not shape or 0 in shape:
        raise CheckpointError(f"{path}: {tensor.name}: expected at least 1 value, got {shape}")
    if heads and shape[0] % (2 * heads):
        raise CheckpointError(
            f"{path}: {tensor.name}: expected rows in multiples of {2 * heads}, got {shape[0]}"
        )
    dtype = {"F16": "F16", "BF16": "BF16"}.get(tensor.tensor_type.name, "F32")
    return _Tensor(tensor, name, heads, dtype, shape)


def _hf_name(name: str, config: dict[str, Any]) -> tuple[str | None, int]:
    """Hugging Face's name, and the heads whose rows to reorder."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name], 0
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, kind = rest.rpartition(".")
    if not block.isdecimal() or part not in _LAYER_NAMES or kind not in ("weight", "bias"):
        return None, 0
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
    hf_name = f"model.layers.{int(block)}.{_LAYER_NAMES[part]}.{kind}"
    return hf_name, config[heads] if heads else 0


def _write_safetensors(path: Path, tensors: list[_Tensor], progress: Progress | None) -> None:
    """The safetensors format: length of the header (uint64), header (JSON), data, back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        done = 0
        for tensor in tensors:
            for block in tensor.blocks():
                file.write(block.data)
                done += block.nbytes
                if progress is not None:
                    progress(done, end)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
