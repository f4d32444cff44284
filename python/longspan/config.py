"""Options under LMDeploy's names; the only place that maps them to the engine's own.

Every option either works or raises: what has no check exists in LMDeploy, does not work here yet,
and is refused unless left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

from longspan import _core
from longspan._core import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from longspan.tokenizer import Tokenizer

#: Returns what was expected, or None when the value passes.
Check = Callable[[Any], str | None]


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _int(low: int, high: int = 2**63 - 1) -> Check:
    words = f"an integer >= {low}" if high == 2**63 - 1 else f"an integer in [{low}, {high}]"
    return lambda v: None if _is_int(v) and low <= v <= high else words


def _number(accepts: Callable[[float], bool], words: str) -> Check:
    return lambda v: None if _is_number(v) and accepts(v) else words


def _optional(check: Check) -> Check:
    def checked(value: Any) -> str | None:
        words = None if value is None else check(value)
        return words and f"None or {words}"

    return checked


def _bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _str(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a string"


def _dict(value: Any) -> str | None:
    return None if isinstance(value, dict) else "a dict"


def _token_ids(value: Any) -> str | None:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    good = listed and all(_is_int(v) and 0 <= v < 2**31 for v in value)
    return None if good else "a list of token ids"


def _words(value: Any) -> str | None:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    good = listed and all(isinstance(v, str) and v for v in value)
    return None if good else "a list of strings, none of them empty"


def _rope_length(value: Any) -> str | None:
    named = isinstance(value, str) and value in ("request", "prompt", "session", "bucket")
    good = named or (_is_int(value) and value > 0)
    return None if good else 'an integer > 0, "request", "prompt", "session" or "bucket"'


def _cache_entries(value: Any) -> str | None:
    good = _is_number(value) and (0 < value < 1 or (value >= 1 and value == int(value)))
    return None if good else "a fraction in (0, 1) or an integer >= 1 of blocks"


#: kv_cache_dtype of each quant_policy.
_QUANT_POLICIES = {0: "auto", 4: "int4", 8: "int8"}


def _quant_policy(value: Any) -> str | None:
    return None if _is_int(value) and value in _QUANT_POLICIES else "0, 4 or 8"


class _Options:
    """Checks the fields of a dataclass."""

    _checks: ClassVar[dict[str, Check]]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises InvalidArgument or Unsupported for the first option that cannot be honoured."""
        for option in fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            check = self._checks.get(option.name)
            if check is not None:
                words = check(value)
                if words is not None:
                    raise InvalidArgument(f"{option.name}: expected {words}, got {value!r}")
            elif value != option.default and not (option.default is None and not value):
                raise Unsupported(
                    f"{option.name}: expected {option.default!r} (nothing else works yet), "
                    f"got {value!r}"
                )


