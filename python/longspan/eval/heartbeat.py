"""Signs of life for those who see no progress bar: logs, pipes, CI."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from longspan.progress import HEARTBEAT, rate

if TYPE_CHECKING:
    from longspan._core import Progress


class Heartbeat:
    """A progress callback that says one line every HEARTBEAT seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said = time.monotonic()

    def __call__(self, states: Sequence[Progress]) -> None:
        if time.monotonic() - self._said < HEARTBEAT:
            return
        self._said = time.monotonic()
        done = sum(state.prefill_done for state in states)
        total = sum(state.prefill_total for state in states)
        left = max(state.eta_s for state in states)
        eta = f", {left:,.0f} s left" if left >= 0 else ""
        self._say(f"{done:,} of {total:,} tokens, {rate(states)}{eta}")
