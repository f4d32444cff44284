"""The commands, on a tiny random model; Ctrl-C on SmolLM2."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import longspan
import pytest
from longspan.cli.app import app
from longspan.cli.chat import gauge
from longspan.cli.terminal import show
from typer.testing import CliRunner

TinyLlama = Callable[..., Path]


def call(*args: Any, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin, prog_name="longspan")


def test_version_and_help() -> None:
    assert call("--version").output == f"longspan {longspan.__version__}\n"
    for command in (
        [],
        ["demo"],
        ["generate"],
        ["chat"],
        ["plan"],
        ["doctor"],
        ["eval"],
        ["eval", "passkey"],
        ["eval", "needle"],
        ["eval", "ppl"],
    ):
        result = call(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output
        assert "…" not in result.output  # whole names, on 80 columns


def test_the_command_starts_fast() -> None:
    code = "import sys, longspan.cli; print(sorted(m.split('.')[0] for m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for heavy in ("matplotlib", "torch", "transformers", "gguf"):
        assert f"'{heavy}'" not in loaded
    assert "'longspan'" in loaded


def test_passkey_record_repeats_itself(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model, out = tiny_llama(), tmp_path / "out.json"
    options = ["--length", 700, "--rounds", 2, "--seed", 5, "--rope-scaling-factor", 4]
    result = call("eval", "passkey", model, *options, "--json", out)
    assert result.exit_code == 0, result.output
    assert "of 2 passkeys found at 700 tokens" in result.stdout
    record = json.loads(out.read_text())
    assert record["complete"] is True
    assert record["options"] == {
        "rope_scaling_factor": 4.0,
        "session_len": 700,
        "max_batch_size": 1,
    }
    assert record["settings"]["seed"] == 5
    for entry in record["results"]:
        assert entry["rope_profile"]["type"] == "dynamic"
        assert entry["prompt_tokens"] <= entry["rope_profile"]["length"] <= 700
        assert entry["prefill_tokens_per_s"] > 0

    again = call(*record["command"][1:-1], "-")
    repeated = json.loads(again.stdout)
    for key in ("key", "depth", "answer", "found", "prompt_sha256", "rope_profile"):
        assert [r[key] for r in repeated["results"]] == [r[key] for r in record["results"]]


def test_ppl_agrees_with_the_pipeline(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model, out, book = tiny_llama(), tmp_path / "out.json", tmp_path / "book.txt"
    book.write_text("It was a bright cold day in April. " * 20)
    options = ["--file", book, "--length", 200, "--windows", 3, "--json", out]
    result = call("eval", "ppl", model, *options)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    with longspan.pipeline(model) as pipe:
        ids = pipe.tokenizer.encode(book.read_text())
        expected = pipe.get_ppl([ids[i : i + 200] for i in (0, 200, 400)])
    got = [window["mean_nll"] for window in record["results"]]
    assert got == pytest.approx([e.mean_nll for e in expected], rel=1e-6)
    assert record["summary"]["num_tokens"] == 3 * 199


def test_generate_takes_a_prompt_from_everywhere(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model, file = tiny_llama(), tmp_path / "prompt.txt"
    file.write_text("Hello there")
    few = ["--raw", "--max-new-tokens", 8, "--seed", 3, "--temperature", 1]
    outputs = [
        call("generate", model, "Hello there", *few),
        call("generate", model, "-", *few, stdin="Hello there"),
        call("generate", model, "--file", file, *few),
    ]
    assert {o.exit_code for o in outputs} == {0}
    assert len({o.stdout for o in outputs}) == 1
    record = json.loads(call("generate", model, "Hello there", *few, "--json", "-").stdout)
    assert record["results"][0]["text"] + "\n" == outputs[0].stdout
    assert record["results"][0]["seed"] == 3
    templated = json.loads(call("generate", model, "Hello there", "--json", "-").stdout)
    assert templated["results"][0]["input_token_len"] == len("Hello there") + 3


@pytest.mark.parametrize("arguments", [[], ["Hello", "--file", "x"]])
def test_generate_wants_one_prompt(tiny_llama: TinyLlama, arguments: list[str]) -> None:
    result = call("generate", tiny_llama(), *arguments)
    assert result.exit_code == 2
    assert "only one of them" in result.stderr


def test_plan(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = tiny_llama()
    result = call("plan", model, "--session-len", 1000)
    assert result.exit_code == 0, result.output
    assert "A session of 1,000 tokens fits" in result.stdout
    plan = json.loads(call("plan", model, "--session-len", 1000, "--json", "-").stdout)
    assert plan["session_len"] == 1000 and plan["fits"] is True
    parts = ("weight_bytes", "kv_bytes", "activation_bytes", "workspace_bytes")
    assert plan["total_bytes"] == sum(plan[part] for part in parts)

    result = call("plan", model, "--session-len", 10**12)
    assert result.exit_code == 1
    assert "does not fit" in result.stdout


@pytest.mark.parametrize(
    ("word", "tokens"), [("700", 700), ("2k", 2048), ("1M", 1048576), ("2x", None), ("k", None)]
)
def test_counts_of_tokens(tiny_llama: TinyLlama, word: str, tokens: int | None) -> None:
    result = call("plan", tiny_llama(), "--session-len", word, "--json", "-")
    if tokens is None:
        assert result.exit_code == 2
        assert "expected a number of tokens, such as 65536 or 64k, got " + word in result.stderr
    else:
        assert json.loads(result.stdout)["session_len"] == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "/no/such/model"], "error: /no/such/model: expected a model directory"),
        (["plan", "/"], "error: /: expected a model directory, got one without config.json"),
        (["demo", "--max-length", 255], "error: max_length: expected at least 256 tokens"),
        (["generate", "{}", "--file", "/no/file"], "error: /no/file: expected a text file"),
        (["eval", "passkey", "{}", "--length", 60], "error: length: expected at least"),
        (["eval", "ppl", "{}", "--length", 10**7], "error: text: expected at least 10000000"),
        (
            ["generate", "{}", "Hi", "--rope-scaling-factor", 0.5],
            "error: rope_scaling_factor: expected 0 or a number >= 1, got 0.5",
        ),
        (["generate", "{}", "Hi", "--rope-length", "long"], "error: rope_length: expected"),
        (["generate", "{}", "Hi", "--dtype", "int3"], "error: dtype"),
        (["generate", "{}", "Hi", "--top-p", 2], "error: top_p: expected"),
        (["generate", "{}", "Hi", "--json", "/no/dir/x"], "error: /no/dir/x: expected"),
        (["generate", "{}", "x" * 300, "--raw"], "error: "),
    ],
)
def test_errors_are_one_line(tiny_llama: TinyLlama, arguments: list[Any], message: str) -> None:
    model = tiny_llama()
    result = call(*[model if a == "{}" else a for a in arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_bad_option_is_told_before_any_work(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--length", 700, "--rope-scaling-factor", 0.5, "--json", out]
    assert call("eval", "passkey", tiny_llama(), *options).exit_code == 1
    assert not out.exists()


def test_wrong_usage() -> None:
    assert call("eval", "passkey").exit_code == 2
    assert call("nonsense").exit_code == 2


def test_generate_streams(tiny_llama: TinyLlama) -> None:
    """The first text is out long before the last."""
    model = tiny_llama(max_position_embeddings=200_000)
    command = [sys.executable, "-m", "longspan.cli", "generate", str(model), "Hi", "--raw"]
    process = subprocess.Popen([*command, "--max-new-tokens", "150000"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.read(1)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_an_answer_has_a_token(tiny_llama: TinyLlama) -> None:
    result = call("chat", tiny_llama(), "--max-new-tokens", 0)
    assert result.exit_code == 2
    assert "--max-new-tokens: expected at least 1, got 0" in result.output


def test_a_file_for_stderr_shows_progress_in_lines(
    tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.progress.HEARTBEAT", 0.0)
    model = tiny_llama(max_position_embeddings=40000)
    result = call("generate", model, "Hi" * 10000, "--raw", "--max-new-tokens", 1)
    assert re.search(r"^Generating: [0-9,]+ of 20,\d+ tokens, ", result.stderr, re.M), result.stderr
    assert not logging.getLogger("longspan.progress").handlers


@contextlib.contextmanager
def on_a_terminal(*args: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """longspan with a terminal for all of its files, and our end of that."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan.cli", *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_generate_says_what_it_ran_on_and_why_it_ended(tiny_llama: TinyLlama) -> None:
    limits = ["--dtype", "float32", "--session-len", 40, "--max-new-tokens", 60]
    with on_a_terminal("generate", tiny_llama(), "Hi", "--raw", *limits) as (_, ours):
        seen = ""
        with contextlib.suppress(OSError):  # the end of a terminal whose other end is gone
            while part := os.read(ours, 65536):
                seen += part.decode("utf-8", "replace")
    assert "threads), float32; RoPE: default, theta 10000, unscaled" in seen
    assert "2 tokens in, 0 of them cached" in seen and "38 out at" in seen
    assert "The context is full" in seen