@dataclass
class EngineConfig(_Options):
    """How the engine is built. TurbomindEngineConfig is the same class.

    device: "cpu", "cuda", "cuda:N" or "auto", a GPU where one can be used and else the CPU.
    dtype: "bfloat16", "float32" or "auto", bfloat16 where the device is fast in it; a GPU has
        bfloat16 alone.
    tp: tensor-parallel ranks: GPUs 0 to tp - 1, or shares of a CPU's threads. A size that does not
        divide the model's heads is refused with those that do. Under torchrun, mpirun or srun
        with tp processes these are the ranks: rank 0's pipeline() returns, the others' serve it
        until it is closed and then end their process.
    cp: context-parallel ranks among the tp, which it divides: so many share the KV cache of every
        sequence, which so may be as many times longer; heads are split over tp / cp.
    session_len: longest prompt + output in tokens; None: the model's own length. May exceed it.
    max_batch_size: sequences running at once; None: 8.
    cache_max_entry_count: KV cache as a fraction of free memory, or a number of blocks.
    cache_block_seq_len: tokens per KV block, on each cp rank: 64, 128 or 256.
    kv_cache_dtype: what keys and values are held in: "auto" (the dtype), "int8", "fp8" (e4m3),
        "int8_fp8" (int8 keys, fp8 values), "int8_int4" or "int4" (keys of six bits, values of
        four).
    quant_policy: LMDeploy's name for the same: 8 is "int8", 4 is "int4", 0 leaves it to
        kv_cache_dtype.
    prefill_attention: what attention of a prompt forms its products in: "auto" (the dtype);
        "int8", those of queries and keys, which is faster; "int8_fp8", and those of weights and
        values in e4m3, which is faster still; on a GPU of compute capability 9.0, heads of 128.
    linear_dtype: what the layers' weight matrices are held and multiplied in: "auto" (the dtype) or
        "int8", which takes half the memory; on a GPU of compute capability 9.0.
    enable_prefix_caching: prompts that begin alike under the same RoPE compute that part once;
        blocks stay cached until others need the room.
    max_prefill_token_num: most prompt tokens in one step; None: the device's best.
    rope_scaling_factor: 0 leaves the model's RoPE; >= 1 makes it dynamic NTK with that factor.
    rope_length: the length that fixes a request's RoPE: "request" (prompt + max_new_tokens),
        "prompt" (as LMDeploy), "session", "bucket" or a number of tokens.
    revision: of a model of the hub: a branch, tag or commit.
    download_dir: where such a model is kept, in place of huggingface_hub's cache.
    use_safetensors: False takes the weights from torch's .bin files instead, which are read with
        weights_only, so that none of their code runs, and converted once into the user's cache.
    hf_overrides: merged into the model's config.json.
    deterministic: the same bits whatever else runs; on a CPU always so, on a GPU refused.
    num_threads: CPU threads; None: as many as the process may use.

    model_format, dp, ep, use_logn_attn, devices, nnodes and communicator are LMDeploy's, and only
    their defaults work.
    """

    dtype: str = "auto"
    model_format: str | None = None
    tp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 64
    enable_prefix_caching: bool = False
    quant_policy: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    download_dir: str | None = None
    revision: str | None = None
    use_safetensors: bool = True
    max_prefill_token_num: int | None = None
    devices: list[int] | None = None
    nnodes: int = 1
    communicator: str = "nccl"
    hf_overrides: dict[str, Any] | None = None
    rope_length: str | int = "request"
    deterministic: bool = False
    device: str = "auto"
    num_threads: int | None = None
    kv_cache_dtype: str = "auto"
    prefill_attention: str = "auto"
    linear_dtype: str = "auto"

    _checks: ClassVar[dict[str, Check]] = {
        "dtype": _str,
        "tp": _int(1, 2**31 - 1),
        "cp": _int(1, 2**31 - 1),
        "session_len": _optional(_int(1)),
        "max_batch_size": _optional(_int(1, 2**31 - 1)),
        "cache_max_entry_count": _cache_entries,
        "download_dir": _optional(_str),
        "revision": _optional(_str),
        "use_safetensors": _bool,
        "cache_block_seq_len": _int(1, 2**31 - 1),
        "kv_cache_dtype": _str,
        "quant_policy": _quant_policy,
        "prefill_attention": _str,
        "linear_dtype": _str,
        "enable_prefix_caching": _bool,
        "rope_scaling_factor": _number(lambda v: v == 0 or v >= 1, "0 or a number >= 1"),
        "max_prefill_token_num": _optional(_int(1)),
        "hf_overrides": _optional(_dict),
        "rope_length": _rope_length,
        "deterministic": _bool,
        "device": _str,
        "num_threads": _optional(_int(1, 2**31 - 1)),
    }

    #: Where the model comes from, which is no matter of the engine's.
    _source: ClassVar[tuple[str, ...]] = ("revision", "download_dir", "use_safetensors")

    def source(self) -> dict[str, Any]:
        """The options of resolve_model()."""
        self.check()
        return {name: getattr(self, name) for name in self._source}

    def check(self) -> None:
        super().check()
        self._kv_cache_dtype()

    def _kv_cache_dtype(self) -> str:
        """By either of its names. Raises InvalidArgument when they disagree."""
        by_policy = _QUANT_POLICIES[self.quant_policy]
        if self.quant_policy and self.kv_cache_dtype not in ("auto", by_policy):
            raise InvalidArgument(
                f"quant_policy: expected 0 beside kv_cache_dtype={self.kv_cache_dtype!r}, "
                f"got {self.quant_policy!r}"
            )
        return by_policy if self.quant_policy else self.kv_cache_dtype

    def native(self) -> _core.EngineConfig:
        """The same options in the engine's terms; what is None is left to the engine. But for
        quant_policy, every option that works and is not of source() has the engine's name."""
        self.check()
        given = {name: getattr(self, name) for name in self._checks if name not in self._source}
        options = {name: value for name, value in given.items() if value is not None}
        options["kv_cache_dtype"] = self._kv_cache_dtype()
        del options["quant_policy"]
        options["hf_overrides"] = _to_json(self.hf_overrides or {})
        return _core.EngineConfig(**options)


TurbomindEngineConfig = EngineConfig


def _to_json(overrides: dict[str, Any]) -> str:
    try:
        return json.dumps(overrides, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"hf_overrides: expected what JSON can hold, got {error}") from error


