"""The tokenizer against the library's own, uncut, and against transformers."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import time
from pathlib import Path

import pytest
import tokenizers
from conftest import write_byte_tokenizer
from longspan import CheckpointError, InvalidArgument
from longspan.fast_tokenizer import LLAMA3_WORDS, QWEN2_WORDS, FastTokenizer
from longspan.tokenizer import Tokenizer
from probes import PROBES
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

PROSE = "\n".join(pydoc_data.topics.topics.values())


def trained(splitter: pre_tokenizers.PreTokenizer, **parts: object) -> tokenizers.Tokenizer:
    """A byte-level BPE of 1000 tokens learnt from prose."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = splitter
    for name, part in parts.items():
        setattr(model, name, part)
    model.train_from_iterator(
        [PROSE[:200_000]],
        trainers.BpeTrainer(
            vocab_size=1000,
            show_progress=False,
            special_tokens=["<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return model


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITTERS = {
    "gpt2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2]),
    "llama3": words(LLAMA3_WORDS),
    "qwen2": words(QWEN2_WORDS),
    "one word": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "metaspace": pre_tokenizers.Metaspace(),
}


def scrambled(length: int, seed: int) -> str:
    """Probes and prose in random order, cut anywhere: every kind of neighbour at a piece's end."""
    rng = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        source = rng.choice([PROSE, PROSE, rng.choice(PROBES)])
        begin = rng.randrange(max(len(source), 1))
        parts.append(source[begin : begin + rng.randrange(1, 900)])
        parts.append(rng.choice(["", " ", "  ", "\n", "'s ", " '", "<s>", " <s> ", "s 1 a"]))
    return "".join(parts)


@pytest.mark.parametrize("name", SPLITTERS)
def test_ids_of_pieces_are_those_of_the_whole(name: str) -> None:
    model = trained(SPLITTERS[name])
    for seed in range(3):
        text = scrambled(100_000, seed)
        assert FastTokenizer(model).encode(text) == model.encode(text).ids


def test_long_text_is_framed_once() -> None:
    frame = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    model = trained(GPT2, post_processor=frame)
    tokenizer = FastTokenizer(model, {"bos_token": "<s>"})
    assert tokenizer.encode(PROSE) == model.encode(PROSE).ids
    assert tokenizer.encode(PROSE, add_bos=False) == model.encode(PROSE).ids[1:]
    assert (
        tokenizer.encode(PROSE, add_special_tokens=False)
        == model.encode(PROSE, add_special_tokens=False).ids
    )
    assert tokenizer.encode("") == [0, 0]


def test_a_token_that_swallows_spaces_keeps_text_whole() -> None:
    model = trained(GPT2, normalizer=normalizers.NFC())
    model.add_tokens([tokenizers.AddedToken("the", rstrip=True)])
    text = "the cat " * 5000
    assert FastTokenizer(model).encode(text) == model.encode(text).ids


def test_smollm2_is_what_transformers_makes_of_the_same_files(smollm2_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    expected = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer = Tokenizer.from_dir(smollm2_dir)
    for text in PROBES:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text), text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == expected.decode(ids, skip_special_tokens=skip)
    text = scrambled(200_000, seed=7)
    assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.vocab_size == len(expected)


def test_time_is_linear_in_length(smollm2_dir: Path) -> None:
    """Not a race: four times the text may take six times as long, sixteen would be quadratic."""
    tokenizer = Tokenizer.from_dir(smollm2_dir)

    def seconds(text: str) -> float:
        begin = time.process_time()
        tokenizer.encode(text)
        return time.process_time() - begin

    for text in (PROSE[:250_000], "a" * 250_000, " " * 250_000):
        tokenizer.encode(text[:1000])
        assert seconds(text * 4) < 10 * max(min(seconds(text) for _ in range(3)), 0.01)


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.vocab_size == 260
    for bad in (-1, 260, 2**40):
        with pytest.raises(InvalidArgument, match=rf"in \[0, 260\), got {bad}"):
            tokenizer.decode([0, bad])
    with pytest.raises(InvalidArgument, match="expected a string, got int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"bos_token": 7}'),
        ("tokenizer_config.json", b'{"eos_token": {"text": "x"}}'),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer.from_dir(tmp_path)


def test_a_token_may_be_a_dict_or_absent(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    config = {"bos_token": None, "eos_token": {"content": "<|end|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 259)
