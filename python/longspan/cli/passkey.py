"""longspan eval passkey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan._core import InvalidArgument
from longspan.cli import grid
from longspan.cli.options import Json, Model, command_line, engine_options, resolve


@engine_options(*grid.ENGINE, "enable_prefix_caching")
def passkey(
    context: typer.Context,
    model: Model,
    lengths: grid.Lengths,
    depths: grid.Depths = None,
    num_depths: grid.NumDepths = None,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts, each with its own key.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Which keys and depths.")] = 0,
    rope_scaling_factor: grid.Factors = None,
    json: Json = None,
    jsonl: grid.JsonLines = None,
    plot: grid.Plot = None,
    *,
    options: dict[str, Any],
) -> None:
    """Hide a number in filler text and ask for it at the end.

    A prompt and its answer take the length. The prompt is sent raw, without a chat template, and
    continued greedily; the key, from 1 to 49999, is found when the first run of digits of the
    answer is the key. At one length every round has a depth of its own; with --depths, or at
    several lengths (then 0,25,50,75,100), every depth has all rounds.

    \b
    Examples:
      longspan eval passkey MODEL --length 16k --rope-scaling-factor 4 --rounds 10 --json out.json
      longspan eval passkey MODEL --lengths 4k,8k,16k --rounds 2 --plot passkey.png
    """
    from longspan.eval import axes
    from longspan.eval import passkey as evaluation
    from longspan.tokenizer import Tokenizer

    output = grid.Output(json, jsonl, plot)
    output.check()
    counts = axes.lengths(lengths)
    percents = grid.depths(depths, num_depths)
    if percents is None and len(counts) > 1:
        percents = axes.even_depths(5)
    if plot and percents is None:
        raise InvalidArgument("plot: expected --depths or several --lengths to draw, got neither")
    if percents is not None:
        options = grid.SHARED | options
    engines = grid.Engines.of(counts, rope_scaling_factor, options, fixed=percents is not None)
    model_dir = resolve(model, options)
    engines.check_memory(model_dir)
    # The shortest fits.
    evaluation.build_prompt(Tokenizer.from_dir(model_dir), counts[0], evaluation.KEY_END, 0.0)

    groups = engines.groups(
        lambda length: [
            {"depth_percent": percent, "round": index}
            for percent in reversed(percents or [None])
            for index in range(rounds)
        ]
    )
    single = len(groups) == 1 and percents is None

    def tell(line: Mapping[str, Any], done: int) -> str:
        where = f"round {line['round'] + 1} of {rounds}"
        if not single:
            where = f"{_name(line)}, {grid.factor_name(line['rope_scaling_factor'])}, {where}"
        return (
            f"{where}: {'found' if line['found'] else 'not found'}, key {line['key']} at depth "
            f"{line['depth']:.0%}, answer {line['answer'].strip()!r}, "
            f"{grid.prefilled(line)}"
        )

    def draw(path: Path, lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
        what = f"{rounds} passkey{'s' if rounds > 1 else ''} in each cell"
        title = f"Passkey retrieval: {grid.model_name(model)}"
        grid.draw_heatmap(path, title, lines, "found", record, what)

    depths_axis = {} if percents is None else {"depths": percents}
    lines = grid.run_grid(
        "passkey",
        model=model,
        model_dir=model_dir,
        command=command_line(context),
        engines=engines,
        groups=groups,
        axes=engines.axes() | depths_axis | {"rounds": rounds},
        settings={
            "seed": seed,
            "answer_tokens": evaluation.ANSWER_TOKENS,
            "rule": evaluation.RULE,
        },
        fields=("depth_percent", "round"),
        evaluate=lambda pipe, cell, progress: evaluation.ask(
            pipe,
            cell["context_length"],
            cell["round"],
            seed,
            None if percents is None else cell["depth_percent"] / 100,
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
        factor = "" if single else f", {grid.factor_name(part['rope_scaling_factor'])}"
        output.say(
            f"{part['found']} of {part['rounds']} passkeys found at "
            f"{part['context_length']:,} tokens{factor}"
        )


def _name(cell: Mapping[str, Any]) -> str:
    depth = cell["depth_percent"]
    return f"{cell['context_length']:,} tokens" + ("" if depth is None else f", depth {depth:.3g}%")


def _summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was found: of all, and of every setting and length."""

    def of(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"found": sum(line["found"] for line in some), "rounds": len(some)}

    return of(lines) | {"lengths": grid.by_length(lines, of)}
