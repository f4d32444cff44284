"""Cells measured one after another, by one engine for every group of them that can share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan._core import CapacityError, plan_memory
from longspan.config import EngineConfig
from longspan.eval.journal import Cell, Journal
from longspan.eval.record import Record, engine_facts
from longspan.eval.watch import Watch
from longspan.pipeline import Pipeline, pipeline
from longspan.progress import ProgressCallback

#: Measures a cell.
Evaluate = Callable[[Pipeline, Cell, ProgressCallback], Any]


@dataclass(frozen=True)
class Group:
    """Cells that the same engine measures, in their order. options: EngineConfig's."""

    options: dict[str, Any]
    cells: Sequence[Cell]


def check_memory(model_dir: Path, options: dict[str, Any]) -> None:
    """Throws CapacityError when a session of such an engine does not fit in memory."""
    plan = plan_memory(str(model_dir), EngineConfig(**options).native())
    if not plan.fits:
        raise CapacityError(
            f"length: expected at most the {plan.max_session_len} tokens that fit in memory, "
            f"got {plan.session_len}"
        )


def run(
    model_dir: Path,
    groups: Sequence[Group],
    evaluate: Evaluate,
    journal: Journal,
    record: Record,
    watch: Watch,
) -> Iterator[dict[str, Any]]:
    """The line of every cell in order: from the journal, else measured, and then in the journal.

    All of them go to the record. Whatever ends the run, Ctrl-C included, both keep what is done.
    """
    varying = {
        name
        for group in groups
        for name, value in group.options.items()
        if value != groups[0].options.get(name)
    }
    if journal.notes is not None:
        record.describe(journal.notes)
    for group in groups:
        with ExitStack() as stack:
            pipe = None
            for cell in group.cells:
                line = journal.result(cell)
                if line is None:
                    if pipe is None:
                        pipe = stack.enter_context(
                            pipeline(model_dir, EngineConfig(**group.options))
                        )
                        journal.begin(engine_facts(pipe.engine, varying))
                        record.describe(journal.notes)
                        stack.enter_context(watch.shown(pipe.engine.model))
                    with watch.cell(cell) as progress:
                        line = journal.add(cell, evaluate(pipe, cell, progress))
                record.add(line)
                yield line
