"""inv_freq against Hugging Face transformers, for every type, both spellings and many lengths."""

import copy
import math
import random
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


def hf_rope(
    config: dict, length: int, monkeypatch: pytest.MonkeyPatch | None
) -> tuple[np.ndarray, float]:
    """inv_freq and attention factor of transformers, in float64 when a monkeypatch is given, else
    as it is."""
    hf = transformers.LlamaConfig(**copy.deepcopy(config))
    kind = hf.rope_parameters["rope_type"]
    # Llama's own default rotates heads whole whatever the config says; Phi-3's is that in part.
    modeling = transformers.models.phi3.modeling_phi3
    if monkeypatch is not None:
        monkeypatch.setattr(rope_utils, "torch", Float64Torch())
        monkeypatch.setattr(modeling, "torch", Float64Torch())
    if kind == "default":
        compute = modeling.Phi3RotaryEmbedding.compute_default_rope_parameters
    else:
        compute = rope_utils.ROPE_INIT_FUNCTIONS[kind]
    inv_freq, attention_factor = compute(hf, device=torch.device("cpu"), seq_len=length)
    assert inv_freq.dtype == (torch.float32 if monkeypatch is None else torch.float64)
    return inv_freq.double().numpy(), attention_factor


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
            profile.inv_freq, hf_rope(config, length, None)[0], rtol=0, atol=1e-6
        )
        with monkeypatch.context() as patch:
            exact, attention_factor = hf_rope(config, length, patch)
        np.testing.assert_allclose(profile.inv_freq, exact, rtol=1e-12, atol=0)
        assert profile.attention_factor == attention_factor == 1.0
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
    expected, _ = hf_rope(config, 1_000_000, None)
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
        ({"rope_type": "warp", "factor": 2.0}, "default, dynamic, linear, llama3, longrope"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "keys factor, partial_rotary_factor"),
    ]:
        config = config_of(64, 9, 1e5, scaling, "rope_parameters")
        with pytest.raises(longspan.Unsupported, match=known):
            RopeProfile.from_config(config, 100)


