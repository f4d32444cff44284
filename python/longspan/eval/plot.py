"""The demo's picture: passkeys found and perplexity against context length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.eval import style


@dataclass(frozen=True)
class Point:
    """length in tokens; found in [0, 1]; either measure is None where it was not taken."""

    length: int
    found: float | None
    perplexity: float | None


def draw(
    path: Path, model: str, native_length: int, series: dict[str, Sequence[Point]], note: str
) -> None:
    """Writes a PNG. series: by legend, at most two, each ascending in length."""
    figure = style.figure_class()(figsize=(11, 4.8), dpi=160, facecolor="white")
    passkeys, perplexities = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.17, top=0.76, wspace=0.14)
    figure.text(
        0.06, 0.945, f"{model} past its trained context", size=15, weight="bold", color=style.TEXT
    )
    figure.text(0.06, 0.015, note, size=8, color=style.FAINT)

    lengths = sorted({point.length for points in series.values() for point in points})
    for axes, title in ((passkeys, "Passkeys found"), (perplexities, "Perplexity of natural text")):
        style.frame(axes, title)
        style.length_axis(axes, lengths, native_length)
    for (label, points), colour in zip(series.items(), style.COLOURS, strict=False):
        look = {
            "color": colour,
            "linewidth": 2.2,
            "marker": "o",
            "markersize": 7,
            "markeredgecolor": "white",
            "label": label,
            "clip_on": False,
        }
        _line(passkeys, [(p.length, p.found) for p in points], "{:.0%}".format, look)
        _line(perplexities, [(p.length, p.perplexity) for p in points], _perplexity, look)
    passkeys.set_ylim(0, 1)
    passkeys.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    values = [p.perplexity for points in series.values() for p in points if p.perplexity]
    if values and max(values) > 20 * min(values):
        perplexities.set_yscale("log")
        perplexities.margins(y=0.12)
        perplexities.minorticks_off()
    else:
        perplexities.set_ylim(0, 1.12 * max(values, default=1))
    perplexities.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(
        *passkeys.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.05, 0.93),
        ncols=2,
        frameon=False,
        labelcolor=style.TEXT,
    )
    figure.savefig(path)


def _line(
    axes: Any, points: Sequence[Any], say: Callable[[float], str], look: dict[str, Any]
) -> None:
    taken = [(length, value) for length, value in points if value is not None]
    if taken:
        axes.plot([x for x, _ in taken], [y for _, y in taken], **look)
        axes.annotate(
            say(taken[-1][1]),
            taken[-1],
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            size=9.5,
            color=look["color"],
            weight="bold",
        )


def _perplexity(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
