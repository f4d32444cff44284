"""The tokenizer of a tokenizer.model: a SentencePiece model with the tokens added to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from longspan._core import CheckpointError, InvalidArgument, Unsupported
from longspan.tokenizer import Tokenizer, read_json_object, special_tokens

# More than any vocabulary has, so that an absurd id is a file's mistake and not our memory.
_MOST_IDS = 1 << 24


@dataclass(frozen=True)
class AddedToken:
    """A token that text is split at before SentencePiece sees it."""

    id: int
    content: str
    special: bool = True  #: what skip_special_tokens skips
    lstrip: bool = False  #: takes the white space before it
    rstrip: bool = False  #: takes the white space behind it


class SentencePieceTokenizer(Tokenizer):
    """Each stretch of text between added tokens is encoded and decoded by itself, so that decoding
    is the exact inverse. No code that came with the model is run."""

    def __init__(
        self,
        model: SentencePieceProcessor,
        special_tokens: dict[str, str] | None = None,
        added: Sequence[AddedToken] = (),
        add_bos: bool = True,
        add_eos: bool = False,
    ) -> None:
        """added: an id may be one of the model's own pieces, which it then replaces.
        add_bos, add_eos: whether encode() frames a text with them."""
        self.model = model
        pieces = model.get_piece_size()
        # Tokens that decoding copies: (text, whether skip_special_tokens skips it).
        self._copied = {
            i: (model.id_to_piece(i), True)
            for i in range(pieces)
            if model.is_control(i) or model.is_unknown(i)
        }
        self._copied |= {token.id: (token.content, token.special) for token in added}
        # Of tokens that begin alike the longest wins.
        longest_first = sorted(added, key=lambda token: len(token.content), reverse=True)
        self._ids = [token.id for token in longest_first]
        self._split = re.compile("|".join(map(_pattern, longest_first))) if added else None
        self._pieces = pieces
        super().__init__(special_tokens or {}, max(pieces, 1 + max(self._copied, default=-1)))
        self._before = [self.bos_token_id] if add_bos and self.bos_token_id is not None else []
        self._after = [self.eos_token_id] if add_eos and self.eos_token_id is not None else []

    @classmethod
    def from_files(cls, model_dir: Path) -> SentencePieceTokenizer:
        """Reads tokenizer.model, tokenizer_config.json, special_tokens_map.json and
        added_tokens.json; only the first must be there. Throws CheckpointError."""
        model = _read_model(model_dir / "tokenizer.model")
        special = special_tokens(model_dir)
        for name, own in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())):
            if name not in special and own >= 0:
                special[name] = model.id_to_piece(own)
        special = {name: text for name, text in special.items() if text is not None}
        path = model_dir / "tokenizer_config.json"
        config = read_json_object(path) if path.exists() else {}
        _require_plain(path, config)
        flags = {"add_bos_token": True, "add_eos_token": False}
        for name in flags:
            value = config.get(name)
            if value is not None:
                if not isinstance(value, bool):
                    raise CheckpointError(f"{path}: {name}: expected true or false, got {value!r}")
                flags[name] = value
        added = _added_tokens(model_dir, config)
        named = set(special.values()) | _additional(model_dir)
        known = {token.content for token in added}
        for text in sorted(named - known):
            piece = model.piece_to_id(text)
            if model.id_to_piece(piece) == text:  # else it is the id of the unknown piece
                added.append(AddedToken(piece, text))
        return cls(model, special, added, flags["add_bos_token"], flags["add_eos_token"])

    def token_id(self, text: str) -> int | None:
        for token, (content, _) in self._copied.items():
            if content == text:
                return token
        piece: int = self.model.piece_to_id(text)
        return piece if self.model.id_to_piece(piece) == text else None

    def _encode(self, s: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        begin = 0
        for match in self._split.finditer(s) if self._split else ():
            ids += self._encode_plain(s[begin : match.start()])
            ids.append(self._ids[match.lastindex - 1])
            begin = match.end()
        ids += self._encode_plain(s[begin:])
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def _encode_plain(self, s: str) -> list[int]:
        if not s:
            return []
        try:
            s.encode()  # of half a character the library's error says nothing
            ids: list[int] = self.model.encode(s)
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"text: expected valid Unicode, got {error}") from error
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text = ""
        plain: list[int] = []  # a stretch of the model's own pieces
        for token in ids:
            copied = self._copied.get(token)
            if copied is not None:
                text += self.model.decode(plain)
                plain = []
                if not (copied[1] and skip_special_tokens):
                    text += copied[0]
            elif token < self._pieces:  # else an id that no token has
                plain.append(token)
        text += self.model.decode(plain)
        return text


def _pattern(token: AddedToken) -> str:
    before, behind = r"\s*" * token.lstrip, r"\s*" * token.rstrip
    return f"{before}({re.escape(token.content)}){behind}"


def _read_model(path: Path) -> SentencePieceProcessor:
    try:
        data = path.read_bytes()
        if not data:  # which the library takes for no model at all
            raise CheckpointError(f"{path}: expected a SentencePiece model, got an empty file")
        model = SentencePieceProcessor(model_proto=data)
        for i in range(model.get_piece_size()):
            model.id_to_piece(i)  # fails on one that is no UTF-8, as decoding it would
        return model
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: expected a SentencePiece model, got {error}") from error


def _require_plain(path: Path, config: dict[str, Any]) -> None:
    """Refuses what would change the ids and is not built."""
    for name, plain in (("legacy", True), ("add_prefix_space", True), ("sp_model_kwargs", {})):
        value = config.get(name)
        if value is not None and value != plain:
            raise Unsupported(
                f"{path}: {name}: expected {plain!r} of a model without tokenizer.json, "
                f"got {value!r:.80}"
            )


def _added_tokens(model_dir: Path, config: dict[str, Any]) -> list[AddedToken]:
    """tokenizer_config.json's added_tokens_decoder, else the older added_tokens.json."""
    by_id = config.get("added_tokens_decoder")
    if by_id is not None:
        path = model_dir / "tokenizer_config.json"
        where = f"{path}: added_tokens_decoder"
        if not isinstance(by_id, dict):
            raise CheckpointError(f"{where}: expected an object, got {by_id!r:.80}")
        return [_added_token(f"{where}: {id}", id, value) for id, value in by_id.items()]
    path = model_dir / "added_tokens.json"
    by_content = read_json_object(path) if path.exists() else {}
    return [_added_token(f"{path}: {c}", id, {"content": c}) for c, id in by_content.items()]


