"""The tokenizer of a tokenizer.model, trained here, against the sentencepiece library itself.

Its files are those of internlm2_5-7b-chat-1m: special tokens that replace unused pieces, a chat
template in tokenizer_config.json, and a Python file that nobody may run.
"""

from __future__ import annotations

import io
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import write_tiny_llama
from longspan import CheckpointError, InvalidArgument, Unsupported, pipeline
from longspan import EngineConfig as Config
from longspan.chat_template import ChatTemplate
from longspan.detokenizer import Detokenizer
from longspan.fast_tokenizer import FastTokenizer
from longspan.sentencepiece_tokenizer import SentencePieceTokenizer
from longspan.tokenizer import Tokenizer
from probes import PROBES

PROSE = "\n".join(pydoc_data.topics.topics.values())
SIZE = 600
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADDED = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "<|plugin|>",
    4: "<|interpreter|>",
    5: "<|action_end|>",
    6: "<|action_start|>",
    7: "<|im_end|>",
    8: "<|im_start|>",
}


def train(**options: Any) -> bytes:
    """A model of SIZE pieces learnt from prose, by default without a space put before a text and
    with bytes for what it has no piece of, as InternLM2's."""
    out = io.BytesIO()
    given = {
        "model_type": "bpe",
        "vocab_size": SIZE,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "character_coverage": 0.99,
        "max_sentence_length": 100_000,
        "user_defined_symbols": [f"[UNUSED_TOKEN_{i}]" for i in range(6)],
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE[:200_000].splitlines()),
        model_writer=out,
        minloglevel=2,
        **given | options,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def proto() -> bytes:
    return train()


def write_files(path: Path, proto: bytes, **changes: Any) -> None:
    """As internlm2_5-7b-chat-1m's. A change to None takes a key away."""
    (path / "tokenizer.model").write_bytes(proto)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(id): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for id, text in ADDED.items()
        },
        "additional_special_tokens": [text for id, text in ADDED.items() if id > 2],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
        "eos_token": "</s>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "sp_model_kwargs": None,
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    kept = {name: value for name, value in (config | changes).items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(kept))
    (path / "tokenization_internlm2.py").write_text("raise SystemExit('remote code was run')\n")


@pytest.fixture
def tokenizer(tmp_path: Path, proto: bytes) -> Tokenizer:
    write_files(tmp_path, proto)
    return Tokenizer.from_dir(tmp_path)


def reference(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


TEXTS = [
    *PROBES,
    PROSE[:5000],
    " a",
    "a ",
    "\n\n\t  x",
    "  two  spaces  ",
    "日本語\u3000",
    "👩‍👩‍👧🏽",
    "a\u0301",
]


def test_ids_are_the_librarys_after_bos(tokenizer: Tokenizer, proto: bytes) -> None:
    library = reference(proto)
    for text in TEXTS:
        if any(token in text for token in ADDED.values()):
            continue  # which the library takes for plain text
        plain = library.encode(text)
        assert tokenizer.encode(text) == [1, *plain]
        assert tokenizer.encode(text, add_bos=False) == plain
        assert tokenizer.encode(text, add_special_tokens=False) == plain
    assert tokenizer.encode("") == [1]


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == f"<s>{text}"
    for _ in range(200):
        text = "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xA0, 0xD7FF), 10, 32]))
            for _ in range(rng.randrange(40))
        )
        text = text.replace("\u2581", "")  # how the library writes a space
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_id_wherever_they_stand(tokenizer: Tokenizer, proto: bytes) -> None:
    library = reference(proto)
    start, end = 8, 7
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.vocab_size == SIZE
    assert [tokenizer.token_id(text) for text in ADDED.values()] == list(ADDED)
    assert tokenizer.token_id("never a token") is None
    text = "<|im_start|>user\nsome  text<|im_end|>\n<|im_start|>"
    ids = [
        start,
        *library.encode("user\nsome  text"),
        end,
        *library.encode("\n"),
        start,
    ]
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "user\nsome  text\n"
    for token, content in ADDED.items():
        assert tokenizer.encode(content, add_special_tokens=False) == [token]
        assert tokenizer.decode([token], skip_special_tokens=False) == content
        assert tokenizer.decode([token]) == ""
    # What they replaced is plain text now.
    assert start not in tokenizer.encode("[UNUSED_TOKEN_5")


