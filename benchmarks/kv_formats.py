"""What the formats of the KV cache cost: SmolLM2 in bf16, perplexity on natural text and passkeys.

Of each format the rise of perplexity over the native cache is measured on the same windows of
text, and how many passkeys are found; at 8192 tokens as trained, beyond under dynamic NTK factor 4.
Activations in bf16 add noise to a rise, so its standard error over the windows stands beside it.
The record is written after every window of a format, so that a run that is cut leaves what it has.
Exits 1 when a format exceeds its limit, or finds fewer keys than the native cache.

    python benchmarks/kv_formats.py [--length 8192] [--windows 4] [--passkeys 0]
        [--formats int8,int4] [--device cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from longspan import EngineConfig, Pipeline, pipeline
from longspan.eval import passkey
from longspan.eval.record import Record, engine_facts
from longspan.eval.text import python_documentation
from longspan.smollm2 import gguf_path
from machine import results_path

#: Rise of perplexity in percent, at most.
LIMITS = {"int8": 0.15, "int8_fp8": 0.2, "int8_int4": 1.0, "fp8": 2.0, "int4": 7.0}
NATIVE = "auto"
TRAINED = 8192
BLOCK = 64  # tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=TRAINED)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--passkeys", type=int, default=0, help="rounds of passkeys a format")
    parser.add_argument("--formats", default=",".join(LIMITS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where the record goes, if not to results/")
    options = parser.parse_args()
    options.formats = options.formats.split(",")
    if unknown := set(options.formats) - set(LIMITS):
        parser.error(f"--formats: expected some of {', '.join(LIMITS)}, got {sorted(unknown)}")
    if options.windows < 1:
        parser.error(f"--windows: expected 1 or more, got {options.windows}")
    if options.device != "cpu" and options.json is None:
        parser.error("--json: expected a file, since results/ names records after the CPU")
    return options


def open_pipeline(format: str, options: argparse.Namespace) -> Pipeline:
    config = EngineConfig(
        dtype="bfloat16",
        device=options.device,
        session_len=options.length,
        max_batch_size=1,
        cache_block_seq_len=BLOCK,
        cache_max_entry_count=-(-options.length // BLOCK),  # all formats are open at once
        rope_scaling_factor=4.0 if options.length > TRAINED else 0.0,
        kv_cache_dtype=format,
    )
    return pipeline(str(gguf_path()), config)


def summarize(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each format the mean rise in percent over the windows that it and the native cache have,
    its standard error, null of one window, and the keys found, if any were asked for."""
    nll: dict[str, list[float]] = {}
    found: dict[str, int] = {}
    for row in results:
        format = row["format"]
        if "window" in row:
            nll.setdefault(format, []).append(row["mean_nll"])
        else:
            found[format] = found.get(format, 0) + row["found"]
    summary: dict[str, dict[str, Any]] = {}
    for format in nll:
        common = min(len(nll[format]), len(nll[NATIVE]))
        part = summary[format] = {"windows": common}
        if format == NATIVE:
            part["perplexity"] = float(np.exp(np.mean(nll[format])))
        else:
            rises = 100 * np.expm1(np.subtract(nll[format][:common], nll[NATIVE][:common]))
            error = float(rises.std(ddof=1) / np.sqrt(common)) if common > 1 else None
            part |= {
                "rise_percent": float(rises.mean()),
                "standard_error": error,
                "limit_percent": LIMITS[format],
            }
        if format in found:
            part["passkeys_found"] = found[format]
    return summary


def holds(summary: dict[str, dict[str, Any]]) -> bool:
    """Whether no format exceeds its limit, or finds fewer keys than the native cache."""
    keys = summary[NATIVE].get("passkeys_found", 0)
    return all(
        part["rise_percent"] <= part["limit_percent"] and part.get("passkeys_found", 0) >= keys
        for format, part in summary.items()
        if format != NATIVE
    )


def run(record: Record, options: argparse.Namespace) -> None:
    """Window by window over all formats, passkeys last."""
    content = record.content

    def note(row: dict[str, Any]) -> None:
        content["results"].append(row)
        content["summary"] = summarize(content["results"])
        record.save()
        print({"format": row["format"]} | content["summary"][row["format"]], flush=True)

    text = python_documentation().text
    formats = [NATIVE, *options.formats]
    with contextlib.ExitStack() as stack:
        pipes = {f: stack.enter_context(open_pipeline(f, options)) for f in formats}
        record.describe(engine_facts(pipes[NATIVE].engine, ("kv_cache_dtype",)))
        ids = pipes[NATIVE].tokenizer.encode(text)
        if len(ids) < options.length * options.windows:
            needed = options.length * options.windows
            raise SystemExit(f"expected a text of {needed} tokens, got {len(ids)}")
        for window in range(options.windows):
            part = ids[window * options.length : (window + 1) * options.length]
            for format, pipe in pipes.items():
                note(
                    {
                        "format": format,
                        "window": window,
                        "mean_nll": pipe.get_ppl(part)[0].mean_nll,
                        "bytes_per_token": pipe.engine.plan.block_bytes / BLOCK,
                    }
                )
        for format, pipe in pipes.items() if options.passkeys else ():
            for one in passkey.run(pipe, options.length, options.passkeys):
                note({"format": format, "passkey": one.key, "found": one.found})


def main() -> int:
    options = parse()
    path = options.json or results_path(f"kv_formats_{options.length}")
    settings = {
        "length": options.length,
        "windows": options.windows,
        "passkeys": options.passkeys,
        "text": python_documentation().source,
        "formats": options.formats,
    }
    with Record("kv_formats", str(path), model=gguf_path().name, settings=settings) as record:
        run(record, options)
        record.finish(record.content["summary"])
    print(path)
    return 0 if holds(record.content["summary"]) else 1


if __name__ == "__main__":
    sys.exit(main())
