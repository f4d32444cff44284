"""Conversations: what a turn sends, what it keeps, what it says of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from longspan import (
    ContextTooLong,
    EngineConfig,
    GenerationConfig,
    InvalidArgument,
    Pipeline,
    pipeline,
)
from longspan.session import Session

#: The tiny model's tokenizer has the bytes in the order of their letters in GPT-2's alphabet:
#: "!" to "~" come first. An answer of these alone is encoded again as it was generated.
GREEDY = GenerationConfig(
    max_new_tokens=24, ignore_eos=True, bad_token_ids=list(range(ord("~") - ord("!") + 1, 260))
)
#: Room for 64 blocks of 64 tokens; trained to 256.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_batch_size": 1,
    "session_len": 1024,
    "rope_scaling_factor": 2.0,
}
LONG = "Tell me of the sea, and of the ships on it. " * 3


@pytest.fixture(params=[True, False], ids=["cached", "uncached"])
def pipe(tiny_llama: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    config = EngineConfig(**OPTIONS, enable_prefix_caching=request.param)
    with pipeline(tiny_llama(), config) as pipe:
        yield pipe


def test_a_turn_sends_the_whole_conversation(pipe: Pipeline) -> None:
    session = pipe.session(system="Be brief.")
    for prompt in ("Hello", "And then?", "日本語"):
        expected = pipe(session.messages(prompt), GREEDY, rope_length="bucket")
        assert pipe.chat(prompt, session, GREEDY) is session
        assert session.response.text == expected.text
        assert session.history[-1] == (prompt, expected.text)
        assert session.num_tokens == expected.input_token_len + expected.generate_token_len
    assert [m["role"] for m in session.messages()] == ["system"] + ["user", "assistant"] * 3
    session.reset()
    assert (session.history, session.num_tokens, session.response) == ([], 0, None)
    assert session("Hello", GREEDY).text == pipe.session("Be brief.")("Hello", GREEDY).text


def test_the_streamed_turn_is_the_same(pipe: Pipeline) -> None:
    whole = pipe.chat("Hello", gen_config=GREEDY)
    assert isinstance(whole, Session)
    session = pipe.session()
    pieces = list(pipe.chat("Hello", session, GREEDY, stream_response=True))
    assert "".join(piece.text for piece in pieces) == whole.response.text == session.response.text
    assert session.history == whole.history


def test_a_turn_that_is_not_read_to_its_end_is_forgotten(tiny_llama: Callable[..., Path]) -> None:
    config = EngineConfig(**OPTIONS | {"session_len": 100_000})
    endless = GenerationConfig(max_new_tokens=90_000, ignore_eos=True)
    with pipeline(tiny_llama(), config) as pipe:
        session = pipe.session(gen_config=GREEDY)
        session("Hello")
        history, tokens = list(session.history), session.num_tokens
        stream = session.stream("And then?", endless)
        assert next(stream).finish_reason is None
        stream.close()  # type: ignore[attr-defined]
        with pytest.raises(ContextTooLong):
            session("x" * 100_000)
        assert (session.history, session.num_tokens) == (history, tokens)
        assert session("And then?").finish_reason == "length"


def test_it_says_what_it_computed_again(pipe: Pipeline) -> None:
    cached = pipe.engine.config.enable_prefix_caching
    session = pipe.session(gen_config=GREEDY)
    assert session(LONG).cached_tokens == 0
    assert (session.recomputed, session.recomputed_why) == (0, None)
    earlier = session.num_tokens
    second = session("And?")
    assert second.rope_profile.length == 256
    assert second.timings.prefill_tokens == second.input_token_len - second.cached_tokens
    assert session.recomputed == earlier - second.cached_tokens
    if not cached:
        assert session.recomputed_why == "enable_prefix_caching is off"
        return
    assert session.recomputed <= 64
    assert session.recomputed_why is None
    third = session(LONG)
    assert third.rope_profile.length == 512
    assert third.cached_tokens == 0
    assert "outgrown" in session.recomputed_why
    assert session("Yes?").cached_tokens > 256
    assert session.recomputed_why is None


def test_a_template_that_changes_earlier_turns(tiny_llama: Callable[..., Path]) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] if loop.last else 'old' }}: {{ m['content'] }}"
        "{% endfor %}"
    )
    config = EngineConfig(**OPTIONS, enable_prefix_caching=True)
    with pipeline(tiny_llama(), config, {"chat_template": template}) as pipe:
        session = pipe.session(gen_config=GREEDY)
        session(LONG)
        messages = session.messages("And?")
        answer = session("And?").text
        assert "template changed" in session.recomputed_why
        assert answer == pipe(messages, GREEDY, rope_length="bucket").text


def test_what_a_conversation_needs(tiny_llama: Callable[..., Path]) -> None:
    from conftest import write_byte_tokenizer

    path = tiny_llama()
    with pipeline(path, EngineConfig(**OPTIONS)) as pipe:
        with pytest.raises(InvalidArgument, match="n: expected 1 in a conversation, got 2"):
            pipe.chat("Hello", gen_config=GenerationConfig(n=2, temperature=1.0))
        with pytest.raises(InvalidArgument, match="chat: expected a string, got list"):
            pipe.chat(["Hello"])  # type: ignore[arg-type]
    write_byte_tokenizer(path, chat_template=None)
    with (
        pipeline(path, EngineConfig(**OPTIONS)) as pipe,
        pytest.raises(InvalidArgument, match="expected a model with a chat template"),
    ):
        pipe.session()
