"""Memory: what loading peaks at, what scoring adds, and that close() gives it back.

Each measurement is a process of its own, since a high-water mark never falls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MIB = 1 << 20

_PROGRAM = """
import json, sys
import numpy as np
from longspan import _core

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

model, tokens = sys.argv[1], int(sys.argv[2])
ids = np.arange(tokens) * 7919 % 49152
before = status("VmRSS")
config = _core.EngineConfig(dtype="float32", session_len=16384, max_batch_size=1)
engine = _core.Engine.load(model, config)
plan = engine.plan
loaded = status("VmHWM")
if tokens:
    engine.score(ids).wait()
scored = status("VmHWM")
engine.close()
kv = -(-tokens // 64) * plan.block_bytes
fixed = plan.activation_bytes + plan.workspace_bytes
print(json.dumps(dict(weights=plan.weight_bytes, fixed=fixed, kv=kv, load=loaded - before,
                      score=scored - loaded, left=status("VmRSS") - before)))
"""


def measure(model: Path, tokens: int) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(model), str(tokens)],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return json.loads(result.stdout)


def test_loading_peaks_below_1_2_times_the_weights(smollm2_dir: Path) -> None:
    sizes = measure(smollm2_dir, 0)
    assert sizes["load"] < 1.2 * sizes["weights"]


def test_scoring_holds_no_row_of_logits_and_close_gives_all_back(smollm2_dir: Path) -> None:
    # 4096 rows of logits would be 805 MB.
    sizes = measure(smollm2_dir, 4096)
    assert sizes["score"] < sizes["kv"] + sizes["fixed"] + 64 * MIB
    assert sizes["left"] < 100 * MIB
