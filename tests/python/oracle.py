"""The reference the engine is judged by: HF transformers in float32 on torch's CPU kernels.

Two things differ from stock transformers, both on purpose. Rotary angles are formed in float64
(position * inv_freq, then cos and sin, then float32), because float32 angles alone move SmolLM2's
logits by 7.6e-4 at position 8192. And inv_freq belongs to a *stated* length, one profile for the
whole sequence, where transformers would give each forward the base of the length it has reached.

Long inputs run in chunks over a float32 KV cache, with logits only where they are asked for, so
memory grows with length and not with its square or with the vocabulary.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import pydoc_data.topics
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

# Waiting threads sleep: torch's would otherwise spin against the engine's between forwards.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
torch = pytest.importorskip("torch", reason="the oracle needs torch")
transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
from shipped import smollm2_gguf  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

CHUNK = 1024
IN_CI = bool(os.environ.get("CI"))
#: For tests of minutes, so that a plain `pytest` stays short.
slow = pytest.mark.skipif(not IN_CI, reason="takes minutes; runs in CI, or with CI=1 set")


def inverse_frequencies(config: LlamaConfig, length: int, factor: float = 0.0) -> torch.Tensor:
    """[head_dim / 2] float64, radians per token, for a sequence of `length` tokens.

    factor 0 follows config.rope_parameters; >= 1 is dynamic NTK with that factor. The formulas are
    those of transformers.modeling_rope_utils, evaluated in float64.
    """
    rope = dict(config.rope_parameters)
    if factor:
        rope |= {"rope_type": "dynamic", "factor": factor}
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base = float(rope["rope_theta"])
    stretch = 1.0
    if rope["rope_type"] == "linear":
        stretch = rope["factor"]
    elif rope["rope_type"] == "dynamic":
        native = config.max_position_embeddings
        ratio = rope["factor"] * max(length, native) / native - (rope["factor"] - 1.0)
        base *= ratio ** (dim / (dim - 2))
    elif rope["rope_type"] != "default":
        raise ValueError(f"the oracle does not know rope_type {rope['rope_type']}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return 1.0 / (base**exponents * stretch)


class Float64Rotary(torch.nn.Module):
    """Stands in for LlamaRotaryEmbedding: angles in float64, cos and sin rounded once."""

    inv_freq: torch.Tensor  # [head_dim / 2] float64

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[Any, Any]:
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Oracle:
    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model.eval()
        self.config = model.config
        self.rotary = Float64Rotary()
        model.model.rotary_emb = self.rotary

    def run(
        self,
        ids: list[int],
        positions: list[int] | None = None,
        length: int | None = None,
        factor: float = 0.0,
        nll: bool = False,
    ) -> tuple[npt.NDArray[np.float32], float]:
        """Logits [len(positions), vocab_size] (default: all positions) and, when asked, the sum in
        float64 of -log p(ids[i + 1] | ids[:i + 1]), under the profile of `length` tokens (default:
        those of ids)."""
        self.rotary.inv_freq = inverse_frequencies(self.config, length or len(ids), factor)
        wanted = range(len(ids)) if positions is None else positions
        cache = DynamicCache()
        logits, total = [], 0.0
        with torch.inference_mode():
            for start in range(0, len(ids), CHUNK):
                hidden = self._hidden(ids[start : start + CHUNK], start, cache)
                rows = [p - start for p in wanted if start <= p < start + len(hidden)]
                logits.append(self.model.lm_head(hidden[rows]).float().numpy())
                if nll:
                    targets = torch.tensor(ids[start + 1 : start + 1 + len(hidden)]).long()
                    total += self._nll(hidden[: len(targets)], targets)
        return np.concatenate(logits), total

    def greedy(self, ids: list[int], count: int, length: int, factor: float = 0.0) -> list[int]:
        """The `count` likeliest tokens in turn, under the profile of `length` tokens, on the device
        that the model is on."""
        frequencies = inverse_frequencies(self.config, length, factor)
        self.rotary.inv_freq = frequencies.to(self.model.device)
        cache = DynamicCache()
        drawn: list[int] = []
        with torch.inference_mode():
            for start in range(0, len(ids), CHUNK):
                hidden = self._hidden(ids[start : start + CHUNK], start, cache)
            while len(drawn) < count:
                if drawn:
                    hidden = self._hidden(drawn[-1:], len(ids) + len(drawn) - 1, cache)
                drawn.append(int(self.model.lm_head(hidden[-1]).argmax()))
        return drawn

    def _hidden(self, ids: list[int], start: int, cache: DynamicCache) -> torch.Tensor:
        """[len(ids), hidden_size] of tokens from position `start` on, of which the cache has all
        before."""
        part = torch.tensor(ids, device=self.model.device)
        return self.model.model(
            input_ids=part[None],
            position_ids=torch.arange(start, start + len(part), device=part.device)[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]

    def _nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> float:
        """Sums in float64: torch's float32 cross entropy is off by 1e-5 a token, always the same
        way."""
        logits = self.model.lm_head(hidden).float()
        chosen = logits.gather(1, targets[:, None])
        top = logits.amax(1, keepdim=True)
        sums = logits.sub_(top).exp_().sum(1, dtype=torch.float64)
        return (sums.log() + (top.double() - chosen.double())[:, 0]).sum().item()


@functools.cache
def scratch() -> Path:
    """A directory that lives as long as the test session."""
    path = Path(tempfile.mkdtemp(prefix="longspan-oracle-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def smollm2() -> Oracle:
    """SmolLM2-135M-Instruct in float32, the GGUF read by transformers: none of our code."""
    path = smollm2_gguf()
    read = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # What transformers reads from a GGUF it will not save again, so the values move to a new model.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(read.state_dict())
    return Oracle(model)


@functools.cache
def smollm2_dir() -> str:
    """smollm2() as a model directory in float32, written by transformers."""
    path = scratch() / "smollm2"
    smollm2().model.save_pretrained(path)
    return str(path)


@functools.cache
def smollm2_start_dir(num_layers: int) -> str:
    """The first layers of smollm2_dir(), embeddings and head as they are: for what every layer does
    as the next."""
    whole = smollm2().model
    config = LlamaConfig.from_dict(whole.config.to_dict() | {"num_hidden_layers": num_layers})
    model = LlamaForCausalLM(config)
    wanted = model.state_dict().keys()
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in wanted})
    path = scratch() / f"smollm2-{num_layers}"
    model.save_pretrained(path)
    return str(path)


@functools.cache
def smollm2_bf16() -> Oracle:
    return at(smollm2_dir(), torch.bfloat16)


@functools.cache
def smollm2_tokenizer() -> Any:
    path = smollm2_gguf()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@functools.cache
def _prose_ids() -> list[int]:
    topics = pydoc_data.topics.topics
    return smollm2_tokenizer()("\n".join(topics[key] for key in sorted(topics)))["input_ids"]


def prose(length: int, start: int = 0) -> list[int]:
    """`length` tokens of natural text: Python's own language reference, which every CPython has."""
    ids = _prose_ids()
    assert start + length <= len(ids)
    return ids[start : start + length]


