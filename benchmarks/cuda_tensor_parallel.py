"""The reference job on the GPUs of one machine as tensor-parallel ranks, beside one of them.

Prefill of long prompts, decode after the longest, and in a batch of 8, on --tp GPUs, then on one:
how much of that many times the speed is reached, and memory against plan. Each figure is the best
of its rounds, with its floor beside it (cuda_reference_job.py), shared out among the ranks.

    python benchmarks/cuda_tensor_parallel.py /dev/shm/reference-job --tp 2

On one GPU its ranks are processes that share it, by a launcher. NCCL then goes by way of sockets
and the card switches between processes, so that only the tokens, which are compared, say anything:

    python benchmarks/random_model.py --layers 4 /dev/shm/slim-job
    torchrun --master-addr 127.0.0.1 --nproc-per-node 2 benchmarks/cuda_tensor_parallel.py \\
        /dev/shm/slim-job --tp 2 --lengths 4096 --cache-blocks 512 --rounds 1
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from cuda_million import GpuMemory
from cuda_reference_job import (
    BATCH,
    Floors,
    Job,
    engine_config,
    free_torch_memory,
    machine_rates,
)

#: Of N GPUs at 131072 tokens of prefill: N times the speed of one by at least this much.
EFFICIENCY = {2: 0.9, 4: 0.8}
#: Tokens of each of a batch.
SHORT = 2048
SAME_TOKENS = 16


def share_one_card(rank: str) -> None:
    """NCCL refuses two ranks of one machine on the same card, so each is a machine of its own."""
    os.environ |= {
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
    }


def config_of(args: argparse.Namespace, tp: int) -> Any:
    return engine_config(max(args.lengths) + 256, args.cache_blocks or 0.99, tp)


def measure(args: argparse.Namespace, tp: int, memory: GpuMemory | None) -> dict[str, Any]:
    """Figures by name; "tokens": greedy ones of a fixed prompt."""
    job = Job(args.folder, config_of(args, tp))
    figures: dict[str, Any] = {"backend": job.engine.model.backend}

    def add(name: str, value: float) -> None:
        figures[name] = value
        print(f"tp {tp}: {name:26} {value:9.4g}", flush=True)

    add("load", job.load_s)
    greedy = job.config(max_new_tokens=SAME_TOKENS, ignore_eos=True)
    prompt = [(7919 * i) % 32000 + 3 for i in range(SHORT)]
    figures["tokens"] = job.engine.generate(prompt, greedy).wait().token_ids
    for n in args.lengths:
        runs = [job.run(n, 129 if n == args.lengths[-1] else 1) for _ in range(args.rounds)]
        add(f"prefill {n}", min(p for p, _ in runs))
    add(f"decode at {args.lengths[-1]}", min(d for _, d in runs))
    rate = max(job.batch_rate(SHORT, BATCH) for _ in range(args.rounds))
    add(f"decode at {SHORT}, batch {BATCH}", BATCH / rate)
    plan = job.engine.plan
    figures["planned_bytes"] = {
        name: getattr(plan, name)
        for name in (
            *("weight_bytes", "kv_bytes", "activation_bytes", "workspace_bytes"),
            *("overhead_bytes", "total_bytes", "device_bytes"),
        )
    }
    if memory is not None:
        figures["peak_bytes"] = memory.taken()
    job.engine.close()
    return figures


def floor_of(floors: Floors, name: str) -> float | None:
    kind, _, rest = name.partition(" ")
    if kind == "prefill":
        return floors.prefill(int(rest))
    if kind == "decode":
        keys, _, batch = rest.removeprefix("at ").partition(", batch ")
        return floors.decode(int(keys), int(batch or 1))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made by random_model.py")
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--cache-blocks", type=int, help="default: what the memory holds")
    parser.add_argument("--json", type=Path, help="where the record goes")
    args = parser.parse_args()

    rank = os.environ.get("RANK")
    if rank is not None:
        share_one_card(rank)
    if rank not in (None, "0"):
        from longspan._core import Engine

        Engine.follow(str(args.folder), config_of(args, args.tp))
        return 0

    model = json.loads((args.folder / "config.json").read_text())
    rates = machine_rates()
    free_torch_memory()
    # The last GPU, which has nothing else.
    memory = GpuMemory(args.tp - 1) if rank is None else None
    several = measure(args, args.tp, memory)
    one = measure(args, 1, None)
    print(f"{rates['device']}: {several['backend']}")
    rows = []
    floors = Floors(model, {k: args.tp * v for k, v in rates.items() if isinstance(v, float)})
    for name, value in several.items():
        floor = floor_of(floors, name)
        if floor is None:
            continue
        efficiency = one[name] / value / args.tp
        least = EFFICIENCY.get(args.tp) if name == "prefill 131072" and rank is None else None
        met = None if least is None else efficiency >= least
        words = [f"{name:26} {value:9.4g} s, on one {one[name]:9.4g} s: {efficiency:4.0%}"]
        words += [f"floor {floor:9.4g} ({floor / value:4.0%})"]
        words += [] if met is None else [f"at least {least:.0%}: {'met' if met else 'NOT MET'}"]
        print("  ".join(words), flush=True)
        rows.append(
            {"name": name, "seconds": value, "on_one": one[name], "efficiency": efficiency}
            | {"floor": floor, "target": least, "met": met}
        )
    planned, peak = several["planned_bytes"]["total_bytes"], several.get("peak_bytes")
    print(f"planned for a rank {planned / 2**30:.2f} GiB", end="")
    print(f", taken {peak / 2**30:.2f} GiB" if peak else "")
    differing = (a != b for a, b in zip(several["tokens"], one["tokens"], strict=True))
    same = next((i for i, differs in enumerate(differing) if differs), SAME_TOKENS)
    print(f"the first {same} of {SAME_TOKENS} greedy tokens are those of one rank")
    record = {
        "benchmark": "cuda_tensor_parallel",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"host": platform.platform(), "backend": several["backend"], **rates},
        "model": model,
        "tp": args.tp,
        "one_card": rank is not None,
        "results": rows,
        "one": one,
        "several": several,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if same > 0 and all(row["met"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
