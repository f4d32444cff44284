"""The reference job on one GPU: prefill of long prompts, decode after them, decode in a batch.

Random weights in InternLM2.5-7B-Chat-1M's shape (random_model.py), bfloat16 weights and KV cache,
one request at a time unless said. Each figure is the best of its rounds, with its floor beside it:
the FLOPs or bytes that nothing avoids over what the same card reaches in a bfloat16 product of 8192
cubed and in copying memory, both measured by torch at the start.

    python benchmarks/cuda_reference_job.py /dev/shm/reference-job
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
#: Name -> (limit, whether the figure must be at most or at least the limit).
TARGETS = {
    "prefill 32768": (1.2, "at most"),
    "prefill 131072": (10.5, "at most"),
    "decode at 131072": (11.5e-3, "at most"),
    "batch 8 over batch 1 at 2048": (6.0, "at least"),
    "load": (8.0, "at most"),
    "host memory of loading": (4.0, "at most"),
    "first token amid a long prefill": (2.0, "at most"),
    "cancelling a long prefill": (1.0, "at most"),
    "GPU idle in a prefill": (0.02, "at most"),
}


def machine_rates() -> dict[str, Any]:
    import torch

    def best(run: Callable[[], Any], rounds: int = 5) -> float:
        times = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                run()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / 5)
        return min(times)

    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rates = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bf16_product_flops": 2 * n**3 / best(lambda: a @ b),
        "copy_bytes_per_s": 2 * source.numel() / best(lambda: target.copy_(source)),
    }
    return rates


def free_torch_memory() -> None:
    import torch

    torch.cuda.empty_cache()


def gpu_times(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of `run` in which the GPU runs kernels, and from its first kernel to its last, by
    CUPTI's timeline."""
    import torch

    # Sees the kernels of the whole process, not torch's alone.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        raise RuntimeError("expected kernels in the profile of a run, got none")
    busy, end = 0.0, spans[0][0]
    for begin, finish in spans:
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return busy * 1e-6, (end - spans[0][0]) * 1e-6


class Floors:
    """What no implementation avoids: FLOPs of linears and of causal attention, bytes of weights and
    cached keys and values."""

    def __init__(self, config: dict[str, Any], rates: dict[str, Any]) -> None:
        c = config
        layers, hidden = c["num_hidden_layers"], c["hidden_size"]
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        per_layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * c["intermediate_size"]
        self.linear = layers * per_layer
        self.head = hidden * c["vocab_size"]
        self.pair_flops = 4 * layers * heads * dim
        self.kv_bytes = 2 * 2 * layers * kv_heads * dim
        self.linear_bytes = 2  # of a weight of the layers
        self.rates = rates

    def flops(self, tokens: int) -> float:
        """Of a prefill and its one row of logits."""
        return 2 * self.linear * tokens + 2 * self.head + self.pair_flops * tokens * tokens / 2

    def prefill(self, tokens: int) -> float:
        return self.flops(tokens) / self.rates["bf16_product_flops"]

    def decode(self, keys: int, batch: int = 1) -> float:
        weights = self.linear_bytes * self.linear + 2 * self.head
        read = weights + batch * keys * self.kv_bytes
        return read / self.rates["copy_bytes_per_s"]


def engine_config(session_len: int, cache_share: float, tp: int = 1) -> Any:
    from longspan._core import EngineConfig

    return EngineConfig(
        device="cuda",
        tp=tp,
        session_len=session_len,
        max_batch_size=BATCH,
        cache_max_entry_count=cache_share,
    )


class HostMemory:
    """Within it, the most memory of this process beyond what it had and the pages of files, bytes;
    looked at a hundred times a second. Page-locked memory that the driver maps is not seen."""

    peak = 0

    def __enter__(self) -> HostMemory:
        self._before = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) << 10

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self._now() - self._before)


