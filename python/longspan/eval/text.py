"""Natural text to measure perplexity on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longspan._core import InvalidArgument, Unsupported


@dataclass(frozen=True)
class Text:
    """source: where it comes from, as a record names it."""

    source: str
    text: str


def python_documentation() -> Text:
    """The language reference that CPython ships for help(): about 450,000 characters of English
    with code, 110,000 tokens of SmolLM2. Its wording differs a little between Python versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Unsupported(
            "text: expected a Python with the module pydoc_data, got one without it; "
            "name a file instead"
        ) from error
    return Text("pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)))


def from_file(path: Path) -> Text:
    """A UTF-8 file. Throws InvalidArgument."""
    try:
        return Text(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: expected a text file in UTF-8, got {error}") from error
