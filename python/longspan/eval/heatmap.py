"""Scores over context length and depth, a panel for every RoPE setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.eval import style

#: By (length in tokens, depth in percent): a score in [0, 100].
Scores = Mapping[tuple[int, float], float]

# Light to dark, so that it reads in grey and without red and green.
_COLOUR_MAP = "cividis"
# With more columns or rows than these, numbers would not fit their cells.
_MOST_COLUMNS, _MOST_ROWS = 12, 21


def draw(
    path: Path,
    title: str,
    native_length: int,
    panels: Mapping[str, Scores],
    measure: str,
    note: str,
) -> None:
    """Writes a PNG.

    panels: by title; a cell that is not in its panel stays empty. measure: what a score is. A
    dashed line stands after the last length the model was trained for.
    """
    lengths = sorted({length for scores in panels.values() for length, _ in scores})
    depths = sorted({depth for scores in panels.values() for _, depth in scores})
    width = min(max(6.4, 2.1 + len(panels) * max(2.9, 0.62 * len(lengths))), 24.0)
    height = min(max(4.1, 2.5 + 0.36 * len(depths)), 10.0)
    figure = style.figure(width, height, title, note)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - 1.05 / width,
        bottom=0.95 / height,
        top=1 - 1.15 / height,
        wspace=0.08,
    )
    for axes, (name, scores) in zip(all_axes, panels.items(), strict=True):
        image = _panel(axes, name, scores, lengths, depths, native_length)
    all_axes[0].set_ylabel("depth in the text", color=style.FAINT)
    last = all_axes[-1].get_position()
    bar = figure.colorbar(
        image, cax=figure.add_axes((last.x1 + 0.18 / width, last.y0, 0.14 / width, last.height))
    )
    bar.set_label(measure, color=style.FAINT)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=style.FAINT)
    figure.savefig(path)


def _panel(
    axes: Any,
    name: str,
    scores: Scores,
    lengths: Sequence[int],
    depths: Sequence[float],
    native_length: int,
) -> Any:
    import numpy as np

    table = np.full((len(depths), len(lengths)), np.nan)
    for (length, depth), value in scores.items():
        table[depths.index(depth), lengths.index(length)] = value
    image = axes.imshow(table, cmap=_COLOUR_MAP, vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor(style.GRID)
    mean = float(np.mean(list(scores.values()))) if scores else float("nan")
    style.frame(axes, f"{name}: mean {mean:.0f}", size=10.5, pad=17)  # a label stands below
    axes.set_xticks(range(len(lengths)), [style.tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.3g}%" for depth in depths])
    axes.set_xlabel("context length, tokens", color=style.FAINT)
    if len(lengths) > _MOST_COLUMNS:
        axes.tick_params(axis="x", rotation=60)
    axes.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    if len(lengths) <= _MOST_COLUMNS and len(depths) <= _MOST_ROWS:
        for row, column in np.argwhere(~np.isnan(table)):
            value = table[row, column]
            axes.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                size=8.5,
                color="white" if value < 50 else style.TEXT,
            )
    inside = sum(length <= native_length for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside - 0.5, color="#c2410c", linewidth=2, linestyle=(0, (4, 2)))
        axes.annotate(
            f"trained for {style.tokens(native_length)}",
            (inside - 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=8,
            color="#c2410c",
        )
    return image