def spread_positions(length: int, count: int = 17) -> list[int]:
    """At most `count` positions from the first to the last, ascending and distinct."""
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


@functools.cache
def smollm2_reference(
    length: int, factor: float
) -> tuple[list[int], list[int], npt.NDArray[np.float32], float]:
    """ids, positions, their logits and the nll sum of `length` tokens of prose. Once a session:
    16384 tokens take two cores a couple of minutes."""
    ids, positions = prose(length), spread_positions(length)
    logits, nll = smollm2().run(ids, positions, factor=factor, nll=True)
    return ids, positions, logits, nll


TINY_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Sizes of which none is a power of two, over TINY_SIZES.
ODD_HEADS: dict[str, Any] = {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "vocab_size": 1001,
}


def tiny_llama(**options: Any) -> tuple[Oracle, str]:
    return tiny("Llama", **options)


@functools.cache
def tiny(family: str, **options: Any) -> tuple[Oracle, str]:
    """A random model of a family, "Llama" or the like as transformers names it, and its
    directory."""
    rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    rope_parameters |= dict(options.pop("rope", ()))
    make_config = getattr(transformers, f"{family}Config")
    sizes = TINY_SIZES | options
    config = make_config(**sizes, rope_parameters=rope_parameters, dtype="float32")
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    draw(model)
    path = tempfile.mkdtemp(dir=scratch(), prefix="tiny-")
    model.save_pretrained(path)
    return Oracle(model), path


def draw(model: Any) -> None:
    """Draws weights so that every part matters: activations stay of order one and attention is far
    from uniform, logits spread over several units."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name and not model.config.tie_word_embeddings:
                weight.copy_(noise)
            else:
                gain = 2.0 if "q_proj" in name or "lm_head" in name else 1.0
                weight.copy_(gain * noise / math.sqrt(weight.shape[1]))


def at(path: str, dtype: torch.dtype = torch.float32) -> Oracle:
    """The model in a directory."""
    return Oracle(LlamaForCausalLM.from_pretrained(path, dtype=dtype))


@contextlib.contextmanager
def native_length(oracle: Oracle, length: int) -> Iterator[None]:
    """For the moment, a model trained to `length` tokens."""
    before = oracle.config.max_position_embeddings
    oracle.config.max_position_embeddings = length
    try:
        yield
    finally:
        oracle.config.max_position_embeddings = before


def random_ids(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab_size, length).tolist()
