"""What the tests of the CUDA backend share.

The truth is the CPU's in float32; the yardstick of what bfloat16 costs is HF transformers in
bfloat16, which rounds wherever the GPU does and in more places.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import longspan
import numpy as np
import pytest
from longspan._core import Engine
from longspan._core import EngineConfig as NativeConfig

CUDA = next(b for b in longspan.backends() if b.name == "cuda")
needs_gpu = pytest.mark.skipif(not CUDA.available, reason=f"needs a GPU: {CUDA.detail}")

#: Largest ratio of a GPU's root-mean-square error to that of transformers: few positions are
#: compared, so that two samples of the same error differ by some tens of percent.
WORSE = 1.5
#: Root-mean-square change of a token's negative log-likelihood when other kernels of the same
#: precision compute it, measured at 0.15 on SmolLM2 and random ids.
TOKEN_NOISE = 0.15


def load(path: Path | str, device: str, dtype: str = "bfloat16", **options: Any) -> Engine:
    return Engine.load(str(path), NativeConfig(device=device, dtype=dtype, **options))


def logits(engine: Engine, ids: list[int], positions: list[int]) -> np.ndarray:
    return np.asarray(engine.logits(ids, positions).wait().logits, dtype=np.float64)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def transformers_logits(path: Path | str, ids: list[int], positions: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the yardstick needs torch")
    transformers = pytest.importorskip("transformers", reason="the yardstick needs transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, positions].double().numpy()


def check_logits(path: Path | str, ids: list[int], **options: Any) -> None:
    """options: of both engines; the yardstick goes without them."""
    positions = sorted({0, len(ids) // 3, len(ids) // 2, len(ids) - 1})
    results = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        with load(path, device, dtype, session_len=len(ids) + 1, **options) as engine:
            results[device] = logits(engine, ids, positions)
    yardstick = rms(transformers_logits(path, ids, positions) - results["cpu"])
    error = rms(results["cuda"] - results["cpu"])
    assert error <= WORSE * yardstick, f"{len(ids)} tokens: {error:.3g}, not {yardstick:.3g}"


def ids_of(count: int, vocab: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]
