"""What the commands of `longspan eval` share: the options of a grid, and how one is run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.options import COMPUTE, SOURCE
from longspan.config import EngineConfig

if TYPE_CHECKING:
    from longspan.eval.grid import Evaluate, Group
    from longspan.eval.journal import Cell

Lengths = Annotated[
    str,
    typer.Option(
        "--lengths",
        "--length",
        metavar="N[,N...]",
        help="Context lengths in tokens, answer included: 2k,8k,16k.",
    ),
]
Depths = Annotated[
    str | None,
    typer.Option(metavar="P[,P...]", help="Percent of the text before it: 0,25,50,75,100."),
]
NumDepths = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="So many depths from 0 to 100 instead of --depths."),
]
Factors = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling-factor",
        metavar="F[,F...]",
        help="Dynamic NTK RoPE scaling with this factor, >= 1; 0, the default: as the model says. "
        "Several: one after another.",
    ),
]
JsonLines = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep every finished cell here, a line each; the same command goes on where this "
        "ends.",
    ),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the results: a PNG.")]

#: The engine options of every evaluation, besides the factors.
ENGINE = (
    "rope_length",
    *COMPUTE,
    "num_threads",
    *SOURCE,
)
#: Options that results do not depend on.
_INDIFFERENT = ("num_threads", "enable_prefix_caching")
#: What a sweep of depths has unless the user says otherwise: its prompts begin alike.
SHARED = {"enable_prefix_caching": True}


@dataclass(frozen=True)
class Output:
    """Where results go: a record (- is standard output), a journal, a picture."""

    json: str | None
    jsonl: Path | None
    plot: Path | None

    def check(self) -> None:
        """Throws Unsupported or InvalidArgument for a picture that cannot be drawn."""
        if self.plot is not None:
            from longspan._core import InvalidArgument
            from longspan.eval.style import figure_class

            figure_class()
            if self.plot.suffix.lower() != ".png" or not self.plot.absolute().parent.is_dir():
                raise InvalidArgument(
                    f"plot: expected a .png in a directory that exists, got {self.plot}"
                )

    def say(self, line: str) -> None:
        """On stderr when the record goes to standard output."""
        typer.echo(line, err=self.json == "-")


@dataclass(frozen=True)
class Engines:
    """RoPE settings x lengths: what the engines of a grid are given.

    factors: None leaves the option alone. options: those the user gave. Cells of one length share a
    RoPE profile, which a fixed rope_length gives them: the length, unless the user says another;
    fixed=False leaves rope_length alone.
    """

    lengths: Sequence[int]
    factors: Sequence[float | None]
    options: Mapping[str, Any]
    fixed: bool

    @classmethod
    def of(
        cls, lengths: Sequence[int], factors: str | None, options: Mapping[str, Any], fixed: bool
    ) -> Engines:
        """Throws InvalidArgument."""
        from longspan.eval import axes

        return cls(lengths, axes.factors(factors) if factors else [None], options, fixed)

    def check_memory(self, model_dir: Path) -> None:
        """Throws CapacityError when the longest length does not fit. Comes before any prompt."""
        from longspan.eval.grid import check_memory

        check_memory(model_dir, self._options(self.factors[0], self.lengths[-1]))

    def axes(self) -> dict[str, Any]:
        """Lengths and factors as the records of passkeys and perplexity have them: a single length
        is "length", and a single factor is left out."""
        axes: dict[str, Any] = {"lengths": list(self.lengths)}
        if len(self.lengths) == 1:
            axes = {"length": self.lengths[0]}
        if len(self.factors) > 1:
            axes["rope_scaling_factors"] = list(self.factors)
        return axes

    def groups(self, cells: Callable[[int], Sequence[Cell]]) -> list[Group]:
        """cells: of a length. Those of a group also hold its factor and length."""
        from longspan.eval.grid import Group

        return [
            Group(
                self._options(factor, length),
                [{"rope_scaling_factor": factor or 0.0, "context_length": length} | cell
                 for cell in cells(length)],
            )
            for factor in self.factors
            for length in self.lengths
        ]  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Of the options, those that results depend on and that cells do not tell."""
        default = "context_length" if self.fixed else EngineConfig.rope_length
        given = {name: value for name, value in self.options.items() if name not in _INDIFFERENT}
        return {"dtype": EngineConfig.dtype, "rope_length": default} | given

    def recorded(self) -> dict[str, Any]:
        """The options as a record shows them: without those that differ from cell to cell."""
        groups = [self._options(f, n) for f in self.factors for n in self.lengths]
        return {
            name: value
            for name, value in groups[0].items()
            if all(group.get(name) == value for group in groups)
        }

    def _options(self, factor: float | None, length: int) -> dict[str, Any]:
        options: dict[str, Any] = {} if factor is None else {"rope_scaling_factor": factor}
        if self.fixed:
            options["rope_length"] = length
        return options | dict(self.options) | {"session_len": length, "max_batch_size": 1}


def factor_name(factor: float) -> str:
    """As legends and titles say it."""
    return f"dynamic NTK x{factor:g}" if factor else "RoPE as the model says"


