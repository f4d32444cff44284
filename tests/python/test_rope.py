"""inv_freq against Hugging Face transformers, for every type, both spellings and many lengths."""

import math
import types

import longspan
import numpy as np
import pytest
from longspan import RopeProfile

torch = pytest.importorskip("torch")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
transformers = pytest.importorskip("transformers")

NATIVE = 8192
LENGTHS = [1, 100, NATIVE - 1, NATIVE, NATIVE + 1, 12_000, 16_384, 100_000, 1_000_000]
# (head_dim, num_heads, theta)
SHAPES = [(64, 9, 1e5), (128, 32, 5e7), (80, 40, 1e4), (96, 4, 5e5), (4, 2, 1e4)]
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 1.0},
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 8},
]


def config_of(head_dim: int, num_heads: int, theta: float, scaling: dict, spelling: str) -> dict:
    """A config.json with the scaling written as transformers 4 or 5 writes it."""
    config = {
        "hidden_size": head_dim * num_heads,
        "num_attention_heads": num_heads,
        "max_position_embeddings": NATIVE,
    }
    if spelling == "rope_parameters":
        return config | {"rope_parameters": scaling | {"rope_theta": theta}}
    old = {key: value for key, value in scaling.items() if key != "rope_type"}
    rope_scaling = None
    if scaling["rope_type"] != "default":
        rope_scaling = old | {"type": scaling["rope_type"]}
    return config | {"rope_theta": theta, "rope_scaling": rope_scaling}


class Float64Torch(types.ModuleType):
    """torch, but what asks for its single precision gets double."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.float = self.float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


def hf_inv_freq(config: dict, length: int, monkeypatch: pytest.MonkeyPatch | None) -> np.ndarray:
    """What transformers computes, in float64 when a monkeypatch is given, else as it is."""
    hf = transformers.LlamaConfig(**config)
    kind = hf.rope_parameters["rope_type"]
    modeling = transformers.models.llama.modeling_llama
    if monkeypatch is not None:
        monkeypatch.setattr(rope_utils, "torch", Float64Torch())
        monkeypatch.setattr(modeling, "torch", Float64Torch())
    if kind == "default":
        compute = modeling.LlamaRotaryEmbedding.compute_default_rope_parameters
    else:
        compute = rope_utils.ROPE_INIT_FUNCTIONS[kind]
    inv_freq, attention_factor = compute(hf, device=torch.device("cpu"), seq_len=length)
    assert attention_factor == 1.0
    assert inv_freq.dtype == (torch.float32 if monkeypatch is None else torch.float64)
    return inv_freq.double().numpy()


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_transformers(shape, scaling, spelling, monkeypatch):
    config = config_of(*shape, scaling, spelling)
    for length in LENGTHS:
        profile = RopeProfile.from_config(config, length)
        assert profile.inv_freq.dtype == np.float64
        assert profile.inv_freq.shape == (shape[0] // 2,)
        # transformers computes in single precision: half its digits, then all of them.
        np.testing.assert_allclose(
            profile.inv_freq, hf_inv_freq(config, length, None), rtol=0, atol=1e-6
        )
        with monkeypatch.context() as patch:
            exact = hf_inv_freq(config, length, patch)
        np.testing.assert_allclose(profile.inv_freq, exact, rtol=1e-12, atol=0)
        assert profile.attention_factor == 1.0
        assert profile.type == scaling["rope_type"]
        assert (profile.length, profile.native_length) == (length, NATIVE)


@pytest.mark.parametrize("factor", [1.0, 2.5, 4.0])
def test_rope_scaling_factor_is_dynamic_ntk(factor):
    shape = (128, 32, 5e7)
    dynamic = config_of(*shape, {"rope_type": "dynamic", "factor": factor}, "rope_parameters")
    for other in SCALINGS[:3]:
        config = config_of(*shape, other, "rope_scaling")
        for length in LENGTHS:
            assert RopeProfile.from_config(config, length, factor) == RopeProfile.from_config(
                dynamic, length
            )


def test_a_million_tokens():
    config = config_of(128, 32, 5e7, {"rope_type": "default"}, "rope_parameters")
    config["max_position_embeddings"] = 262_144
    profile = RopeProfile.from_config(config, 1_000_000, rope_scaling_factor=2.5)
    assert profile.base == pytest.approx(4.1535e8, rel=1e-4)
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.5}
    expected = hf_inv_freq(config, 1_000_000, None)
    np.testing.assert_allclose(profile.inv_freq, expected, rtol=2e-6, atol=0)


def test_within_the_native_length_nothing_changes():
    plain = config_of(64, 9, 1e5, {"rope_type": "default"}, "rope_scaling")
    for length in (1, 4000, NATIVE):
        scaled = RopeProfile.from_config(plain, length, 4.0)
        np.testing.assert_array_equal(
            scaled.inv_freq, RopeProfile.from_config(plain, length).inv_freq
        )
        assert scaled.factor == 1.0
    assert RopeProfile.from_config(plain, NATIVE + 1, 4.0).factor == 4.0


@pytest.mark.parametrize("factor", [-1.0, 0.5, math.nan, math.inf])
def test_bad_scaling_factors(factor):
    config = config_of(64, 9, 1e5, {"rope_type": "default"}, "rope_scaling")
    with pytest.raises(ValueError, match="rope_scaling_factor: expected 0 or a number >= 1"):
        RopeProfile.from_config(config, 100, factor)


def test_unknown_types_and_keys_list_the_known():
    for scaling, known in [
        ({"rope_type": "warp", "factor": 2.0}, "default, dynamic, linear"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "factor, rope_theta, rope_type"),
    ]:
        config = config_of(64, 9, 1e5, scaling, "rope_parameters")
        with pytest.raises(longspan.Unsupported, match=known):
            RopeProfile.from_config(config, 100)