class Job:
    """config: an engine_config()."""

    def __init__(self, folder: Path, config: Any) -> None:
        from longspan._core import Engine, GenerationConfig

        self.config = GenerationConfig
        with HostMemory() as memory:
            start = time.perf_counter()
            self.engine = Engine.load(str(folder), config)
            self.load_s = time.perf_counter() - start
        self.load_bytes = memory.peak
        self.random = np.random.default_rng(0)

    def submit(self, tokens: int, new_tokens: int) -> Any:
        ids = self.random.integers(3, self.engine.model.vocab_size, tokens).tolist()
        config = self.config(max_new_tokens=new_tokens, ignore_eos=True)
        return self.engine.generate(ids, config)

    def run(self, tokens: int, new_tokens: int) -> tuple[float, float]:
        """Seconds of the prefill and of a decoded token."""
        out = self.submit(tokens, new_tokens).wait()
        return out.prefill_s, out.decode_s / max(new_tokens - 1, 1)

    def promptness(self, tokens: int, rounds: int) -> tuple[float, float]:
        """Amid the prefill of that many tokens, the worst of the rounds: seconds to the first token
        of a request of 100, and from cancelling the long one to its memory being free."""
        first = cancelled = 0.0
        for i in range(rounds):
            long = self.submit(tokens, 1)
            while long.progress().prefill_done < tokens * (i + 1) // (8 * rounds):
                time.sleep(0.01)
            start = time.perf_counter()
            self.submit(100, 1).wait()
            first = max(first, time.perf_counter() - start)
            time.sleep(0.1 + 0.2 * i)  # to another point of a step
            if long.progress().prefill_done >= tokens:
                raise RuntimeError(f"expected a prefill of {tokens} tokens under way, got its end")
            start = time.perf_counter()
            long.cancel()
            if long.wait().finish_reason != "cancelled":
                raise RuntimeError("expected a cancelled request, got a whole one")
            while self.engine.metrics().running > 0:
                time.sleep(0.001)
            cancelled = max(cancelled, time.perf_counter() - start)
        return first, cancelled

    def idle_share(self, tokens: int) -> float:
        """The share of a prefill, from its first kernel to its last, in which the GPU runs none."""
        busy, whole = gpu_times(lambda: self.run(tokens, 1))
        return 1.0 - busy / whole

    def batch_rate(self, tokens: int, batch: int) -> float:
        """Decoded tokens/s of all sequences together, prefills taken off."""

        def seconds(new_tokens: int) -> float:
            start = time.perf_counter()
            for handle in [self.submit(tokens, new_tokens) for _ in range(batch)]:
                handle.wait()
            return time.perf_counter() - start

        long, short = 257, 1
        return batch * (long - short) / (seconds(long) - seconds(short))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made by random_model.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument(
        "--beside", type=int, default=500_000, help="tokens of the prefill that others come amid"
    )
    parser.add_argument("--json", type=Path, help="where the record goes")
    args = parser.parse_args()

    config = json.loads((args.folder / "config.json").read_text())
    rates = machine_rates()
    free_torch_memory()
    floors = Floors(config, rates)
    lengths = [int(n) for n in args.lengths.split(",")]
    job = Job(args.folder, engine_config(max(*lengths, args.beside) + 256, 0.99))
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, floor: float | None = None) -> None:
        limit, sense = TARGETS.get(name, (None, None))
        met = None if limit is None else value <= limit if sense == "at most" else value >= limit
        rows.append(
            {
                "name": name,
                "value": value,
                "unit": unit,
                "floor": floor,
                "target": limit,
                "met": met,
            }
        )
        words = [f"{name:32} {value:10.4g} {unit:9}"]
        if floor is not None:
            share = value / floor if unit.endswith("/s") else floor / value
            words.append(f"floor {floor:8.4g} ({share:4.0%})")
        words += [] if met is None else [f"{sense} {limit:g}: {'met' if met else 'NOT MET'}"]
        print("  ".join(words), flush=True)

    print(f"{rates['device']}: {job.engine.model.backend}")
    add("load", job.load_s, "s")
    add("host memory of loading", job.load_bytes / 2**30, "GiB")
    job.run(2048, 8)  # the first use of every kernel
    for n in lengths:
        runs = [job.run(n, 129 if n == lengths[-1] else 1) for _ in range(args.rounds)]
        add(f"prefill {n}", min(p for p, _ in runs), "s", floors.prefill(n))
        if n == lengths[-1]:
            add(f"decode at {n}", min(d for _, d in runs), "s/token", floors.decode(n))
    add("GPU idle in a prefill", job.idle_share(lengths[0]), "share")
    job.run(2048, 8)
    single = max(job.batch_rate(2048, 1) for _ in range(args.rounds))
    add("decode at 2048, batch 1", single, "tokens/s", 1 / floors.decode(2048))
    batch = max(job.batch_rate(2048, BATCH) for _ in range(args.rounds))
    add(f"decode at 2048, batch {BATCH}", batch, "tokens/s", BATCH / floors.decode(2048, BATCH))
    add(f"batch {BATCH} over batch 1 at 2048", batch / single, "times")
    first, cancelled = job.promptness(args.beside, 3)
    add("first token amid a long prefill", first, "s")
    add("cancelling a long prefill", cancelled, "s")
    plan = job.engine.plan
    record = {
        "benchmark": "cuda_reference_job",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"host": platform.platform(), "backend": job.engine.model.backend, **rates},
        "model": config,
        "planned_bytes": {
            name: getattr(plan, name)
            for name in ("weight_bytes", "kv_bytes", "activation_bytes", "workspace_bytes")
        },
        "results": rows,
    }
    job.engine.close()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["met"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