def run_grid(
    kind: str,
    *,
    model: str,
    model_dir: Path,
    command: Sequence[str],
    engines: Engines,
    groups: Sequence[Group],
    axes: Mapping[str, Any],
    settings: Mapping[str, Any],
    fields: Sequence[str],
    evaluate: Evaluate,
    tokens: Callable[[Cell], int],
    name: Callable[[Cell], str],
    tell: Callable[[Mapping[str, Any], int], str],
    summarise: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    draw: Callable[[Path, Sequence[Mapping[str, Any]], Mapping[str, Any]], None],
    output: Output,
) -> list[dict[str, Any]]:
    """Measures every cell that the journal does not hold; tells, records and draws all of them.

    settings: of the evaluation, besides the axes of the grid: what a result depends on. fields:
    those of a cell besides factor and length. tokens, name: see Watch. tell: a finished line and
    how many are, as printed. summarise: all lines, for the record. draw: the picture of some lines,
    with the content of the record. Ctrl-C leaves the picture of what is done, and passes on.
    """
    from longspan.eval import grid
    from longspan.eval.fingerprint import fingerprint
    from longspan.eval.journal import Journal
    from longspan.eval.record import Record, environment
    from longspan.eval.watch import Watch

    identity = {
        "version": environment()["longspan"],
        "model": fingerprint(model_dir) if output.jsonl else "",
        "options": engines.identity(),
        "settings": dict(settings),
    }
    lines: list[dict[str, Any]] = []
    with (
        Journal(
            output.jsonl, kind, identity, ("rope_scaling_factor", "context_length", *fields)
        ) as journal,
        Record(
            kind,
            output.json,
            model=model,
            command=command,
            options=engines.recorded(),
            settings={**axes, **settings},
        ) as record,
        warnings.catch_warnings(),
    ):
        if len(groups) > 1:  # what reading past the trained length does is what a grid shows
            warnings.filterwarnings("ignore", message="a sequence may reach")
        cells = [cell for group in groups for cell in group.cells]
        left = [cell for cell in cells if journal.result(cell) is None]
        if len(left) < len(cells):
            output.say(f"{output.jsonl}: {len(cells) - len(left)} of {len(cells)} cells are done")
        watch = Watch(left, tokens, name, lambda line: typer.echo(line, err=True))
        try:
            for line in grid.run(model_dir, groups, evaluate, journal, record, watch):
                lines.append(line)
                output.say(tell(line, len(lines)))
            record.finish(dict(summarise(lines)))
        finally:
            if output.plot is not None and lines:
                draw(output.plot, lines, record.content)
                output.say(f"Wrote {output.plot}")
    return lines


def prefilled(line: Mapping[str, Any]) -> str:
    """What a prompt has cost, as printed."""
    cached = f", {line['cached_tokens']:,} cached" if line["cached_tokens"] else ""
    return (
        f"{line['prompt_tokens']:,} tokens{cached} in {line['seconds']:.1f} s "
        f"({line['prefill_tokens_per_s']:,.0f} tokens/s)"
    )


def note(record: Mapping[str, Any], what: str) -> str:
    """The small print of a picture."""
    environment, engine = record["environment"], record["engine"]
    return f"{what}; {engine['dtype']}, longspan {environment['longspan']}, {environment['cpu']}"


def model_name(model: str) -> str:
    """As titles say it: the name of the file or directory."""
    path = Path(model)
    return path.stem if path.suffix.lower() == ".gguf" else path.resolve().name


def depths(listed: str | None, count: int | None) -> list[float] | None:
    """What --depths or --num-depths says; None when neither was given. Throws InvalidArgument."""
    from longspan.eval import axes

    if listed is not None and count is not None:
        raise typer.BadParameter("expected --depths or --num-depths, and only one of them")
    if listed is not None:
        return axes.depths(listed)
    return None if count is None else axes.even_depths(count)


def by_length(
    lines: Sequence[Mapping[str, Any]],
    summary: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The summary of the lines of every (rope_scaling_factor, context_length), in their order."""
    parts: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        parts.setdefault((line["rope_scaling_factor"], line["context_length"]), []).append(line)
    return [
        {"rope_scaling_factor": factor, "context_length": length} | summary(some)
        for (factor, length), some in parts.items()
    ]


def draw_heatmap(
    path: Path,
    title: str,
    lines: Sequence[Mapping[str, Any]],
    measure: str,
    record: Mapping[str, Any],
    what: str,
) -> None:
    """A panel for every factor; the mean over rounds of line[measure] in each cell."""
    from longspan.eval import heatmap

    sums: dict[float, dict[tuple[int, float], list[float]]] = {}
    for line in lines:
        panel = sums.setdefault(line["rope_scaling_factor"], {})
        cell = line["context_length"], line["depth_percent"]
        panel.setdefault(cell, []).append(float(line[measure]))
    scale = 100 if measure == "found" else 1
    heatmap.draw(
        path,
        title,
        record["model"]["native_length"],
        {
            factor_name(factor): {
                cell: scale * sum(values) / len(values) for cell, values in panel.items()
            }
            for factor, panel in sums.items()
        },
        "found, %" if measure == "found" else "score",
        note(record, what),
    )
