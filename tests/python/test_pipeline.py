"""The pipeline on tiny models: forms of input, batches, progress, interrupts, scores."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from longspan import (
    ContextTooLong,
    EngineClosed,
    EngineConfig,
    GenerationConfig,
    InvalidArgument,
    Perplexity,
    Pipeline,
    Response,
    pipeline,
)

GREEDY = GenerationConfig(max_new_tokens=8, ignore_eos=True)
PROMPT = "The grass is green."
FAST = EngineConfig(dtype="float32", max_batch_size=4, cache_max_entry_count=64)


@pytest.fixture(scope="module")
def model(tiny_512: Path) -> Path:
    return tiny_512


@pytest.fixture(scope="module")
def pipe(model: Path) -> Iterator[Pipeline]:
    with pipeline(model, FAST) as pipe:
        yield pipe


def hf_greedy(model: Path, ids: list[int], count: int) -> list[int]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = reference.generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return out[0, len(ids) :].tolist()


def test_greedy_tokens_are_those_of_transformers(model: Path, pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode(PROMPT)
    response = pipe(ids, gen_config=GREEDY)
    assert response.token_ids == hf_greedy(model, ids, 8)
    assert response.text == pipe.tokenizer.decode(response.token_ids)
    assert response.input_token_len == len(ids)
    assert response.generate_token_len == 8
    assert response.finish_reason == "length"
    assert not response.context_full
    assert response.rope_profile.type == "default"
    assert response.timings.prefill_s > 0


def test_every_form_of_token_ids_is_the_same_prompt(pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode(PROMPT)
    expected = pipe(ids, GREEDY).token_ids
    forms: list[Any] = [tuple(ids), np.array(ids), np.array(ids, np.uint8)]
    try:
        import torch

        forms += [torch.tensor(ids), [torch.tensor(i) for i in ids]]
    except ImportError:
        pass
    forms += [[np.int64(i) for i in ids]]
    for form in forms:
        response = pipe(form, GREEDY)
        assert isinstance(response, Response)
        assert response.token_ids == expected
    for batch in ([ids, ids], [np.array(ids)] * 2, np.array([ids, ids])):
        responses = pipe(batch, GREEDY)
        assert [r.token_ids for r in responses] == [expected] * 2
        assert [r.index for r in responses] == [0, 1]


def test_text_goes_through_the_chat_template(pipe: Pipeline) -> None:
    wrapped = f"<|user|>{PROMPT}<|end|><|assistant|>"
    expected = pipe(wrapped, GREEDY, do_preprocess=False)
    assert expected.input_token_len == len(PROMPT) + 3
    messages = [{"role": "user", "content": PROMPT}]
    for form in (PROMPT, messages):
        assert pipe(form, GREEDY).token_ids == expected.token_ids
    for batch in ([PROMPT], [messages], [messages, PROMPT]):
        responses = pipe(batch, GREEDY)
        assert len(responses) == len(batch)
        assert responses[-1].token_ids == expected.token_ids
    assert pipe(PROMPT, GREEDY, do_preprocess=False).input_token_len == len(PROMPT)


def test_a_model_without_a_template_is_sent_the_text(tiny_llama: Callable[..., Path]) -> None:
    from conftest import write_byte_tokenizer

    path = tiny_llama()
    write_byte_tokenizer(path, chat_template=None)
    with pipeline(path, FAST) as pipe:
        assert pipe(PROMPT, GREEDY).input_token_len == len(PROMPT)
        with pytest.raises(InvalidArgument, match="no chat template"):
            pipe([{"role": "user", "content": PROMPT}])
    with pipeline(path, FAST, chat_template_config={"chat_template": "x"}) as pipe:
        assert pipe(PROMPT, GREEDY).input_token_len == 1


def test_text_of_a_chat_template_is_not_framed_again(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama()
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 256)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    with pipeline(path, FAST) as pipe:
        assert pipe(PROMPT, GREEDY).input_token_len == len(PROMPT) + 3
        assert pipe(PROMPT, GREEDY, do_preprocess=False).input_token_len == len(PROMPT) + 1


def test_a_config_for_each_prompt(pipe: Pipeline) -> None:
    configs = [GenerationConfig(max_new_tokens=n, ignore_eos=True) for n in (3, 0, 5)]
    responses = pipe([PROMPT] * 3, gen_config=configs)
    assert [r.generate_token_len for r in responses] == [3, 0, 5]
    assert pipe([], gen_config=[]) == []
    with pytest.raises(InvalidArgument, match="expected one or 2, got 3"):
        pipe([PROMPT] * 2, gen_config=configs)
    with pytest.raises(InvalidArgument, match="expected a GenerationConfig, got dict"):
        pipe(PROMPT, gen_config={"top_k": 1})


def test_a_batch_is_its_prompts_one_by_one(pipe: Pipeline) -> None:
    prompts = [PROMPT * n for n in (1, 4, 2, 7, 3, 1, 5)]
    alone = [pipe(prompt, GREEDY).token_ids for prompt in prompts]
    assert [r.token_ids for r in pipe(prompts, GREEDY)] == alone


def test_a_seed_repeats_the_text(pipe: Pipeline) -> None:
    def sampled(seed: int | None) -> Response:
        config = GenerationConfig(
            temperature=1.5, top_k=0, max_new_tokens=24, ignore_eos=True, random_seed=seed
        )
        return pipe(PROMPT, config)

    first = sampled(11)
    assert first.seed == 11
    assert sampled(11).token_ids == first.token_ids
    assert sampled(12).token_ids != first.token_ids
    drawn = sampled(None)
    assert sampled(drawn.seed).token_ids == drawn.token_ids


def test_a_stop_token_stops_and_is_left_out(pipe: Pipeline) -> None:
    free = pipe(PROMPT, GenerationConfig(max_new_tokens=32, ignore_eos=True)).token_ids
    stop = free[5]
    first = free.index(stop)
    config = GenerationConfig(max_new_tokens=32, ignore_eos=True, stop_token_ids=[stop])
    response = pipe(PROMPT, config)
    assert response.finish_reason == "stop"
    assert response.token_ids == free[:first]


def test_the_end_of_the_context_is_told(pipe: Pipeline) -> None:
    ids = [65] * 500
    response = pipe(ids, GenerationConfig(max_new_tokens=50, ignore_eos=True))
    assert (response.finish_reason, response.context_full) == ("length", True)
    assert response.generate_token_len == 12
    response = pipe(ids, GenerationConfig(max_new_tokens=None, ignore_eos=True))
    assert (response.generate_token_len, response.context_full) == (12, True)


def test_responses_print_like_lmdeploys(pipe: Pipeline) -> None:
    response = pipe(PROMPT, GREEDY)
    lines = str(response).removeprefix(response.text).strip("\n").split("\n")
    assert lines[:3] == [
        f"input_token_len={response.input_token_len}",
        "generate_token_len=8",
        "finish_reason='length'",
    ]
    assert repr(response).startswith(f"text={response.text!r}\n")


def test_perplexity_is_that_of_the_logits(pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode(PROMPT * 3)
    logits = pipe.get_logits(ids, range(len(ids))).astype(np.float64)
    assert logits.shape == (len(ids), 260)
    lse = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    each = lse[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
    nll = each.sum()
    (score,) = pipe.get_ppl(ids)
    assert isinstance(score, float) and isinstance(score, Perplexity)
    assert score.num_tokens == len(ids) - 1
    assert score.nll_sum == pytest.approx(nll, rel=1e-5)
    assert score.mean_nll == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert float(score) == pytest.approx(math.exp(score.mean_nll), rel=1e-12)
    assert score.token_nll.size == 0
    (told,) = pipe.get_ppl(ids, token_nll=True)
    assert told == score
    assert told.token_nll.dtype == np.float64
    np.testing.assert_allclose(told.token_nll, each, rtol=0, atol=1e-5)
    assert sum(told.token_nll.tolist()) == score.nll_sum
    many = pipe.get_ppl([ids, ids[:10], np.array(ids)])
    assert [m.num_tokens for m in many] == [len(ids) - 1, 9, len(ids) - 1]
    assert many[2] == pytest.approx(score, rel=1e-6)


def test_logits_come_in_the_order_asked_for(pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode(PROMPT)
    every = pipe.get_logits(ids, np.arange(len(ids)))
    assert every.dtype == np.float32
    some = pipe.get_logits(ids, [-1, 3, 0, 3])
    np.testing.assert_allclose(some, every[[-1, 3, 0, 3]], atol=1e-5)
    np.testing.assert_allclose(pipe.get_logits(ids), every[-1:], atol=1e-5)
    for bad in ([len(ids)], [-len(ids) - 1], [], [0.5], 3, "x"):
        with pytest.raises(InvalidArgument, match="positions: expected"):
            pipe.get_logits(ids, bad)  # type: ignore[arg-type]


def test_progress_is_reported_while_it_works(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(max_position_embeddings=65536)
    seen: list[list[tuple[int, int]]] = []
    times: list[float] = []

    def progress(states: Any) -> None:
        seen.append([(s.prefill_done, s.prefill_total) for s in states])
        times.append(time.monotonic())

    with pipeline(path, EngineConfig(dtype="float32")) as pipe:
        begin = time.monotonic()
        pipe.get_ppl([[65] * 10000, [66] * 10000], progress=progress)
        end = time.monotonic()
    gaps = np.diff([begin, *times, end])
    assert gaps.max() < 2.0
    assert seen[-1] == [(10000, 10000)] * 2
    done = [sum(d for d, _ in states) for states in seen]
    assert done == sorted(done)


def test_without_a_terminal_progress_is_logged(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("longspan.progress.HEARTBEAT", 0.0)
    with caplog.at_level("INFO", "longspan.progress"):
        pipe.get_ppl([65] * 40)
    assert re.fullmatch(r"\w+: 40 of 40 tokens, .* tokens/s, .* TFLOP/s", caplog.messages[-1])


def test_an_exception_in_progress_cancels(pipe: Pipeline, model: Path) -> None:
    def progress(states: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipe([PROMPT] * 3, GREEDY, progress=progress)
    wait_until_idle(pipe)
    assert pipe(PROMPT, GREEDY).generate_token_len == 8


def wait_until_idle(pipe: Pipeline) -> None:
    """A cancelled request that nobody waits for is gone a layer later; ten seconds are many."""
    for _ in range(500):
        metrics = pipe.engine.metrics()
        if metrics.running == 0 and metrics.waiting == 0:
            break
        time.sleep(0.02)
    assert (metrics.running, metrics.waiting) == (0, 0)
    assert metrics.free_blocks == metrics.total_blocks


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_ctrl_c_frees_everything(tiny_llama: Callable[..., Path], phase: str) -> None:
    path = tiny_llama(max_position_embeddings=200_000, num_hidden_layers=8)
    length = 150_000 if phase == "prefill" else 8
    config = GenerationConfig(max_new_tokens=None, ignore_eos=True)
    with pipeline(path, EngineConfig(dtype="float32", max_batch_size=2)) as pipe:
        expected = pipe(PROMPT, GREEDY).token_ids
        timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pipe([[65] * length, [66] * length, [67] * length], config)
        timer.join()
        assert time.monotonic() - begin < 3.0
        wait_until_idle(pipe)
        assert pipe(PROMPT, GREEDY).token_ids == expected


def test_threads_may_share_a_pipeline(pipe: Pipeline) -> None:
    prompts = [PROMPT * n for n in (1, 2, 3, 4)]
    expected = [pipe(prompt, GREEDY).token_ids for prompt in prompts]
    results: dict[int, list[list[int]]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        for _ in range(5):
            results[i].append(pipe(prompts[i], GREEDY).token_ids)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [expected[i]] * 5 for i in range(4)}


def test_a_pipeline_says_what_it_runs_on(pipe: Pipeline) -> None:
    info = pipe.engine.model
    assert repr(pipe) == (
        f"<Pipeline: {info.backend}, float32; RoPE: default, theta 10000, unscaled, native length "
        "512 tokens; session_len 512>"
    )


@pytest.mark.parametrize(
    ("device", "gpus", "usable", "told"),
    [
        ("auto", 1, False, True),
        ("auto", 0, False, False),
        ("auto", 1, True, False),
        ("cpu", 1, False, False),
    ],
)
def test_a_gpu_that_auto_leaves_idle_is_told(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    gpus: int,
    usable: bool,
    told: bool,
) -> None:
    cuda = SimpleNamespace(available=usable, detail="no driver was found")
    monkeypatch.setattr("longspan.describe.backends", lambda: (None, cuda))
    monkeypatch.setattr("longspan.describe.nvidia_gpus", lambda: gpus)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline(model, replace(FAST, device=device)).close()
    said = [str(warning.message) for warning in caught if "NVIDIA GPU" in str(warning.message)]
    assert len(said) == told
    assert all("no driver was found" in line for line in said)
    assert all(w.filename == __file__ for w in caught if "NVIDIA GPU" in str(w.message))


def test_text_where_token_ids_belong(pipe: Pipeline) -> None:
    for text in ("hello", b"hello"):
        with pytest.raises(InvalidArgument, match=r"got (str|bytes); pipe\.tokenizer\.encode"):
            pipe.get_ppl([text])


def test_beyond_the_trained_length_unscaled_is_said_once(model: Path) -> None:
    config = EngineConfig(dtype="float32", session_len=2048, cache_max_entry_count=64)
    with pipeline(model, config) as pipe:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            inside = pipe([65] * 400, GREEDY)
        assert not inside.beyond_native
        with pytest.warns(UserWarning, match="may reach 608 tokens, beyond the 512") as caught:
            beyond = pipe([65] * 600, GREEDY)
        assert caught[0].filename == __file__
        assert beyond.beyond_native
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pipe.get_ppl([65] * 600)[0].beyond_native
            assert not pipe.get_ppl([65] * 500)[0].beyond_native
    scaled = EngineConfig(
        dtype="float32", session_len=2048, cache_max_entry_count=64, rope_scaling_factor=2.0
    )
    with pipeline(model, scaled) as pipe, warnings.catch_warnings():
        warnings.simplefilter("error")
        response = pipe([65] * 600, GREEDY)
        assert not response.beyond_native
        assert response.rope_profile.type == "dynamic"
        assert response.rope_profile.length == 608


def test_overrides_reach_the_model(model: Path) -> None:
    overrides = {"max_position_embeddings": 300}
    with pipeline(model, FAST, hf_overrides=overrides) as pipe:
        assert pipe.engine.model.native_length == 300
        assert pipe.engine.config.session_len == 300
    both = EngineConfig(hf_overrides={"rope_theta": 1e5})
    with pytest.raises(InvalidArgument, match="hf_overrides"):
        pipeline(model, both, hf_overrides=overrides)


def test_the_log_level_is_heard(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    for level, lines in (("WARNING", 0), ("INFO", 1)):
        caplog.clear()
        with pipeline(model, FAST, log_level=level):
            assert len(caplog.records) == lines
    with pytest.raises(InvalidArgument, match="log_level: expected a level of logging, got 'LOUD'"):
        pipeline(model, FAST, log_level="LOUD")


def test_closing_ends_it(model: Path) -> None:
    with pipeline(model, FAST) as pipe:
        pass
    pipe.close()
    with pytest.raises(EngineClosed):
        pipe(PROMPT)


def test_one_that_cannot_fit_stops_the_call_before_the_others_run(pipe: Pipeline) -> None:
    before = pipe.engine.metrics().generated_tokens
    with pytest.raises(ContextTooLong) as caught:
        pipe([PROMPT, [65] * 512], GREEDY)
    assert (caught.value.prompt_tokens, caught.value.session_len) == (512, 512)
    wait_until_idle(pipe)
    assert pipe.engine.metrics().generated_tokens <= before + 8
    assert pipe(PROMPT, GREEDY).generate_token_len == 8
