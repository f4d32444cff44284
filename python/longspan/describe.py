"""What runs, in a line for people; and whether a GPU that is there does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan._core import backends
from longspan.doctor import nvidia_gpus

if TYPE_CHECKING:
    from longspan._core import ModelInfo


def describe(info: ModelInfo) -> str:
    """A loaded model: "cpu (avx2, 2 threads), float32; RoPE: dynamic, ..."."""
    return f"{info.backend}, {info.dtype}; RoPE: {info.rope}"


def idle_gpu() -> str | None:
    """Why the engine cannot use the NVIDIA GPU that this machine has; None where it has none, or
    where it can."""
    _, cuda = backends()
    return cuda.detail if not cuda.available and nvidia_gpus() > 0 else None
