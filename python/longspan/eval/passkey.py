"""Passkey retrieval: a number hidden in a long, monotonous text, asked for at its end.

The sentences are those of LMDeploy's context length extrapolation document, which took them from
Mohtashami and Jaggi, "Landmark Attention" (2023), so that results compare. The prompt is sent as it
is, without a chat template, and continued greedily.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longspan._core import InvalidArgument, NumericalError
from longspan.config import GenerationConfig
from longspan.eval.record import sha256_of_ids

if TYPE_CHECKING:
    from longspan._core import Progress, RopeProfile
    from longspan.pipeline import Pipeline

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"

#: Keys are drawn from [1, KEY_END).
KEY_END = 50_000
#: Room for the answer, part of the stated length: five digits, and what a tokenizer puts around.
ANSWER_TOKENS = 16
#: How an answer is judged, as records say it.
RULE = "the first run of digits in the generated text is the key"


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    #: The share of the filler that stands before the information line, in [0, 1].
    depth: float


@dataclass(frozen=True)
class Round:
    """One prompt and what came back. cached_tokens: of the prompt, those that an earlier one had
    computed; the rest took the prefill. seconds: wall time, prompt construction included."""

    round: int
    key: int
    depth: float
    found: bool
    answer: str
    prompt_tokens: int
    cached_tokens: int
    prompt_sha256: str
    seconds: float
    prefill_tokens_per_s: float
    rope_profile: RopeProfile


def information(key: int) -> str:
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def build_prompt(tokenizer: Any, length: int, key: int, depth: float) -> Prompt:
    """As many fillers as leave ANSWER_TOKENS of `length` tokens free, the key after a share of
    about `depth`, in [0, 1], of them. The whole text is tokenised once.

    Throws InvalidArgument when not a single filler fits.
    """

    def text(before: int, after: int) -> str:
        return " ".join([TASK, *[FILLER] * before, information(key), *[FILLER] * after, QUESTION])

    one, two = (len(tokenizer.encode(text(1, after))) for after in (0, 1))
    room = length - ANSWER_TOKENS
    fillers = 1 + (room - one) // (two - one)
    while fillers >= 1:
        before = min(int(depth * (fillers + 1)), fillers)
        ids = tokenizer.encode(text(before, fillers - before))
        excess = len(ids) - room
        if excess <= 0:
            return Prompt(ids, before / fillers)
        # Only a tokenizer that joins words across spaces comes here.
        fillers -= -(-excess // (two - one))
    raise InvalidArgument(
        f"length: expected at least {one + ANSWER_TOKENS} tokens for a passkey prompt, got {length}"
    )


def is_found(answer: str, key: int) -> bool:
    """Whether the first run of the digits 0-9 in the answer is the key."""
    digits = re.search(r"[0-9]+", answer)
    return digits is not None and int(digits.group()) == key


def run(
    pipe: Pipeline,
    length: int,
    rounds: int,
    seed: int = 0,
    progress: Callable[[Sequence[Progress]], None] | None = None,
) -> Iterator[Round]:
    """Rounds of prompts that with their answers take `length` tokens.

    Key and depth of a round depend on seed and round alone, not on length or model.
    Throws what Pipeline.infer throws, and NumericalError.
    """
    for index in range(rounds):
        yield ask(pipe, length, index, seed, progress=progress)


def ask(
    pipe: Pipeline,
    length: int,
    index: int,
    seed: int = 0,
    depth: float | None = None,
    progress: Callable[[Sequence[Progress]], None] | None = None,
) -> Round:
    """Round `index` alone; a depth in [0, 1] takes the place of the round's own."""
    begin = time.perf_counter()
    rng = np.random.default_rng((seed, index))
    key = int(rng.integers(1, KEY_END))
    own = rng.random()
    prompt = build_prompt(pipe.tokenizer, length, key, own if depth is None else depth)
    greedy = GenerationConfig(max_new_tokens=ANSWER_TOKENS, do_sample=False)
    response = pipe.infer(prompt.ids, greedy, progress=progress)
    if response.finish_reason == "error":
        raise NumericalError(response.error_message)
    return Round(
        round=index,
        key=key,
        depth=prompt.depth,
        found=is_found(response.text, key),
        answer=response.text,
        prompt_tokens=len(prompt.ids),
        cached_tokens=response.cached_tokens,
        prompt_sha256=sha256_of_ids(prompt.ids),
        seconds=time.perf_counter() - begin,
        prefill_tokens_per_s=(len(prompt.ids) - response.cached_tokens)
        / response.timings.prefill_s,
        rope_profile=response.rope_profile,
    )
