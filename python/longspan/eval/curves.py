"""Perplexity over context length, or over the position in it, a line for every RoPE setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.eval import style

# More panels than these would be too small to read; the longest lengths are shown.
_MOST_PANELS = 4
# Inches.
_HEIGHT = 4.6


def draw_lengths(
    path: Path,
    title: str,
    native_length: int,
    series: Mapping[str, Sequence[tuple[int, float]]],
    note: str,
) -> None:
    """Writes a PNG. series: by legend, (context length, perplexity) ascending in length."""
    figure = style.figure(7.5, _HEIGHT, title, note)
    axes = figure.subplots()
    _place(figure, 7.5)
    style.frame(axes, "Perplexity")
    lengths = sorted({length for points in series.values() for length, _ in points})
    style.length_axis(axes, lengths, native_length)
    for i, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), label=name, markersize=7, **_look(i))
    _value_axis(axes, [value for points in series.values() for _, value in points])
    _legend(figure, axes, 7.5)
    figure.savefig(path)


def draw_positions(
    path: Path,
    title: str,
    native_length: int,
    panels: Mapping[int, Mapping[str, Sequence[float]]],
    note: str,
) -> None:
    """Writes a PNG.

    panels: by context length, then by legend: perplexity over equal parts of the context, NaN
    where nothing was scored. The longest few are shown.
    """
    shown = sorted(panels)[-_MOST_PANELS:]
    width = 2.0 + 5.0 * len(shown)
    figure = style.figure(width, _HEIGHT, title, note)
    all_axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    _place(figure, width)
    values: list[float] = []
    for axes, length in zip(all_axes, shown, strict=True):
        style.frame(axes, f"Perplexity in contexts of {style.tokens(length)}")
        axes.set_xlim(0, length)
        ticks = [length * i // 4 for i in range(5)]
        axes.set_xticks(ticks, [style.tokens(tick) if tick else "0" for tick in ticks])
        axes.set_xlabel("position in the context, tokens", color=style.FAINT)
        axes.grid(axis="y", color=style.GRID)
        axes.set_axisbelow(True)
        style.shade_native(axes, 0, length, native_length)
        for i, (name, parts) in enumerate(panels[length].items()):
            middle = [(part + 0.5) * length / len(parts) for part in range(len(parts))]
            every = max(len(parts) // 8, 1)
            axes.plot(middle, parts, label=name, markersize=5, markevery=every, **_look(i))
            values += [value for value in parts if value == value]
    _value_axis(all_axes[0], values)
    _legend(figure, all_axes[-1], width)
    figure.savefig(path)


def _place(figure: Any, width: float) -> None:
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.3 / width,
        bottom=0.95 / _HEIGHT,
        top=1 - 1.25 / _HEIGHT,
        wspace=0.08,
    )


def _look(index: int) -> dict[str, Any]:
    return {
        "color": style.COLOURS[index % len(style.COLOURS)],
        "marker": style.MARKERS[index % len(style.MARKERS)],
        "linewidth": 1.8,
        "markeredgecolor": "white",
    }


def _value_axis(axes: Any, values: Sequence[float]) -> None:
    if max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.set_ylim(0, 1.12 * max(values))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _legend(figure: Any, axes: Any, width: float) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - 0.45 / _HEIGHT),
        ncols=6,
        frameon=False,
        labelcolor=style.TEXT,
    )
