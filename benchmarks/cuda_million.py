"""One passkey round at a million tokens: seconds from pipe([prompt]) to the answer.

The round is that of LMDeploy's context length extrapolation document, which takes about 364 s on
four A100-80G there, with the reference job (random_model.py; values do not matter to speed, so the
key is not found and only the work is judged). Attention is exact: every key is read. One GPU, or
with --tp N of this machine. Each figure stands beside its floor: all FLOPs at CEILING, or all bytes
at COPY, the most that an H100 has shown in bfloat16 attention and in copying memory, of every GPU.

    python benchmarks/cuda_million.py /dev/shm/reference-job --json million.json

The model is made first where the folder is empty. --max-seconds ends a run early with what was
measured by then. --get-ppl N scores the first N tokens of the same prompt, which is to take no
longer, after the round or, with --no-passkey, instead of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda_reference_job import Floors
from longspan.progress import rate

CEILING = 690e12  # FLOP/s
COPY = 3.0e12  # bytes/s
TARGET_S = 364.0
SAID_EVERY_S = 10.0
#: What the document leaves free in the prompt.
ROOM = 1000
#: Tokens of a KV block.
BLOCK = 64
#: Prompt tokens in a step, the device's best first.
CHUNKS = (None, 4224, 2112, 1056)


class OutOfTime(Exception):
    """--max-seconds are over."""


def prefill_floor(floors: Floors, tokens: int, args: argparse.Namespace) -> float:
    """Seconds; products in bytes take half the time: those of queries and keys, half of attention,
    or those of weights and values too, and with --linear-dtype the layers' linears."""
    flops = floors.flops(tokens)
    in_bytes = {"int8": 0.5, "int8_fp8": 1.0}.get(args.prefill_attention, 0.0)
    flops -= floors.pair_flops * tokens * tokens / 2 * in_bytes / 2
    if args.linear_dtype == "int8":
        flops -= floors.linear * tokens
    return flops / floors.rates["bf16_product_flops"]


