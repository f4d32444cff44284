"""Prose to token ids: MB of UTF-8 per second, beside the `tokenizers` library that does the work.

The text is Python's language reference, some 450 KB, the tokenizer SmolLM2's. The best of several
runs of each counts. Exits 1 when Tokenizer.encode gets below 5 MB/s, or differs from the library.

    python benchmarks/tokenizer.py
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import tokenizers
from longspan.eval.text import python_documentation
from longspan.model_path import resolve_model
from longspan.smollm2 import gguf_path
from longspan.tokenizer import Tokenizer
from machine import cpu_facts, results_path

TARGET = 5.0
RUNS = 10


def main() -> int:
    tokenizer = Tokenizer.from_dir(resolve_model(gguf_path()))
    library: Any = tokenizer.model  # type: ignore[attr-defined]
    text = python_documentation().text
    lines = text.splitlines(keepends=True)
    megabytes = len(text.encode()) / 1e6

    def speed(run: Callable[[], object]) -> float:
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return megabytes / min(times)

    same = tokenizer.encode(text) == library.encode(text).ids
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_facts()["model name"],
        "cores": len(os.sched_getaffinity(0)),
        "tokenizers": tokenizers.__version__,
        "megabytes": megabytes,
        "same_ids_as_the_library": same,
        "megabytes_per_s": {
            "longspan": speed(lambda: tokenizer.encode(text)),
            "library, whole text": speed(lambda: library.encode(text)),
            "library, lines as a batch": speed(lambda: library.encode_batch_fast(lines)),
        },
    }
    print(json.dumps(result, indent=1))
    results_path("tokenizer").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if same and result["megabytes_per_s"]["longspan"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