def _added_token(where: str, id: Any, value: Any) -> AddedToken:
    number = int(id) if isinstance(id, str) and id.isascii() and id.isdecimal() else id
    if not isinstance(number, int) or not 0 <= number < _MOST_IDS:
        raise CheckpointError(f"{where}: expected an id in [0, {_MOST_IDS}), got {id!r:.80}")
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{where}: expected an object with a content, got {value!r:.80}")
    flags = {}
    for name in ("special", "lstrip", "rstrip", "single_word"):
        flags[name] = value.get(name, False)
        if not isinstance(flags[name], bool):
            raise CheckpointError(
                f"{where}: {name}: expected true or false, got {flags[name]!r:.80}"
            )
    if flags.pop("single_word"):
        raise Unsupported(f"{where}: single_word: expected false, got true")
    return AddedToken(number, content, **flags)


def _additional(model_dir: Path) -> set[str]:
    """additional_special_tokens of the files that may name them."""
    texts: set[str] = set()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = model_dir / name
        tokens = read_json_object(path).get("additional_special_tokens") if path.exists() else None
        for token in tokens if isinstance(tokens, list) else []:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise CheckpointError(
                    f"{path}: additional_special_tokens: expected strings, got {token!r:.80}"
                )
            texts.add(text)
    return texts