def a_scaling(draw: random.Random, kind: str, pairs: int, native: int) -> dict:
    """A dictionary of that type with values as models have them, and some keys left out or null."""
    scaling: dict = {"rope_type": kind}
    original = draw.choice([native, native // 2, native // 4, native // 32])

    def maybe(key: str, value: object, chance: float = 0.5) -> None:
        if draw.random() < chance:
            scaling[key] = None if draw.random() < 0.2 else value

    if kind == "yarn":
        scaling["factor"] = draw.choice([None, 1, 1.0, 2, 2.5, 4.0, 8.0, 40])
        maybe("attention_factor", draw.uniform(0.5, 2.0), 0.3)
        maybe("beta_fast", draw.choice([0, 8, 32.0, 64]))
        maybe("beta_slow", draw.choice([0, 1, 1.5, 8]))
        maybe("mscale", draw.choice([0, 0.707, 1.0, 2]))
        maybe("mscale_all_dim", draw.choice([0, 0.707, 1.0]))
        if draw.random() < 0.5:
            scaling["truncate"] = draw.random() < 0.5
    elif kind == "llama3":
        scaling["factor"] = draw.choice([1.0, 4, 8.0, 32.0])
        scaling["low_freq_factor"] = draw.choice([0.5, 1, 1.0, 2.0])
        scaling["high_freq_factor"] = draw.choice([2.5, 4, 4.0, 32.0])
    elif kind == "longrope":
        scaling["short_factor"] = [draw.uniform(0.9, 1.5) for _ in range(pairs)]
        scaling["long_factor"] = [draw.choice([1, draw.uniform(1.0, 60.0)]) for _ in range(pairs)]
        maybe("factor", draw.choice([1.0, 4, 32.0]))
        maybe("attention_factor", draw.uniform(0.5, 2.0), 0.3)
    elif kind != "default":
        scaling["factor"] = draw.choice([1.0, 2, 2.5, 8.0])
    if kind in ("yarn", "llama3", "longrope") and draw.random() < 0.7:
        scaling["original_max_position_embeddings"] = original
    return scaling


def a_config(draw: random.Random, kind: str) -> dict:
    """A config.json of that type, spelt in one of the ways there are."""
    head_dim, part = draw.choice(
        [(64, 1.0), (128, 1.0), (128, 0.5), (96, 0.75), (80, 0.4), (32, 1.0), (80, 1.0)]
    )
    heads, native = draw.choice([1, 4, 9, 32]), draw.choice([2048, 8192, 40960, 131072])
    theta = draw.choice([1e4, 1e5, 5e5, 1e6, 5e7, round(math.exp(draw.uniform(7, 18)), 3)])
    scaling = a_scaling(draw, kind, int(head_dim * part) // 2, native)
    config = {
        "hidden_size": head_dim * heads,
        "num_attention_heads": heads,
        "max_position_embeddings": native,
    }
    if draw.random() < 0.3:
        config |= {"head_dim": head_dim, "hidden_size": 8 * heads}
    original = "original_max_position_embeddings"
    if original in scaling and draw.random() < 0.4:  # Phi-3's place, which wins over the other
        config[original] = scaling[original]
        if draw.random() < 0.5:
            del scaling[original]
        else:
            scaling[original] = native // 2
    (config if draw.random() < 0.5 else scaling)["rope_theta"] = theta
    if part != 1.0:
        place, other = (config, scaling) if draw.random() < 0.5 else (scaling, config)
        place["partial_rotary_factor"] = part
        if other is config and draw.random() < 0.3:  # the dictionary's wins
            config["partial_rotary_factor"] = 0.25
    if draw.random() < 0.5:
        scaling["type"] = scaling["rope_type"]
        if draw.random() < 0.7:
            del scaling["rope_type"]
    config[draw.choice(["rope_scaling", "rope_parameters"])] = scaling
    return config


KINDS = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_configs_equal_transformers(kind, monkeypatch):
    draw = random.Random(f"rope {kind}")
    for _ in range(60):
        config = a_config(draw, kind)
        native = config["max_position_embeddings"]
        for length in (1, native // 4, native // 4 + 1, native, native + 1, 12 * native):
            try:
                profile = RopeProfile.from_config(config, length)
            except longspan.InvalidArgument as error:  # transformers only warns of these
                assert "beta_fast: expected at least beta_slow" in str(error), config
                continue
            single, attention_factor = hf_rope(config, length, None)
            np.testing.assert_allclose(profile.inv_freq, single, rtol=0, atol=1e-6)
            assert profile.attention_factor == pytest.approx(attention_factor, rel=1e-12), config
            with monkeypatch.context() as patch:
                exact, _ = hf_rope(config, length, patch)
            # longrope's exponents are single precision even so.
            rtol = 2e-6 if kind == "longrope" else 1e-12
            np.testing.assert_allclose(
                profile.inv_freq, exact, rtol=rtol, atol=0, err_msg=f"{config}"
            )
            assert profile.type == kind


def test_longrope_by_its_formula():
    draw = random.Random(5)
    pairs, theta = 48, 1e4
    short = [draw.uniform(1.0, 1.5) for _ in range(pairs)]
    long = [draw.uniform(1.0, 60.0) for _ in range(pairs)]
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    config = config_of(96, 4, theta, scaling, "rope_parameters")
    config["original_max_position_embeddings"] = 1024
    for length, divisors in ((1, short), (1024, short), (1025, long), (100_000, long)):
        profile = RopeProfile.from_config(config, length)
        expected = theta ** (-np.arange(pairs) / pairs) / np.array(divisors)
        np.testing.assert_allclose(profile.inv_freq, expected, rtol=1e-14)
        assert profile.attention_factor == pytest.approx(
            math.sqrt(1 + math.log(8) / math.log(1024))
        )
        assert (profile.native_length, profile.factor) == (1024, 8.0)


@pytest.mark.parametrize("length", [1, 5000, NATIVE, NATIVE + 1, 20_000, 1_000_000])
def test_adaptive_yarn_is_the_yarn_of_the_length(length):
    """A factor of "auto" against transformers with the factor that the length needs."""
    auto = {"rope_type": "yarn", "factor": "auto", "mscale": 0.7, "mscale_all_dim": 1.0}
    profile = RopeProfile.from_config(config_of(128, 8, 1e6, auto, "rope_scaling"), length)
    factor = length / NATIVE
    if factor <= 1:
        expected, attention_factor, factor = 1e6 ** (-np.arange(64) / 64), 1.0, 1.0
    else:
        fixed = config_of(128, 8, 1e6, auto | {"factor": factor}, "rope_scaling")
        expected, attention_factor = hf_rope(fixed, length, None)
    np.testing.assert_allclose(profile.inv_freq, expected, rtol=0, atol=1e-6)
    assert profile.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert profile.factor == factor


def test_log_n_is_part_of_the_profile():
    config = config_of(64, 9, 1e5, {"rope_type": "default"}, "rope_parameters")
    plain = RopeProfile.from_config(config, 100)
    logn = RopeProfile.from_config(config | {"use_logn_attn": True}, 100)
    assert (plain.logn_length, logn.logn_length) == (0, NATIVE)
    assert plain != logn
    assert "logn_length=8192" in repr(logn)
