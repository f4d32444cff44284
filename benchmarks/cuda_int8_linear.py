"""Claim: with linears in int8 the perplexity of SmolLM2 rises by 0.5 % at most, on Hopper.

Windows of 8192 tokens of Python's documentation with linear_dtype="auto" and "int8", mean rise and
its standard error over the windows. With --reference-job also its prefill, decode and load times,
which have no limit: weights are read in half the bytes, and tensor cores multiply bytes at twice
the rate of bfloat16.

    python benchmarks/cuda_int8_linear.py [--windows 12] [--reference-job DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cuda_reference_job import Job, engine_config
from longspan import EngineConfig, pipeline
from longspan.eval.record import Record, engine_facts
from longspan.eval.text import python_documentation
from longspan.smollm2 import gguf_path

LIMIT_PERCENT = 0.5
DTYPES = ("auto", "int8")


def mean_nlls(record: Record, args: argparse.Namespace, linear_dtype: str) -> list[float]:
    """Of every window."""
    config = EngineConfig(
        device=args.device,
        dtype="bfloat16",
        session_len=args.length,
        max_batch_size=1,
        linear_dtype=linear_dtype,
    )
    with pipeline(str(gguf_path()), config) as pipe:
        record.describe(engine_facts(pipe.engine, ("linear_dtype",)))
        ids = pipe.tokenizer.encode(python_documentation().text)
        if len(ids) < args.length * args.windows:
            raise SystemExit(f"expected {args.length * args.windows} tokens, got {len(ids)}")
        windows = [ids[w * args.length : (w + 1) * args.length] for w in range(args.windows)]
        return [pipe.get_ppl(window)[0].mean_nll for window in windows]


def rise(nll: dict[str, list[float]]) -> dict[str, Any]:
    """Of perplexity over "auto" in percent, and its standard error, null of one window."""
    rises = 100 * np.expm1(np.subtract(nll["int8"], nll["auto"]))
    error = float(rises.std(ddof=1) / np.sqrt(len(rises))) if len(rises) > 1 else None
    return {
        "perplexity": float(np.exp(np.mean(nll["auto"]))),
        "rise_percent": float(rises.mean()),
        "standard_error": error,
        "limit_percent": LIMIT_PERCENT,
    }


def times(args: argparse.Namespace, linear_dtype: str) -> dict[str, Any]:
    config = engine_config(args.prefill + 256, 0.9)
    config.device = args.device
    config.linear_dtype = linear_dtype
    job = Job(args.reference_job, config)
    new_tokens = 129
    job.run(2048, 8)  # the first use of every kernel
    job.run(args.prefill, 1)
    prefill = min(job.run(args.prefill, 1)[0] for _ in range(2))
    decode = min(job.run(2048, new_tokens)[1] for _ in range(2))
    result = {
        "load_s": job.load_s,
        f"prefill_{args.prefill}_s": prefill,
        "decode_at_2048_s": decode,
        "weight_bytes": job.engine.plan.weight_bytes,
    }
    job.engine.close()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--reference-job", type=Path, help="made by random_model.py")
    parser.add_argument("--prefill", type=int, default=32768, help="tokens of its prompt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="where the record goes")
    args = parser.parse_args()

    settings = {
        "windows": args.windows,
        "length": args.length,
        "text": python_documentation().source,
    }
    with Record("cuda_int8_linear", args.json, model=gguf_path().name, settings=settings) as record:
        nll: dict[str, list[float]] = {}
        for linear_dtype in DTYPES:
            nll[linear_dtype] = mean_nlls(record, args, linear_dtype)
            record.add({"linear_dtype": linear_dtype, "mean_nll": nll[linear_dtype]})
        summary = rise(nll)
        print(summary, flush=True)
        for linear_dtype in DTYPES if args.reference_job else ():
            result = {"linear_dtype": linear_dtype} | times(args, linear_dtype)
            record.add(result)
            print(result, flush=True)
        record.finish(summary)
    return 0 if summary["rise_percent"] <= LIMIT_PERCENT else 1


if __name__ == "__main__":
    sys.exit(main())
