"""The tokenizer of a tokenizer.json, run by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from longspan._core import CheckpointError
from longspan.tokenizer import Tokenizer, special_tokens

#: How Llama 3 and Qwen 2 split text into words before BPE, as their tokenizer.json files say.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

# Long text is encoded in pieces of about this many characters: they stay in cache, and the
# library shares them out over the cores.
_PIECE = 4096
# Between a letter and a space with a letter after it. The splitters above, and GPT-2's, end a word
# and begin the next there whatever stands around, so the pieces' ids together are the whole's.
_WORD_END = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")


class FastTokenizer(Tokenizer):
    """Encodes and decodes as the `tokenizers` library does, which releases the GIL meanwhile."""

    def __init__(
        self, model: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None
    ) -> None:
        self.model = model
        largest = max(model.get_vocab(with_added_tokens=True).values(), default=-1)
        self._may_cut = _may_cut(json.loads(model.to_str()))
        super().__init__(special_tokens or {}, 1 + largest)

    @classmethod
    def from_files(cls, model_dir: Path) -> FastTokenizer:
        """Reads tokenizer.json, tokenizer_config.json and special_tokens_map.json; only the first
        must be there. Throws CheckpointError."""
        path = model_dir / "tokenizer.json"
        try:
            model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path}: expected a tokenizer, got {error}") from error
        model.no_truncation()
        model.no_padding()
        special = special_tokens(model_dir)
        return cls(model, {name: text for name, text in special.items() if text is not None})

    def token_id(self, text: str) -> int | None:
        return self.model.token_to_id(text)

    def _encode(self, s: str, add_special_tokens: bool) -> list[int]:
        pieces = list(_pieces(s)) if self._may_cut else [s]
        encodings = self.model.encode_batch_fast(pieces, add_special_tokens=False)
        encoding = tokenizers.Encoding.merge(encodings)
        ids: list[int] = self.model.post_process(encoding, None, add_special_tokens).ids
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.model.decode(ids, skip_special_tokens=skip_special_tokens)


def _pieces(s: str) -> Iterator[str]:
    begin = 0
    while match := _WORD_END.search(s, begin + _PIECE):
        yield s[begin : match.start()]
        begin = match.start()
    yield s[begin:]


def _may_cut(tokenizer: dict[str, Any]) -> bool:
    """Whether text may be cut at _WORD_END: words are split where we know, nothing before that
    looks across a space, and no added token holds or swallows one."""
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    for token in tokenizer["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or any(c.isspace() for c in token["content"]):
            return False
    splitter = tokenizer.get("pre_tokenizer") or {"type": "None"}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    kinds = {_splitter_kind(step) for step in steps}
    return "words" in kinds and "other" not in kinds


def _splitter_kind(step: dict[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "bytes"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        known = step["pattern"].get("Regex") in (LLAMA3_WORDS, QWEN2_WORDS)
        return "words" if known else "other"
    return "digits" if step["type"] == "Digits" else "other"