def test_the_chat_template_is_chatml(tokenizer: Tokenizer, tmp_path: Path, proto: bytes) -> None:
    template = ChatTemplate.from_dir(tmp_path, tokenizer.special_tokens)
    assert template is not None
    text = template.render([{"role": "user", "content": "Hi there"}])
    assert text == "<s><|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    library = reference(proto)
    assert tokenizer.encode(text, add_special_tokens=False) == [
        1,
        8,
        *library.encode("user\nHi there"),
        7,
        *library.encode("\n"),
        8,
        *library.encode("assistant\n"),
    ]


@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_a_stream_never_splits_a_character(tmp_path: Path, add_dummy_prefix: bool) -> None:
    write_files(tmp_path, train(add_dummy_prefix=add_dummy_prefix))
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = "Größe 你好 👩‍👩‍👧🏽 naïve\n  x = {'a': 1}<|im_end|>\n<|im_start|> 後 word"
    ids = tokenizer.encode(text)
    assert any(tokenizer.decode([i]).endswith("\ufffd") for i in ids), "no character needs two ids"
    for skip in (False, True):
        stream = Detokenizer(tokenizer, skip)
        parts = [*(stream.add(token) for token in ids), stream.finish()]
        assert "".join(parts) == tokenizer.decode(ids, skip)
        assert "\ufffd" not in "".join(parts)
    assert tokenizer.decode(ids, False) == "<s>" + text


def test_a_space_before_the_text_comes_and_goes(tmp_path: Path) -> None:
    """add_dummy_prefix, as Llama 2's and Mistral's models have it: each stretch gets its own."""
    proto = train(add_dummy_prefix=True)
    write_files(tmp_path, proto)
    tokenizer = Tokenizer.from_dir(tmp_path)
    for text in ("word", " word", "a<|im_end|>b", "a <|im_end|> b", "<|im_start|>user\nx"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == f"<s>{text}"
    assert tokenizer.encode("word", add_bos=False) == reference(proto).encode("word")


def test_unigram_models_and_unknown_characters(tmp_path: Path) -> None:
    proto = train(model_type="unigram", byte_fallback=False, character_coverage=0.99)
    write_files(tmp_path, proto)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the function")) == "the function"
    ids = tokenizer.encode("the 蝸 x", add_bos=False)
    assert 0 in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the <unk> x"
    assert tokenizer.decode(ids) == "the  x"


def test_flags_of_added_tokens(tmp_path: Path, proto: bytes) -> None:
    def token(content: str, **flags: bool) -> dict[str, Any]:
        return {"content": content, **flags}

    added = {
        "1": token("<s>", special=True),
        "700": token("<L>", lstrip=True),
        "701": token("<R>", rstrip=True, special=True),
        "702": token("<R>x"),
    }
    write_files(tmp_path, proto, added_tokens_decoder=added, additional_special_tokens=None)
    tokenizer = Tokenizer.from_dir(tmp_path)
    library = reference(proto)
    assert tokenizer.vocab_size == 703
    assert tokenizer.encode("a \n<L> b <R> \tc", add_bos=False) == [
        *library.encode("a"),
        700,
        *library.encode(" b "),
        701,
        *library.encode("c"),
    ]
    assert tokenizer.encode("<R>x", add_bos=False) == [702]  # the longest
    assert tokenizer.decode([700, 701, 702]) == "<L><R>x"  # only 701 is special
    assert tokenizer.decode([650]) == ""  # an id without a token


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({"add_bos_token": False}, []),
        ({"add_eos_token": True}, [1, 2]),
        ({"add_bos_token": None}, [1]),
    ],
)
def test_what_frames_a_text(
    tmp_path: Path, proto: bytes, config: dict[str, Any], ids: list[int]
) -> None:
    write_files(tmp_path, proto, **config)
    assert Tokenizer.from_dir(tmp_path).encode("") == ids


def test_older_files_name_the_tokens_too(tmp_path: Path, proto: bytes) -> None:
    """added_tokens.json and special_tokens_map.json, as before transformers 4.34."""
    (tmp_path / "tokenizer.model").write_bytes(proto)
    alone = Tokenizer.from_dir(tmp_path)
    assert (alone.bos_token_id, alone.eos_token_id, alone.vocab_size) == (1, 2, SIZE)
    assert alone.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|extra|>": SIZE}))
    names = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<|extra|>",
        "additional_special_tokens": ["[UNUSED_TOKEN_3]"],
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, SIZE)
    unused = reference(proto).piece_to_id("[UNUSED_TOKEN_3]")
    assert tokenizer.encode("[UNUSED_TOKEN_3]<|extra|>", add_bos=False) == [unused, SIZE]
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert Tokenizer.from_dir(tmp_path).encode("") == []


