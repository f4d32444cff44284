"""One table, in Markdown, of a folder of GPU records: each figure beside its floor or peer.

`.ci/gpu` ends with it. Reads the records and texts that it leaves in its --out folder; what is not
there is left out.

    python benchmarks/cuda_table.py FOLDER >table.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = ("what", "measured", "beside", "share", "aim", "")
#: Of the copy's rate, by format of the cache; see cuda_decode.cu.
DECODE_AIMS = {
    "auto": 0.9,
    "int8": 0.8,
    "int8_fp8": 0.8,
    "fp8": 0.8,
    "int8_int4": 0.8,
    "int4": 0.65,
}

Row = tuple[str, str, str, str, str, str]


def mark(met: bool | None) -> str:
    return {None: "", True: "met", False: "NOT MET"}[met]


def share_of(value: float, other: float, aim: float | None) -> tuple[str, str, str]:
    share = value / other
    return (
        f"{share:.2f}",
        "" if aim is None else f"{aim:g}",
        mark(None if aim is None else share >= aim),
    )


def reference_job(record: Any) -> Iterator[Row]:
    for row in record["results"]:
        value, floor, rate = row["value"], row["floor"], row["unit"].endswith("/s")
        share = "" if floor is None else f"{value / floor if rate else floor / value:.2f}"
        beside = "" if floor is None else f"floor {floor:.4g}"
        aim = "" if row["target"] is None else f"{row['target']:g}"
        measured = f"{value:.4g} {row['unit']}"
        yield f"reference job, {row['name']}", measured, beside, share, aim, mark(row["met"])


def attention(record: Any) -> Iterator[Row]:
    for row in record["results"]:
        ours, cudnn = row["tflops"], row["cudnn_tflops"]
        parts = share_of(ours, cudnn, 0.9)
        yield (
            f"prefill attention, {row['shape']}",
            f"{ours:.0f} TFLOP/s",
            f"cuDNN {cudnn:.0f}",
            *parts,
        )


def attention_int8(lines: str) -> Iterator[Row]:
    for row in map(json.loads, re.findall(r"^\{.*\}$", lines, re.M)):
        ours, native = row["int8_tflops"], row["bf16_tflops"]
        parts = share_of(ours, native, 1.2 if "128k" in row["shape"] else None)
        what = f"prefill attention in bytes, {row['shape']}"
        yield what, f"{ours:.0f} TFLOP/s", f"bfloat16 {native:.0f}", *parts
        both = row["int8_fp8_tflops"]
        parts = share_of(both, ours, 1.0 if "128k" in row["shape"] else None)
        what = f"prefill attention in bytes and e4m3, {row['shape']}"
        yield what, f"{both:.0f} TFLOP/s", f"int8 {ours:.0f}", *parts


def attention_error(lines: str) -> Iterator[Row]:
    for row in map(json.loads, re.findall(r"^\{.*\}$", lines, re.M)):
        what = f"error of attention, {row['keys']:,} keys, {row['format']}, {row['kernel']}"
        rms, worst = (f"{row[name]:.4f} of {row[f'limit_{name}']:.4f}" for name in ("rms", "worst"))
        yield what, f"rms {rms}", f"worst {worst}", "", "", mark(row["ok"])


def decode(lines: str) -> Iterator[Row]:
    rates = {
        name.strip(): float(rate)
        for name, rate in re.findall(r"^(.*?) +[\d.]+ us +([\d.]+) GB/s$", lines, re.M)
    }
    copy = rates.pop("copy of 1 GiB", None)
    for name, rate in rates.items() if copy else ():
        aimed = re.search(r"D 128 .* (131072 batch 1|32768 batch 16) block_len 64 KV (\w+)$", name)
        if not aimed:
            continue
        what = f"decode attention, {aimed[1].replace(' batch ', ' keys, batch ')}, {aimed[2]}"
        parts = share_of(rate, copy, DECODE_AIMS[aimed[2]])
        yield what, f"{rate:.0f} GB/s", f"copy {copy:.0f}", *parts


def linear(record: Any) -> Iterator[Row]:
    copy = record["results"][0]["GB/s"]
    for row in record["results"][1:]:
        parts = share_of(row["GB/s"], copy, 0.85 if row["rows"] <= 8 else None)
        what = f"product of {row['rows']} rows, {row['name']}"
        yield what, f"{row['GB/s']:.0f} GB/s", f"copy {copy:.0f}", *parts


def small_decode(record: Any) -> Iterator[Row]:
    for row in record["results"]:
        what = f"SmolLM2-135M decodes, batch {row['batch']}"
        measured, floor = f"{row['tokens_per_s']:.0f} tokens/s", row["floor_s"] * 1e6
        yield (
            what,
            measured,
            f"floor {floor:.0f} us a step",
            f"{row['floor_s'] / row['step_s']:.2f}",
            "",
            "",
        )


def int8_linear(record: Any) -> Iterator[Row]:
    rise, limit = (record["summary"][name] for name in ("rise_percent", "limit_percent"))
    what = "SmolLM2's perplexity with linears in int8"
    yield what, f"{rise:+.2f} %", "bfloat16", "", f"{limit:g}", mark(rise <= limit)
    wide, narrow = ([r for r in record["results"] if "load_s" in r] or [{}, {}])[:2]
    for name, ours in narrow.items():
        if name.endswith("_s"):
            what = f"reference job with linears in int8, {name.removesuffix('_s')}"
            parts = share_of(wide[name], ours, None)
            yield what, f"{ours:.4g} s", f"bfloat16 {wide[name]:.4g}", *parts


def retrieval(record: Any) -> Iterator[Row]:
    for row in record["results"]:
        options = row["options"]
        what = f"keys found in {record['length']:,} tokens, {options['kv_cache_dtype']}"
        attention = options.get("prefill_attention")
        what += f", attention in {attention}" if attention else ""
        measured = f"{row['found']} in {row['seconds']:.2f} s"
        met = row["found"] == record["keys"]
        yield what, measured, "", "", f"{record['keys']}", mark(met)


#: File in the folder: whether it is a JSON record, and its rows.
READERS = {
    "cuda_reference_job.json": (True, reference_job),
    "cuda_small_decode.json": (True, small_decode),
    "cuda_int8_linear.json": (True, int8_linear),
    "cuda_attention.json": (True, attention),
    "cuda_attention_int8.txt": (False, attention_int8),
    "cuda_attention_error.txt": (False, attention_error),
    "cuda_decode.txt": (False, decode),
    "cuda_linear.json": (True, linear),
    "cuda_retrieval.json": (True, retrieval),
    "cuda_retrieval-int8.json": (True, retrieval),
    "cuda_retrieval-int8_fp8.json": (True, retrieval),
}


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: cuda_table.py FOLDER", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name, (is_json, read) in READERS.items():
        path = Path(sys.argv[1]) / name
        if path.exists():
            text = path.read_text()
            rows += read(json.loads(text) if is_json else text)
    print("|" + "|".join(f" {cell} " for cell in HEAD) + "|")
    print("|" + "---|" * len(HEAD))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
