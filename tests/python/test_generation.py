"""Streams, stop words, penalties, log probabilities, several sequences, asyncio: on tiny models."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from longspan import (
    ContextTooLong,
    EngineConfig,
    GenerationConfig,
    InvalidArgument,
    Pipeline,
    Response,
    pipeline,
)
from longspan.aio import AsyncPipeline
from test_pipeline import wait_until_idle

PROMPT = "The grass is green."
FAST = EngineConfig(dtype="float32", max_batch_size=4, cache_max_entry_count=64)
LONG = EngineConfig(dtype="float32", max_batch_size=2, session_len=200_000)
SAMPLED = GenerationConfig(
    temperature=1.0, top_k=0, max_new_tokens=40, ignore_eos=True, random_seed=5
)


@pytest.fixture(scope="module")
def model(tiny_512: Path) -> Path:
    return tiny_512


@pytest.fixture(scope="module")
def pipe(model: Path) -> Iterator[Pipeline]:
    with pipeline(model, FAST) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def garbled(pipe: Pipeline) -> list[int]:
    """Tokens that are no printable character by themselves."""
    return [i for i in range(260) if not pipe.tokenizer.decode([i]).isascii() or i > 255]


def config(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 24, "ignore_eos": True} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.6},
        {"repetition_penalty": 1.2, "bad_token_ids": [10, 202, 203]},
        {"min_new_tokens": 10, "ignore_eos": False, "stop_token_ids": []},
    ],
)
def test_greedy_is_that_of_transformers(
    model: Path, pipe: Pipeline, options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = pipe.tokenizer.encode(PROMPT)
    processors = transformers.LogitsProcessorList()
    if "repetition_penalty" in options:
        penalty = options["repetition_penalty"]
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    if "bad_token_ids" in options:
        bad = [[token] for token in options["bad_token_ids"]]
        processors.append(transformers.NoBadWordsLogitsProcessor(bad))
    if "min_new_tokens" in options:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(len(ids), 10, 259, device="cpu")
        )
    got = pipe(ids, config(**options)).token_ids
    expected = list(ids)
    while len(expected) < len(ids) + 24:
        tokens = torch.tensor([expected])
        with torch.no_grad():
            logits = reference(tokens).logits[:, -1].double()
        token = int(processors(tokens, logits).argmax())
        if token == 259 and "min_new_tokens" in options:
            break
        expected.append(token)
    assert got == expected[len(ids) :]
    assert got != pipe(ids, config()).token_ids or "min_new_tokens" in options


def test_min_p_keeps_what_transformers_keeps(model: Path, pipe: Pipeline) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = pipe.tokenizer.encode(PROMPT)
    logits = torch.tensor(pipe.get_logits(ids)).double()
    warper = transformers.MinPLogitsWarper(min_p=0.3)
    kept = set(
        torch.isfinite(warper(torch.tensor([ids]), logits / 1.5)[0]).nonzero().flatten().tolist()
    )
    drawn = set()
    for seed in range(200):
        one = config(max_new_tokens=1, temperature=1.5, top_k=0, min_p=0.3, random_seed=seed)
        drawn.update(pipe(ids, one).token_ids)
    assert 1 < len(kept) < 260
    assert drawn <= kept
    assert len(drawn) > len(kept) // 2


def test_bad_words_do_not_come(pipe: Pipeline, garbled: list[int]) -> None:
    free = pipe(PROMPT, config(bad_token_ids=garbled)).text
    word = free[1:3]
    text = pipe(PROMPT, config(bad_token_ids=garbled, bad_words=[word])).text
    assert word not in text
    same = free.index(word) + 1
    assert text[:same] == free[:same], "only the end of the word is banned"


def test_logprobs_are_the_log_softmax(pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode(PROMPT)
    response = pipe(
        ids,
        config(max_new_tokens=6, logprobs=4, prompt_logprobs=True, temperature=2.0, random_seed=1),
    )
    whole = ids + response.token_ids
    logits = pipe.get_logits(whole, range(len(whole))).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert len(response.logprobs) == 6
    for i, (token, given) in enumerate(zip(response.token_ids, response.logprobs, strict=True)):
        row = logprobs[len(ids) - 1 + i]
        likeliest = np.argsort(-row, kind="stable")[:4].tolist()
        assert list(given)[:4] == likeliest
        assert set(given) == {*likeliest, token}
        assert list(given.values()) == pytest.approx([row[t] for t in given], abs=1e-5)
    expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
    assert response.prompt_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    alone = pipe(ids, config(max_new_tokens=2, logprobs=0))
    assert [list(given) for given in alone.logprobs] == [[t] for t in alone.token_ids]
    only = pipe(ids, config(max_new_tokens=0, prompt_logprobs=True))
    assert only.prompt_logprobs == response.prompt_logprobs
    assert only.generate_token_len == 0


def test_streams_add_up_to_the_response(pipe: Pipeline) -> None:
    prompts = [PROMPT, "日本語", "x"]
    options = config(logprobs=2, temperature=1.2, top_k=0, random_seed=9, prompt_logprobs=True)
    expected = pipe(prompts, options)
    pieces: list[list[Response]] = [[], [], []]
    for piece in pipe.stream_infer(prompts, options):
        pieces[piece.index].append(piece)
    for parts, whole in zip(pieces, expected, strict=True):
        assert [p.finish_reason for p in parts] == [None] * (len(parts) - 1) + ["length"]
        lengths = [p.generate_token_len for p in parts]
        assert lengths == np.cumsum([len(p.token_ids) for p in parts]).tolist()
        joined = reduce(Response.extend, parts)
        for name in ("text", "token_ids", "logprobs", "prompt_logprobs", "seed", "index"):
            assert getattr(joined, name) == getattr(whole, name), name
        assert joined.timings.decode_tokens == 23


def test_a_stream_comes_while_it_is_generated(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(max_position_embeddings=200_000)
    with pipeline(path, LONG) as pipe:
        before = pipe.engine.metrics()
        endless = GenerationConfig(max_new_tokens=4000, ignore_eos=True)
        stream = pipe.stream_infer([PROMPT, PROMPT], endless)
        assert pipe.engine.metrics().steps == before.steps, "nothing runs before it is asked for"
        first = next(stream)
        assert first.finish_reason is None
        assert first.generate_token_len < 4000
        stream.close()  # type: ignore[attr-defined]
        wait_until_idle(pipe)
        assert pipe.engine.metrics().generated_tokens < 8000
        with pytest.raises(InvalidArgument):
            pipe.stream_infer(PROMPT, GenerationConfig(n=2))


@pytest.mark.parametrize("length", [8, 150_000])
def test_ctrl_c_in_a_stream_frees_everything(tiny_llama: Callable[..., Path], length: int) -> None:
    path = tiny_llama(max_position_embeddings=200_000, num_hidden_layers=8)
    endless = GenerationConfig(max_new_tokens=None, ignore_eos=True, stop_words=["\x00never"])
    with pipeline(path, LONG) as pipe:
        timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            for _ in pipe.stream_infer([[65] * length, [66] * length], endless):
                pass
        timer.join()
        assert time.monotonic() - begin < 3.0
        wait_until_idle(pipe)
        assert pipe(PROMPT, config()).generate_token_len == 24


def stop_words_of(text: str) -> list[str]:
    return [text[5:6], text[3:7], text[2:12], text[10:11]]


def test_stop_words_of_many_tokens(pipe: Pipeline, garbled: list[int]) -> None:
    readable = {**vars(SAMPLED), "bad_token_ids": garbled}
    whole = pipe(PROMPT, GenerationConfig(**readable))
    for word in stop_words_of(whole.text):
        options = {**readable, "stop_words": ["never seen", word]}
        at = whole.text.index(word)
        cut = pipe(PROMPT, GenerationConfig(**options))
        assert (cut.text, cut.finish_reason) == (whole.text[:at], "stop")
        assert cut.token_ids == whole.token_ids[: cut.generate_token_len]
        assert pipe.tokenizer.decode(cut.token_ids).startswith(cut.text)
        if cut.token_ids:
            assert not pipe.tokenizer.decode(cut.token_ids[:-1]).startswith(cut.text)
        kept = pipe(PROMPT, GenerationConfig(**options | {"include_stop_str_in_output": True}))
        assert kept.text == whole.text[: at + len(word)]
        streamed = [p.text for p in pipe.stream_infer(PROMPT, GenerationConfig(**options))]
        assert "".join(streamed) == cut.text
    wait_until_idle(pipe)


def test_a_stop_word_ends_the_work(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(max_position_embeddings=200_000)
    with pipeline(path, LONG) as pipe:
        word = pipe(PROMPT, config()).text[8:10]
        endless = GenerationConfig(max_new_tokens=100_000, ignore_eos=True, stop_words=[word])
        begin = pipe.engine.metrics().generated_tokens
        assert pipe(PROMPT, endless).finish_reason == "stop"
        wait_until_idle(pipe)
        assert pipe.engine.metrics().generated_tokens - begin < 10_000


def test_nothing_stops_before_the_least_length(pipe: Pipeline) -> None:
    whole = pipe(PROMPT, SAMPLED)
    word = whole.text[2]
    options = {**vars(SAMPLED), "stop_words": [word], "min_new_tokens": 12}
    response = pipe(PROMPT, GenerationConfig(**options))
    assert response.token_ids[:11] == whole.token_ids[:11]
    assert response.generate_token_len >= 11


def test_a_stop_token_can_be_kept(pipe: Pipeline) -> None:
    free = pipe(PROMPT, config()).token_ids
    stop = free[5]
    first = free.index(stop)
    kept = config(stop_token_ids=[stop], include_stop_str_in_output=True)
    response = pipe(PROMPT, kept)
    assert response.token_ids == free[: first + 1]
    assert response.text == pipe.tokenizer.decode(free[: first + 1])
    assert response.finish_reason == "stop"


def test_several_sequences_repeat_with_their_seeds(pipe: Pipeline) -> None:
    options = {**vars(SAMPLED), "max_new_tokens": 8}
    three = pipe(PROMPT, GenerationConfig(**options | {"n": 3}))
    assert [r.choice for r in three] == [0, 1, 2]
    assert [r.seed for r in three] == [5, 6, 7]
    assert len({r.text for r in three}) == 3
    for response in three:
        again = pipe(PROMPT, GenerationConfig(**options | {"random_seed": response.seed}))
        assert again.token_ids == response.token_ids
    mixed = [GenerationConfig(**options | {"n": 2}), GenerationConfig(**options)]
    pair, single = pipe([PROMPT, PROMPT], mixed)
    assert [r.token_ids for r in pair] == [r.token_ids for r in three[:2]]
    assert single.token_ids == three[0].token_ids
    drawn = pipe(PROMPT, GenerationConfig(**options | {"n": 2, "random_seed": None}))
    assert drawn[1].seed == (drawn[0].seed + 1) % 2**64


def test_what_a_call_asks_for_enters_together(pipe: Pipeline) -> None:
    """So all its sequences take every step with each other, each time."""
    prompts = [pipe.tokenizer.encode(PROMPT * (1 + i)) for i in range(4)]

    def steps(call: Callable[[], Any]) -> int:
        before = pipe.engine.metrics().steps
        call()
        return pipe.engine.metrics().steps - before

    config = replace(SAMPLED, max_new_tokens=12)
    assert steps(lambda: pipe(PROMPT, replace(config, n=4))) == 12
    assert steps(lambda: pipe(prompts, config)) == 12
    assert steps(lambda: list(pipe.stream_infer(prompts, config))) == 12
    assert steps(lambda: asyncio.run(AsyncPipeline(pipe).infer(prompts, config))) == 12
    assert steps(lambda: pipe.get_ppl(prompts)) == 1


def test_several_sequences_share_their_prompt(model: Path) -> None:
    ids = [65] * 200
    options = GenerationConfig(**vars(SAMPLED) | {"n": 3, "max_new_tokens": 8})
    with pipeline(model, FAST) as pipe:
        alone = pipe(ids, options)
    with pipeline(model, replace(FAST, enable_prefix_caching=True)) as pipe:
        shared = pipe(ids, options)
    assert [r.token_ids for r in shared] == [r.token_ids for r in alone]
    assert [r.cached_tokens for r in alone] == [0, 0, 0]
    assert shared[0].cached_tokens == 0
    assert all(r.cached_tokens >= 192 for r in shared[1:])


def test_a_list_is_checked_before_any_of_it_runs(pipe: Pipeline) -> None:
    before = pipe.engine.metrics()
    too_long = [65] * 512
    for call in (pipe, pipe.stream_infer, pipe.get_ppl):
        with pytest.raises(ContextTooLong):
            call([[65] * 4, [*too_long, 65]])
    after = pipe.engine.metrics()
    assert (after.steps, after.waiting) == (before.steps, 0)


def test_statistics_add_up(pipe: Pipeline) -> None:
    begin = time.perf_counter()
    responses = pipe([PROMPT] * 6, config())
    spent = time.perf_counter() - begin
    for r in responses:
        t = r.timings
        assert min(t.queue_s, t.prefill_s, t.decode_s) > 0
        assert t.queue_s + t.prefill_s + t.decode_s <= spent
        assert t.prefill_tokens == r.input_token_len
        assert t.decode_tokens == 23
        assert t.decode_tokens_per_s == pytest.approx(23 / t.decode_s)
        assert t.prefill_tokens_per_s == pytest.approx(r.input_token_len / t.prefill_s)
    assert max(r.timings.queue_s for r in responses) > min(r.timings.queue_s for r in responses)


def test_coroutines_give_the_same(pipe: Pipeline) -> None:
    prompts = [PROMPT * n for n in (1, 2, 3)]
    expected = [pipe(p, SAMPLED) for p in prompts]
    aio = AsyncPipeline(pipe)

    async def streamed(prompt: str) -> str:
        return "".join([p.text async for p in aio.stream_infer(prompt, SAMPLED)])

    async def run() -> None:
        both = await asyncio.gather(
            aio.infer(prompts, SAMPLED), *(streamed(p) for p in prompts), aio.infer(PROMPT, SAMPLED)
        )
        assert [r.token_ids for r in both[0]] == [r.token_ids for r in expected]
        assert both[1:4] == [r.text for r in expected]
        assert both[4].text == expected[0].text
        with pytest.raises(InvalidArgument):
            await aio.infer(PROMPT, GenerationConfig(n=2))

    asyncio.run(run())
    asyncio.run(run())  # in another loop
    for _ in range(100):
        if not any(t.name == "longspan-aio" for t in threading.enumerate()):
            return
        time.sleep(0.05)
    pytest.fail("its thread outlives its requests")


def test_cancelling_a_task_cancels_its_request(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(max_position_embeddings=200_000)
    with pipeline(path, LONG) as pipe:

        async def run() -> None:
            aio = AsyncPipeline(pipe)
            endless = GenerationConfig(max_new_tokens=100_000, ignore_eos=True)
            task = asyncio.create_task(aio.infer(PROMPT, endless))
            async for _ in aio.stream_infer(PROMPT, endless):
                break
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        wait_until_idle(pipe)


def test_nothing_but_aio_needs_asyncio() -> None:
    root = Path(sys.modules["longspan"].__file__ or "").parent
    for path in root.rglob("*.py"):
        assert path.name == "aio.py" or "asyncio" not in path.read_text(), path
    code = "import longspan, sys; assert 'longspan.aio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
