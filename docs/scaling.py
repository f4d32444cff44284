"""Writes the tables of scaling.md, which `longspan plan --gpus` has the numbers of:

    python docs/scaling.py

They stand between comments that name them. Needs a build with the CUDA backend, no GPU."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from longspan import EngineConfig, predict_cost
from longspan._core import CostPrediction

HERE = Path(__file__).parent
PAGE = HERE / "scaling.md"
TOKENS = 1_000_000
#: What the million tokens were measured with on one GPU, which the cache fills.
IN_CODES = {
    "kv_cache_dtype": "int8_int4",
    "prefill_attention": "int8_fp8",
    "linear_dtype": "int8",
    "cache_max_entry_count": 15625,
}
#: GPUs, the model of them, context shards among them and options of the cache. What is left of the
#: GPUs splits heads: eight ways, a KV head to each.
ROWS: list[tuple[int, str, int, dict[str, Any]]] = [
    (1, "h100", 1, IN_CODES),
    (1, "h200", 1, IN_CODES),
    (8, "h100", 1, {}),
    (8, "h200", 1, {}),
    (64, "h100", 8, {}),
    (64, "h200", 8, {}),
    (512, "h100", 64, {}),
    (512, "h200", 64, {}),
]
WORDS = {
    "attention": "attention",
    "products": "products",
    "rows": "small kernels",
    "ranks": "sums over ranks",
}


def reference_job(folder: Path) -> Path:
    """The model's config.json, which is all that a plan needs."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    try:
        from random_model import REFERENCE_JOB
    finally:
        sys.path.pop(0)
    (folder / "config.json").write_text(json.dumps(REFERENCE_JOB))
    return folder


def predictions(folder: Path) -> list[CostPrediction]:
    model = str(reference_job(folder))
    return [
        predict_cost(
            model,
            EngineConfig(
                session_len=TOKENS, max_batch_size=1, device=device, tp=gpus, cp=cp, **options
            ),
        )
        for gpus, device, cp, options in ROWS
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shares(parts: Any) -> str:
    """What a time goes to, largest first, nothing below 3 %."""
    named = sorted(((getattr(parts, part) / parts.total, words) for part, words in WORDS.items()))
    return ", ".join(f"{words} {share:.0%}" for share, words in reversed(named) if share >= 0.03)


def million(costs: list[CostPrediction]) -> str:
    rows = []
    for (gpus, device, cp, options), cost in zip(ROWS, costs, strict=True):
        rows.append(
            [
                f"{gpus} {device.upper()}",
                f"{gpus}, {cp}",
                options.get("kv_cache_dtype", "bfloat16"),
                f"{cost.memory.total_bytes / 2**30:.1f} of {cost.memory.device_bytes / 2**30:.0f}",
                f"{cost.prefill.total:.1f} s",
                shares(cost.prefill),
                f"{1000 * cost.decode.total:.1f} ms",
                shares(cost.decode),
            ]
        )
    return table(
        [
            "GPUs",
            "tp, cp",
            "KV cache",
            "GiB each",
            "prefill",
            "of which",
            "a token",
            "of which",
        ],
        rows,
    )


def terms(costs: list[CostPrediction]) -> str:
    told: dict[tuple[str, str], list[str]] = {}
    for (_, device, *_), cost in zip(ROWS, costs, strict=True):
        for term in cost.terms:
            its_own = term.name in ("product", "copy")
            name = f"{term.name}, {device.upper()}" if its_own else term.name
            told[name, term.source] = [f"`{name}`", f"{term.value:.3g} {term.unit}", term.source]
    return table(["term", "value", "source"], list(told.values()))


def page(text: str, costs: list[CostPrediction]) -> str:
    """The page with its tables new."""
    for name, content in (("million", million(costs)), ("terms", terms(costs))):
        between = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        text, found = between.subn(lambda m, content=content: f"{m[1]}{content}\n{m[2]}", text)
        assert found == 1, name
    return text


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(PAGE.read_text(), predictions(Path(folder))))


if __name__ == "__main__":
    main()
