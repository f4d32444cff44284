"""The border between Python and C++: conversions, errors, lifetimes, the interpreter lock."""

from __future__ import annotations

import array
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from longspan import _core
from longspan._core import (
    Engine,
    EngineConfig,
    GenerationConfig,
    InvalidArgument,
    RequestHandle,
    RopeProfile,
)

IDS = [5, 17, 250, 99, 3, 42]


@pytest.fixture
def engine(tiny_llama: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.load(str(tiny_llama()), EngineConfig(dtype="float32")) as engine:
        yield engine


def nll(engine: Engine, ids: Any) -> float:
    return engine.score(ids).wait().nll_sum


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_any_integer_dtype(engine: Engine, dtype: str) -> None:
    ids = [abs(i) % 100 for i in IDS]
    assert nll(engine, np.array(ids, dtype)) == nll(engine, ids)


def test_any_sequence(engine: Engine) -> None:
    expected = nll(engine, IDS)
    strided = np.repeat(np.array(IDS, np.int32), 3)[::3]
    assert not strided.flags.c_contiguous
    reverse = np.array(IDS[::-1])[::-1]
    for ids in (tuple(IDS), array.array("q", IDS), np.array(IDS), strided, reverse):
        assert nll(engine, ids) == expected


def test_torch_tensor(engine: Engine) -> None:
    torch = pytest.importorskip("torch")
    assert nll(engine, torch.tensor(IDS)) == nll(engine, IDS)
    assert nll(engine, torch.tensor(IDS, dtype=torch.int32)) == nll(engine, IDS)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1.5, 2.0], "float64"),
        ("text", "1-D"),
        ([[1, 2], [3, 4]], r"\(2, 2\)"),
        ([[1], [2, 3]], "1-D"),
        (7, r"\(\)"),
        ([1, None], "object"),
        ([True, False], "bool"),
        ([1, 2**31], "2147483648 at index 1"),
        ([1, -1], "-1 at index 1"),
        (np.array([1, 2**64 - 1], np.uint64), "index 1"),
        ([1, 2**70], "object"),
        ([1, 260], "260"),
        ([], "input_ids"),
    ],
)
def test_bad_ids(engine: Engine, ids: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        engine.generate(ids)


def test_logits(engine: Engine) -> None:
    output = engine.logits(IDS, np.array([0, 5])).wait()
    logits = output.logits
    assert logits.shape == (2, 260)
    assert logits.dtype == np.float32
    assert np.shares_memory(logits, output.logits), "a view, not a copy"
    before = logits.copy()
    del output
    gc.collect()
    assert np.array_equal(logits, before), "the array keeps its memory alive"
    assert engine.generate(IDS, GenerationConfig(max_new_tokens=1)).wait().logits.shape == (0, 0)


def test_handle_outlives_engine(tiny_llama: Callable[..., Path]) -> None:
    engine = Engine.load(str(tiny_llama()))
    config = GenerationConfig(max_new_tokens=4, ignore_eos=True)
    done = engine.generate(IDS, config)
    tokens = done.wait().token_ids
    cut = engine.generate(IDS, GenerationConfig(max_new_tokens=None, ignore_eos=True))
    engine.close()
    engine.close()
    with pytest.raises(_core.EngineClosed):
        engine.generate(IDS)
    del engine
    gc.collect()
    assert done.wait().token_ids == tokens == done.tokens_from(0)
    assert done.tokens_from(2) == tokens[2:]
    assert done.progress().generated == 4
    done.cancel()
    assert cut.wait_for(1.0)
    with pytest.raises(_core.EngineClosed):
        cut.wait()


@pytest.fixture
def endless(tiny_llama: Callable[..., Path]) -> Iterator[RequestHandle]:
    """A request that runs for many seconds unless it is cancelled."""
    with Engine.load(str(tiny_llama(max_position_embeddings=1 << 20))) as engine:
        yield engine.generate(IDS, GenerationConfig(max_new_tokens=None, ignore_eos=True))


def test_waiting_frees_the_interpreter(endless: RequestHandle) -> None:
    """While one thread waits for a request another can cancel it."""
    reasons: list[str] = []
    waiter = threading.Thread(target=lambda: reasons.append(endless.wait().finish_reason))
    waiter.start()
    time.sleep(0.05)
    endless.cancel()
    waiter.join()
    assert reasons == ["cancelled"]


def test_wait_for_times_out(endless: RequestHandle) -> None:
    start = time.monotonic()
    assert not endless.wait_for(0.25)
    assert time.monotonic() - start >= 0.25
    assert not endless.wait_for(-1.0)
    with pytest.raises(InvalidArgument, match="nan"):
        endless.wait_for(float("nan"))
    endless.cancel()
    assert endless.wait_for(float("inf"))


@pytest.mark.parametrize("wait", [RequestHandle.wait, lambda handle: handle.wait_for(1e9)])
def test_ctrl_c_interrupts_waiting(endless: RequestHandle, wait: Callable[..., Any]) -> None:
    main = threading.get_ident()
    timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        wait(endless)
    timer.join()


def test_load_progress(tiny_llama: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    Engine.load(str(tiny_llama()), progress=lambda done, total: seen.append((done, total))).close()
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0

    class Stop(Exception):
        pass

    def refuse(done: int, total: int) -> None:
        raise Stop(f"{done} of {total}")

    with pytest.raises(Stop, match=" of "):
        Engine.load(str(tiny_llama()), progress=refuse)


def test_context_too_long_carries_lengths(engine: Engine) -> None:
    with pytest.raises(_core.ContextTooLong, match="300") as caught:
        engine.generate([1] * 300)
    assert caught.value.prompt_tokens == 300
    assert caught.value.session_len == engine.config.session_len == 256
    assert caught.value.kv_capacity == engine.plan.kv_capacity
    assert isinstance(caught.value, ValueError)


def test_errors_from_load(tmp_path: Path) -> None:
    with pytest.raises(_core.CheckpointError, match=r"config\.json"):
        Engine.load(str(tmp_path))


def test_options() -> None:
    config = EngineConfig(session_len=np.int64(4096), cache_max_entry_count=100, rope_length=512)
    assert (config.session_len, config.cache_max_entry_count) == (4096, 100.0)
    assert config.rope_length == 512
    for name in ("request", "prompt", "session", "bucket"):
        config.rope_length = name
        assert config.rope_length == name
    assert "rope_length='bucket'" in repr(config)
    assert GenerationConfig(max_new_tokens=None).max_new_tokens is None
    assert GenerationConfig(seed=2**64 - 1, stop_token_ids=(1, 2)).stop_token_ids == [1, 2]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sesion_len": 1}, TypeError, "expected one of dtype, .*, got 'sesion_len'"),
        ({"session_len": "long"}, TypeError, "session_len: expected an int of tokens, got 'long'"),
        ({"session_len": 1.5}, TypeError, "got 1.5"),
        ({"num_threads": 2**40}, InvalidArgument, "num_threads: expected an int, got 1099"),
        ({"deterministic": None}, TypeError, "expected a bool, got None"),
        ({"rope_length": "Request"}, InvalidArgument, "\"request\".*got 'Request'"),
        ({"rope_length": 0}, InvalidArgument, "got 0"),
        ({"rope_length": 1.0}, TypeError, "got 1.0"),
    ],
)
def test_bad_engine_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        EngineConfig(**options)


def test_bad_generation_options() -> None:
    with pytest.raises(InvalidArgument, match=r"seed: expected an int in \[0, 2\*\*64\)"):
        GenerationConfig(seed=-1)
    with pytest.raises(TypeError, match="stop_token_ids"):
        GenerationConfig(stop_token_ids="text")
    with pytest.raises(TypeError, match="do_sample"):
        GenerationConfig(do_sample=None)


def test_rope_profile() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
    }
    profile = RopeProfile.from_config(config, length=256)
    assert profile.inv_freq.dtype == np.float64
    np.testing.assert_allclose(profile.inv_freq, 10000.0 ** -(np.arange(8) / 8), rtol=1e-12)
    assert profile == RopeProfile.from_config(config, length=256)
    scaled = RopeProfile.from_config(config, 1024, rope_scaling_factor=2.0)
    assert profile != scaled
    assert profile != "default"
    assert (scaled.type, scaled.length, scaled.native_length) == ("dynamic", 1024, 256)
    assert "type='dynamic'" in repr(scaled)
    with pytest.raises(ValueError, match="rope_scaling_factor"):
        RopeProfile.from_config(config, 1024, rope_scaling_factor=0.5)
