"""Claim: prefill attention of the CUDA backend is at least 0.9 times as fast as cuDNN's, sm_90.

Both in turn on one GPU, cuDNN through torch. Ours reads a paged cache, cuDNN's contiguous tensors,
numbers of [-1, 1) in both. TFLOP/s are 4 * head_dim per (query, key, head) that is visible. torch's
cuDNN has no causal mask for a chunk behind other keys, so there it computes the whole rectangle,
which is counted in full.

    python benchmarks/cuda_attention.py PATH/cuda_attention [--rounds 3] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CLAIM = 0.9

# name: (queries, keys, heads, key heads, head_dim)
SHAPES = {
    "causal-16k": (16384, 16384, 32, 8, 128),
    "causal-64k": (65536, 65536, 32, 8, 128),
    "causal-128k": (131072, 131072, 32, 8, 128),
    "8k-on-64k": (8192, 65536, 32, 8, 128),
    "8k-on-128k": (8192, 131072, 32, 8, 128),
    "causal-8k-d64": (8192, 8192, 9, 3, 64),
    "causal-32k-d64": (32768, 32768, 9, 3, 64),
}


def cudnn(queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> float:
    """TFLOP/s of torch's cuDNN attention: the median launch of at least five, and 0.3 s."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(1, *shape, dim, dtype=torch.bfloat16, device="cuda") * 2 - 1

    q, k, v = numbers(heads, queries), numbers(kv_heads, keys), numbers(kv_heads, keys)
    causal = queries == keys
    times: list[float] = []
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):

        def run() -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        run()
        run()
        while len(times) < 5 or sum(times) < 300:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    pairs = queries * (queries + 1) / 2 if causal else queries * keys
    return 4 * dim * pairs * heads / statistics.median(times) * 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("binary", help="the cuda_attention program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the record to this file")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these")
    options = parser.parse_args()

    server = subprocess.Popen(
        [options.binary, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    record = []
    for name in options.shape or SHAPES:
        ours, theirs = [], []
        for _ in range(options.rounds):
            theirs.append(cudnn(*SHAPES[name]))
            print(name, file=server.stdin, flush=True)
            ours.append(json.loads(server.stdout.readline())["tflops"])
        a, b = statistics.median(ours), statistics.median(theirs)
        record.append(
            {
                "shape": name,
                "tflops": a,
                "cudnn_tflops": round(b, 1),
                "ratio": round(a / b, 3),
            }
        )
        print(f"{name:16} {a:7.1f} TFLOP/s   cuDNN {b:7.1f}   {a / b:.3f}", flush=True)
    server.stdin.close()
    server.wait()
    low = [r["shape"] for r in record if r["ratio"] < CLAIM]
    if options.json:
        versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
        device = torch.cuda.get_device_name()
        with open(options.json, "w") as file:
            json.dump({"device": device, "versions": versions, "results": record}, file, indent=2)
            file.write("\n")
    if low:
        raise SystemExit(f"expected at least {CLAIM} of cuDNN, got less at {', '.join(low)}")


if __name__ == "__main__":
    main()
