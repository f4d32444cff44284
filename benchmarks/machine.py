"""What the benchmarks share: which machine this is, and where its results go."""

from __future__ import annotations

import re
from pathlib import Path


def cpu_facts() -> dict[str, str]:
    """model name, cpu family, model, flags, ... of the first CPU."""
    pairs = re.findall(r"^([\w ]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {name: value for name, value in reversed(pairs)}


def results_path(benchmark: str) -> Path:
    """results/<benchmark>-<cpu>.json; the numbers tell CPUs of one marketing name apart."""
    cpu = cpu_facts()
    name = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*", " ", cpu["model name"].lower())
    words = [*re.findall(r"[a-z0-9]+", name), cpu["cpu family"], cpu["model"]]
    return Path(__file__).parent / "results" / f"{benchmark}-{'-'.join(words)}.json"
