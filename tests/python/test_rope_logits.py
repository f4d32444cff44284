"""Logits under every RoPE method against stock transformers in float32, on tiny random models.

At these lengths transformers' single-precision angles move a logit by 2e-5 or so.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import torch
from longspan._core import Engine, EngineConfig
from ranks import check_shared
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.llama import modeling_llama

TOLERANCE = 1e-4
NATIVE = 128
LENGTHS = (1, NATIVE, NATIVE + 1, 300)
IDS = oracle.random_ids(300, 256)

_DIVISORS = {
    "short_factor": tuple(1 + 0.02 * i for i in range(8)),
    "long_factor": tuple(1 + 0.9 * i for i in range(8)),
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
METHODS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.4,
        "truncate": False,
        "beta_fast": 8.0,
        "original_max_position_embeddings": 32,
    },
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.6},
    "llama3": {"rope_type": "llama3", "original_max_position_embeddings": 32} | LLAMA3,
    "longrope": {"rope_type": "longrope", "factor": 4.0} | _DIVISORS,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
#: Two ranks that share the context.
SHARED: dict[str, Any] = {"tolerance": TOLERANCE, "tp": 2, "cp": 2}


def hf_logits(path: str | Path, ids: list[int], **options: Any) -> npt.NDArray[np.float32]:
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def engine_logits(path: str | Path, ids: list[int], **overrides: Any) -> npt.NDArray[np.float32]:
    config = EngineConfig(
        dtype="float32", session_len=320, max_batch_size=1, hf_overrides=json.dumps(overrides)
    )
    with Engine.load(str(path), config) as engine:
        return engine.logits(ids, list(range(len(ids)))).wait().logits


def tiny(**rope: Any) -> str:
    _, path = oracle.tiny_llama(
        num_key_value_heads=2, max_position_embeddings=NATIVE, rope=tuple(rope.items())
    )
    return path


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    path = tiny(**METHODS[name])
    for length in LENGTHS:
        expected = hf_logits(path, IDS[:length])
        np.testing.assert_allclose(
            engine_logits(path, IDS[:length]), expected, rtol=0, atol=TOLERANCE
        )
    plain = engine_logits(tiny(), IDS)
    assert np.abs(plain - expected).max() > 0.1  # the method makes a difference
    check_shared(path, IDS, expected, **SHARED)


def as_llama(model: Phi3ForCausalLM, config: dict[str, Any]) -> Path:
    """A Phi-3, whose forward is Llama's but for partial rotation, as a Llama's directory."""
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    head_dim = model.config.hidden_size // heads
    weights: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        parts = {name: weight}
        if "qkv_proj" in name:
            sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
            names = [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"]
            parts = dict(zip(names, weight.split(sizes), strict=True))
        elif "gate_up_proj" in name:
            names = [name.replace("gate_up", part) for part in ("gate", "up")]
            parts = dict(zip(names, weight.chunk(2), strict=True))
        weights |= {key: part.contiguous() for key, part in parts.items()}
    path = Path(tempfile.mkdtemp(dir=oracle.scratch(), prefix="phi3-"))
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    return path


@pytest.mark.parametrize("part", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["default", "longrope"])
def test_partial_rotation(kind: str, part: float) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "longrope":
        pairs = int(32 * part) // 2
        rope["short_factor"] = [1 + 0.02 * i for i in range(pairs)]
        rope["long_factor"] = [1 + 0.9 * i for i in range(pairs)]
    config = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 4 * NATIVE,
        "original_max_position_embeddings": NATIVE,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "partial_rotary_factor": part,
        "rope_parameters": rope,
    }
    torch.manual_seed(3)
    model = Phi3ForCausalLM(Phi3Config(**json.loads(json.dumps(config)))).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(torch.randn_like(weight) / weight.shape[1] ** 0.5)
    path = as_llama(model, config)
    for length in LENGTHS:
        with torch.inference_mode():
            expected = model(torch.tensor([IDS[:length]])).logits[0].numpy()
        np.testing.assert_allclose(
            engine_logits(path, IDS[:length]), expected, rtol=0, atol=TOLERANCE
        )
    check_shared(path, IDS, expected, **SHARED)


def test_adaptive_yarn_costs_short_prompts_nothing() -> None:
    path = tiny()
    auto = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": "auto"}
    for length in (1, NATIVE):
        np.testing.assert_array_equal(
            engine_logits(path, IDS[:length], rope_parameters=auto),
            engine_logits(path, IDS[:length]),
        )
    static = auto | {"factor": 300 / NATIVE, "original_max_position_embeddings": NATIVE}
    expected = hf_logits(path, IDS, rope_parameters=static)
    np.testing.assert_allclose(
        engine_logits(path, IDS, rope_parameters=auto), expected, rtol=0, atol=TOLERANCE
    )
    overrides = json.dumps({"rope_parameters": auto})
    check_shared(path, IDS, expected, **SHARED, hf_overrides=overrides)


def test_requests_of_different_factors_share_a_batch() -> None:
    """Each with the bits it has alone."""
    path = tiny(rope_type="longrope", **_DIVISORS)
    overrides = json.dumps({"rope_parameters": {"factor": "auto"}})
    config = EngineConfig(
        dtype="float32", session_len=320, max_batch_size=4, hf_overrides=overrides
    )
    with Engine.load(path, config) as engine:
        lengths = (50, NATIVE, 200, 300)
        handles = [engine.logits(IDS[:n], [n - 1]) for n in lengths]
        together = [handle.wait() for handle in handles]
        alone = [engine.logits(IDS[:n], [n - 1]).wait() for n in lengths]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
    assert [out.rope_profile.factor for out in together] == [1, 1, 200 / NATIVE, 300 / NATIVE]


def test_log_n_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers with its rotated queries multiplied by max(1, ln n / ln 128)."""
    path = tiny()
    rotate = modeling_llama.apply_rotary_pos_emb

    def rotate_and_scale(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        q, k = rotate(q, k, *args, **kwargs)
        counts = torch.arange(1, q.shape[-2] + 1, dtype=torch.float64)
        scale = (counts.log() / np.log(NATIVE)).clamp(min=1.0).float()
        return q * scale[:, None], k

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_scale)
        expected = hf_logits(path, IDS)
    got = engine_logits(path, IDS, use_logn_attn=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    plain = engine_logits(path, IDS)
    np.testing.assert_array_equal(got[:NATIVE], plain[:NATIVE])
    assert np.abs(got - plain).max() > 0.01
    check_shared(path, IDS, expected, **SHARED, hf_overrides=json.dumps({"use_logn_attn": True}))


def test_the_resolved_rope_is_told_and_returned() -> None:
    with Engine.load(tiny(**METHODS["yarn"]), EngineConfig(dtype="float32")) as engine:
        assert engine.model.rope == (
            "yarn, theta 10000, factor 4, attention factor 1.13863, original length 128 tokens, "
            "native length 128 tokens"
        )
        profile = engine.logits(IDS[:5], [4]).wait().rope_profile
    assert (profile.type, profile.factor, profile.length) == ("yarn", 4.0, 5)
