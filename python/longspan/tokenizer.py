"""Text to token ids and back, by the model's own tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from longspan._core import CheckpointError, InvalidArgument

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


class Tokenizer:
    """Encodes and decodes as the `tokenizers` library does, which releases the GIL meanwhile."""

    def __init__(
        self, model: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None
    ) -> None:
        """special_tokens: text by name ("bos_token", "eos_token", "pad_token", ...)."""
        self.model = model
        self.special_tokens = dict(special_tokens or {})
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        #: One more than the largest id.
        self.vocab_size: int = 1 + max(model.get_vocab(with_added_tokens=True).values(), default=-1)
        self._may_cut = _may_cut(json.loads(model.to_str()))

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> Tokenizer:
        """Reads tokenizer.json and tokenizer_config.json. Throws CheckpointError."""
        path = Path(model_dir) / "tokenizer.json"
        try:
            model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path}: expected a tokenizer, got {error}") from error
        model.no_truncation()
        model.no_padding()
        config_path = Path(model_dir) / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.exists() else {}
        special = {}
        for name, value in config.items():
            if name.endswith("_token") and value is not None and not isinstance(value, bool):
                text = value.get("content") if isinstance(value, dict) else value
                if not isinstance(text, str):
                    raise CheckpointError(
                        f"{config_path}: {name}: expected a string, got {value!r}"
                    )
                special[name] = text
        return cls(model, special)

    def encode(self, s: str, add_bos: bool = True, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: let the tokenizer add the tokens it frames a text with, if any;
        add_bos=False drops the one that begins it."""
        if not isinstance(s, str):
            raise InvalidArgument(f"text: expected a string, got {type(s).__name__}")
        pieces = list(_pieces(s)) if self._may_cut else [s]
        encodings = self.model.encode_batch_fast(pieces, add_special_tokens=False)
        encoding = tokenizers.Encoding.merge(encodings)
        ids: list[int] = self.model.post_process(encoding, None, add_special_tokens).ids
        if not add_bos and ids and ids[0] == self.bos_token_id:
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Throws InvalidArgument for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            got = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidArgument(f"token id: expected one in [0, {self.vocab_size}), got {got}")
        return self.model.decode(ids, skip_special_tokens=skip_special_tokens)

    def __call__(self, s: str) -> list[int]:
        return self.encode(s)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.model.token_to_id(text)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Throws CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


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
