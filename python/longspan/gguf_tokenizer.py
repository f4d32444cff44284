"""tokenizer.json, tokenizer_config.json and the chat template, from a GGUF file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from longspan._core import CheckpointError, Unsupported
from longspan.fast_tokenizer import LLAMA3_WORDS, QWEN2_WORDS

if TYPE_CHECKING:
    from longspan.gguf import Metadata

# llama.cpp's token types.
_CONTROL, _USER_DEFINED = 3, 4


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(words: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# How words are split, by llama.cpp's name for it (tokenizer.ggml.pre).
_SPLITTERS = {
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _gpt2()]),
    "llama-bpe": lambda: _split(LLAMA3_WORDS),
    "qwen2": lambda: _split(QWEN2_WORDS),
}


def write_tokenizer(metadata: Metadata, model_dir: Path) -> None:
    """Throws Unsupported for a tokenizer that is not a byte-level BPE known here."""
    kind = metadata.need("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise Unsupported(f"{metadata.path}: tokenizer.ggml.model: expected gpt2, got {kind}")
    splitter = metadata.get("tokenizer.ggml.pre", str, "default")
    if splitter not in _SPLITTERS:
        raise Unsupported(
            f"{metadata.path}: tokenizer.ggml.pre: expected one of {', '.join(_SPLITTERS)}, "
            f"got {splitter}"
        )
    tokens = metadata.need("tokenizer.ggml.tokens", list)
    tokenizer = _bpe(metadata, tokens, splitter)
    special = _special_tokens(metadata, tokens)
    begins = metadata.get("tokenizer.ggml.add_bos_token", bool, splitter == "llama-bpe")
    ends = metadata.get("tokenizer.ggml.add_eos_token", bool, False)
    tokenizer.post_processor = _frame(
        tokens,
        special.get("bos_token") if begins else None,
        special.get("eos_token") if ends else None,
    )
    tokenizer.save(str(model_dir / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    config["clean_up_tokenization_spaces"] = False
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (model_dir / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    template = metadata.get("tokenizer.chat_template", str)
    if template is not None:
        (model_dir / "chat_template.jinja").write_text(template, encoding="utf-8")


def _bpe(metadata: Metadata, tokens: list[str], splitter: str) -> tokenizers.Tokenizer:
    merges = [tuple(m.split(" ")) for m in metadata.need("tokenizer.ggml.merges", list)]
    types = metadata.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(vocabulary) != len(tokens):
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.tokens: expected {len(types)} different tokens, "
            f"got {len(vocabulary)}"
        )
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            ignore_merges=splitter == "llama-bpe",
        )
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{metadata.path}: tokenizer.ggml.merges: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    if splitter == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _SPLITTERS[splitter]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _special_tokens(metadata: Metadata, tokens: list[str]) -> dict[str, str]:
    """The text of bos, eos, unk and pad, under Hugging Face's names."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special: dict[str, str] = {}
    for name, hf_name in names.items():
        key = f"tokenizer.ggml.{name}_token_id"
        token = metadata.get(key, int)
        if token is None:
            continue
        if not 0 <= token < len(tokens):
            raise CheckpointError(
                f"{metadata.path}: {key}: expected an id in [0, {len(tokens)}), got {token}"
            )
        special[f"{hf_name}_token"] = tokens[token]
    return special


def _frame(tokens: list[str], bos: str | None, eos: str | None) -> processors.PostProcessor:
    """What encode() puts around a text."""
    if bos is None and eos is None:
        return processors.ByteLevel(trim_offsets=False)
    pattern = [token for token in (bos, "$A", eos) if token is not None]
    ids = {token: tokens.index(token) for token in (bos, eos) if token is not None}
    return processors.TemplateProcessing(
        single=" ".join(pattern), pair=" ".join([*pattern, "$B"]), special_tokens=list(ids.items())
    )
