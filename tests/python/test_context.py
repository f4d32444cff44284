"""Contexts that are saved and loaded: the file holds what transformers computes, and what goes on
from it is what goes on from the cache."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny_llama
from longspan import (
    CheckpointError,
    ContextTooLong,
    EngineConfig,
    GenerationConfig,
    InvalidArgument,
    Pipeline,
    pipeline,
)
from longspan.cli.app import app
from typer.testing import CliRunner

TOKENS = 150


def load(model: Path, **options: Any) -> Pipeline:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "max_batch_size": 2,
        "enable_prefix_caching": True,
    }
    return pipeline(model, EngineConfig(**(defaults | options)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(path)
    return path


def ids_of(count: int) -> list[int]:
    return np.random.default_rng(1).integers(0, 256, count).tolist()


def test_a_file_holds_the_keys_and_values_of_transformers(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    safetensors = pytest.importorskip("safetensors.numpy")
    with load(model) as pipe:
        context = pipe.save_context(ids_of(TOKENS), tmp_path / "saved")
    saved = safetensors.load_file(tmp_path / "saved")
    np.testing.assert_array_equal(saved["token_ids"], ids_of(TOKENS))
    np.testing.assert_array_equal(saved["rope.inv_freq"], context.rope_profile.inv_freq)
    assert saved["keys"].shape == (2, 2, TOKENS, 16)  # [layer][kv_head][token][head_dim]
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        cache = reference(torch.tensor([ids_of(TOKENS)])).past_key_values
    for layer in range(2):
        keys, values = cache.layers[layer].keys[0], cache.layers[layer].values[0]
        np.testing.assert_allclose(saved["keys"][layer], keys.numpy(), atol=2e-5)
        np.testing.assert_allclose(saved["values"][layer], values.numpy(), atol=2e-5)


def test_a_prompt_goes_on_from_a_saved_document(model: Path, tmp_path: Path) -> None:
    document = "A long document, by the letter: " * 4
    greedy = GenerationConfig(max_new_tokens=12, ignore_eos=True)
    path = tmp_path / "document"
    with load(model) as pipe:
        seen: list[tuple[int, int]] = []
        context = pipe.save_context(
            document, path, progress=lambda p: seen.append((p.computed, p.moved))
        )
        expected = pipe(document + "and a question?", greedy)
        # The template's end of the turn is not what follows in the longer prompt.
        assert len(document) < expected.cached_tokens < len(context.token_ids)
        assert seen[-1] == (len(context.token_ids), len(context.token_ids))
    with load(model) as pipe:
        loaded = pipe.load_context(path)
        np.testing.assert_array_equal(loaded.token_ids, context.token_ids)
        assert loaded.rope_profile == context.rope_profile
        response = pipe(document + "and a question?", greedy)
        assert (response.token_ids, response.cached_tokens) == (
            expected.token_ids,
            expected.cached_tokens,
        )
        ids = [*loaded.token_ids, *pipe.tokenizer.encode("more", add_special_tokens=False)]
        assert pipe(ids, greedy).cached_tokens == len(context.token_ids)


def test_the_command_line_keeps_a_prompt_and_goes_on(model: Path, tmp_path: Path) -> None:
    def call(*args: Any) -> Any:
        few = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 5, "--json", "-"]
        arguments = ["generate", model, *args, *few]
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="longspan")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["results"][0]

    saved = tmp_path / "saved"
    call("a document", "--raw", "--save-context", saved)
    saving = ("--save-context", saved, "--checkpoint-tokens", 10)
    assert call("a document of some length", "--raw", *saving)["cached_tokens"] == 24
    more = call(", and more", "--context", saved)
    whole = call("a document of some length, and more", "--raw")
    assert more["text"] == whole["text"]
    assert (more["cached_tokens"], whole["cached_tokens"]) == (25, 0)


def test_a_killed_process_loses_no_more_than_asked(model: Path, tmp_path: Path) -> None:
    script = """
import os, signal, sys
from test_context import TOKENS, ids_of, load

def progress(state):
    if state.computed > 128:
        os.kill(os.getpid(), signal.SIGKILL)

load(sys.argv[1]).save_context(ids_of(TOKENS), sys.argv[2], checkpoint_tokens=64, progress=progress)
"""
    command = [sys.executable, "-c", script, str(model), str(tmp_path / "saved")]
    killed = subprocess.run(command, cwd=Path(__file__).parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    with load(model) as pipe:
        assert len(pipe.load_context(tmp_path / "saved").token_ids) == 128
        pipe.save_context(ids_of(TOKENS), tmp_path / "saved", checkpoint_tokens=64)
        assert pipe.engine.metrics().prefilled_tokens == TOKENS - 128
    with load(model) as pipe:
        pipe.save_context(ids_of(TOKENS), tmp_path / "whole")
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_interrupt_leaves_no_file(model: Path, tmp_path: Path) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with load(model) as pipe:
        with pytest.raises(KeyboardInterrupt):
            pipe.save_context(ids_of(TOKENS), tmp_path / "saved", progress=interrupt)
        assert not list(tmp_path.iterdir())
        pipe.save_context(ids_of(TOKENS), tmp_path / "saved")
    with load(model) as pipe:
        with pytest.raises(KeyboardInterrupt):
            pipe.load_context(tmp_path / "saved", progress=interrupt)
        assert pipe.engine.metrics().cached_blocks == 0
        assert pipe.engine.metrics().free_blocks == pipe.engine.metrics().total_blocks


def test_errors_are_typed(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    with load(model) as pipe:
        pipe.save_context(ids_of(TOKENS), path)
        with pytest.raises(ContextTooLong):
            pipe.save_context(ids_of(300), path)
        with pytest.raises(InvalidArgument, match="rope_length: expected"):
            pipe.save_context(ids_of(9), path, rope_length="longest")
        with pytest.raises(CheckpointError, match="none: expected a readable file"):
            pipe.load_context(tmp_path / "none")
    with load(model, enable_prefix_caching=False) as pipe:
        for call in (lambda: pipe.save_context(ids_of(9), path), lambda: pipe.load_context(path)):
            with pytest.raises(InvalidArgument, match="enable_prefix_caching: expected true"):
                call()
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_llama(other, seed=1)
    with load(other) as pipe, pytest.raises(CheckpointError, match="saved: model: expected"):
        pipe.load_context(path)
    with load(model, session_len=TOKENS - 1) as pipe, pytest.raises(ContextTooLong):
        pipe.load_context(path)
