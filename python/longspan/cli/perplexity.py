"""longspan eval ppl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan._core import InvalidArgument
from longspan.cli import grid
from longspan.cli.options import Json, Model, command_line, engine_options, resolve


@engine_options(*grid.ENGINE)
def ppl(
    context: typer.Context,
    model: Model,
    lengths: grid.Lengths,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text. Default: Python's language reference."),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Consecutive windows of the longest length to read."),
    ] = 1,
    form: Annotated[
        str, typer.Option(metavar="FORM", help="whole, sliding or by-position.")
    ] = "whole",
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="From one sliding window to the next. Default: half a length.",
        ),
    ] = None,
    rope_scaling_factor: grid.Factors = None,
    json: Json = None,
    jsonl: grid.JsonLines = None,
    plot: grid.Plot = None,
    *,
    options: dict[str, Any],
) -> None:
    """The perplexity of a text, read in windows of a length.

    Every token of a window but the first is scored given all before it in the window. --form
    sliding begins a window every --stride tokens and scores what the one before did not have;
    by-position tells the parts of the context apart. Every length reads the same tokens.

    \b
    Examples:
      longspan eval ppl MODEL --length 16k --rope-scaling-factor 4 --file book.txt --windows 4
      longspan eval ppl MODEL --length 16k --form by-position --rope-scaling-factor 0,4 --plot p.png
    """
    from longspan.eval import axes, perplexity, text
    from longspan.eval.record import sha256_of_text
    from longspan.tokenizer import Tokenizer

    output = grid.Output(json, jsonl, plot)
    output.check()
    if form not in perplexity.FORMS:
        raise InvalidArgument(f"form: expected one of {', '.join(perplexity.FORMS)}, got {form!r}")
    if stride is not None and form != "sliding":
        raise InvalidArgument(f"stride: expected with --form sliding only, got it with {form}")
    counts = axes.lengths(lengths)
    # Windows that are all whole have their own length for a RoPE length.
    fixed = form == "sliding" or len(counts) > 1
    engines = grid.Engines.of(counts, rope_scaling_factor, options, fixed)
    source = text.from_file(file) if file else text.python_documentation()
    model_dir = resolve(model, options)
    ids = Tokenizer.from_dir(model_dir).encode(source.text)
    total = counts[-1] * windows
    perplexity.cut(ids, counts[-1], windows)
    engines.check_memory(model_dir)

    def spans(length: int) -> list[perplexity.Span]:
        if form == "sliding":
            return perplexity.sliding(total, length, stride or max(length // 2, 1))
        return perplexity.whole(total, length)

    planned = {length: spans(length) for length in counts}
    groups = engines.groups(
        lambda length: [
            {"offset": span.offset, "num_tokens": span.num_tokens} for span in planned[length]
        ]
    )
    tokens = {(length, span.offset): span.length for length in counts for span in planned[length]}
    buckets = perplexity.BUCKETS if form == "by-position" else 0

    def evaluate(pipe: Any, cell: Mapping[str, Any], progress: Any) -> perplexity.Window:
        begin = cell["offset"]
        window = ids[begin : begin + tokens[cell["context_length"], begin]]
        return perplexity.score(pipe, window, cell["num_tokens"], begin, buckets, progress)

    def tell(line: Mapping[str, Any], done: int) -> str:
        place = f"window {done} of {len(planned[counts[0]])}"
        if len(groups) > 1:
            place = f"{_name(line)}, {grid.factor_name(line['rope_scaling_factor'])}"
        return (
            f"{place}: perplexity {line['perplexity']:.3f}, {line['length']:,} tokens in "
            f"{line['seconds']:.1f} s ({line['tokens_per_s']:,.0f} tokens/s)"
        )

    def draw(path: Path, lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
        what = f"{total:,} tokens of {Path(source.source).name}, {form}"
        _draw(path, grid.model_name(model), lines, record, form, what)

    lines = grid.run_grid(
        "perplexity",
        model=model,
        model_dir=model_dir,
        command=command_line(context),
        engines=engines,
        groups=groups,
        axes=engines.axes() | {"windows": windows},
        settings={
            "form": form,
            "stride": stride,
            "text": source.source,
            "text_sha256": sha256_of_text(source.text),
        },
        fields=("offset", "num_tokens"),
        evaluate=evaluate,
        tokens=lambda cell: tokens[cell["context_length"], cell["offset"]],
        name=_name,
        tell=tell,
        summarise=_summary,
        draw=draw,
        output=output,
    )
    for part in _summary(lines)["lengths"]:
        factor = f", {grid.factor_name(part['rope_scaling_factor'])}" if len(groups) > 1 else ""
        output.say(
            f"perplexity {part['perplexity']:.3f} in contexts of {part['context_length']:,} "
            f"tokens of {source.source}{factor}"
        )


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['context_length']:,} tokens from {cell['offset']:,}"


def _summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Perplexity and tokens scored: of all, and of every setting and length; by-position also of
    every part of the context, null where nothing was scored."""
    from longspan.eval.perplexity import perplexity

    def of(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        count = sum(line["num_tokens"] for line in some)
        mean = sum(line["nll_sum"] for line in some) / count
        return {"perplexity": perplexity(mean), "mean_nll": mean, "num_tokens": count}

    def parts(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not some[0]["bucket_nll"]:
            return {}
        sums = [sum(part) for part in zip(*(line["bucket_nll"] for line in some), strict=True)]
        counts = [sum(part) for part in zip(*(line["bucket_tokens"] for line in some), strict=True)]
        means = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        return {"bucket_mean_nll": means, "bucket_tokens": counts}

    return of(lines) | {"lengths": grid.by_length(lines, lambda some: of(some) | parts(some))}


def _draw(
    path: Path,
    model: str,
    lines: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    form: str,
    what: str,
) -> None:
    from longspan.eval import curves
    from longspan.eval.perplexity import perplexity

    parts = _summary(lines)["lengths"]
    native, small = record["model"]["native_length"], grid.note(record, what)
    if form == "by-position":
        panels: dict[int, dict[str, list[float]]] = {}
        for part in parts:
            panels.setdefault(part["context_length"], {})[
                grid.factor_name(part["rope_scaling_factor"])
            ] = [
                float("nan") if mean is None else perplexity(mean)
                for mean in part["bucket_mean_nll"]
            ]
        curves.draw_positions(path, f"Perplexity by position: {model}", native, panels, small)
        return
    series: dict[str, list[tuple[int, float]]] = {}
    for part in parts:
        series.setdefault(grid.factor_name(part["rope_scaling_factor"]), []).append(
            (part["context_length"], part["perplexity"])
        )
    curves.draw_lengths(path, f"Perplexity by length: {model}", native, series, small)