def test_tokenizer_json_wins(tiny_llama: Callable[..., Path], proto: bytes) -> None:
    path = tiny_llama()
    (path / "tokenizer.model").write_bytes(proto)
    assert isinstance(Tokenizer.from_dir(path), FastTokenizer)
    (path / "tokenizer.json").unlink()
    assert isinstance(Tokenizer.from_dir(path), SentencePieceTokenizer)


def test_a_pipeline_talks_through_it(tmp_path: Path, proto: bytes) -> None:
    write_tiny_llama(tmp_path, vocab_size=SIZE, eos_token_id=7)
    (tmp_path / "tokenizer.json").unlink()
    write_files(tmp_path, proto)
    with pipeline(tmp_path, Config(dtype="float32", cache_max_entry_count=16)) as pipe:
        response = pipe("Hi there")
        assert response.input_token_len == len(
            pipe.tokenizer.encode(
                "<s><|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
                add_special_tokens=False,
            )
        )
        assert response.text == pipe.tokenizer.decode(response.token_ids)


def test_text_that_is_none_is_refused(tokenizer: Tokenizer) -> None:
    for bad in (b"bytes", None, 3):
        with pytest.raises(InvalidArgument, match="expected a string"):
            tokenizer.encode(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="expected valid Unicode"):
        tokenizer.encode("a\ud800")
    for bad_id in (-1, SIZE):
        with pytest.raises(InvalidArgument, match=rf"in \[0, {SIZE}\), got {bad_id}"):
            tokenizer.decode([bad_id])


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"legacy": False}, Unsupported, "legacy: expected True .* got False"),
        ({"add_prefix_space": False}, Unsupported, "add_prefix_space: expected True"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, Unsupported, "sp_model_kwargs"),
        ({"add_bos_token": "yes"}, CheckpointError, "add_bos_token: expected true or false"),
        ({"bos_token": 1}, CheckpointError, "bos_token: expected a string, got 1"),
        ({"added_tokens_decoder": []}, CheckpointError, "added_tokens_decoder: expected an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, CheckpointError, "x: expected an id"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, CheckpointError, "expected an id in"),
        (
            {"added_tokens_decoder": {str(2**40): {"content": "a"}}},
            CheckpointError,
            "expected an id in",
        ),
        ({"added_tokens_decoder": {"7": "a"}}, CheckpointError, "7: expected an object with"),
        (
            {"added_tokens_decoder": {"7": {"content": ""}}},
            CheckpointError,
            "7: expected an object",
        ),
        (
            {"added_tokens_decoder": {"7": {"content": "a", "lstrip": 1}}},
            CheckpointError,
            "7: lstrip: expected true or false",
        ),
        (
            {"added_tokens_decoder": {"7": {"content": "a", "single_word": True}}},
            Unsupported,
            "7: single_word: expected false",
        ),
        ({"additional_special_tokens": [3]}, CheckpointError, "expected strings, got 3"),
    ],
)
def test_files_that_say_what_is_not_built_or_wrong(
    tmp_path: Path, proto: bytes, changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    write_files(tmp_path, proto, **changes)
    with pytest.raises(error, match=expected):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0", b"not one", b"\xff" * 1000, b"{}"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected a SentencePiece model"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        Tokenizer.from_dir(tmp_path)


_DAMAGE = """
import random, sys
from pathlib import Path
from longspan import LongspanError
from longspan.tokenizer import Tokenizer
path, seed = Path(sys.argv[1]), int(sys.argv[2])
whole = (path / "tokenizer.model").read_bytes()
rng = random.Random(seed)
refused = 0
for attempt in range(150):
    data = bytearray(whole)
    kind = attempt % 3
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    else:
        begin = rng.randrange(len(data))
        del data[begin : begin + rng.randrange(1, 300)]
    (path / "tokenizer.model").write_bytes(data)
    try:
        tokenizer = Tokenizer.from_dir(path)
        for text in ("hello  world\\n", "\\U0001f600 \\u4f60", "x" * 99):
            tokenizer.decode(tokenizer.encode(text))
        tokenizer.decode(range(tokenizer.vocab_size))
    except LongspanError:
        refused += 1
print("survived", refused)
"""


@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "nmt_nfkc"}])
def test_damaged_models_never_take_the_process_down(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """In a process of its own: a crash would be this one's. Every error is of ours."""
    write_files(tmp_path, train(**options))
    command = [sys.executable, "-c", _DAMAGE, str(tmp_path), "11"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()[-2:]
    assert words[0] == "survived" and int(words[1]) > 30
