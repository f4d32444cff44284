"""The commands together, and how all of them fail: one line on stderr and an exit code."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longspan._core import LongspanError, version
from longspan.cli import chat, demo, doctor, evaluate, generate, plan
from longspan.cli.terminal import say

INTERRUPTED = 130


class _Commands(TyperGroup):
    """Exit codes: 0; 1 for a LongspanError; 2 for wrong usage; 130 for Ctrl-C."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        return super().make_context(info_name, args, *rest, obj=list(args), **extra)

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings(), _progress_on_stderr():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            try:
                return super().invoke(ctx)
            except LongspanError as error:
                say(f"error: {error}")
                raise typer.Exit(1) from error
            except KeyboardInterrupt as interrupt:
                say("interrupted")
                raise typer.Exit(INTERRUPTED) from interrupt


@contextmanager
def _progress_on_stderr() -> Iterator[None]:
    """Shows what bars log where stderr is no terminal, such as a file (progress.Bar)."""
    log, handler = logging.getLogger("longspan.progress"), logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # the pipeline may have given "longspan" a handler of its own
    try:
        yield
    finally:
        log.propagate = True
        log.setLevel(logging.NOTSET)
        log.removeHandler(handler)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longspan {version()}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def longspan(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run open-weights language models far past the context they were trained for, and measure
    whether they still understand.

    Begin with: longspan demo
    """


app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    app()
