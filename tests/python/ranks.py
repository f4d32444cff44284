"""What an engine of several ranks is asked, and a rank as a program of its own:

    python ranks.py CASES

CASES: JSON, a list of {"path", "options", "ids", "positions", "prompts"}, of which each is an
engine. Rank 0 prints a line for each, "> " and the JSON of its answers().
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


def launch(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """This program as torchrun would start it, on one GPU: NCCL takes the ranks for machines of
    their own, since it refuses two of one machine on the same card."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
        config = EngineConfig(device="cuda", **case["options"])
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
