"""The demo's picture: passkeys found and perplexity against context length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan._core import Unsupported

_TEXT = "#24292f"
_FAINT = "#6e7781"
_GRID = "#e4e7eb"
_WINDOW = "#f3f5f7"
_COLOURS = ("#c2410c", "#1d4ed8")


@dataclass(frozen=True)
class Point:
    """length in tokens; found in [0, 1]; either measure is None where it was not taken."""

    length: int
    found: float | None
    perplexity: float | None


def figure_class() -> Any:
    """matplotlib's Figure. Throws Unsupported when it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(
            "plot: expected matplotlib, got none; install it with: pip install 'longspan[demo]'"
        ) from error
    return Figure


def draw(
    path: Path, model: str, native_length: int, series: dict[str, Sequence[Point]], note: str
) -> None:
    """Writes a PNG. series: by legend, at most two, each ascending in length."""
    figure = figure_class()(figsize=(11, 4.8), dpi=160, facecolor="white")
    passkeys, perplexities = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.17, top=0.76, wspace=0.14)
    figure.text(
        0.06, 0.945, f"{model} past its trained context", size=15, weight="bold", color=_TEXT
    )
    figure.text(0.06, 0.015, note, size=8, color=_FAINT)

    lengths = sorted({point.length for points in series.values() for point in points})
    for axes, title in ((passkeys, "Passkeys found"), (perplexities, "Perplexity of natural text")):
        _frame(axes, title, lengths, native_length)
    for (label, points), colour in zip(series.items(), _COLOURS, strict=False):
        style = {
            "color": colour,
            "linewidth": 2.2,
            "marker": "o",
            "markersize": 7,
            "markeredgecolor": "white",
            "label": label,
            "clip_on": False,
        }
        _line(passkeys, [(p.length, p.found) for p in points], "{:.0%}".format, style)
        _line(perplexities, [(p.length, p.perplexity) for p in points], _perplexity, style)
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
        labelcolor=_TEXT,
    )
    figure.savefig(path)


def _frame(axes: Any, title: str, lengths: Sequence[int], native_length: int) -> None:
    axes.set_title(title, loc="left", size=11.5, color=_TEXT, pad=10)
    axes.set_xscale("log", base=2)
    span = lengths[-1] / lengths[0]
    low, high = lengths[0] / (1.1 * span**0.06), lengths[-1] * (1.1 * span**0.16)  # room for labels
    axes.set_xlim(low, high)
    axes.set_xticks(lengths, [_tokens(length) for length in lengths])
    axes.set_xlabel("context length, tokens", color=_FAINT)
    axes.minorticks_off()
    axes.tick_params(length=0, colors=_FAINT)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if native_length < high:
        axes.axvspan(low, native_length, color=_WINDOW, zorder=0, linewidth=0)
        axes.axvline(native_length, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"trained for {native_length:,}",
            (native_length, 0.5),
            xycoords=("data", "axes fraction"),
            xytext=(-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            size=8.5,
            color=_FAINT,
        )


def _line(
    axes: Any, points: Sequence[Any], say: Callable[[float], str], style: dict[str, Any]
) -> None:
    taken = [(length, value) for length, value in points if value is not None]
    if taken:
        axes.plot([x for x, _ in taken], [y for _, y in taken], **style)
        axes.annotate(
            say(taken[-1][1]),
            taken[-1],
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            size=9.5,
            color=style["color"],
            weight="bold",
        )


def _perplexity(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
