"""What a pipeline returns: Response for text, Perplexity for scores."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from longspan._core import RequestOutput, RopeProfile

_MAX_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Timings:
    """Seconds one request spent waiting, in prefill and in decode, and what was done in them."""

    queue_s: float
    prefill_s: float
    decode_s: float
    #: Tokens of the prompt that were computed.
    prefill_tokens: int = 0
    #: Tokens generated after the first, which the prefill gives.
    decode_tokens: int = 0

    @classmethod
    def of(cls, output: RequestOutput) -> Timings:
        return cls(
            output.queue_s,
            output.prefill_s,
            output.decode_s,
            output.input_token_len - output.cached_tokens,
            max(len(output.token_ids) - 1, 0),
        )

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class Response:
    """One generation, with LMDeploy's fields and what a long context makes worth knowing.

    `token_ids` and `text` leave out the token or word that ended the generation, unless
    include_stop_str_in_output asks for it. stream_infer() gives a response in pieces: text,
    token_ids and logprobs are then what is new, generate_token_len counts from the beginning, and
    what is known only at the end comes with the last piece, which has a finish_reason.
    """

    text: str
    generate_token_len: int
    input_token_len: int
    #: "stop": an end or stop token or a stop word; "length": max_new_tokens, or the context is
    #: full; "abort": cancelled; "error": see error_message.
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    #: For each token, natural-log probabilities by id: of GenerationConfig.logprobs likeliest
    #: tokens, likeliest first, and of the token itself.
    logprobs: list[dict[int, float]] | None = None
    #: Of the prompt in its list.
    index: int = 0
    #: Which of the n sequences of its prompt.
    choice: int = 0
    error_message: str | None = None
    #: The context, not max_new_tokens, ended the generation.
    context_full: bool = False
    #: Tokens beyond the model's trained length, without any RoPE scaling, took part.
    beyond_native: bool = False
    #: Tokens of the prompt whose keys and values came from the prefix cache.
    cached_tokens: int = 0
    #: What sampling used; repeats the text when given as random_seed.
    seed: int = 0
    rope_profile: RopeProfile | None = None
    timings: Timings | None = None
    #: GenerationConfig.prompt_logprobs: of each prompt token after the first.
    prompt_logprobs: list[float] | None = None

    def extend(self, piece: Response) -> Response:
        """Appends the piece of a stream that follows, in place: a stream may have 100,000 pieces.
        Returns itself."""
        self.token_ids += piece.token_ids
        if piece.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += piece.logprobs
        joined = {
            "text": self.text + piece.text,
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
        }
        vars(self).update(vars(piece) | joined)
        return self

    def _lines(self) -> list[str]:
        lines = [
            f"input_token_len={self.input_token_len}",
            f"generate_token_len={self.generate_token_len}",
            f"finish_reason={self.finish_reason!r}",
            f"token_ids={self.token_ids}",
            f"logprobs={self.logprobs}",
            f"index={self.index}",
        ]
        if self.error_message is not None:
            lines.append(f"error_message={self.error_message!r}")
        if self.context_full:
            lines.append("context_full=True")
        if self.beyond_native:
            lines.append("beyond_native=True")
        if self.cached_tokens:
            lines.append(f"cached_tokens={self.cached_tokens}")
        if self.rope_profile is not None:
            profile = self.rope_profile
            lines.append(f"rope={profile.type}, factor {profile.factor:g}, length {profile.length}")
        return lines

    def __str__(self) -> str:
        return "\n".join([self.text, *self._lines()])

    def __repr__(self) -> str:
        return "\n".join([f"text={self.text!r}", *self._lines()])


class Perplexity(float):
    """exp of the mean negative log-likelihood (nats) of the tokens after the first."""

    nll_sum: float
    num_tokens: int
    rope_profile: RopeProfile
    timings: Timings
    beyond_native: bool
    #: float64 [num_tokens], in nats, if asked for: entry i is of input_ids[i + 1]. Else empty.
    token_nll: npt.NDArray[np.float64]

    def __new__(cls, output: RequestOutput, beyond_native: bool = False) -> Perplexity:
        mean = output.nll_sum / output.nll_count
        self = super().__new__(cls, math.exp(mean) if mean < _MAX_EXPONENT else math.inf)
        self.nll_sum = output.nll_sum
        self.num_tokens = output.nll_count
        self.token_nll = output.token_nll
        self.rope_profile = output.rope_profile
        self.timings = Timings.of(output)
        self.beyond_native = beyond_native
        return self

    @property
    def mean_nll(self) -> float:
        """nll_sum / num_tokens, in nats; the logarithm of the perplexity."""
        return self.nll_sum / self.num_tokens


def unscaled(profile: RopeProfile) -> bool:
    return profile.type == "default"


def beyond_native(profile: RopeProfile, tokens: int) -> bool:
    """Whether so many tokens pass the model's trained length without any RoPE scaling."""
    return unscaled(profile) and tokens > profile.native_length
