"""Text of a model on a terminal."""

from __future__ import annotations

import re
import sys

# C0 without tab and newline, DEL, C1: what a terminal takes as orders.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(text: str) -> None:
    """Writes a piece of text to standard output at once; a terminal gets no control characters,
    which a model may have been taught to abuse."""
    sys.stdout.write(_CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
