"""The axes of a grid as one types them: 2k,8k,16k and 0,25,50."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from longspan._core import InvalidArgument

_UNITS = {"": 1, "k": 2**10, "m": 2**20}

_Value = TypeVar("_Value", int, float)


def count(word: str) -> int | None:
    """A number of tokens: 16384, 16k or 1m, where k is 1024 and m is 1024 k. None for no such."""
    match = re.fullmatch(r"([0-9]{1,18})([km]?)", word.lower())
    return int(match[1]) * _UNITS[match[2]] if match else None


def lengths(text: str) -> list[int]:
    """Ascending token counts of 2 or more, each as count() reads it. Throws InvalidArgument."""

    def one(word: str) -> int | None:
        tokens = count(word)
        return tokens if tokens is not None and tokens >= 2 else None

    return sorted(_list("length", "token counts from 2 on, such as 2k,8k,16384", text, one))


def depths(text: str) -> list[float]:
    """Ascending percentages in [0, 100] of the text that stand before. Throws InvalidArgument."""

    def one(word: str) -> float | None:
        value = _number(word)
        return value if 0 <= value <= 100 else None

    return sorted(_list("depths", "percentages in [0, 100], such as 0,50,100", text, one))


def even_depths(count: int) -> list[float]:
    """`count` depths from 0 to 100 at equal distances; a single one is 50."""
    if count < 1:
        raise InvalidArgument(f"num_depths: expected an integer >= 1, got {count}")
    return [100 * i / (count - 1) for i in range(count)] if count > 1 else [50.0]


def factors(text: str) -> list[float]:
    """rope_scaling_factors in the order given: 0 or from 1 on. Throws InvalidArgument."""

    def one(word: str) -> float | None:
        value = _number(word)
        return value if value == 0 or 1 <= value < math.inf else None

    return _list("rope_scaling_factor", "0 or a number >= 1", text, one)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _list(name: str, expected: str, text: str, one: Callable[[str], _Value | None]) -> list[_Value]:
    words = [word.strip() for word in text.split(",")]
    values = []
    for word in words:
        value = one(word)
        if value is None:
            raise InvalidArgument(f"{name}: expected {expected}, got {word or repr(text)}")
        values.append(value)
    if len(set(values)) < len(values):
        raise InvalidArgument(f"{name}: expected each once, got {_twice(values):g} twice")
    return values


def _twice(values: Iterable[_Value]) -> _Value:
    seen: set[_Value] = set()
    return next(value for value in values if value in seen or seen.add(value))
