"""Decoding token by token, against decoding the whole at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers
from conftest import write_byte_tokenizer
from longspan.detokenizer import Detokenizer, StopWords
from longspan.fast_tokenizer import FastTokenizer
from longspan.tokenizer import Tokenizer
from probes import PROBES
from tokenizers import decoders, models, pre_tokenizers

WORDS = ["a", "b", "the", "cat", "日本語", "naïve", "🙂", "👍🏽", "хлеб", "\n\t", "한국", "½"]


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every byte a token."""
    path = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(path)
    return Tokenizer.from_dir(path)


class ByteFallback:
    """Llama 2's way: pieces that begin with "▁" for a space, bytes for what has no piece, and no
    space before the first word."""

    def __init__(self) -> None:
        vocab = {f"<0x{i:02X}>": i for i in range(256)}
        for piece in ("▁", "a", "b", "▁the", "▁cat", "s", "日", "▁é", "<unk>"):
            vocab[piece] = len(vocab)
        model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
        self.model = tokenizers.Tokenizer(model)
        self.model.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        self.pieces = [i for i in vocab.values() if i >= 256 and i != vocab["<unk>"]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.model.decode(list(ids), skip_special_tokens=skip_special_tokens)


def expect_the_whole(
    tokenizer: Tokenizer | ByteFallback, ids: list[int], skip_special_tokens: bool = True
) -> list[str]:
    whole = tokenizer.decode(ids, skip_special_tokens)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    pieces = []
    for i, token in enumerate(ids):
        pieces.append(detokenizer.add(token))
        assert whole.startswith("".join(pieces)), (ids[: i + 1], pieces)
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == whole
    assert detokenizer.finish() == ""
    return pieces


@pytest.mark.parametrize("text", PROBES)
def test_no_split_of_a_text_is_seen(by_bytes: Tokenizer, text: str) -> None:
    ids = by_bytes.encode(text)
    for piece in expect_the_whole(by_bytes, ids):
        assert "\ufffd" not in piece
    expect_the_whole(by_bytes, ids, skip_special_tokens=False)


def test_every_split_of_every_character(by_bytes: Tokenizer) -> None:
    """A text is complete after each of its characters, whatever the tokens before."""
    for text in ("é日🙂a", "a🙂🙂日é", "🙂", "👩‍👩‍👧‍👦"):
        detokenizer = Detokenizer(by_bytes)
        shown = ""
        for i, byte in enumerate(by_bytes.encode(text)):
            shown += detokenizer.add(byte)
            assert shown == text.encode()[: i + 1].decode("utf-8", "ignore")


def test_random_tokens_give_the_whole(by_bytes: Tokenizer) -> None:
    """Invalid bytes, cut characters and special tokens among the text."""
    rng = random.Random(5)
    for _ in range(300):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 12)):
            if rng.random() < 0.5:
                ids += by_bytes.encode(rng.choice(WORDS))
            else:
                ids += [rng.randrange(260) for _ in range(rng.randrange(5))]
        expect_the_whole(by_bytes, ids)
        expect_the_whole(by_bytes, ids, skip_special_tokens=False)


def test_a_decoder_that_looks_back() -> None:
    """The first word loses its space, and only the first; characters are spelled in bytes."""
    rng = random.Random(6)
    tokenizer = ByteFallback()
    for _ in range(300):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 10)):
            if rng.random() < 0.6:
                ids.append(rng.choice(tokenizer.pieces))
            else:  # a whole character, which nothing may cut
                ids += list(rng.choice("é日🙂x").encode())
        expect_the_whole(tokenizer, ids)


def test_words_of_bpe_merges() -> None:
    """Tokens that hold the end of one character and the beginning of the next."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    rng = random.Random(7)
    text = "日本語🙂é한국👍🏽 ok " * 8
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    letters = raw[0][0]
    for _ in range(40):
        cuts = sorted(rng.sample(range(1, len(letters)), len(letters) // 3))
        words = [letters[a:b] for a, b in zip([0, *cuts], [*cuts, len(letters)], strict=True)]
        for word in words:
            vocab.setdefault(word, len(vocab))
        model = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="a"))
        model.decoder = decoders.ByteLevel()
        ids = [vocab[word] for word in words]
        pieces = expect_the_whole(FastTokenizer(model), ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_the_window_stays_short(by_bytes: Tokenizer) -> None:
    detokenizer = Detokenizer(by_bytes)
    for token in by_bytes.encode("naïve 日本語 " * 200) + [0x80] * 500:
        detokenizer.add(token)
    assert len(detokenizer._window) < 600
    longest = 0
    for token in by_bytes.encode("naïve 日本語 " * 200):
        detokenizer.add(token)
        longest = len(detokenizer._window)
    assert longest < 16


def test_stop_words_across_pieces() -> None:
    rng = random.Random(8)
    for _ in range(2000):
        words = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(3)]
        text = "".join(rng.choices("abc", k=20))
        stop = StopWords(words)
        # Letter by letter: the first end of a word, and where it begins.
        ends = [
            (i + 1, i + 1 - len(w))
            for i in range(len(text))
            for w in words
            if text[: i + 1].endswith(w)
        ]
        expected = min(ends, default=None)
        grown, found, shown = 0, None, 0
        while grown < len(text) and found is None:
            before, grown = grown, min(len(text), grown + rng.randrange(1, 4))
            found = stop.find(text[:grown], before)
            if found is None:
                shown = grown - stop.held(text[:grown])
        if expected is None:
            assert found is None
        else:
            assert found == (expected[1], expected[0])
            assert shown <= found[0], "a part of the word was shown"
