"""What the pictures share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from longspan._core import Unsupported

TEXT = "#24292f"
FAINT = "#6e7781"
GRID = "#e4e7eb"
WINDOW = "#f3f5f7"
#: Told apart by the colour-blind, too, and in grey: lines differ in marker as well.
COLOURS = ("#c2410c", "#1d4ed8", "#0f766e", "#a21caf", "#a16207", "#334155")
MARKERS = "osD^vP"


def figure_class() -> Any:
    """matplotlib's Figure. Throws Unsupported when it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(
            "plot: expected matplotlib, got none; install it with: pip install 'longspan[demo]'"
        ) from error
    return Figure


def tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def figure(width: float, height: float, title: str, note: str) -> Any:
    """A white figure of so many inches with a title at its top and small print at its foot."""
    drawn = figure_class()(figsize=(width, height), dpi=160, facecolor="white")
    # A bold letter is about 0.68 of its size wide; an inch has 72 points.
    size = max(min(14.0, 72 * (width - 0.4) / (0.68 * max(len(title), 1))), 7.0)
    drawn.text(0.2 / width, 1 - 0.42 / height, title, size=size, weight="bold", color=TEXT)
    small = textwrap.fill(note, int(72 * (width - 0.4) / (0.54 * 7.5)))
    drawn.text(0.2 / width, 0.1 / height, small, size=7.5, color=FAINT, va="bottom")
    return drawn


def frame(axes: Any, title: str, size: float = 11.5, pad: float = 10.0) -> None:
    """No box, no tick marks, faint labels."""
    axes.set_title(title, loc="left", size=size, color=TEXT, pad=pad)
    axes.minorticks_off()
    axes.tick_params(length=0, colors=FAINT)
    for side in axes.spines.values():
        side.set_visible(False)


def length_axis(axes: Any, lengths: Sequence[int], native_length: int) -> None:
    """Ascending lengths on a logarithmic axis, what the model was trained for shaded."""
    axes.set_xscale("log", base=2)
    span = lengths[-1] / lengths[0]
    low, high = lengths[0] / (1.1 * span**0.06), lengths[-1] * (1.1 * span**0.16)  # for labels
    axes.set_xlim(low, high)
    axes.set_xticks(lengths, [tokens(length) for length in lengths])
    axes.set_xlabel("context length, tokens", color=FAINT)
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    shade_native(axes, low, high, native_length)


def shade_native(axes: Any, low: float, high: float, native_length: int) -> None:
    """Shades [low, native_length] and says so, unless all of the axis lies in it."""
    if native_length >= high:
        return
    axes.axvspan(low, native_length, color=WINDOW, zorder=0, linewidth=0)
    axes.axvline(native_length, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"trained for {native_length:,}",
        (native_length, 0.5),
        xycoords=("data", "axes fraction"),
        xytext=(-7, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        size=8.5,
        color=FAINT,
    )
