"""A model whose weights are set by construction, so that what it says proves what was read.

A partner token stands anywhere in the context; the mark of its key, at the end, makes the model say
that very partner, one of many that the key could have. Nothing is learned, so a wrong answer can
only come from a key or value that was lost, misplaced or misread on the way.

Tokens have one-hot embeddings, hence the weights of a projection are a table of what each token
gives. In the table of keys a partner has the code of its key, in that of queries its mark has the
same code; codes are orthogonal rows of a Hadamard matrix, in those dims of a head that rotate
slowest, by 0.001 rad in a million tokens at most. All other dims, and the keys and values of all
other tokens, are noise. Scores, the softmax scale included: MATCH for the partner; SINK for token
0, which has the value zero and takes the attention of heads that look for nothing; for all others
about N(0, 3^2) or less with heads of 128, the exponentials of a million of which sum up to exp(18).
So a partner gets all but 1e-7 of the weight. Every head of every layer looks for keys of its own.

A partner is also the mark of the next key: a generation that begins with the mark of key 0 says the
partners of all keys in turn, each after another reading of the whole cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longspan._core import InvalidArgument

MATCH = 48.0
SINK = 30.0
#: Of a partner's key in the dims of its code.
CODE = 4.0
#: Of the keys and queries that mean nothing: in the dims of codes, and in those that rotate.
NOISE = 1.0
TURNING_NOISE = 1.2
#: Length of what a head finds, beside an embedding of length 1.
FOUND = 0.25
#: Logit of the partner; those of others are about N(0, (LOGIT^2 / head_dim)).
LOGIT = 20.0
ROPE_THETA = 1e12

Table = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RetrievalModel:
    """num_keys keys of num_partners partners each. Token 0 begins every text, then come the marks,
    the partners of key 0, of key 1, ..., and the fillers."""

    num_keys: int = 20
    num_partners: int = 16
    num_fillers: int = 155
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 262144
    seed: int = 0

    def __post_init__(self) -> None:
        dim = self.head_dim
        if dim < 16 or dim & (dim - 1):
            raise InvalidArgument(f"head_dim: expected a power of two >= 16, got {dim}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_heads: expected a multiple of {self.num_kv_heads}, got {self.num_heads}"
            )
        group = self.num_heads // self.num_kv_heads
        most = (self.code_dims - 1) // group * self.num_layers * self.num_heads
        if not 1 <= self.num_keys <= most:
            raise InvalidArgument(
                f"num_keys: expected an integer in [1, {most}], got {self.num_keys}"
            )

    @property
    def code_dims(self) -> int:
        return self.head_dim // 4

    @property
    def vocab_size(self) -> int:
        return 1 + self.num_keys * (1 + self.num_partners) + self.num_fillers

    @property
    def hidden_size(self) -> int:
        """A dim for each token, and head_dim more for what was found."""
        return -(-(self.vocab_size + self.head_dim) // 64) * 64

    def mark(self, key: int) -> int:
        return 1 + key

    def partner(self, key: int, choice: int) -> int:
        return 1 + self.num_keys + key * self.num_partners + choice

    def text(self, length: int, seed: int = 0) -> tuple[list[int], list[int]]:
        """Ids of `length` tokens: fillers, a partner of each key among them, spread evenly, and the
        mark of key 0 at the end; and the partners in order of their keys, which a greedy generation
        must say. Throws InvalidArgument for a length below 2 + 2 num_keys."""
        least = 2 + 2 * self.num_keys
        if length < least:
            raise InvalidArgument(f"length: expected at least {least}, got {length}")
        random = np.random.default_rng((self.seed, seed))
        ids = random.integers(self.vocab_size - self.num_fillers, self.vocab_size, length)
        ids[0] = 0
        ids[-1] = self.mark(0)
        choices = random.integers(0, self.num_partners, self.num_keys)
        partners = [self.partner(key, int(choice)) for key, choice in enumerate(choices)]
        # One in each of num_keys equal stretches, keys in any order.
        ends = np.linspace(1, length - 1, self.num_keys + 1).astype(int)
        places = [int(random.integers(a, b)) for a, b in pairwise(ends)]
        ids[random.permutation(places)] = partners
        return ids.tolist(), partners

    def write(self, folder: Path) -> None:
        """Writes a Hugging Face directory, without a tokenizer."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self._config(), indent=1))

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 64,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": 1e-6,
            "rope_theta": ROPE_THETA,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "torch_dtype": "bfloat16",
        }

    def _tensors(self) -> dict[str, Table]:
        hidden, vocab, dim = self.hidden_size, self.vocab_size, self.head_dim
        random = np.random.default_rng(self.seed)
        value_codes = _normal(random, vocab, dim)
        found = slice(vocab, vocab + dim)  # dims of the residual stream
        unit = float(np.sqrt(hidden))  # what a norm makes of an embedding's 1

        embedding = np.zeros((vocab, hidden), np.float32)
        embedding[:, :vocab] = np.eye(vocab)
        head = np.zeros((vocab, hidden), np.float32)
        partners = slice(self.partner(0, 0), self.partner(self.num_keys, 0))
        head[partners, found] = value_codes[partners] * (LOGIT / (unit * FOUND * dim**0.5))
        tensors = {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": np.ones(hidden, np.float32),
            "lm_head.weight": head,
        }
        for layer in range(self.num_layers):
            queries, keys, values = self._tables(layer, value_codes, random)
            out = np.zeros((hidden, self.num_heads * dim), np.float32)
            for h in range(self.num_heads):
                out[found, h * dim : (h + 1) * dim] = np.eye(dim) * (FOUND / dim**0.5)
            inner = np.zeros((64, hidden), np.float32)
            name = f"model.layers.{layer}."
            tensors |= {
                name + "input_layernorm.weight": np.ones(hidden, np.float32),
                name + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
                name + "self_attn.q_proj.weight": _projection(queries, hidden, unit),
                name + "self_attn.k_proj.weight": _projection(keys, hidden, unit),
                name + "self_attn.v_proj.weight": _projection(values, hidden, unit),
                name + "self_attn.o_proj.weight": out,
                name + "mlp.gate_proj.weight": inner,
                name + "mlp.up_proj.weight": inner.copy(),
                name + "mlp.down_proj.weight": np.zeros((hidden, 64), np.float32),
            }
        return tensors

    def _tables(
        self, layer: int, value_codes: Table, random: np.random.Generator
    ) -> tuple[Table, Table, Table]:
        """Queries, keys and values of a layer: [vocab, heads, head_dim]."""
        vocab, dim = self.vocab_size, self.head_dim
        codes = _hadamard(self.code_dims)
        # Pairs (j, j + head_dim / 2) turn together; the last quarter of them turns slowest.
        slow = np.arange(dim // 2 - dim // 8, dim // 2)
        slow = np.concatenate([slow, slow + dim // 2])
        per_score = dim**0.5 / (CODE * self.code_dims)

        def noise(heads: int) -> Table:
            table = TURNING_NOISE * _normal(random, vocab, heads, dim)
            table[..., slow] *= NOISE / TURNING_NOISE
            return table

        queries, keys = noise(self.num_heads), noise(self.num_kv_heads)
        values = _normal(random, vocab, self.num_kv_heads, dim)
        queries[..., slow] = SINK * per_score * codes[0]
        keys[0] = 0
        keys[0][:, slow] = CODE * codes[0]
        values[0] = 0
        used = [0] * self.num_kv_heads  # codes beside the sink's
        for key in range(self.num_keys):
            slot = key % (self.num_layers * self.num_heads)
            if slot // self.num_heads != layer:
                continue
            head = slot % self.num_heads
            kv_head = head * self.num_kv_heads // self.num_heads
            used[kv_head] += 1
            code = codes[used[kv_head]]
            partners = np.arange(self.partner(key, 0), self.partner(key + 1, 0))
            before = (key - 1) % self.num_keys  # whose partners are marks of this key too
            asking = [self.mark(key), *range(self.partner(before, 0), self.partner(before + 1, 0))]
            for token in asking:
                queries[token, head, slow] += MATCH * per_score * code
            for token in partners:
                keys[token, kv_head, slow] = CODE * code
            values[partners, kv_head] = value_codes[partners]
        return queries, keys, values


def _normal(random: np.random.Generator, *shape: int) -> Table:
    return random.standard_normal(shape, np.float32)


def _projection(table: Table, hidden: int, unit: float) -> Table:
    """[heads * head_dim, hidden]: column t gives table[t] for the normed embedding of token t."""
    weight = np.zeros((table[0].size, hidden), np.float32)
    weight[:, : len(table)] = table.reshape(len(table), -1).T / unit
    return weight


def _hadamard(size: int) -> Table:
    """Orthogonal rows of 1 and -1 (Sylvester); size: a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
