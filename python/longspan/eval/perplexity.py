"""Perplexity of a text that is read in windows, in three forms.

whole: windows one after another. Every token of a window but its first is scored given all that
precede it in the window. There is no stride and nothing is scored twice.

sliding: a window begins every `stride` tokens and ends `length` tokens on or with the text; of each
are scored the tokens that the window before did not have. This is the strided perplexity of
huggingface.co/docs/transformers/perplexity: a token has at least length - stride tokens before it,
the first window's apart.

by-position: whole, with the likelihood of the tokens summed by where in the window they stand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from longspan._core import InvalidArgument
from longspan.eval.record import sha256_of_ids

if TYPE_CHECKING:
    from longspan._core import Progress, RopeProfile
    from longspan.pipeline import Pipeline


FORMS = ("whole", "sliding", "by-position")
#: Equal parts of a window that by-position tells apart.
BUCKETS = 64


@dataclass(frozen=True)
class Span:
    """ids[offset : offset + length] of a text, of which the last num_tokens are scored."""

    offset: int
    length: int
    num_tokens: int


@dataclass(frozen=True)
class Window:
    """ids[offset : offset + length] of the text, whose last num_tokens are scored. NLL in nats;
    seconds: wall time. bucket_nll, bucket_tokens: sums over the scored tokens of each equal part of
    the window, or empty."""

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
    bucket_nll: list[float]
    bucket_tokens: list[int]


def whole(total: int, length: int) -> list[Span]:
    """The windows of `length` tokens that fit in `total`, one after another."""
    return [Span(offset, length, length - 1) for offset in range(0, total - length + 1, length)]


def sliding(total: int, length: int, stride: int) -> list[Span]:
    """Windows that together score every token of the first `total` once, but for the very first;
    with a stride of `length`, but for the first of each.

    Throws InvalidArgument unless the stride is in [1, length].
    """
    if not 1 <= stride <= length:
        raise InvalidArgument(f"stride: expected an integer in [1, {length}], got {stride}")
    spans, scored = [], 0  # a window does not predict its own first token
    for offset in range(0, total, stride):
        end = min(offset + length, total)
        num_tokens = end - max(scored, offset + 1)
        if num_tokens > 0:
            spans.append(Span(offset, end - offset, num_tokens))
        scored = end
        if end == total:
            break
    return spans


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
        yield score(pipe, ids, len(ids) - 1, offset, progress=progress)
        offset += len(ids)


def score(
    pipe: Pipeline,
    ids: Sequence[int],
    num_tokens: int,
    offset: int = 0,
    buckets: int = 0,
    progress: Callable[[Sequence[Progress]], None] | None = None,
) -> Window:
    """The last num_tokens, in [1, len(ids)), of one context, which begins at `offset` of its text.
    buckets: equal parts of the context to sum over; 0: none. Throws what Pipeline.get_ppl throws.
    """
    begin = time.perf_counter()
    every = num_tokens == len(ids) - 1
    told = {} if every and not buckets else {"token_nll": True}
    result = pipe.get_ppl(ids, progress=progress, **told)[0]
    nll = result.token_nll[-num_tokens:] if told else np.empty(0)
    total = result.nll_sum if every else float(nll.sum())
    sums, counts = _by_position(nll, len(ids), buckets) if buckets else ([], [])
    return Window(
        offset=offset,
        length=len(ids),
        perplexity=perplexity(total / num_tokens),
        mean_nll=total / num_tokens,
        nll_sum=total,
        num_tokens=num_tokens,
        ids_sha256=sha256_of_ids(ids),
        seconds=time.perf_counter() - begin,
        tokens_per_s=len(ids) / result.timings.prefill_s,
        rope_profile=result.rope_profile,
        bucket_nll=sums,
        bucket_tokens=counts,
    )


def perplexity(mean_nll: float) -> float:
    """exp, infinite where it overflows."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def _by_position(
    nll: npt.NDArray[np.float64], length: int, buckets: int
) -> tuple[list[float], list[int]]:
    """Sums and counts over equal parts of [0, length); nll is of the window's last tokens."""
    part = np.arange(length - len(nll), length) * buckets // length
    sums = np.bincount(part, weights=nll, minlength=buckets)
    return sums.tolist(), np.bincount(part, minlength=buckets).tolist()


def overall(windows: Sequence[Window]) -> float:
    """exp of the mean NLL of all scored tokens."""
    return perplexity(sum(w.nll_sum for w in windows) / sum(w.num_tokens for w in windows))
