"""Prompts, scores and records of the evaluations; no model runs here."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from longspan import EngineConfig, InvalidArgument, Response, RopeProfile, Unsupported
from longspan.eval import passkey, perplexity, plot, text
from longspan.eval.heartbeat import Heartbeat
from longspan.eval.record import Record, engine_facts, sha256_of_ids
from longspan.response import Timings
from longspan.tokenizer import Tokenizer

TinyLlama = Callable[..., Path]

CONFIG = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}


def profile(length: int) -> RopeProfile:
    return RopeProfile.from_config(
        CONFIG | {"model_type": "llama", "rope_theta": 1e4, "num_hidden_layers": 2}, length, 4.0
    )


class Score(float):
    """What get_ppl returns, of tokens that each cost their own id in hundredths of a nat."""

    def __new__(cls, ids: list[int]) -> Score:
        nll = [i / 100 for i in ids[1:]]
        self = super().__new__(cls, math.exp(sum(nll) / len(nll)))
        self.nll_sum, self.num_tokens = sum(nll), len(nll)
        self.mean_nll = self.nll_sum / self.num_tokens
        self.timings, self.rope_profile = Timings(0.0, 0.5, 0.0), profile(len(ids))
        return self


class FakePipe:
    """Finds the key in the prompt, except in rounds where it is told to answer something else."""

    def __init__(self, tokenizer: Any, answers: dict[int, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[str] = []
        self._answers = answers or {}

    def infer(self, ids: list[int], config: Any, progress: Any = None) -> Response:
        assert config.max_new_tokens == passkey.ANSWER_TOKENS
        assert not config.native().do_sample
        prompt = self.tokenizer.decode(ids)
        key = re.search(r"The pass key is (\d+)\. Remember", prompt)[1]
        answer = self._answers.get(len(self.prompts), f" {key}. The grass")
        self.prompts.append(prompt)
        return Response(
            answer, 4, len(ids), timings=Timings(0.0, 2.0, 0.1), rope_profile=profile(len(ids))
        )

    def get_ppl(self, ids: list[int], progress: Any = None) -> list[Score]:
        return [Score(ids)]


@pytest.fixture(params=["bytes", "smollm2"])
def tokenizer(request: Any, tiny_llama: TinyLlama) -> Iterator[Tokenizer]:
    if request.param == "bytes":
        yield Tokenizer.from_dir(tiny_llama())
    else:
        yield Tokenizer.from_dir(request.getfixturevalue("smollm2_dir"))


@pytest.mark.parametrize("length", [900, 4096, 20000])
@pytest.mark.parametrize("depth", [0.0, 0.4, 0.999])
def test_a_prompt_fills_its_length_to_the_last_filler(
    tokenizer: Tokenizer, length: int, depth: float
) -> None:
    prompt = passkey.build_prompt(tokenizer, length, 4711, depth)
    filler = len(tokenizer.encode(" " + passkey.FILLER))
    room = length - passkey.ANSWER_TOKENS
    assert room - filler < len(prompt.ids) <= room
    assert 0.0 <= prompt.depth <= 1.0
    assert abs(prompt.depth - depth) <= filler / (room - 3 * filler)

    words = tokenizer.decode(prompt.ids)
    assert words == tokenizer.decode(tokenizer.encode(words))
    assert words.count(passkey.information(4711)) == 1
    head, tail = words.split(passkey.information(4711))
    assert head.startswith(passkey.TASK) and tail.endswith(passkey.QUESTION)
    before, after = head.count(passkey.FILLER), tail.count(passkey.FILLER)
    assert prompt.depth == before / (before + after)
    fillers = [passkey.FILLER]
    expected = [passkey.TASK, *fillers * before, passkey.information(4711), *fillers * after]
    assert words == " ".join([*expected, passkey.QUESTION])


def test_no_length_is_passed_and_none_wasted(tiny_llama: TinyLlama) -> None:
    tokenizer = Tokenizer.from_dir(tiny_llama())
    filler = len(tokenizer.encode(" " + passkey.FILLER))
    spare = {
        length - len(passkey.build_prompt(tokenizer, length, 4711, 0.5).ids)
        for length in range(1000, 1000 + filler)
    }
    assert spare == set(range(passkey.ANSWER_TOKENS, passkey.ANSWER_TOKENS + filler))


def test_the_sentences_are_the_benchmarks() -> None:
    assert passkey.TASK == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there."
    )
    assert passkey.FILLER == (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    assert passkey.information(5) == "The pass key is 5. Remember it. 5 is the pass key."
    assert passkey.QUESTION == "What is the pass key? The pass key is"


def test_a_prompt_without_room_for_a_filler_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match=r"expected at least \d+ tokens .* got 40"):
        passkey.build_prompt(tokenizer, 40, 1, 0.5)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 4711. Remember", True),
        (" 04711", True),
        ("It is 4711", True),
        ("4712 or 4711", False),
        (" 47110", False),
        (" 471", False),
        (" 4,711", False),
        ("", False),
        ("the", False),
    ],
)
def test_an_answer_counts_by_its_first_digits(answer: str, found: bool) -> None:
    assert passkey.is_found(answer, 4711) is found


def test_rounds_differ_and_repeat_with_their_seed(tokenizer: Tokenizer) -> None:
    def keys(length: int, rounds: int, seed: int) -> list[tuple[int, str]]:
        results = passkey.run(FakePipe(tokenizer), length, rounds, seed)
        return [(r.key, r.prompt_sha256) for r in results]

    first = keys(1500, 6, 3)
    assert len(set(first)) == 6
    assert all(1 <= key < passkey.KEY_END for key, _ in first)
    assert keys(1500, 4, 3) == first[:4]
    assert keys(1500, 6, 4) != first
    assert [key for key, _ in keys(2500, 6, 3)] == [key for key, _ in first]


def test_a_round_says_what_happened(tokenizer: Tokenizer) -> None:
    pipe = FakePipe(tokenizer, {1: " yellow"})
    rounds = list(passkey.run(pipe, 2000, 3, seed=1))
    assert [r.found for r in rounds] == [True, False, True]
    for r, prompt in zip(rounds, pipe.prompts, strict=True):
        ids = tokenizer.encode(prompt)
        assert r.prompt_tokens == len(ids)
        assert r.prompt_sha256 == sha256_of_ids(ids)
        assert passkey.information(r.key) in prompt
        assert r.prefill_tokens_per_s == len(ids) / 2.0
        assert r.rope_profile == profile(len(ids))
    assert rounds[1].answer == " yellow"


def test_windows_are_consecutive_and_their_sum_is_the_perplexity() -> None:
    ids = list(range(1, 36))
    windows = list(perplexity.run(FakePipe(None), perplexity.cut(ids, 10, 3)))
    assert [(w.offset, w.length, w.num_tokens) for w in windows] == [
        (0, 10, 9),
        (10, 10, 9),
        (20, 10, 9),
    ]
    assert windows[1].nll_sum == pytest.approx(sum(range(12, 21)) / 100)
    assert windows[1].ids_sha256 == sha256_of_ids(ids[10:20])
    assert windows[1].tokens_per_s == 20.0
    scored = [i for i in range(1, 31) if i % 10 != 1]
    assert perplexity.overall(windows) == pytest.approx(math.exp(sum(scored) / 100 / 27))


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least 40 tokens for 4 windows of 10, got 39"):
        perplexity.cut(list(range(39)), 10, 4)


def test_texts(tmp_path: Path) -> None:
    source = text.python_documentation()
    assert source.source == "pydoc_data.topics"
    assert len(source.text) > 300_000 and "Assignment statements" in source.text
    path = tmp_path / "a.txt"
    path.write_bytes("häuser".encode())
    assert text.from_file(path).text == "häuser"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidArgument, match=r"a\.txt: expected a text file in UTF-8"):
        text.from_file(path)
    with pytest.raises(InvalidArgument, match=r"none\.txt"):
        text.from_file(tmp_path / "none.txt")


def test_a_heartbeat_says_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [100.0], []
    monkeypatch.setattr("longspan.eval.heartbeat.time.monotonic", lambda: clock[0])
    beat = Heartbeat(lines.append)
    state = SimpleNamespace(
        prefill_done=12345,
        prefill_total=1_000_000,
        tokens_per_s=1234.6,
        flops_per_s=98.76e12,
        eta_s=800.2,
    )
    for clock[0] in (101.0, 109.9, 110.0, 111.0, 120.0):
        beat([state])
        state.eta_s = -1.0
    assert lines == [
        "12,345 of 1,000,000 tokens, 1,235 tokens/s, 98.8 TFLOP/s",
        "12,345 of 1,000,000 tokens, 1,235 tokens/s, 98.8 TFLOP/s",
    ]
    state.eta_s, clock[0] = 800.2, 130.0
    beat([state])
    assert lines[2].endswith("TFLOP/s, 800 s left")


def fake_engine() -> Any:
    sizes = "num_parameters num_layers hidden_size num_heads num_kv_heads head_dim vocab_size"
    model = dict.fromkeys(sizes.split(), 1) | {"native_length": 512, "rope": "default"}
    model |= {"architecture": "LlamaForCausalLM", "dtype": "float32", "backend": "cpu"}
    config = EngineConfig(session_len=512, rope_scaling_factor=4.0).native()
    return SimpleNamespace(model=SimpleNamespace(**model), config=config)


def test_a_record_grows_on_disk_and_is_complete_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    def read() -> dict[str, Any]:
        return json.loads(path.read_text())

    pipe = FakePipe(SimpleNamespace(encode=lambda s: s.split(), decode=" ".join))
    pipe.infer = None  # not reached
    with Record(
        "perplexity", str(path), model="m", command=["longspan", "eval"], settings={"seed": 7}
    ) as record:
        assert read()["complete"] is False and read()["results"] == []
        record.describe(engine_facts(fake_engine()))
        for window in perplexity.run(pipe, perplexity.cut(list(range(20)), 10, 2)):
            record.add(window)
            assert read()["results"][-1]["offset"] == window.offset
            assert read()["complete"] is False
        record.finish({"perplexity": 2.0})
    content = read()
    assert content["complete"] is True
    assert content["kind"] == "perplexity"
    assert content["command"] == ["longspan", "eval"]
    assert content["settings"] == {"seed": 7}
    assert content["summary"] == {"perplexity": 2.0}
    assert content["seconds"] > 0
    assert content["model"]["path"] == "m" and content["model"]["native_length"] == 512
    assert content["engine"]["rope_scaling_factor"] == 4.0
    assert content["engine"]["session_len"] == 512
    assert {"longspan", "python", "numpy", "platform", "cpu"} <= set(content["environment"])
    rope = content["results"][0]["rope_profile"]
    assert set(rope) == {
        "type",
        "factor",
        "base",
        "length",
        "native_length",
        "attention_factor",
        "logn_length",
    }
    assert len(content["results"]) == 2
    assert list(tmp_path.iterdir()) == [path]  # no partial file stays behind


def test_an_interruption_keeps_the_results(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt), Record("passkey", str(path), model="m") as record:
        record.add({"round": 0})
        raise KeyboardInterrupt
    content = json.loads(path.read_text())
    assert content["complete"] is False and content["results"] == [{"round": 0}]


def test_a_record_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"out\.json: expected to write it"):
        Record("passkey", str(tmp_path / "none" / "out.json"), model="m")
    with pytest.raises(InvalidArgument, match="expected a file, got a directory"):
        Record("passkey", str(tmp_path), model="m")


def test_a_record_goes_to_standard_output_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Record("passkey", "-", model="m") as record:
        record.add({"round": 0})
        assert capsys.readouterr().out == ""
        record.finish({})
    assert json.loads(capsys.readouterr().out)["complete"] is True


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plain = [plot.Point(2048, 1.0, 14.0), plot.Point(16384, 0.0, 900.0)]
    scaled = [plot.Point(2048, 1.0, 14.0), plot.Point(16384, 1.0, None)]
    for series in ({"plain": plain, "scaled": scaled}, {"plain": plain[:1], "scaled": []}):
        path = tmp_path / f"{len(series['scaled'])}.png"
        plot.draw(path, "Model", 8192, series, "a note")
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert path.stat().st_size > 20_000


def test_without_matplotlib_the_plot_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Unsupported, match=r"pip install 'longspan\[demo\]'"):
        plot.draw(tmp_path / "a.png", "Model", 8192, {}, "")
