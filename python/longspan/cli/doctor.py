"""longspan doctor."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from longspan.cli.options import Json, write_json
from longspan.doctor import ABSENT, BROKEN, OK, WARNING, Check, examine, meet

_STYLES = {OK: "green", ABSENT: "dim", WARNING: "yellow", BROKEN: "red"}


def doctor(
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", help="Of the ranks of a launcher: auto, cpu or cuda."),
    ] = "auto",
    timeout: Annotated[
        int,
        typer.Option(metavar="SECONDS", help="That ranks may take to come, and to answer."),
    ] = 60,
    json: Json = None,
) -> None:
    """Check what the engine needs of this machine.

    Where something is wrong it says what to do. Under torchrun, mpirun or srun the ranks also meet,
    connect their devices and add up numbers; rank 0 tells all, another rank what is broken, and
    which rank failed at which step. Exits with 1 when something is broken.

    \b
    Examples:
      longspan doctor
      torchrun --nproc-per-node 4 -m longspan.cli doctor
    """
    checks = list(examine())
    meeting = meet(device, timeout)
    checks += meeting.checks
    broken = [check for check in checks if check.state == BROKEN]
    if meeting.rank == 0 and json is not None:
        write_json(json, [asdict(check) for check in checks])
    if meeting.rank > 0:
        for check in broken:
            typer.echo(f"rank {meeting.rank}: {check.name}: {check.found}", err=True)
    elif json != "-":
        _show(checks)
    if meeting.hangs:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    if broken:
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
