"""A needle in a haystack: one sentence in a long text, asked for at its end.

The test is Greg Kamradt's (github.com/gkamradt/LLMTest_NeedleInAHaystack): the text is cut to the
length in tokens, and the needle stands after a given share of it, moved back to where a sentence
ends. The score is that of OpenCompass's single-needle task (NeedleBenchOriginEvaluator in
opencompass/datasets/needlebench/origin.py): 100 when the answer contains the keyword; else
20 (1 - d / n), where d is the Levenshtein distance between answer and needle without their white
space and n the length of the longer. Sentences, prompts and texts are our own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longspan._core import InvalidArgument, NumericalError
from longspan.config import GenerationConfig
from longspan.eval.record import sha256_of_ids

if TYPE_CHECKING:
    from longspan._core import RopeProfile
    from longspan.chat_template import ChatTemplate
    from longspan.eval.text import Text
    from longspan.pipeline import Pipeline
    from longspan.progress import ProgressCallback
    from longspan.tokenizer import Tokenizer

#: How an answer is judged, as records say it.
RULE = "100 if the answer contains the keyword, else 20 (1 - Levenshtein / longer length)"

INTRODUCTION = "Read the following text. A question about it comes at the end.\n\n"
CHAT_QUESTION = "\n\nThat was the text. Answer from it, in one sentence: {question}"
RAW_QUESTION = "\n\nThat was the text.\n\nQuestion: {question}\nAnswer:"

_PLACES = (
    "Antwerp", "Bergen", "Cork", "Dresden", "Ghent", "Lucerne", "Malmo", "Porto", "Riga",
    "Seville", "Trieste", "Utrecht",
)  # fmt: skip
_THINGS = (
    "a copper kettle", "a green umbrella", "a jar of plum jam", "a pair of wooden shoes",
    "a silver whistle", "a tin of ginger biscuits", "a wool blanket", "a paper lantern",
    "a brass compass", "a box of candied lemons", "a linen apron", "a clay flute",
)  # fmt: skip

# Tokens to look back through for the end of a sentence.
_LOOK_BACK = 2048
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


@dataclass(frozen=True)
class Needle:
    """text: what is hidden. question: what is asked. keyword: what a right answer contains."""

    text: str
    question: str
    keyword: str


def draw(seed: int, index: int) -> Needle:
    """The needle of a round. Nobody knows it but from the text."""
    rng = np.random.default_rng((seed, index))
    place, thing = rng.choice(_PLACES), rng.choice(_THINGS)
    return Needle(
        f"The best thing to bring home from a trip to {place} is {thing}.",
        f"What is the best thing to bring home from a trip to {place}?",
        str(thing),
    )


def levenshtein(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace to make one the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(above + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def score(answer: str, needle: Needle) -> float:
    """In [0, 100]; see the module."""
    if needle.keyword in answer:
        return 100.0
    got, wanted = (re.sub(r"\s+", "", text) for text in (answer, needle.text))
    return 20.0 * (1.0 - levenshtein(got, wanted) / max(len(got), len(wanted), 1))


class Haystack:
    """A text as tokens, again and again."""

    def __init__(self, text: Text, tokenizer: Tokenizer) -> None:
        """Throws InvalidArgument when the text is empty."""
        words = text.text.strip()
        if not words:
            raise InvalidArgument(f"haystack: expected text, got none in {text.source}")
        # The space stands between a needle at the very beginning and the text.
        self._first = tokenizer.encode(" " + words, add_special_tokens=False)
        self._again = tokenizer.encode("\n\n" + words, add_special_tokens=False)

    def take(self, count: int) -> list[int]:
        """The first `count` tokens."""
        ids = self._first[:count]
        while len(ids) < count:
            ids += self._again[: count - len(ids)]
        return ids

    def times(self, count: int) -> float:
        """How often the text stands in `count` tokens."""
        return count / len(self._first)


@dataclass(frozen=True)
class Prompt:
    """ids: the whole. begin: where the needle begins. depth: the share, in [0, 1], of the haystack
    that stands before the needle. haystack: tokens of it, the needle not counted."""

    ids: list[int]
    begin: int
    depth: float
    haystack: int


@dataclass(frozen=True)
class Answer:
    """One prompt and what came back. cached_tokens: of the prompt, those that an earlier one had
    computed; the rest took the prefill. seconds: wall time, prompt construction included."""

    depth: float
    needle: str
    keyword: str
    score: float
    found: bool
    answer: str
    prompt_tokens: int
    cached_tokens: int
    haystack_times: float
    prompt_sha256: str
    seconds: float
    prefill_tokens_per_s: float
    rope_profile: RopeProfile


class Test:
    """Needles in one haystack, for one tokenizer."""

    __test__ = False  # for pytest

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        haystack: Haystack,
        *,
        needle: Needle | None = None,
        seed: int = 0,
        max_new_tokens: int = 32,
    ) -> None:
        """template: None sends the prompt as it is. needle: for every round; without it a round's
        own. max_new_tokens: room for the answer, part of the stated length."""
        self._tokenizer = tokenizer
        self._template = template
        self._haystack = haystack
        self._needle = needle
        self._seed = seed
        self._config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)

    def needle(self, index: int) -> Needle:
        return self._needle or draw(self._seed, index)

    def room(self, length: int, index: int = 0) -> int:
        """Tokens of the haystack in the prompt of a round. Throws InvalidArgument when none."""
        taken = self._config.max_new_tokens + sum(len(part) for part in self._parts(index))
        if length <= taken:
            raise InvalidArgument(
                f"length: expected at least {taken + 1} tokens for this needle, got {length}"
            )
        return length - taken

    def prompt(self, length: int, depth: float, index: int = 0) -> Prompt:
        """As many tokens of the haystack as make prompt and answer take exactly `length`, and the
        needle of a round after a share of `depth` in [0, 1]: at the end of the last sentence within
        it, if one ends in the 2048 tokens before, and exactly there at 0 and 1.

        Throws what room() throws.
        """
        head, hidden, tail = self._parts(index)
        hay = self._haystack.take(self.room(length, index))
        cut = self._sentence_end(hay, int(depth * len(hay)))
        ids = [*head, *hay[:cut], *hidden, *hay[cut:], *tail]
        return Prompt(ids, len(head) + cut, cut / len(hay), len(hay))

    def ask(
        self,
        pipe: Pipeline,
        length: int,
        depth: float,
        index: int = 0,
        progress: ProgressCallback | None = None,
    ) -> Answer:
        """Throws what Pipeline.infer throws, and NumericalError."""
        begin = time.perf_counter()
        needle, prompt = self.needle(index), self.prompt(length, depth, index)
        response = pipe.infer(prompt.ids, self._config, progress=progress)
        if response.finish_reason == "error":
            raise NumericalError(response.error_message)
        return Answer(
            depth=prompt.depth,
            needle=needle.text,
            keyword=needle.keyword,
            score=score(response.text, needle),
            found=needle.keyword in response.text,
            answer=response.text,
            prompt_tokens=len(prompt.ids),
            cached_tokens=response.cached_tokens,
            haystack_times=self._haystack.times(prompt.haystack),
            prompt_sha256=sha256_of_ids(prompt.ids),
            seconds=time.perf_counter() - begin,
            prefill_tokens_per_s=(len(prompt.ids) - response.cached_tokens)
            / response.timings.prefill_s,
            rope_profile=response.rope_profile,
        )

    def _parts(self, index: int) -> tuple[list[int], list[int], list[int]]:
        """As tokens: what stands before the haystack, the needle in it, and what comes after."""
        needle = self.needle(index)
        hidden = self._tokenizer.encode(" " + needle.text, add_special_tokens=False)
        question = needle.question
        if self._template is None:
            head = self._tokenizer.encode(INTRODUCTION)
            tail = RAW_QUESTION.format(question=question)
        else:
            mark = "\x00haystack\x00"
            content = INTRODUCTION + mark + CHAT_QUESTION.format(question=question)
            message: dict[str, Any] = {"role": "user", "content": content}
            before, found, tail = self._template.render([message]).partition(mark)
            if not found:
                raise InvalidArgument("chat_template: expected it to keep what a user says")
            # A chat template writes out every special token itself.
            head = self._tokenizer.encode(before, add_special_tokens=False)
        return head, hidden, self._tokenizer.encode(tail, add_special_tokens=False)

    def _sentence_end(self, ids: Sequence[int], cut: int) -> int:
        if cut in (0, len(ids)):
            return cut
        for place in range(cut, max(cut - _LOOK_BACK, 0), -1):
            before = self._tokenizer.decode(ids[place - 1 : place])
            after = self._tokenizer.decode(ids[place - 1 : place + 1])[len(before) :]
            if _SENTENCE_END.search(before) and after[:1].isspace():
                return place
        return cut
