"""The build backend: scikit-build-core's, which also brings CUDA's compiler where one is needed.

On a machine with an NVIDIA driver and no nvcc, or with LONGSPAN_CUDA=wheels set, the compiler comes
from PyPI's nvidia-cuda-* wheels, so that `pip install '.[cuda]'` is all that a GPU's owner types.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

#: Newer ones build for newer drivers than CUDA 13.0's; these run on all of CUDA 13's.
COMPILER = [
    f"{name}==13.0.*"
    for name in (
        "nvidia-cuda-cccl",
        "nvidia-cuda-crt",
        "nvidia-cuda-nvcc",
        "nvidia-cuda-runtime",
        "nvidia-nvvm",
    )
]


def compiler_wheels() -> list[str]:
    """What pip must install to compile for a GPU; sets LONGSPAN_CUDA for CMake where it is that."""
    choice = os.environ.get("LONGSPAN_CUDA", "AUTO")
    has_driver = Path("/proc/driver/nvidia/version").exists()
    has_nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    if choice == "AUTO" and has_driver and not has_nvcc:
        choice = os.environ["LONGSPAN_CUDA"] = "wheels"
    return COMPILER if choice == "wheels" else []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _build.get_requires_for_build_wheel(config_settings) + compiler_wheels()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _build.get_requires_for_build_editable(config_settings) + compiler_wheels()


compiler_wheels()  # each hook is a process of its own
