"""longspan demo: a small model read far past its trained length, without and with RoPE scaling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longspan import smollm2
from longspan._core import InvalidArgument
from longspan.config import EngineConfig
from longspan.eval import passkey, perplexity, plot, style, text
from longspan.eval.heartbeat import Heartbeat
from longspan.eval.record import Record, engine_facts, sha256_of_text
from longspan.model_path import resolve_model
from longspan.pipeline import Pipeline, pipeline
from longspan.progress import rate
from longspan.tokenizer import Tokenizer

if TYPE_CHECKING:
    from longspan import _core

_LENGTHS = (2048, 8192, 16384)


def lengths_up_to(max_length: int) -> list[int]:
    """2k, 8k, 16k, then doubling; max_length itself is the last."""
    lengths = list(_LENGTHS)
    while lengths[-1] < max_length:
        lengths.append(2 * lengths[-1])
    return [length for length in lengths if length < max_length] + [max_length]


@dataclass
class Cell:
    """What was measured at one length with one factor (0: no scaling)."""

    length: int
    rope_scaling_factor: float
    rounds: list[passkey.Round] = field(default_factory=list)
    windows: list[perplexity.Window] = field(default_factory=list)

    @property
    def found(self) -> int:
        return sum(r.found for r in self.rounds)

    @property
    def perplexity(self) -> float | None:
        return perplexity.overall(self.windows) if self.windows else None

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in (*self.rounds, *self.windows))

    @property
    def tokens_per_s(self) -> float:
        return prefill_speed([self])

    def point(self) -> plot.Point:
        found = self.found / len(self.rounds) if self.rounds else None
        return plot.Point(self.length, found, self.perplexity)

    def summary(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "rope_scaling_factor": self.rope_scaling_factor,
            "passkeys_found": self.found,
            "passkeys": len(self.rounds),
            "perplexity": self.perplexity,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
        }


def prefill_speed(cells: Sequence[Cell]) -> float:
    """Tokens per second of all their prefills together; NaN when there was none."""
    rounds = [r for cell in cells for r in cell.rounds]
    done = [(r.prompt_tokens - r.cached_tokens, r.prefill_tokens_per_s) for r in rounds]
    done += [(w.length, w.tokens_per_s) for cell in cells for w in cell.windows]
    return sum(n for n, _ in done) / sum(n / speed for n, speed in done) if done else math.nan


class Demo:
    """Measures, shows what it measures, and leaves a plot and a record behind."""

    def __init__(
        self,
        *,
        model: str | None = None,
        max_length: int = 16384,
        factor: float = 4.0,
        rounds: int = 1,
        seed: int = 0,
        output_dir: Path = Path("."),
        command: Sequence[str] = (),
        console: Console | None = None,
    ) -> None:
        """Throws InvalidArgument, Unsupported or CheckpointError."""
        if not output_dir.is_dir():
            raise InvalidArgument(f"output_dir: expected a directory, got {output_dir}")
        if max_length < 256:
            raise InvalidArgument(f"max_length: expected at least 256 tokens, got {max_length}")
        style.figure_class()
        self._model = Path(model) if model else smollm2.gguf_path()
        self._lengths = lengths_up_to(max_length)
        self._factor = factor
        self._rounds = rounds
        self._seed = seed
        self._plot = output_dir / "longspan-demo.png"
        self._json = output_dir / "longspan-demo.json"
        self._command = command
        self._console = console or Console(highlight=False)
        self._heartbeat = Heartbeat(self._say)
        self._cells: list[Cell] = []
        self._native = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("Loading", total=None, visible=False, speed="")

    def run(self) -> None:
        """Ctrl-C leaves the plot and the record of what is finished, and passes on."""
        source = text.python_documentation()
        model_dir = resolve_model(self._model)
        ids = Tokenizer.from_dir(model_dir).encode(source.text)
        # Every length reads the same tokens, in one window or in several, so that its perplexity
        # compares with the others'.
        span = max([n for n in self._lengths if n <= len(ids)], default=0)
        settings = {
            "lengths": self._lengths,
            "rope_scaling_factor": self._factor,
            "rounds": self._rounds,
            "seed": self._seed,
            "rule": passkey.RULE,
            "text": source.source,
            "text_sha256": sha256_of_text(source.text),
            "text_tokens": span,
        }
        with Record(
            "demo",
            str(self._json),
            model=str(self._model),
            command=self._command,
            settings=settings,
        ) as record:
            try:
                for factor in (0.0, self._factor):
                    self._measure(model_dir, factor, ids[:span], record)
                record.finish({"cells": [cell.summary() for cell in self._cells]})
            except KeyboardInterrupt:
                self._say("Interrupted; what was finished until then is kept.")
                raise
            finally:
                self._leave(record, span)

    def _measure(self, model_dir: Path, factor: float, ids: Sequence[int], record: Record) -> None:
        # Dynamic NTK leaves the trained length alone, bit for bit.
        lengths = [n for n in self._lengths if not factor or n > self._native]
        if not lengths:
            return
        config = EngineConfig(
            session_len=self._lengths[-1],
            max_batch_size=1,
            rope_scaling_factor=factor,
            enable_prefix_caching=True,  # passkey prompts are alike up to the first key
        )
        with pipeline(model_dir, config) as pipe:
            if not factor:
                record.describe(engine_facts(pipe.engine))
                self._native = pipe.engine.model.native_length
                self._introduce(pipe)
            with self._shown():
                for length in lengths:
                    cell = Cell(length, factor)
                    self._cells.append(cell)
                    record.add(cell)
                    self._fill(cell, pipe, ids, record)
                    if not self._console.is_terminal:
                        self._say(self._line(cell))

    def _fill(self, cell: Cell, pipe: Pipeline, ids: Sequence[int], record: Record) -> None:
        name = _short_name(cell.rope_scaling_factor)
        windows = len(ids) // cell.length
        steps = (
            (cell.rounds, "passkey", self._rounds,
             passkey.run(pipe, cell.length, self._rounds, self._seed, self._progress)),
            (cell.windows, "perplexity", windows,
             perplexity.run(pipe, perplexity.cut(ids, cell.length, windows), self._progress)),
        )  # fmt: skip
        for results, what, count, measured in steps:
            for index in range(count):
                self._bar.update(self._task, description=f"{name}, {what} {index + 1} of {count}")
                results.append(next(measured))
                record.save()

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """The table and the bar, on a terminal; no warning about what the demo is about."""
        with warnings.catch_warnings(), ExitStack() as screen:
            warnings.filterwarnings("ignore", message="a sequence may reach")
            if self._console.is_terminal:
                live = Live(console=self._console, get_renderable=self._live, transient=True)
                screen.enter_context(live)
            yield

    def _live(self) -> Group:
        return Group(self._table(), self._bar)

    def _progress(self, states: Sequence[_core.Progress]) -> None:
        if not self._console.is_terminal:
            self._heartbeat(states)
            return
        state = states[0]
        self._bar.update(
            self._task,
            completed=state.prefill_done,
            total=state.prefill_total,
            speed=rate([state]),
            visible=True,
        )

    def _introduce(self, pipe: Pipeline) -> None:
        info = pipe.engine.model
        self._say(
            f"{self._model.name}: {info.architecture}, {info.num_parameters / 1e6:,.0f}M "
            f"parameters, trained for {info.native_length:,} tokens; {info.dtype} on "
            f"{info.backend}\n"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _line(self, cell: Cell) -> str:
        return (
            f"{cell.length:>9,} tokens, {_name(cell.rope_scaling_factor) + ':':<17} "
            f"passkey {_found(cell)}, perplexity {_perplexity(cell)}, "
            f"{cell.tokens_per_s:,.0f} tokens/s, {cell.seconds:.1f} s"
        )

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("context\ntokens", justify="right")
        for factor in (0.0, self._factor):
            for column in ("passkey", "perplexity"):
                table.add_column(f"{_short_name(factor)}\n{column}", justify="right")
        table.add_column("prefill\ntokens/s", justify="right")
        table.add_column("\nseconds", justify="right")
        for length in self._lengths:
            cells = {c.rope_scaling_factor: c for c in self._cells if c.length == length}
            row = [f"{length:,}"]
            for factor in (0.0, self._factor):
                if factor in cells:
                    row += [_found(cells[factor]), _perplexity(cells[factor])]
                else:
                    row += ["same", "same"] if factor and length <= self._native else ["", ""]
            if seconds := sum(cell.seconds for cell in cells.values()):
                row += [f"{prefill_speed(list(cells.values())):,.0f}", f"{seconds:.1f}"]
            table.add_row(*row)
        return table

    def _leave(self, record: Record, span: int) -> None:
        """Draws the plot, says what was found and where it is."""
        if not any(cell.rounds or cell.windows for cell in self._cells):
            return
        series = {
            _name(factor): [
                cell.point() for cell in self._cells if cell.rope_scaling_factor == factor
            ]
            for factor in (0.0, self._factor)
        }
        plain, scaled = series.values()
        inside = [point for point in plain if point.length <= self._native]
        if scaled and inside:
            scaled.insert(0, inside[-1])  # inside the trained length the two are one
        environment = record.content["environment"]
        passkeys = "1 passkey" if self._rounds == 1 else f"{self._rounds} passkeys"
        note = (
            f"{passkeys} at each length; perplexity of {span:,} tokens of Python's "
            f"language reference, read in windows; longspan {environment['longspan']}, "
            f"{environment['cpu']}"
        )
        if self._console.is_terminal:
            self._console.print(self._table())
        plot.draw(self._plot, self._model.stem, self._native, series, note)
        for cell in self._cells:
            if cell.length == self._lengths[-1]:
                self._say(
                    f"At {cell.length:,} tokens, {_name(cell.rope_scaling_factor)}: "
                    f"passkey {_found(cell)}, perplexity {_perplexity(cell)}"
                )
        self._say(f"Wrote {self._plot} and {self._json}")


def _name(factor: float) -> str:
    return f"dynamic {_short_name(factor)}" if factor else _short_name(factor)


def _short_name(factor: float) -> str:
    return f"NTK x{factor:g}" if factor else "no scaling"


def _found(cell: Cell) -> str:
    return f"{cell.found} of {len(cell.rounds)}" if cell.rounds else "..."


def _perplexity(cell: Cell) -> str:
    value = cell.perplexity
    if value is None:
        return "..."
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