def test_chat_takes_lines(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("The key is 7.")
    lines = [
        "Hello",
        "/file /no/such/file",
        f"/file {note}",
        "What is the key?",
        "x" * 300,
        "/nonsense",
        "/system Be brief.",
        "Hello",
        "/quit",
        "never read",
    ]
    model = tiny_llama(max_position_embeddings=256)
    result = call("chat", model, "--max-new-tokens", 8, stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert "/no/such/file: expected a text file" in result.stderr
    assert "note.txt: 13 tokens, in front of your next prompt" in result.stderr
    assert "300" not in result.stdout
    assert "/nonsense: expected one of" in result.stderr
    assert "error: expected" in result.stderr  # the prompt that does not fit
    with longspan.pipeline(model) as pipe:
        config = longspan.GenerationConfig(max_new_tokens=8)
        session = pipe.session(gen_config=config)
        answers = [session("Hello"), session("note.txt:\n\nThe key is 7.\n\nWhat is the key?")]
        answers.append(pipe.session("Be brief.", config)("Hello"))
    assert result.stdout == "".join(answer.text + "\n" for answer in answers)


def test_chat_on_a_terminal(tiny_llama: TinyLlama) -> None:
    """A gauge and statistics after each turn; Ctrl-C stops an answer, Ctrl-D ends it all."""
    model = tiny_llama(max_position_embeddings=1000)
    options = ["--session-len", "150000", "--rope-scaling-factor", "150"]
    with on_a_terminal("chat", model, *options, "--max-new-tokens", 140_000) as (process, ours):
        seen = ""

        def read_until(text: str) -> None:
            nonlocal seen
            deadline = time.monotonic() + 120
            while text not in seen:
                assert time.monotonic() < deadline, seen[-2000:]
                if select.select([ours], [], [], 1.0)[0]:
                    seen += os.read(ours, 65536).decode("utf-8", "replace")
            seen = seen.partition(text)[2]

        read_until("> ")
        os.write(ours, b"Tell me everything\n")
        read_until("Tell me everything\r\n")
        time.sleep(0.5)  # it is answering
        process.send_signal(signal.SIGINT)
        read_until("stopped; this turn is forgotten")
        read_until("> ")
        os.write(ours, b"/help\n")
        read_until("Ctrl-C stops an answer")
        read_until("> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0


def test_the_gauge_marks_the_trained_length() -> None:
    assert gauge(0, 100, 100) == "[" + "░" * 40 + "] 0 of 100 tokens"
    line = gauge(15_000, 20_000, 5_000)
    assert line == (
        "["
        + "█" * 10
        + "|"
        + "█" * 20
        + "░" * 10
        + "] 15,000 of 20,000 tokens, trained to 5,000 (|)"
    )
    assert gauge(200, 100, 100).startswith("[" + "█" * 40 + "]")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_no_orders(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    text = "red \x1b[31m\x9b2J bell\x07\tcafé\n"
    show(text)
    shown = "red \ufffd[31m\ufffd2J bell\ufffd\tcafé\n"
    assert out.getvalue() == (shown if terminal else text)


def interrupt(command: list[str], ready: Callable[[], bool]) -> tuple[int, str, float]:
    """Runs longspan, sends SIGINT once ready; its exit code, stderr and seconds until it ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan.cli", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=30)[1]
        return process.returncode, stderr, time.monotonic() - sent
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_keeps_what_was_generated(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model, out = tiny_llama(max_position_embeddings=200_000), tmp_path / "out.json"

    def generating() -> bool:
        ready = out.exists() and bool(json.loads(out.read_text())["engine"])
        time.sleep(0.5 if ready else 0)
        return ready

    options = ["--raw", "--max-new-tokens", "150k", "--json", str(out)]
    code, stderr, _ = interrupt(["generate", str(model), "Hi", *options], generating)
    assert (code, stderr) == (130, "interrupted\n")
    record = json.loads(out.read_text())
    assert record["complete"] is False
    (result,) = record["results"]
    assert result["finish_reason"] is None
    assert 1 <= len(result["token_ids"]) == result["generate_token_len"] < 150 * 1024


def test_ctrl_c_in_a_long_prefill_keeps_the_record(smollm2_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def loaded() -> bool:
        return out.exists() and bool(json.loads(out.read_text())["engine"])

    started = time.monotonic()

    def prefilling() -> bool:
        nonlocal started
        if not loaded():
            started = time.monotonic()
        return time.monotonic() - started > 1.5

    command = ["eval", "passkey", str(smollm2_dir), "--length", "100000", "--json", str(out)]
    code, stderr, seconds = interrupt(command, prefilling)
    assert code == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert seconds < 5
    record = json.loads(out.read_text())
    assert record["complete"] is False
    assert record["model"]["architecture"] == "LlamaForCausalLM"
