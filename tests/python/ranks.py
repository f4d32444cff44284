"""What an engine of several ranks is asked, and a rank as a program of its own:

    python ranks.py CASES

CASES: JSON, a list of {"path", "options", "ids", "positions", "prompts"}, of which each is an
engine, on a GPU unless its options say otherwise. Rank 0 prints a line for each, "> " and the JSON
of its answers().
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from longspan import ParallelError
from longspan._core import Engine, EngineConfig, GenerationConfig

NEW_TOKENS = 8


def answers(engine: Engine, case: dict[str, Any]) -> dict[str, Any]:
    """logits: [positions][vocab]; nll: mean over ids; tokens: greedy, [prompts][NEW_TOKENS], all
    prompts at once; margins: log odds of each against the second best."""
    ids = case["ids"]
    logits = engine.logits(ids, case["positions"]).wait().logits
    nll = engine.score(ids).wait().nll_sum / (len(ids) - 1)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
    outputs = [h.wait() for h in [engine.generate(p, config) for p in case["prompts"]]]
    return {
        "logits": logits.tolist(),
        "nll": nll,
        "tokens": [o.token_ids for o in outputs],
        "margins": [[best[1] - next_[1] for _, best, next_ in o.logprobs] for o in outputs],
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def token_nll(logits: npt.NDArray[np.float32], ids: list[int]) -> npt.NDArray[np.float64]:
    """Of every id after the first, by the logits of the one before it: [len(ids) - 1], in nats.
    logits: [at least len(ids) - 1, vocab], small enough for exp() in double precision."""
    rows = logits[: len(ids) - 1].astype(np.float64)
    return np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), ids[1:]]


def check_shared(
    path: Path | str,
    ids: list[int],
    expected: npt.NDArray[np.float32],
    tolerance: float,
    **options: Any,
) -> None:
    """That ranks in one process (options: tp, cp) score, in chunks of 100 tokens, as `expected`
    says, the logits [len(ids), vocab] of all positions, and have these logits, computed or from the
    prefix cache."""
    defaults = {
        "device": "cpu",
        "dtype": "float32",
        "session_len": 320,
        "max_batch_size": 2,
        "max_prefill_token_num": 100,
        "num_threads": 2,
        "enable_prefix_caching": True,
    }
    with Engine.load(str(path), EngineConfig(**(defaults | options))) as engine:
        nll = engine.score(ids, token_nll=True).wait().token_nll
        logits = engine.logits(ids, list(range(len(ids)))).wait().logits
        last = engine.logits(ids, [len(ids) - 1]).wait()
    assert np.abs(logits - expected).max() < tolerance, options
    assert np.abs(nll - token_nll(expected, ids)).max() < tolerance, options
    assert last.cached_tokens == len(ids) - 1
    assert np.abs(last.logits - expected[-1]).max() < tolerance, options


def launch(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """This program as torchrun would start it, on CPUs or on one GPU: NCCL takes the ranks for
    machines of their own, since it refuses two of one machine on the same card."""
    port = free_port()
    processes = []
    for rank in range(size):
        environment = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "LONGSPAN_PORT": port,
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            "NCCL_HOSTID": f"rank-{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_P2P_DISABLE": 1,
            "NCCL_SHM_DISABLE": 1,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(Path(__file__)), *arguments],
                env=os.environ | {name: str(value) for name, value in environment.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def outputs_of(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[str, str]]:
    """What each has said, on stdout and stderr, when all have ended."""
    deadline = time.monotonic() + seconds
    try:
        return [p.communicate(timeout=max(0, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        said_by_all = [process.communicate() for process in processes]
        raise AssertionError(f"not over after {seconds} s: {said_by_all}") from None


def said(output: str) -> list[str]:
    return [line[2:] for line in output.splitlines() if line.startswith("> ")]


def main() -> None:
    forever = "--forever" in sys.argv
    for case in json.loads(sys.argv[1]):
        config = EngineConfig(**({"device": "cuda"} | case["options"]))
        if Engine.follow(case["path"], config):
            continue
        with Engine.load(case["path"], config) as engine:
            print(">", json.dumps(answers(engine, case)), flush=True)
            try:
                while forever:
                    answers(engine, case)
            except ParallelError as error:
                print(">", error, flush=True)


if __name__ == "__main__":
    main()
