"""What a run did, as JSON from which it can be repeated.

Keys: schema (SCHEMA); kind; complete (false while it runs and after an interruption); command;
started (UTC); seconds; model; options (of the engine, where not the default); engine (as it
resolved them); settings (of the evaluation, seed included); environment; results; summary. A
prompt's hash is the SHA-256 of its token ids as little-endian int32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longspan import _core
from longspan._core import InvalidArgument, RopeProfile

if TYPE_CHECKING:
    from longspan._core import Engine

#: Of records and journals; counts up when a key changes its meaning or goes.
SCHEMA = 1

_ENGINE = (
    "device",
    "tp",
    "cp",
    "num_threads",
    "session_len",
    "max_batch_size",
    "cache_max_entry_count",
    "cache_block_seq_len",
    "kv_cache_dtype",
    "prefill_attention",
    "linear_dtype",
    "enable_prefix_caching",
    "max_prefill_token_num",
    "rope_scaling_factor",
    "rope_length",
    "deterministic",
)
_MODEL = (
    "architecture",
    "num_parameters",
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "native_length",
    "rope",
)
_ROPE = ("type", "factor", "base", "length", "native_length", "attention_factor", "logn_length")


class Record:
    """The record of one run, kept on disk after every result. A context manager.

    A file is replaced as a whole each time, so that it is valid JSON whenever one looks; what can
    only be written to ("-" is standard output, or a pipe) gets the record once, at the end.
    """

    def __init__(
        self,
        kind: str,
        destination: str | None,
        *,
        model: str,
        command: Sequence[str] = (),
        options: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """destination: a path, "-" or None. Throws InvalidArgument when it cannot be written."""
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "complete": False,
            "command": list(command),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "model": {"path": model},
            "options": options or {},
            "engine": {},
            "settings": settings or {},
            "environment": environment(),
            "results": [],
            "summary": {},
        }
        self._begin = time.perf_counter()
        self._destination = destination
        path = None if destination in (None, "-") else Path(destination).resolve()
        if path and path.is_dir():
            raise InvalidArgument(f"{path}: expected a file, got a directory")
        self._file = path if path and (path.is_file() or not path.exists()) else None
        self.save()

    def describe(self, facts: dict[str, Any]) -> None:
        """Notes what engine_facts() says of the loaded model."""
        self.content["model"] |= facts["model"]
        self.content["engine"] = facts["engine"]
        self.save()

    def add(self, result: Any) -> None:
        self.content["results"].append(result)
        self.save()

    def finish(self, summary: dict[str, Any]) -> None:
        self.content["summary"] = summary
        self.content["complete"] = True
        self.save()

    def save(self) -> None:
        self.content["seconds"] = time.perf_counter() - self._begin
        if self._file is None:
            return
        part = self._file.with_name(f".{self._file.name}.{os.getpid()}.part")
        try:
            part.write_text(self.text(), encoding="utf-8")
            os.replace(part, self._file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InvalidArgument(
                f"{self._file}: expected to write it, {error.strerror}"
            ) from error

    def text(self) -> str:
        return json.dumps(self.content, default=to_json, indent=2, ensure_ascii=False) + "\n"

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *error: object) -> None:
        if self._destination == "-":
            sys.stdout.write(self.text())
        elif self._destination is not None and self._file is None:
            Path(self._destination).write_text(self.text(), encoding="utf-8")


def engine_facts(engine: Engine, varying: Collection[str] = ()) -> dict[str, Any]:
    """The loaded model, and the options as the engine resolved them but for the varying ones."""
    info, config = engine.model, engine.config
    options = {name: getattr(config, name) for name in _ENGINE if name not in varying}
    return {
        "model": {name: getattr(info, name) for name in _MODEL},
        "engine": {"backend": info.backend, "dtype": info.dtype} | options,
    }


def environment() -> dict[str, Any]:
    """Versions and the machine."""
    return {
        "longspan": _core.version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "backends": {b.name: b.detail for b in _core.backends() if b.available},
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def sha256_of_ids(ids: Sequence[int] | npt.NDArray[Any]) -> str:
    """Of the token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def sha256_of_text(text: str) -> str:
    """Of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_json(value: Any) -> Any:
    """What json.dumps asks for a value it does not know."""
    if isinstance(value, RopeProfile):
        return {name: getattr(value, name) for name in _ROPE}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"record: expected what JSON can hold, got {type(value).__name__}")
