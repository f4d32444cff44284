"""What the cost model of `longspan plan --gpus` stands on, measured: products of the shapes that a
rank of so many has, and all-reduces of as many rows as a step has, where there are several GPUs.

The reference job's shapes (random_model.py). Weights rotate through 1 GiB, so that no product finds
its own in the second-level cache. Rates are best of the rounds: FLOPs or bytes read and written
once, over seconds; of an all-reduce NCCL's bus bandwidth, 2 (n - 1) / n of its bytes over seconds.

    python benchmarks/cuda_scaling.py --json cuda_scaling.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_model import REFERENCE_JOB

RANKS = (1, 2, 4, 8, 16, 32, 64, 512)
ROWS = (8448, 1056)
#: [rows, hidden_size] in bfloat16 of one token, of a chunk at a million tokens, of a whole one; and
#: NCCL's usual yardstick.
MESSAGES = (8 << 10, 64 << 10, 1 << 20, 1056 * 8192, 8448 * 8192, 1 << 30)


def seconds(run: Callable[[int], Any], calls: int, rounds: int = 4) -> float:
    """Of one of so many calls, queued back to back; run gets the number of the call."""
    import torch

    best = float("inf")
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for i in range(calls):
            run(i)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000 / calls)
    return best


def shapes(config: dict[str, Any], ranks: int) -> dict[str, tuple[int, int]]:
    """Of a rank: out and in features of each product. Heads do not split further than there are KV
    heads; the MLP does."""
    hidden, inner, dim = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    of_heads = min(ranks, kv_heads)
    q, kv = heads * dim // of_heads, kv_heads * dim // of_heads
    return {
        "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q),
        "gate_up": (2 * inner // ranks, hidden),
        "down": (hidden, inner // ranks),
    }


def products() -> list[dict[str, Any]]:
    import torch

    results = []
    for rows in ROWS:
        for ranks in RANKS:
            for name, (out, into) in shapes(REFERENCE_JOB, ranks).items():
                x = torch.randn(rows, into, device="cuda", dtype=torch.bfloat16)
                y = torch.empty(rows, out, device="cuda", dtype=torch.bfloat16)
                copies = max(1, min(64, (1 << 29) // (out * into)))
                w = torch.randn(copies, into, out, device="cuda", dtype=torch.bfloat16)
                flops, moved = 2 * rows * out * into, 2 * (rows * (out + into) + out * into)
                calls = max(4, min(100, int(2e13 / flops)))
                time = seconds(lambda i, x=x, w=w, y=y: torch.mm(x, w[i % len(w)], out=y), calls)
                results.append(
                    {"product": name, "ranks": ranks, "rows": rows, "out": out, "in": into}
                    | {"seconds": time, "flops_per_s": flops / time, "bytes_per_s": moved / time}
                )
    return results


def card() -> dict[str, Any]:
    import torch

    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product, copy = seconds(lambda i: a @ b, 20), seconds(lambda i: target.copy_(source), 20)
    return {
        "device": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "bf16_product_flops": 2 * n**3 / product,
        "copy_bytes_per_s": 2 * source.numel() / copy,
    }


def reduce_rank(rank: int, size: int, port: int, out: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size)
    results = []
    for message in MESSAGES:
        values = torch.ones(message // 2, device="cuda", dtype=torch.bfloat16)
        for _ in range(5):
            dist.all_reduce(values)
        values.zero_()
        calls = 20 if message > 1 << 24 else 200
        time = seconds(lambda i, values=values: dist.all_reduce(values), calls)
        bus = 2 * (size - 1) / size * message / time
        results.append({"ranks": size, "bytes": message, "seconds": time, "bus_bytes_per_s": bus})
    if rank == 0:
        out.put({"nccl": ".".join(map(str, torch.cuda.nccl.version())), "all_reduce": results})
    dist.destroy_process_group()


def all_reduces(size: int) -> dict[str, Any]:
    import torch.multiprocessing as processes

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = processes.get_context("spawn")
    out = context.Queue()
    ranks = [
        context.Process(target=reduce_rank, args=(r, size, port, out), daemon=True)
        for r in range(size)
    ]
    for rank in ranks:
        rank.start()
    result: dict[str, Any] = out.get(timeout=90)
    for rank in ranks:
        rank.join(30)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "benchmark": "cuda_scaling",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"host": platform.platform()} | card(),
        "products": products(),
    }
    for p in record["products"]:
        print(
            f"{p['product']:8} of {p['ranks']:3} ranks, {p['rows']} rows:"
            f" {p['seconds'] * 1e6:8.1f} us,"
            f" {p['flops_per_s'] / 1e12:6.1f} TFLOP/s, {p['bytes_per_s'] / 1e12:5.2f} TB/s"
        )
    if record["machine"]["gpus"] > 1:
        record |= all_reduces(record["machine"]["gpus"])
        for r in record["all_reduce"]:
            print(
                f"all-reduce of {r['bytes']:10} bytes on {r['ranks']}:"
                f" {r['seconds'] * 1e6:8.1f} us,"
                f" {r['bus_bytes_per_s'] / 1e9:6.1f} GB/s"
            )
    print(json.dumps(record["machine"]))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
