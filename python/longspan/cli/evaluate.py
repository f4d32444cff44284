"""longspan eval."""

from __future__ import annotations

import typer

from longspan.cli import needle, passkey, perplexity

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure whether a model still understands at a length.",
)
app.command()(passkey.passkey)
app.command()(needle.needle)
app.command()(perplexity.ppl)
