"""How far a grid has come, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from longspan.describe import describe
from longspan.progress import HEARTBEAT, ProgressCallback, rate

if TYPE_CHECKING:
    from longspan._core import ModelInfo, Progress
    from longspan.eval.journal import Cell


class Watch:
    """A bar on a terminal, elsewhere a line now and then.

    The time left follows the arithmetic, which grows with the square of a prompt: a token costs
    2 FLOP a weight, and 4 heads x head_dim a layer for every key it sees.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        tokens: Callable[[Cell], int],
        name: Callable[[Cell], str],
        say: Callable[[str], None],
    ) -> None:
        """cells: those still to be measured. tokens: those a cell's prompt has. name: of a cell, as
        a reader sees it. say: prints a line on stderr, without a bar."""
        self._cells = list(cells)
        self._tokens = tokens
        self._name = name
        self._say = say
        self._work = float  # of that many tokens, in FLOP
        self._finished: list[Cell] = []
        self._spent = 0.0
        self._said = time.monotonic()
        self._bar: Any = None
        self._described = ""

    @contextmanager
    def shown(self, model: ModelInfo) -> Iterator[None]:
        """While the cells of one engine are measured. Says what it runs on where that is new."""
        if (what := describe(model)) != self._described:
            self._described = what
            self._say(what)
        layers = model.num_layers * model.num_heads * model.head_dim
        self._work = lambda n: 2.0 * model.num_parameters * n + 2.0 * layers * n * n
        if not sys.stderr.isatty():
            yield
            return
        with _rich_bar() as self._bar:
            self._task = self._bar.add_task("", total=None, speed=0.0, left="")
            yield
        self._bar = None

    @contextmanager
    def cell(self, cell: Cell) -> Iterator[ProgressCallback]:
        """While one cell is measured, with the progress callback for its requests."""
        begin = time.monotonic()

        def progress(states: Sequence[Progress]) -> None:
            self._report(cell, states[0], time.monotonic() - begin)

        yield progress
        self._spent += time.monotonic() - begin
        self._finished.append(cell)

    def seconds_left(self, done_tokens: int = 0, spent: float = 0.0) -> float | None:
        """Of the whole grid, when the cell at hand has come so far in so many seconds."""
        done = sum(self._work(self._tokens(c)) for c in self._finished) + self._work(done_tokens)
        total = sum(self._work(self._tokens(c)) for c in self._cells)
        if done <= 0:
            return None
        return max(total - done, 0.0) / done * (self._spent + spent)

    def _report(self, cell: Cell, state: Progress, spent: float) -> None:
        left = self.seconds_left(state.prefill_done, spent)
        eta = "" if left is None else f", {duration(left)} left in all"
        name = f"{len(self._finished) + 1} of {len(self._cells)}: {self._name(cell)}"
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=name,
                completed=state.prefill_done,
                total=state.prefill_total,
                speed=rate([state]),
                left=eta,
            )
        elif time.monotonic() - self._said >= HEARTBEAT:
            self._said = time.monotonic()
            self._say(
                f"{name}: {state.prefill_done:,} of {state.prefill_total:,} tokens, "
                f"{rate([state])}{eta}"
            )


def duration(seconds: float) -> str:
    """As a person says it: 40 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.completed:,.0f} tokens, {task.fields[speed]}{task.fields[left]}"),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays out of the terminal
        transient=True,
    )
