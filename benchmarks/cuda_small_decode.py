"""How fast a GPU decodes a small model, whose steps wait for their host.

SmolLM2-135M-Instruct (30 layers of 576) in bfloat16: its weights are read in a tenth of a
millisecond, so that what a step takes is what launching and chaining its 250 kernels takes. Decoded
tokens/s of 1 and 8 sequences of 64 tokens that continue by 256, the best of the rounds, with the
floor beside it: the bytes of the weights over what the card reaches in copying memory. With
--profile also how long the GPU runs nothing, from CUPTI's timeline.

    python benchmarks/cuda_small_decode.py [--profile] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cuda_reference_job import free_torch_memory, gpu_times, machine_rates
from longspan.smollm2 import gguf_path

BATCHES = (1, 8)
PROMPT_TOKENS = 64
NEW_TOKENS = 256


class Decode:
    def __init__(self, folder: str) -> None:
        from longspan._core import Engine, EngineConfig, GenerationConfig, Request

        self.engine = Engine.load(
            folder, EngineConfig(device="cuda", session_len=1024, max_batch_size=max(BATCHES))
        )
        self.request = Request.generate
        self.config = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        self.random = np.random.default_rng(0)

    def step_s(self, batch: int) -> float:
        """Seconds of a decoding step of that many sequences, on average over their tokens."""
        vocabulary = self.engine.model.vocab_size
        prompts = [self.random.integers(3, vocabulary, PROMPT_TOKENS) for _ in range(batch)]
        requests = [self.request(ids.tolist(), self.config) for ids in prompts]
        outputs = [handle.wait() for handle in self.engine.submit(requests)]
        return max(out.decode_s for out in outputs) / (NEW_TOKENS - 1)

    def busy_s(self, batch: int) -> float:
        """Seconds of a step in which the GPU runs kernels."""
        return gpu_times(lambda: self.step_s(batch))[0] / NEW_TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, help="where the record goes")
    args = parser.parse_args()

    from longspan.gguf import convert

    rates = machine_rates()
    free_torch_memory()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        convert(gguf_path(), Path(folder))
        decode = Decode(folder)
        floor = 2 * decode.engine.model.num_parameters / rates["copy_bytes_per_s"]
        for batch in BATCHES:
            seconds = min(decode.step_s(batch) for _ in range(args.rounds))
            row = {"batch": batch, "tokens_per_s": batch / seconds, "step_s": seconds}
            if args.profile:
                row["busy_s"] = decode.busy_s(batch)
            rows.append(row | {"floor_s": floor})
            print(
                f"batch {batch}: {batch / seconds:8.1f} tokens/s, {1e6 * seconds:7.1f} us a step "
                f"(floor {1e6 * floor:.1f})"
                + (f", kernels run {1e6 * row['busy_s']:.1f}" if args.profile else ""),
                flush=True,
            )
        backend = decode.engine.model.backend
        decode.engine.close()
    if args.json:
        record = {
            "benchmark": "cuda_small_decode",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"host": platform.platform(), "backend": backend, **rates},
            "results": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
