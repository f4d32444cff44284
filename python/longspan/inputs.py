"""What users pass as prompts, told apart and checked before any work is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from longspan._core import InvalidArgument

TokenIds = npt.NDArray[np.int32]


def is_array(value: Any) -> bool:
    """A numpy array, a torch tensor or the like."""
    return hasattr(value, "__array__") and hasattr(value, "ndim")


def split_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts one by one, and whether there was one alone: a string, a conversation (list of
    dicts) or a sequence of token ids."""
    if is_array(prompts):
        if prompts.ndim not in (1, 2):
            raise InvalidArgument(f"token ids: expected 1 or 2 dimensions, got {prompts.ndim}")
        return ([prompts], True) if prompts.ndim == 1 else (list(prompts), False)
    if isinstance(prompts, str):
        return [prompts], True
    if not isinstance(prompts, Sequence):
        raise InvalidArgument(
            "prompts: expected a string, messages, token ids or a list of these, "
            f"got {type(prompts).__name__}"
        )
    if len(prompts) == 0:
        return [], False
    first = prompts[0]
    alone = isinstance(first, (Mapping, int, float, np.number)) or (
        is_array(first) and first.ndim == 0
    )
    return ([prompts], True) if alone else (list(prompts), False)


def token_ids(value: Any, what: str, vocab_size: int) -> TokenIds:
    """A sequence of ids as int32. Throws InvalidArgument naming `what`."""
    if isinstance(value, (str, bytes)):
        raise InvalidArgument(
            f"{what}: expected token ids, got {type(value).__name__}; pipe.tokenizer.encode() "
            "makes them of a string"
        )
    try:
        ids = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:  # ragged, or on a device
        raise InvalidArgument(f"{what}: expected token ids, {error}") from error
    if ids.size == 0:
        raise InvalidArgument(f"{what}: expected at least 1 token id, got none")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        got = f"{ids.ndim} dimensions of {ids.dtype}"
        raise InvalidArgument(f"{what}: expected one dimension of integer token ids, got {got}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        got = low if low < 0 else high
        raise InvalidArgument(f"{what}: expected token ids in [0, {vocab_size}), got {got}")
    return np.ascontiguousarray(ids, dtype=np.int32)
