"""How far long work has come, shown on the terminal when nobody asked to be called."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan._core import ContextProgress, Progress

#: Called with the state of every prompt, in their order.
ProgressCallback = Callable[[Sequence["Progress"]], None]

#: Seconds between two reports.
INTERVAL = 0.5
#: Seconds of work before a bar is worth showing.
PATIENCE = 2.0
#: Seconds between two lines, for those who see no bar: logs, pipes, CI.
HEARTBEAT = 10.0

_log = logging.getLogger(__name__)


class Bar:
    """A progress bar on stderr, once the work has taken PATIENCE. Where that is no terminal, a line
    of the logger "longspan.progress" every HEARTBEAT instead, of level INFO."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._begin = self._said = time.monotonic()
        self._live: Any = None

    def update(self, done: float, total: float, note: str = "") -> None:
        """done and total in units; note is shown behind the bar."""
        if self._live is None:
            if not sys.stderr.isatty():
                self._log(done, total, note)
                return
            if time.monotonic() - self._begin < PATIENCE:
                return
            self._live = _rich_bar()
            self._task = self._live.add_task(self._what, total=total, note="", unit=self._unit)
            self._live.start()
        self._live.update(self._task, completed=done, total=total, note=note)

    def _log(self, done: float, total: float, note: str) -> None:
        if time.monotonic() - self._said < HEARTBEAT:
            return
        self._said = time.monotonic()
        parts = f"{self._what}: {done:,.0f} of {total:,.0f} {self._unit}", note
        _log.info(", ".join(filter(None, parts)))

    def close(self) -> None:
        """Takes the bar from the terminal, for good."""
        self._begin = self._said = float("inf")
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def rate(states: Sequence[Progress]) -> str:
    """How fast the fastest of the prompts goes: "1,235 tokens/s, 12.3 TFLOP/s"."""
    tokens = max((state.tokens_per_s for state in states), default=0.0)
    flops = max((state.flops_per_s for state in states), default=0.0)
    return f"{tokens:,.0f} tokens/s, {flops * 1e-12:.3g} TFLOP/s"


def show(bar: Bar, states: Sequence[Progress]) -> None:
    """The prompts' progress as one bar: prompt tokens first, then what is being generated."""
    done = sum(state.prefill_done for state in states)
    total = sum(state.prefill_total for state in states)
    generated = sum(state.generated for state in states)
    note = f"{generated} generated" if generated else rate(states)
    bar.update(done, total, note)


def show_context(computing: Bar, writing: Bar, state: ContextProgress) -> None:
    """A context that is being saved: first it is computed, then written."""
    if state.computed < state.total:
        computing.update(state.computed, state.total)
    else:
        computing.close()
        writing.update(state.moved, state.total)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
