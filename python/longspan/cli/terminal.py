"""What a terminal shows: text of a model on standard output, what is said of it on stderr."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.response import Response

# C0 without tab and newline, DEL, C1: what a terminal takes as orders.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(text: str) -> None:
    """Writes a piece of text to standard output at once; a terminal gets no control characters,
    which a model may have been taught to abuse."""
    sys.stdout.write(_CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """To the terminal, but not into the answers, which may go to a file."""
    print(text, file=sys.stderr, flush=True)


def statistics(response: Response) -> str:
    timings = response.timings
    assert timings is not None
    return (
        f"{response.input_token_len:,} tokens in, {response.cached_tokens:,} of them cached, "
        f"the rest at {timings.prefill_tokens_per_s:,.0f} tokens/s; "
        f"{response.generate_token_len:,} out at {timings.decode_tokens_per_s:,.1f} tokens/s"
    )
