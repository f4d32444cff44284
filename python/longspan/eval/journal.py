"""What a grid has measured, a line of JSON for every cell, on disk before the next one begins.

The first line is the header: schema, kind, identity (everything a result depends on besides its
cell: model, options, settings, version) and notes (facts about the loaded model). Every other line
is the result of one cell and holds the cell's own fields. A run that finds a journal of the same
identity goes on where that one ended; its grid may have other cells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from longspan._core import InvalidArgument
from longspan.eval.record import SCHEMA, to_json

#: A cell by its fields: JSON scalars.
Cell = Mapping[str, Any]


class Journal:
    """A context manager; without a path nothing is kept."""

    def __init__(
        self, path: Path | None, kind: str, identity: Mapping[str, Any], fields: Sequence[str]
    ) -> None:
        """fields: those that tell the cells apart.

        Throws InvalidArgument when the file cannot be used: because it cannot be written, is no
        journal, or was begun with another identity, whose first difference is named.
        """
        self._fields = tuple(fields)
        self._header = {"schema": SCHEMA, "kind": kind, "identity": plain(identity)}
        self._done: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._path = path
        self._file = None
        self.notes: dict[str, Any] | None = None
        if path is not None:
            try:
                self._file = path.open("a+b")
                self._read(path)
            except OSError as error:
                raise InvalidArgument(f"{path}: expected to write it, {error.strerror}") from error

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What was found in a cell, or None."""
        return self._done.get(self._key(cell))

    def begin(self, notes: Mapping[str, Any]) -> None:
        """Before the first result: writes the header of a new journal."""
        if self.notes is None:
            self.notes = plain(notes)
            self._write(self._header | {"notes": self.notes})

    def add(self, cell: Cell, result: Any) -> dict[str, Any]:
        """The line of a finished cell: its fields, then those of the result that it has not."""
        line = plain(dict(cell)) | plain(result) | plain(dict(cell))
        self._write(line)
        self._done[self._key(cell)] = line
        return line

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _key(self, cell: Cell) -> tuple[Any, ...]:
        return tuple(cell[field] for field in self._fields)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InvalidArgument(
                f"{self._path}: expected to write it, {error.strerror}"
            ) from error

    def _read(self, path: Path) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        if lines[-1]:  # a line that an interruption tore
            self._file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        for number, text in enumerate(lines[:-1], 1):
            try:
                line = json.loads(text)
                if number == 1:
                    self._compare(path, line)
                    self.notes = dict(line["notes"])
                else:
                    self._done[self._key(line)] = line
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, InvalidArgument):
                    raise
                raise InvalidArgument(
                    f"{path}: line {number}: expected a line of an evaluation, got {text[:60]!r}"
                ) from error

    def _compare(self, path: Path, header: Any) -> None:
        ours_flat, theirs_flat = _flat(self._header), _flat(header)
        for name in [*ours_flat, *theirs_flat]:
            ours, theirs = ours_flat.get(name), theirs_flat.get(name)
            if theirs != ours:
                raise InvalidArgument(
                    f"{path}: {name}: expected the {ours!r:.70} of this run, got {theirs!r:.70}; "
                    "go on with what that run had, or name another file"
                )


def plain(value: Any) -> Any:
    """As it reads back from JSON."""
    return json.loads(json.dumps(value, default=to_json))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, by dotted names; what each run may note on its own is left out."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if prefix or name != "notes":
            flat |= _flat(inner, f"{prefix}.{name}" if prefix and prefix != "identity" else name)
    return flat
