"""Options: LMDeploy's names and defaults, each one checked, mapped to the engine's."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import numpy as np
import pytest
from longspan import (
    EngineConfig,
    GenerationConfig,
    InvalidArgument,
    TurbomindEngineConfig,
    Unsupported,
)

NOT_YET = {
    EngineConfig: {
        "dp": 2,
        "use_logn_attn": True,
        "model_format": "awq",
        "devices": [0, 1],
        "nnodes": 2,
    },
    GenerationConfig: {
        "response_format": {"type": "json_object"},
        "logits_processors": [len],
        "output_logits": "all",
        "output_last_hidden_state": "all",
        "spaces_between_special_tokens": False,
    },
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, name, value) for kind, options in NOT_YET.items() for name, value in options.items()],
)
def test_what_does_not_work_yet_raises_by_name(kind: type, name: str, value: Any) -> None:
    with pytest.raises(Unsupported, match=f"^{name}: expected .* got "):
        kind(**{name: value})
    kind(**{name: inspect.signature(kind).parameters[name].default})


BAD = [
    (EngineConfig, "session_len", 0, r"None or an integer >= 1, got 0"),
    (EngineConfig, "session_len", 1.5, r"None or an integer >= 1, got 1.5"),
    (EngineConfig, "session_len", True, r"None or an integer >= 1, got True"),
    (EngineConfig, "max_batch_size", -1, r"None or an integer in \[1, 2147483647\], got -1"),
    (EngineConfig, "cache_max_entry_count", 0, r"a fraction in \(0, 1\) or an integer >= 1"),
    (EngineConfig, "cache_max_entry_count", 1.5, r"a fraction in \(0, 1\) or an integer >= 1"),
    (EngineConfig, "cache_max_entry_count", math.nan, "got nan"),
    (EngineConfig, "cache_block_seq_len", "64", "an integer"),
    (EngineConfig, "max_prefill_token_num", 0, "an integer >= 1"),
    (EngineConfig, "rope_scaling_factor", 0.5, "0 or a number >= 1, got 0.5"),
    (EngineConfig, "rope_scaling_factor", -1.0, "0 or a number >= 1, got -1.0"),
    (EngineConfig, "rope_scaling_factor", math.inf, "0 or a number >= 1, got inf"),
    (EngineConfig, "rope_length", "prompts", '"request", "prompt", .*, got \'prompts\''),
    (EngineConfig, "rope_length", 0, "an integer > 0"),
    (EngineConfig, "quant_policy", 16, "0, 4 or 8, got 16"),
    (EngineConfig, "quant_policy", None, "0, 4 or 8, got None"),
    (EngineConfig, "kv_cache_dtype", None, "a string, got None"),
    (EngineConfig, "prefill_attention", 8, "a string, got 8"),
    (EngineConfig, "linear_dtype", None, "a string, got None"),
    (EngineConfig, "enable_prefix_caching", None, "True or False, got None"),
    (EngineConfig, "tp", 0, "an integer"),
    (EngineConfig, "cp", 0, "an integer"),
    (EngineConfig, "deterministic", 1, "True or False, got 1"),
    (EngineConfig, "num_threads", 0, "an integer"),
    (EngineConfig, "dtype", None, "a string, got None"),
    (EngineConfig, "hf_overrides", "{}", "a dict"),
    (GenerationConfig, "max_new_tokens", -1, "None or an integer >= 0, got -1"),
    (GenerationConfig, "max_new_tokens", 8.0, "None or an integer >= 0, got 8.0"),
    (GenerationConfig, "do_sample", "yes", "None or True or False"),
    (GenerationConfig, "top_p", 0.0, r"a number in \(0, 1\], got 0.0"),
    (GenerationConfig, "top_p", 1.1, r"a number in \(0, 1\], got 1.1"),
    (GenerationConfig, "top_k", -1, "an integer"),
    (GenerationConfig, "temperature", math.nan, "a number >= 0, got nan"),
    (GenerationConfig, "temperature", -0.1, "a number >= 0, got -0.1"),
    (GenerationConfig, "random_seed", -1, "an integer"),
    (GenerationConfig, "random_seed", 2**64, "an integer"),
    (GenerationConfig, "stop_token_ids", [1.0], "a list of token ids"),
    (GenerationConfig, "stop_token_ids", 2, "a list of token ids"),
    (GenerationConfig, "stop_token_ids", [-1], "a list of token ids"),
    (GenerationConfig, "n", 0, "an integer"),
    (GenerationConfig, "min_p", 1.1, r"a number in \[0, 1\], got 1.1"),
    (GenerationConfig, "repetition_penalty", 0, "a number > 0, got 0"),
    (GenerationConfig, "frequency_penalty", math.inf, "a number, got inf"),
    (GenerationConfig, "presence_penalty", "1", "a number, got '1'"),
    (GenerationConfig, "stop_words", "stop", "None or a list of strings"),
    (GenerationConfig, "stop_words", [""], "a list of strings, none of them empty"),
    (GenerationConfig, "bad_words", [7], "a list of strings"),
    (GenerationConfig, "bad_token_ids", [-1], "a list of token ids"),
    (GenerationConfig, "min_new_tokens", -1, "None or an integer >= 0"),
    (GenerationConfig, "logprobs", 1025, r"an integer in \[0, 1024\], got 1025"),
    (GenerationConfig, "prompt_logprobs", 1, "True or False, got 1"),
    (GenerationConfig, "include_stop_str_in_output", 1, "True or False, got 1"),
    (GenerationConfig, "ignore_eos", None, "True or False, got None"),
    (GenerationConfig, "skip_special_tokens", 0, "True or False, got 0"),
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), BAD)
def test_bad_values_are_refused_by_name(kind: type, name: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: expected .*{expected}"):
        kind(**{name: value})
    late = kind()
    setattr(late, name, value)
    with pytest.raises(InvalidArgument, match=f"^{name}: expected"):
        late.native()


def test_unknown_options_are_type_errors() -> None:
    with pytest.raises(TypeError, match="rope_scalin_factor"):
        EngineConfig(rope_scalin_factor=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_tokens"):
        GenerationConfig(max_tokens=2)  # type: ignore[call-arg]


def test_defaults_are_lmdeploys() -> None:
    config = GenerationConfig()
    assert (config.n, config.max_new_tokens, config.ignore_eos) == (1, 512, False)
    assert (config.repetition_penalty, config.skip_special_tokens) == (1.0, True)
    engine = TurbomindEngineConfig()
    assert engine == EngineConfig()
    assert (engine.dtype, engine.tp, engine.session_len) == ("auto", 1, None)
    assert (engine.cache_max_entry_count, engine.cache_block_seq_len) == (0.8, 64)
    assert (engine.rope_scaling_factor, engine.quant_policy) == (0.0, 0)
    assert not engine.enable_prefix_caching


def test_engine_options_reach_the_engine() -> None:
    native = EngineConfig(
        dtype="float32",
        tp=2,
        cp=2,
        session_len=np.int64(1_000_000),
        max_batch_size=1,
        cache_max_entry_count=0.7,
        cache_block_seq_len=128,
        max_prefill_token_num=256,
        rope_scaling_factor=2.5,
        rope_length="prompt",
        hf_overrides={"rope_theta": 5e5},
        deterministic=True,
        device="cpu",
        num_threads=3,
        kv_cache_dtype="int8_int4",
        prefill_attention="int8",
        linear_dtype="int8",
    ).native()
    assert native.dtype == "float32"
    assert (native.tp, native.cp) == (2, 2)
    assert native.session_len == 1_000_000
    assert native.max_batch_size == 1
    assert native.cache_max_entry_count == 0.7
    assert native.cache_block_seq_len == 128
    assert native.max_prefill_token_num == 256
    assert native.rope_scaling_factor == 2.5
    assert native.rope_length == "prompt"
    assert json.loads(native.hf_overrides) == {"rope_theta": 5e5}
    assert native.deterministic is True
    assert native.device == "cpu"
    assert native.num_threads == 3
    assert native.kv_cache_dtype == "int8_int4"
    assert native.prefill_attention == "int8"
    assert native.linear_dtype == "int8"
    assert EngineConfig(rope_length=4096).native().rope_length == 4096
    assert EngineConfig(cache_max_entry_count=40).native().cache_max_entry_count == 40


def test_quant_policy_is_lmdeploys_name_for_the_kv_cache_dtype() -> None:
    named = {0: "auto", 8: "int8", 4: "int4"}
    for policy, dtype in named.items():
        assert EngineConfig(quant_policy=policy).native().kv_cache_dtype == dtype
        both = EngineConfig(quant_policy=policy, kv_cache_dtype=dtype)
        assert both.native().kv_cache_dtype == dtype
    assert EngineConfig(kv_cache_dtype="int8_fp8").native().kv_cache_dtype == "int8_fp8"
    with pytest.raises(
        InvalidArgument, match=r"^quant_policy: expected 0 beside kv_cache_dtype='fp8', got 8"
    ):
        EngineConfig(quant_policy=8, kv_cache_dtype="fp8")
    late = EngineConfig(quant_policy=8)
    late.kv_cache_dtype = "int4"
    with pytest.raises(InvalidArgument, match=r"^quant_policy: "):
        late.native()


def test_overrides_must_be_json() -> None:
    for bad in ({"a": object()}, {"a": math.nan}):
        with pytest.raises(InvalidArgument, match="hf_overrides"):
            EngineConfig(hf_overrides=bad).native()


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, None),
        ({"temperature": 0.5}, (0.5, 50, 1.0)),
        ({"top_p": 0.9}, (0.8, 50, 0.9)),
        ({"top_k": 40}, (0.8, 40, 1.0)),
        ({"top_k": 0}, (0.8, 0, 1.0)),
        ({"top_p": 0.8, "top_k": 40, "temperature": 0.7}, (0.7, 40, 0.8)),
        ({"min_p": 0.1}, (0.8, 50, 1.0)),
        ({"do_sample": True}, (0.8, 50, 1.0)),
        ({"do_sample": False, "temperature": 0.5, "top_k": 3}, None),
        ({"temperature": 0}, None),
        ({"do_sample": True, "temperature": 0.0}, None),
    ],
)
def test_sampling_when_something_asks_for_it(
    options: dict[str, Any], sampling: tuple[float, int, float] | None
) -> None:
    native = GenerationConfig(**options).native()
    assert native.do_sample is (sampling is not None)
    if sampling is not None:
        assert (native.temperature, native.top_k, native.top_p) == pytest.approx(sampling)


class Words:
    """A tokenizer of single letters, with one special token."""

    eos_token_id = 2

    def encode(self, s: str, add_special_tokens: bool = True) -> list[int]:
        return [3] if s == "<stop>" else [ord(c) for c in s]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i > 3)


def test_generation_options_reach_the_engine() -> None:
    native = GenerationConfig(
        max_new_tokens=7,
        random_seed=2**63 + 1,
        stop_token_ids=[9, 4],
        stop_words=["ab", "c", "<stop>"],
        bad_words=["xy"],
        bad_token_ids=[5],
        min_new_tokens=3,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.25,
        min_p=0.125,
        logprobs=0,
    ).native(Words())
    assert native.max_new_tokens == 7
    assert native.seed == 2**63 + 1
    assert native.stop_token_ids == [2, 3, 4, 9]
    assert native.bad_sequences == [[5], [120, 121], [32, 120, 121]]
    assert native.min_new_tokens == 3
    assert native.repetition_penalty == 1.5
    assert native.frequency_penalty == -0.5
    assert native.presence_penalty == 0.25
    assert native.min_p == 0.125
    assert native.logprobs == 0
    assert native.ignore_eos is False
    config = GenerationConfig(max_new_tokens=None, ignore_eos=True, stop_token_ids=[9])
    native = config.native(Words())
    assert native.max_new_tokens is None
    assert native.seed is None
    assert native.stop_token_ids == [9]
    assert native.ignore_eos is True
    assert native.logprobs is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 2), ("stop_words", ["x"]), ("bad_words", ["x"]), ("prompt_logprobs", True)],
)
def test_what_needs_text_raises_without_it(name: str, value: Any) -> None:
    config = GenerationConfig(temperature=1.0, **{name: value})
    config.native(Words())
    with pytest.raises(Unsupported, match=f"^{name}: expected .* without a pipeline, got"):
        config.native()


def test_several_sequences_need_sampling() -> None:
    with pytest.raises(InvalidArgument, match="n: expected 1 without sampling, got 2"):
        GenerationConfig(n=2).native(Words())
