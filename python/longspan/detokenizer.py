"""Token ids to text as they come: never half a character, never a stop word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

#: What decoders put for bytes that are not (yet) a character.
_UNFINISHED = "\ufffd"
#: More of these in a row are no unfinished character but the text; a character has 4 bytes at most.
_MOST_UNFINISHED = 16


class _Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Decodes a sequence token by token; the pieces together are the decoded whole.

    A decoder may look at what stands before (a space that only the first word lacks, say), so a
    new token is decoded together with the last ones whose text is settled. Costs the same at any
    length.
    """

    def __init__(self, tokenizer: _Decoder, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []  # the last settled tokens, then those that are not
        self._settled = 0  # tokens of the window that are
        self._shown = 0  # characters of the window's text that are out

    def add(self, token: int) -> str:
        """The text that this token makes certain; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        unfinished = len(text) - len(text.rstrip(_UNFINISHED))
        if unfinished > _MOST_UNFINISHED:
            unfinished = 3
        certain = max(len(text) - unfinished, self._shown)
        piece = text[self._shown : certain]
        self._shown = certain
        if unfinished == 0 and self._decode(self._window[self._settled :]):
            del self._window[: self._settled]
            self._settled = len(self._window)
            self._shown = len(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """What is left of the text when no token follows."""
        text = self._decode(self._window)
        piece = text[self._shown :]
        self._shown = len(text)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)


class StopWords:
    """Finds the first of some words in a text that grows, across the borders of its pieces."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._longest = max(map(len, self._words), default=0)

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """Where the first word that ends beyond text[:start] begins and ends: of those that end
        first, the longest."""
        found = []
        for word in self._words:
            begin = text.find(word, max(0, start - len(word) + 1))
            if begin >= 0:
                found.append((begin + len(word), begin))
        if not found:
            return None
        end, begin = min(found)
        return begin, end

    def held(self, text: str) -> int:
        """How many of the last characters may be the beginning of a word."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(word.startswith(tail) for word in self._words):
                return size
        return 0