@dataclass
class GenerationConfig(_Options):
    """How one request generates.

    n: sequences per prompt, 1 to 65536; more than one needs sampling. Sequence i is what
        random_seed + i gives.
    do_sample: None samples exactly when temperature, top_p, top_k or min_p was given.
    temperature, top_p, top_k: None means 0.8, 1.0 and 50 when sampling; temperature 0 is greedy,
        top_k 0 considers every token.
    min_p: drops tokens less likely than this share, in [0, 1], of the likeliest one's probability,
        after top_k and top_p.
    repetition_penalty: > 0, of tokens in prompt and output, as HF transformers; frequency_penalty
        and presence_penalty: of tokens in the output, as OpenAI; in this order, before temperature.
    max_new_tokens: None generates until the context is full.
    random_seed: None draws one; Response.seed tells it.
    stop_token_ids: in addition to the model's end tokens, which ignore_eos switches off.
    stop_words: end the generation when the text holds one, however it is split into tokens.
    include_stop_str_in_output: keep the stop word, or the stop token, that ended it.
    bad_words: are never spelled by the tokens that the tokenizer encodes them to, with or without a
        space before them; other tokens may still spell them.
    bad_token_ids: are never drawn.
    min_new_tokens: nothing stops the generation before so many tokens.
    skip_special_tokens: leave special tokens out of the text.
    logprobs: natural-log probabilities of each generated token and so many likeliest ones, at most
        1024, of the model itself: before penalties, temperature and filters.
    prompt_logprobs: of each prompt token given those before it; needs no more memory for a larger
        vocabulary.

    spaces_between_special_tokens, response_format, logits_processors, output_logits and
    output_last_hidden_state are LMDeploy's, and only their defaults work.
    """

    n: int = 1
    max_new_tokens: int | None = 512
    do_sample: bool | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    temperature: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: list[str] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: bool = False
    response_format: dict[str, Any] | None = None
    logits_processors: list[Any] | None = None
    output_logits: str | None = None
    output_last_hidden_state: str | None = None
    include_stop_str_in_output: bool = False

    _checks: ClassVar[dict[str, Check]] = {
        "n": _int(1, 2**16),
        "min_p": _number(lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        "repetition_penalty": _number(lambda v: v > 0, "a number > 0"),
        "frequency_penalty": _number(lambda v: True, "a number"),
        "presence_penalty": _number(lambda v: True, "a number"),
        "stop_words": _optional(_words),
        "bad_words": _optional(_words),
        "bad_token_ids": _optional(_token_ids),
        "min_new_tokens": _optional(_int(0)),
        "logprobs": _optional(_int(0, 1024)),
        "prompt_logprobs": _bool,
        "include_stop_str_in_output": _bool,
        "max_new_tokens": _optional(_int(0)),
        "do_sample": _optional(_bool),
        "top_p": _optional(_number(lambda v: 0 < v <= 1, "a number in (0, 1]")),
        "top_k": _optional(_int(0, 2**31 - 1)),
        "temperature": _optional(_number(lambda v: v >= 0, "a number >= 0")),
        "ignore_eos": _bool,
        "random_seed": _optional(_int(0, 2**64 - 1)),
        "stop_token_ids": _optional(_token_ids),
        "skip_special_tokens": _bool,
    }

    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        given = (self.temperature, self.top_p, self.top_k, self.min_p or None)
        wanted = any(v is not None for v in given) if self.do_sample is None else self.do_sample
        return wanted and self.temperature != 0

    def native(self, tokenizer: Tokenizer | None = None) -> _core.GenerationConfig:
        """The same options in the engine's terms. tokenizer: its end token ends a generation like
        those of generation_config.json, and it encodes words. Whoever has none, as an Engine,
        cannot have what needs text or several sequences."""
        self.check()
        if tokenizer is None:
            self._needs_a_pipeline()
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens or 0,
            "ignore_eos": self.ignore_eos,
            "stop_token_ids": self._stop_token_ids(tokenizer),
            "bad_sequences": self._bad_sequences(tokenizer),
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logprobs": self.logprobs,
        }
        if self.samples():
            options |= {
                "do_sample": True,
                "temperature": 0.8 if self.temperature is None else self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "top_k": 50 if self.top_k is None else self.top_k,
                "min_p": self.min_p,
            }
        elif self.n > 1:
            raise InvalidArgument(f"n: expected 1 without sampling, got {self.n}")
        if self.random_seed is not None:
            options["seed"] = self.random_seed
        return _core.GenerationConfig(**options)

    def _needs_a_pipeline(self) -> None:
        for name in ("n", "stop_words", "bad_words", "prompt_logprobs"):
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default:
                raise Unsupported(f"{name}: expected {default!r} without a pipeline, got {value!r}")

    def _stop_token_ids(self, tokenizer: Tokenizer | None) -> list[int]:
        stop = set(self.stop_token_ids or ())
        if tokenizer is not None:
            if not self.ignore_eos and tokenizer.eos_token_id is not None:
                stop.add(tokenizer.eos_token_id)
            for word in self.stop_words or ():
                ids = tokenizer.encode(word, add_special_tokens=False)
                if len(ids) == 1 and not tokenizer.decode(ids):  # special: never in the text
                    stop.update(ids)
        return sorted(stop)

    def _bad_sequences(self, tokenizer: Tokenizer | None) -> list[list[int]]:
        bad = [[token] for token in self.bad_token_ids or ()]
        for word in self.bad_words or ():
            assert tokenizer is not None
            for text in (word, f" {word}"):
                ids = tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in bad:
                    bad.append(ids)
        return bad
