"""longspan doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import typer

from longspan.cli.options import Json, write_json
from longspan.doctor import ABSENT, BROKEN, OK, WARNING, Check, examine

_STYLES = {OK: "green", ABSENT: "dim", WARNING: "yellow", BROKEN: "red"}


def doctor(json: Json = None) -> None:
    """Check what the engine needs of this machine, and say what to do where something is wrong.

    Exits with 1 when something is broken.

    Example:

        longspan doctor
    """
    checks = list(examine())
    if json is not None:
        write_json(json, [asdict(check) for check in checks])
    if json != "-":
        _show(checks)
    if any(check.state == BROKEN for check in checks):
        raise typer.Exit(1)


def _show(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(check.name, check.state, check.found, style=_STYLES[check.state])
        if check.remedy:
            table.add_row("", "", f"-> {check.remedy}")
    Console(highlight=False, markup=False).print(table)
