"""longspan eval needle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan._core import InvalidArgument
from longspan.cli import grid
from longspan.cli.options import Json, Model, command_line, engine_options, resolve


@engine_options(*grid.ENGINE, "enable_prefix_caching")
def needle(
    context: typer.Context,
    model: Model,
    lengths: grid.Lengths,
    depths: grid.Depths = None,
    num_depths: grid.NumDepths = None,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Needles at each length and depth.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Which needles.")] = 0,
    haystack: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text. Default: Python's language reference."),
    ] = None,
    needle: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A sentence of your own to hide.")
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="What asks for it.")] = None,
    answer: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What a right answer contains.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Room for the answer.")
    ] = 32,
    raw: Annotated[bool, typer.Option("--raw", help="Send no chat template.")] = False,
    rope_scaling_factor: grid.Factors = None,
    json: Json = None,
    jsonl: grid.JsonLines = None,
    plot: grid.Plot = None,
    *,
    options: dict[str, Any],
) -> None:
    """Hide a sentence in a long text and ask for it: needle in a haystack.

    At every length and depth, prompt and answer take exactly the length. The score is that of
    OpenCompass: 100 when the answer contains the keyword, else up to 20 for how close it comes to
    the needle.

    \b
    Examples:
      longspan eval needle MODEL --lengths 2k,8k,16k --rope-scaling-factor 0,4 --plot needle.png
      longspan eval needle MODEL --lengths 128k --haystack book.txt --jsonl needle.jsonl
    """
    from longspan.chat_template import ChatTemplate
    from longspan.eval import axes, text
    from longspan.eval import needle as evaluation
    from longspan.eval.record import sha256_of_text
    from longspan.tokenizer import Tokenizer

    output = grid.Output(json, jsonl, plot)
    output.check()
    options = grid.SHARED | options
    engines = grid.Engines.of(axes.lengths(lengths), rope_scaling_factor, options, fixed=True)
    percents = grid.depths(depths, num_depths) or axes.even_depths(5)
    own = _own(needle, question, answer, rounds)
    source = text.from_file(haystack) if haystack else text.python_documentation()
    model_dir = resolve(model, options)
    engines.check_memory(model_dir)
    tokenizer = Tokenizer.from_dir(model_dir)
    template = None if raw else ChatTemplate.from_dir(model_dir, tokenizer.special_tokens)
    test = evaluation.Test(
        tokenizer,
        template,
        evaluation.Haystack(source, tokenizer),
        needle=own,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    for index in range(rounds):
        test.room(engines.lengths[0], index)  # the shortest has some

    # Deepest first: a prompt then begins with what the one before it has in common with it.
    groups = engines.groups(
        lambda length: [
            {"depth_percent": percent, "round": index}
            for percent in reversed(percents)
            for index in range(rounds)
        ]
    )

    def tell(line: Mapping[str, Any], done: int) -> str:
        return (
            f"{_name(line)}, {grid.factor_name(line['rope_scaling_factor'])}: "
            f"score {line['score']:.0f}, answer {line['answer'].strip()!r}, "
            f"{grid.prefilled(line)}"
        )

    def draw(path: Path, lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
        grid.draw_heatmap(
            path,
            f"Needle in a haystack: {grid.model_name(model)}",
            lines,
            "score",
            record,
            f"{rounds} needle{'s' if rounds > 1 else ''} in each cell, "
            f"{'chat template' if template else 'raw prompt'}, haystack {Path(source.source).name}",
        )

    lines = grid.run_grid(
        "needle",
        model=model,
        model_dir=model_dir,
        command=command_line(context),
        engines=engines,
        groups=groups,
        axes={
            "lengths": engines.lengths,
            "depths": percents,
            "rounds": rounds,
            "rope_scaling_factors": [factor or 0.0 for factor in engines.factors],
        },
        settings={
            "seed": seed,
            "rule": evaluation.RULE,
            "max_new_tokens": max_new_tokens,
            "needle": own,
            "haystack": source.source,
            "haystack_sha256": sha256_of_text(source.text),
            "chat_template": template is not None,
        },
        fields=("depth_percent", "round"),
        evaluate=lambda pipe, cell, progress: test.ask(
            pipe,
            cell["context_length"],
            cell["depth_percent"] / 100,
            cell["round"],
            progress,
        ),
        tokens=lambda cell: cell["context_length"],
        name=_name,
        tell=tell,
        summarise=_summary,
        draw=draw,
        output=output,
    )
    for part in _summary(lines)["lengths"]:
        output.say(
            f"{part['context_length']:>9,} tokens, "
            f"{grid.factor_name(part['rope_scaling_factor'])}: score {part['score']:.1f}, "
            f"{part['found']} of {part['cells']} found"
        )


def _own(needle: str | None, question: str | None, answer: str | None, rounds: int) -> Any:
    from longspan.eval.needle import Needle

    given = [needle, question, answer]
    if not any(given):
        return None
    if not all(given):
        raise typer.BadParameter("expected --needle, --question and --answer together")
    if rounds > 1:
        raise InvalidArgument(
            f"rounds: expected 1 for a needle of your own, which every round would repeat, "
            f"got {rounds}"
        )
    return Needle(str(needle), str(question), str(answer))


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['context_length']:,} tokens, depth {cell['depth_percent']:.3g}%"


def _summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean score and what was found: of all, and of every setting and length."""

    def of(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "score": sum(line["score"] for line in some) / len(some),
            "found": sum(line["found"] for line in some),
            "cells": len(some),
        }

    return of(lines) | {"lengths": grid.by_length(lines, of)}
