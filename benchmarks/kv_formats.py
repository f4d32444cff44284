"""What the formats of the KV cache cost in perplexity: SmolLM2 in bf16 on natural text.

Of each format the rise over the native cache is measured on the same windows of text; at 8192
tokens as trained, beyond under dynamic NTK factor 4. Exits 1 when a format exceeds its limit.

    python benchmarks/kv_formats.py [--length 8192] [--windows 2] [--formats int8,int4]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

from longspan import EngineConfig, pipeline
from longspan.eval.record import environment
from longspan.eval.text import python_documentation
from longspan.smollm2 import gguf_path
from machine import results_path

#: Rise of perplexity in percent, at most.
LIMITS = {"int8": 0.15, "int8_fp8": 0.2, "int8_int4": 1.0, "fp8": 2.0, "int4": 7.0}
TRAINED = 8192


def measure(format: str, length: int, windows: int, device: str) -> dict[str, Any]:
    config = EngineConfig(
        dtype="bfloat16",
        device=device,
        session_len=length,
        max_batch_size=1,
        rope_scaling_factor=4.0 if length > TRAINED else 0.0,
        kv_cache_dtype=format,
    )
    with pipeline(str(gguf_path()), config) as pipe:
        ids = pipe.tokenizer.encode(python_documentation().text)
        if len(ids) < length * windows:
            raise SystemExit(f"expected a text of {length * windows} tokens, got {len(ids)}")
        begin = time.perf_counter()
        parts = [ids[i * length : (i + 1) * length] for i in range(windows)]
        nll = [pipe.get_ppl(part)[0].mean_nll for part in parts]
        seconds = time.perf_counter() - begin
        tokens = pipe.engine.config.cache_block_seq_len
        bytes_per_token = pipe.engine.plan.block_bytes / tokens
    return {"mean_nll": nll, "seconds": seconds, "bytes_per_token": bytes_per_token}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=TRAINED)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--formats", default=",".join(LIMITS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    short = False
    for format in ["auto", *options.formats.split(",")]:
        results[format] = result = measure(format, options.length, options.windows, options.device)
        mean = sum(result["mean_nll"]) / options.windows
        if format == "auto":
            native = mean
            print(f"{format:10s} perplexity {math.exp(mean):.4f}", flush=True)
            continue
        result["rise_percent"] = rise = 100 * math.expm1(mean - native)
        result["limit_percent"] = LIMITS[format]
        short |= rise > LIMITS[format]
        smaller = results["auto"]["bytes_per_token"] / result["bytes_per_token"]
        print(
            f"{format:10s} rise {rise:+.3f} % (limit {LIMITS[format]} %), {smaller:.2f} times "
            "smaller",
            flush=True,
        )
    record = {
        "length": options.length,
        "windows": options.windows,
        "text": python_documentation().source,
        "model": gguf_path().name,
        "environment": environment(),
        "results": results,
    }
    path = results_path(f"kv_formats_{options.length}")
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(path)
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
