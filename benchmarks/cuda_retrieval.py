"""Claim: of 20 keys spread over a million tokens all 20 are found, in every format of the cache.

The model is one whose weights are set by construction (longspan/eval/retrieval.py): two layers of
four heads of 128, each of which looks for keys of its own. The first partner comes from the
prefill, the others from 19 decoded tokens, each a reading of the whole cache. A format that the
device lacks is named and passed over.

    python benchmarks/cuda_retrieval.py [--length 1000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMATS = ("auto", "int8", "fp8", "int8_fp8", "int8_int4", "int4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1_000_000)
    parser.add_argument("--kv-cache-dtype", action="append", choices=FORMATS, help="only these")
    parser.add_argument("--prefill-attention")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="where the record goes")
    args = parser.parse_args()

    from longspan import EngineConfig, Unsupported
    from longspan._core import Engine, GenerationConfig
    from longspan.eval.retrieval import RetrievalModel

    model = RetrievalModel()
    ids, partners = model.text(args.length)
    rows: list[dict[str, Any]] = []
    backend = ""
    with tempfile.TemporaryDirectory() as scratch:
        model.write(Path(scratch))
        for name in args.kv_cache_dtype or FORMATS:
            options: dict[str, Any] = {
                "device": args.device,
                "session_len": args.length + model.num_keys,
                "max_batch_size": 1,
                "kv_cache_dtype": name,
            }
            if args.prefill_attention:
                options["prefill_attention"] = args.prefill_attention
            try:
                engine = Engine.load(scratch, EngineConfig(**options))
            except Unsupported as error:
                print(f"{name:10} {error}", flush=True)
                continue
            with engine:
                backend = engine.model.backend
                begin = time.perf_counter()
                config = GenerationConfig(max_new_tokens=model.num_keys, ignore_eos=True)
                out = engine.generate(ids, config).wait()
                seconds = time.perf_counter() - begin
            found = sum(a == b for a, b in zip(out.token_ids, partners, strict=True))
            rows.append({"options": options, "found": found, "seconds": seconds})
            print(f"{name:10} {found} of {len(partners)} found, {seconds:.1f} s", flush=True)
    if args.json:
        record = {
            "benchmark": "cuda_retrieval",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"host": platform.platform(), "backend": backend},
            "length": args.length,
            "keys": len(partners),
            "results": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if rows and all(row["found"] == len(partners) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
