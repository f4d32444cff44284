"""Needles: prompts to the token, and scores worked out by hand. No model runs here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from longspan import InvalidArgument
from longspan.chat_template import ChatTemplate
from longspan.eval import needle, text
from longspan.tokenizer import Tokenizer

TinyLlama = Callable[..., Path]

SENTENCES = " ".join(
    f"Chapter {i} is about the number {i * 7919 % 10007}.5 and what it did! Was it right?"
    for i in range(400)
)


@pytest.fixture(params=["bytes", "smollm2"])
def model_dir(request: Any, tiny_llama: TinyLlama) -> Iterator[Path]:
    yield tiny_llama() if request.param == "bytes" else request.getfixturevalue("smollm2_dir")


def make(model_dir: Path, *, raw: bool = False, words: str = SENTENCES, **options: Any) -> Any:
    tokenizer = Tokenizer.from_dir(model_dir)
    template = None if raw else ChatTemplate.from_dir(model_dir, tokenizer.special_tokens)
    assert raw or template is not None
    haystack = needle.Haystack(text.Text("words", words), tokenizer)
    return needle.Test(tokenizer, template, haystack, **options), tokenizer


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("length", [700, 4099])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.75, 1.0])
def test_a_needle_stands_where_it_should(
    model_dir: Path, length: int, depth: float, raw: bool
) -> None:
    test, tokenizer = make(model_dir, raw=raw, max_new_tokens=20)
    prompt = test.prompt(length, depth, 3)
    hidden = tokenizer.encode(" " + test.needle(3).text)
    assert len(prompt.ids) + 20 == length
    assert prompt.ids[prompt.begin : prompt.begin + len(hidden)] == hidden

    # Without the needle it is the beginning of the text, between what depth does not change.
    rest = prompt.ids[: prompt.begin] + prompt.ids[prompt.begin + len(hidden) :]
    hay = tokenizer.encode(" " + SENTENCES)[: prompt.haystack]
    starts = [i for i in range(400) if rest[i : i + len(hay)] == hay]
    assert len(starts) == 1
    start = starts[0]
    words = tokenizer.decode(rest[:start]), tokenizer.decode(rest[start + len(hay) :])
    assert words[0].endswith(needle.INTRODUCTION)
    assert test.needle(3).question in words[1]

    place = prompt.begin - start
    assert prompt.depth == place / len(hay)
    wanted = int(depth * len(hay))
    if depth in (0.0, 1.0):
        assert place == wanted
        return
    assert place <= wanted
    before, skipped = tokenizer.decode(hay[:place]), tokenizer.decode(hay[place:wanted])
    assert re.search(r"[.!?]$", before) and skipped[:1] in (" ", "")
    assert not re.search(r"[.!?]\s", skipped)  # no later sentence ends within the depth
    assert re.search(r"[.!?]\s", skipped + tokenizer.decode(hay[wanted : wanted + 200]))


def test_prompts_of_a_length_share_what_stands_before_the_shallower_needle(
    tiny_llama: TinyLlama,
) -> None:
    test, _ = make(tiny_llama())
    deep, shallow = test.prompt(5000, 0.75, 0), test.prompt(5000, 0.5, 0)
    assert deep.ids[: shallow.begin] == shallow.ids[: shallow.begin]
    assert shallow.depth == pytest.approx(0.5, abs=0.02)


def test_a_short_text_is_repeated(tiny_llama: TinyLlama) -> None:
    test, tokenizer = make(tiny_llama(), words="Only this. And that.")
    prompt = test.prompt(900, 0.0)
    assert len(prompt.ids) + 32 == 900
    words = tokenizer.decode(prompt.ids)
    assert " Only this. And that.\n\nOnly this. And that.\n\nOnly this." in words
    with pytest.raises(InvalidArgument, match="haystack: expected text, got none in words"):
        make(tiny_llama(), words=" \n")


def test_a_text_without_sentences_is_cut_where_it_is(tiny_llama: TinyLlama) -> None:
    test, _ = make(tiny_llama(), words="word " * 2000)
    prompt = test.prompt(5000, 0.5)
    assert prompt.depth == int(0.5 * prompt.haystack) / prompt.haystack


def test_a_length_without_room_is_refused(model_dir: Path) -> None:
    test, _ = make(model_dir)
    with pytest.raises(InvalidArgument, match=r"length: expected at least \d+ tokens .* got 40"):
        test.prompt(40, 0.5)
    least = next(n for n in range(2000) if _fits(test, n))
    assert test.prompt(least, 0.0).haystack == 1


def _fits(test: Any, length: int) -> bool:
    try:
        return bool(test.prompt(length, 0.0))
    except InvalidArgument:
        return False


def test_needles_differ_by_round_and_repeat_by_seed() -> None:
    first = [needle.draw(5, index) for index in range(8)]
    assert len({n.text for n in first}) > 4
    assert first == [needle.draw(5, index) for index in range(8)]
    assert first != [needle.draw(6, index) for index in range(8)]
    for n in first:
        assert n.keyword in n.text and n.keyword not in n.question


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("sitting", "kitten", 3),
        ("flaw", "lawn", 2),
        ("abc", "abc", 0),
        ("abc", "cab", 2),
    ],
)
def test_levenshtein(a: str, b: str, distance: int) -> None:
    assert needle.levenshtein(a, b) == distance


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("the keyword zz is here", 100.0),
        ("ZZ", 0.0),  # every letter differs, and case counts
        ("", 0.0),
        ("abc.zy", 20 * (1 - 1 / 6)),  # one of six letters is another
        ("a b\nc .  z", 20 * (1 - 1 / 6)),  # white space does not count; one letter is missing
        ("abc.zyabc.zy", 20 * (1 - 6 / 12)),  # six too many; the longer has twelve
    ],
)
def test_scores_by_hand(answer: str, score: float) -> None:
    hidden = needle.Needle("ab c.\nzz", "?", "zz")
    assert needle.score(answer, hidden) == pytest.approx(score, abs=1e-12)