class GpuMemory:
    """The memory in use on a GPU, as nvidia-smi tells it twice a second; MiB."""

    def __init__(self, gpu: int = 0) -> None:
        self.before: int | None = None  # when the watching began
        self.peak = 0
        command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used"]
        command += ["--format=csv,noheader,nounits", "--loop-ms=500"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            return
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 10.0
        while self.before is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _watch(self) -> None:
        for line in self._process.stdout or ():
            if not line.strip().isdecimal():
                return
            self.peak = max(self.peak, int(line))
            if self.before is None:
                self.before = int(line)

    def taken(self) -> int | None:
        """Bytes at the peak beyond those in use before; None where nobody could tell."""
        return None if self.before is None else (self.peak - self.before) << 20


class Watch:
    """A progress callback: a line every SAID_EVERY_S, and OutOfTime at the deadline."""

    def __init__(self, floors: Floors, deadline: float) -> None:
        self.floors = floors
        self.deadline = deadline
        self.last: Any = None  # the latest Progress with work in it
        self._said = time.monotonic()

    def __call__(self, states: Sequence[Any]) -> None:
        state = self.last = states[0]
        now = time.monotonic()
        if now - self._said >= SAID_EVERY_S and state.tokens_per_s > 0:
            self._said = now
            print(
                f"  {state.prefill_done:,} of {state.prefill_total:,} tokens, "
                f"{rate(states)}, {state.eta_s:,.0f} s left, {state.generated} generated",
                flush=True,
            )
        if now > self.deadline:
            raise OutOfTime

    def seconds(self) -> float:
        return self.last.prefill_done / self.last.tokens_per_s if self.last.tokens_per_s else 0.0

    def tflops(self) -> float:
        return self.last.flops_per_s * 1e-12


def passkey_prompt(tokenizer: Any, session_len: int, seed: int) -> tuple[str, int]:
    """The prompt of the document's program, and its key."""
    from longspan.eval.passkey import FILLER, KEY_END, QUESTION, TASK, information

    random = np.random.default_rng(seed)
    fillers = (session_len - ROOM) // len(tokenizer.encode(FILLER))
    before = int(random.integers(0, fillers))
    key = int(random.integers(1, KEY_END))
    parts = [TASK, " ".join([FILLER] * before), information(key)]
    parts += [" ".join([FILLER] * (fillers - before)), QUESTION]
    return " ".join(parts), key


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those given, and where they leave it open the largest chunk with which the session fits."""
    from longspan import EngineConfig, plan_memory

    options: dict[str, Any] = {
        "device": args.device,
        "tp": args.tp,
        "session_len": args.session_len,
        "rope_scaling_factor": 2.5,
        "max_batch_size": 1,
        "cache_max_entry_count": args.cache_max_entry_count or -(-args.session_len // BLOCK),
        "cache_block_seq_len": BLOCK,
        "kv_cache_dtype": args.kv_cache_dtype,
    }
    for name in ("prefill_attention", "linear_dtype"):
        if given := getattr(args, name):
            options[name] = given
    for chunk in (args.chunk,) if args.chunk else CHUNKS:
        options["max_prefill_token_num"] = chunk
        if plan_memory(str(args.folder), EngineConfig(**options)).fits:
            break
    return options


def passkey_round(pipe: Any, prompt: str, key: int, args: Any, watch: Watch) -> dict[str, Any]:
    from longspan import GenerationConfig

    begin = time.perf_counter()
    tokens = len(pipe.tokenizer.encode(prompt))
    tokenize_s = time.perf_counter() - begin
    print(f"{tokens:,} tokens, {tokenize_s:.2f} s to encode", flush=True)
    # Random weights know no end: the tokens of an answer, whatever they are.
    answer = GenerationConfig(max_new_tokens=args.max_new_tokens, ignore_eos=True)
    begin = time.perf_counter()
    try:
        response = pipe([prompt], answer, progress=watch)[0]
    except OutOfTime:
        seconds, done = watch.seconds(), watch.last.prefill_done
        return {
            "complete": False,
            "prompt_tokens": tokens,
            "prefilled_tokens": done,
            "prefill_s": seconds,
            "prefill_tflops": watch.tflops(),
            "prefill_floor_s": prefill_floor(watch.floors, done, args),
        }
    pipe_s = time.perf_counter() - begin
    timings = response.timings
    assert timings is not None
    return {
        "complete": True,
        "prompt_tokens": tokens,
        "generated_tokens": response.generate_token_len,
        "tokenize_s": tokenize_s,
        "pipe_s": pipe_s,
        "answer_s": pipe_s - tokenize_s,  # the figure
        "prefill_s": timings.prefill_s,
        "prefill_tflops": watch.floors.flops(tokens) / timings.prefill_s * 1e-12,
        "prefill_floor_s": prefill_floor(watch.floors, tokens, args),
        "decode_s_per_token": timings.decode_s / max(timings.decode_tokens, 1),
        "decode_floor_s": watch.floors.decode(tokens),
        "key": key,
        "answer": response.text,
    }


def score(pipe: Any, prompt: str, args: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    ids = pipe.tokenizer.encode(prompt)[: args.get_ppl]
    begin = time.perf_counter()
    try:
        perplexity = pipe.get_ppl(ids, progress=watch)[0]
    except OutOfTime:
        return {"complete": False, "tokens": len(ids), "prefilled_tokens": watch.last.prefill_done}
    seconds = time.perf_counter() - begin
    floors = watch.floors
    scoring = 2 * floors.head * len(ids)
    flops = floors.flops(len(ids)) + scoring
    return {
        "complete": True,
        "tokens": len(ids),
        "seconds": seconds,
        "tflops": flops / seconds * 1e-12,
        "floor_s": prefill_floor(floors, len(ids), args)
        + scoring / floors.rates["bf16_product_flops"],
        "mean_nll": perplexity.mean_nll,
    }


def report(record: dict[str, Any]) -> None:
    def line(name: str, value: float, unit: str, floor: float | None = None) -> None:
        words = f"{name:28} {value:10.4g} {unit}"
        print(words + (f"   floor {floor:.4g} ({floor / value:.0%})" if floor else ""), flush=True)

    if one := record.get("passkey"):
        if not one["complete"]:
            print(f"stopped after {one['prefilled_tokens']:,} of {one['prompt_tokens']:,} tokens")
        line("prefill", one["prefill_s"], "s", one["prefill_floor_s"])
        ceiling = record["ceiling"]["flops"] * 1e-12
        line("prefill rate", one["prefill_tflops"], f"TFLOP/s, ceiling {ceiling:.0f}")
        if one["complete"]:
            line("decode", 1e3 * one["decode_s_per_token"], "ms/token", 1e3 * one["decode_floor_s"])
            line(
                "pipe([prompt]) to answer",
                one["answer_s"],
                f"s less {one['tokenize_s']:.2f} s to encode",
            )
    if (ppl := record.get("get_ppl")) and ppl["complete"]:
        line(f"get_ppl of {ppl['tokens']:,}", ppl["seconds"], "s", ppl["floor_s"])
    gib = 1 / 2**30
    line("planned", record["planned_bytes"]["total_bytes"] * gib, "GiB")
    if record["peak_bytes"] is not None:
        line("peak, with CUDA's own", record["peak_bytes"] * gib, "GiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the model; filled where there is none")
    parser.add_argument("--session-len", type=int, default=1_000_000)
    parser.add_argument("--kv-cache-dtype", default="int8")
    parser.add_argument("--prefill-attention")
    parser.add_argument("--linear-dtype")
    parser.add_argument("--chunk", type=int, help="most prompt tokens in a step")
    parser.add_argument("--cache-max-entry-count", type=float, help="default: what it takes")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--get-ppl", type=int, metavar="TOKENS")
    parser.add_argument("--no-passkey", dest="passkey", action="store_false")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the record goes")
    args = parser.parse_args()
    if not args.passkey and not args.get_ppl:
        parser.error("--no-passkey: expected --get-ppl with it, got nothing to do")
    deadline = time.monotonic() + args.max_seconds

    if not (args.folder / "config.json").exists():
        # In a process of its own, whose GPU memory goes with it.
        maker = Path(__file__).with_name("random_model.py")
        subprocess.run([sys.executable, maker, args.folder], check=True)
    memory = GpuMemory() if args.device.startswith("cuda") else None

    from longspan import EngineConfig, pipeline

    model = json.loads((args.folder / "config.json").read_text())
    rates = {"bf16_product_flops": args.tp * CEILING, "copy_bytes_per_s": args.tp * COPY}
    floors = Floors(model, rates)
    floors.linear_bytes = 1 if args.linear_dtype == "int8" else 2
    options = engine_options(args)
    begin = time.perf_counter()
    with pipeline(args.folder, EngineConfig(**options)) as pipe:
        load_s = time.perf_counter() - begin
        plan = pipe.engine.plan
        floors.kv_bytes = args.tp * plan.block_bytes / pipe.engine.config.cache_block_seq_len
        print(f"{pipe.engine.model.backend}: {options}; loaded in {load_s:.1f} s", flush=True)
        prompt, key = passkey_prompt(pipe.tokenizer, args.session_len, args.seed)
        record: dict[str, Any] = {
            "benchmark": "cuda_million",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"host": platform.platform(), "backend": pipe.engine.model.backend},
            "model": model,
            "options": options,
            "ceiling": {"flops": args.tp * CEILING, "copy_bytes_per_s": args.tp * COPY},
            "load_s": load_s,
            "planned_bytes": {
                name: getattr(plan, name)
                for name in (
                    *("weight_bytes", "kv_bytes", "activation_bytes", "workspace_bytes"),
                    *("total_bytes", "device_bytes"),
                )
            },
        }
        if args.passkey:
            watch = Watch(floors, deadline)
            record["passkey"] = passkey_round(pipe, prompt, key, args, watch)
        if args.get_ppl:
            record["get_ppl"] = score(pipe, prompt, args, Watch(floors, deadline))
        record["peak_bytes"] = memory.taken() if memory else None
    report(record)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    seconds = [
        part.get(name, float("inf"))
        for part, name in ((record.get("passkey"), "answer_s"), (record.get("get_ppl"), "seconds"))
        if part is not None
    ]
    return 0 if max(seconds) <= TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
