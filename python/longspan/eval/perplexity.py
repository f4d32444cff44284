"""Perplexity of a text that is read in windows, each in one context of the whole window.

Every token of a window but its first is scored given all that precede it in the window, under the
RoPE profile of the window's length. There is no stride and nothing is scored twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longspan._core import InvalidArgument
from longspan.eval.record import sha256_of_ids

if TYPE_CHECKING:
    from longspan._core import Progress, RopeProfile
    from longspan.pipeline import Pipeline


@dataclass(frozen=True)
class Window:
    """ids[offset : offset + length] of the text, scored. NLL in nats; seconds: wall time."""

    offset: int
    length: int
    perplexity: float
    mean_nll: float
    nll_sum: float
    num_tokens: int
    ids_sha256: str
    seconds: float
    tokens_per_s: float
    rope_profile: RopeProfile


def cut(ids: Sequence[int], length: int, windows: int) -> list[Sequence[int]]:
    """The first windows of `length` tokens, one after another. Throws InvalidArgument when the
    text is shorter."""
    need = length * windows
    if need > len(ids):
        raise InvalidArgument(
            f"text: expected at least {need} tokens for {windows} windows of {length}, "
            f"got {len(ids)}"
        )
    return [ids[offset : offset + length] for offset in range(0, need, length)]


def run(
    pipe: Pipeline,
    windows: Sequence[Sequence[int]],
    progress: Callable[[Sequence[Progress]], None] | None = None,
) -> Iterator[Window]:
    """Scores consecutive windows of at least 2 tokens. Throws what Pipeline.get_ppl throws."""
    offset = 0
    for ids in windows:
        begin = time.perf_counter()
        score = pipe.get_ppl(ids, progress=progress)[0]
        yield Window(
            offset=offset,
            length=len(ids),
            perplexity=float(score),
            mean_nll=score.mean_nll,
            nll_sum=score.nll_sum,
            num_tokens=score.num_tokens,
            ids_sha256=sha256_of_ids(ids),
            seconds=time.perf_counter() - begin,
            tokens_per_s=len(ids) / score.timings.prefill_s,
            rope_profile=score.rope_profile,
        )
        offset += len(ids)


def overall(windows: Sequence[Window]) -> float:
    """exp of the mean NLL of all scored tokens."""
    return math.exp(sum(w.nll_sum for w in windows) / sum(w.num_tokens for w in windows))
