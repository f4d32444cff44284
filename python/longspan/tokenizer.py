"""Text to token ids and back, by the model's own tokenizer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan._core import CheckpointError, InvalidArgument


class Tokenizer(ABC):
    """What every kind of tokenizer does. May be used from several threads."""

    def __init__(self, special_tokens: dict[str, str], vocab_size: int) -> None:
        """special_tokens: text by name ("bos_token", "eos_token", "pad_token", ...).
        vocab_size: one more than the largest id."""
        self.special_tokens = dict(special_tokens)
        self.vocab_size = vocab_size
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> Tokenizer:
        """The tokenizer of a model directory: tokenizer.json's, else tokenizer.model's. Throws
        CheckpointError."""
        from longspan.fast_tokenizer import FastTokenizer
        from longspan.sentencepiece_tokenizer import SentencePieceTokenizer

        path = Path(model_dir)
        if (path / "tokenizer.model").exists() and not (path / "tokenizer.json").exists():
            return SentencePieceTokenizer.from_files(path)
        return FastTokenizer.from_files(path)

    def encode(self, s: str, add_bos: bool = True, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: let the tokenizer add the tokens it frames a text with, if any;
        add_bos=False drops the one that begins it. Throws InvalidArgument for what is no text."""
        if not isinstance(s, str):
            raise InvalidArgument(f"text: expected a string, got {type(s).__name__}")
        ids = self._encode(s, add_special_tokens)
        if not add_bos and ids and ids[0] == self.bos_token_id:
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Throws InvalidArgument for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            got = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidArgument(f"token id: expected one in [0, {self.vocab_size}), got {got}")
        return self._decode(ids, skip_special_tokens)

    def __call__(self, s: str) -> list[int]:
        return self.encode(s)

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """The id of the token with this text, if there is one."""

    @abstractmethod
    def _encode(self, s: str, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Throws CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def special_tokens(model_dir: Path) -> dict[str, str | None]:
    """What tokenizer_config.json, else special_tokens_map.json, says of the tokens it calls
    "bos_token" and the like; None where it says that there is none. Throws CheckpointError."""
    special: dict[str, str | None] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = model_dir / file
        for name, value in (read_json_object(path) if path.exists() else {}).items():
            if not name.endswith("_token") or isinstance(value, bool):
                continue
            text = value.get("content", value) if isinstance(value, dict) else value
            if text is not None and not isinstance(text, str):
                raise CheckpointError(f"{path}: {name}: expected a string, got {value!r}")
            special[name] = text
    return special
