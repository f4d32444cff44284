"""The forms of perplexity, each against numpy on the logits of the same engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import longspan
import numpy as np
import numpy.typing as npt
import pytest
from longspan import InvalidArgument
from longspan.cli.app import app
from longspan.eval import curves, heatmap, perplexity
from typer.testing import CliRunner

TinyLlama = Callable[..., Path]

WORDS = "".join(f"It was day {i}, bright and cold, and clocks struck {i % 13}. " for i in range(40))


def call(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="longspan")


def nll(pipe: longspan.Pipeline, ids: list[int]) -> npt.NDArray[np.float64]:
    """Entry i is of ids[i + 1]."""
    logits = pipe.get_logits(ids, range(len(ids) - 1)).astype(np.float64)
    top = logits.max(1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(1)) + top
    return log_sum - logits[np.arange(len(ids) - 1), ids[1:]]


def measure(tiny_llama: TinyLlama, tmp_path: Path, *options: Any) -> tuple[Path, dict[str, Any]]:
    model, out, book = tiny_llama(), tmp_path / "out.json", tmp_path / "book.txt"
    book.write_text(WORDS)
    result = call("eval", "ppl", model, "--file", book, "--json", out, *options)
    assert result.exit_code == 0, result.output
    return model, json.loads(out.read_text())


@pytest.mark.parametrize(
    ("length", "stride"), [(300, 100), (300, 170), (128, 128), (500, 1000 // 3)]
)
def test_sliding_is_the_strided_perplexity(
    tiny_llama: TinyLlama, tmp_path: Path, length: int, stride: int
) -> None:
    options = ("--length", length, "--windows", 3, "--form", "sliding", "--stride", stride)
    model, record = measure(tiny_llama, tmp_path, *options, "--rope-scaling-factor", 4)
    total = 3 * length
    config = longspan.EngineConfig(
        session_len=length, rope_length=length, rope_scaling_factor=4.0, max_batch_size=1
    )
    sums, count, previous = 0.0, 0, 0
    with longspan.pipeline(model, config) as pipe:
        ids = pipe.tokenizer.encode(WORDS)[:total]
        for begin in range(0, total, stride):
            end = min(begin + length, total)
            # Labels of what the window before had are masked; the shift drops the first one.
            labels = np.arange(begin, end) >= previous
            each = nll(pipe, ids[begin:end])[labels[1:]]
            sums, count, previous = sums + each.sum(), count + len(each), end
            if end == total:
                break
    summary = record["summary"]
    assert summary["num_tokens"] == count
    if stride < length:
        assert count == total - 1
    assert summary["mean_nll"] == pytest.approx(sums / count, rel=1e-5)
    assert summary["perplexity"] == pytest.approx(np.exp(sums / count), rel=1e-5)
    assert {r["rope_profile"]["length"] for r in record["results"]} == {length}


def test_by_position_adds_up_where_the_tokens_stand(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    options = ("--length", 600, "--windows", 2, "--form", "by-position", "--plot", plot)
    model, record = measure(tiny_llama, tmp_path, *options, "--rope-scaling-factor", "0,4")
    assert plot.stat().st_size > 20_000
    assert len(record["summary"]["lengths"]) == 2
    for part in record["summary"]["lengths"]:
        sums, counts = np.zeros(64), np.zeros(64, int)
        config = longspan.EngineConfig(
            session_len=600, rope_scaling_factor=part["rope_scaling_factor"], max_batch_size=1
        )
        with longspan.pipeline(model, config) as pipe:
            ids = pipe.tokenizer.encode(WORDS)
            for window in (ids[:600], ids[600:1200]):
                for position, value in enumerate(nll(pipe, window), start=1):
                    bucket = next(b for b in range(64) if position < (b + 1) * 600 / 64)
                    sums[bucket] += value
                    counts[bucket] += 1
        assert part["bucket_tokens"] == counts.tolist()
        np.testing.assert_allclose(part["bucket_mean_nll"], sums / counts, rtol=1e-5)
        assert part["mean_nll"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)


def test_every_length_reads_the_same_tokens(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    _, record = measure(tiny_llama, tmp_path, "--lengths", "150,300,600", "--plot", plot)
    assert plot.stat().st_size > 20_000
    windows = [(r["context_length"], r["offset"], r["num_tokens"]) for r in record["results"]]
    assert windows == [
        *[(150, offset, 149) for offset in (0, 150, 300, 450)],
        *[(300, offset, 299) for offset in (0, 300)],
        (600, 0, 599),
    ]
    for r in record["results"]:
        assert r["rope_profile"]["length"] == r["context_length"] == r["length"]


def test_strided_spans_by_hand() -> None:
    def spans(*args: int) -> list[tuple[int, int, int]]:
        return [(s.offset, s.length, s.num_tokens) for s in perplexity.sliding(*args)]

    assert spans(10, 4, 2) == [(0, 4, 3), (2, 4, 2), (4, 4, 2), (6, 4, 2)]
    assert spans(11, 4, 3) == [(0, 4, 3), (3, 4, 3), (6, 4, 3), (9, 2, 1)]
    assert spans(9, 4, 4) == [(0, 4, 3), (4, 4, 3)]  # the ninth would be a window's first
    assert spans(4, 4, 1) == [(0, 4, 3)]
    for stride in (0, 5):
        with pytest.raises(InvalidArgument, match=r"stride: expected an integer in \[1, 4\]"):
            perplexity.sliding(10, 4, stride)


def test_pictures_of_all_shapes_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name, note = "Model " * 12, "a note of many words " * 12
    many = {(1000 * i, d): (i * d) % 101 for i in range(1, 20) for d in (0.0, 33.3, 100.0)}
    heatmap.draw(tmp_path / "1.png", name, 8192, {"a": {(2048, 0.0): 40.0}}, "score", note)
    heatmap.draw(tmp_path / "2.png", name, 8192, {"a": many, "b": {}}, "score", note)
    lines = {f"x{i}": [(2048, 10.0 + i), (16384, 10.0**i)] for i in range(8)}
    curves.draw_lengths(tmp_path / "3.png", name, 8192, lines, note)
    curves.draw_lengths(tmp_path / "4.png", name, 8192, {"a": [(512, 3.0)]}, note)
    parts = {n: {"a": [12.0, float("nan"), 13.0, 900.0]} for n in (1024, 2048, 4096, 8192, 16384)}
    curves.draw_positions(tmp_path / "5.png", name, 8192, parts, note)
    for i in range(1, 6):
        picture = (tmp_path / f"{i}.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n") and len(picture) > 15_000
