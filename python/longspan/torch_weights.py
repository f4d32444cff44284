"""torch's pytorch_model*.bin become safetensors, once, in the user's cache.

A .bin is a pickle, which can run code when it is read; torch reads it here with weights_only, which
builds tensors and nothing else. The only module that imports torch, and only when called.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan._core import CapacityError, CheckpointError, Unsupported
from longspan.cache import cached_dir
from longspan.tokenizer import read_json_object

# Part of the cache's key: raise it when the files written change.
_FORMAT = 1

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"

#: What a model directory has beside its weights.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

#: Called while weights are written: bytes so far, bytes in all.
Progress = Callable[[int, int], None]


def cached_model_dir(path: str | Path, progress: Progress | None = None) -> Path:
    """A directory with the same model in safetensors, made first if it is not in the cache yet.

    Throws CheckpointError for weights that are absent, malformed or more than tensors, Unsupported
    without a torch that reads them safely, CapacityError without the space.
    """
    path = Path(path).resolve()
    files = _weight_files(path)
    names = [*(n for n in TEXT_FILES if (path / n).exists()), *files]
    key = hashlib.sha256(f"{_FORMAT} {path}".encode())
    for name in names:
        status = (path / name).stat()
        key.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return cached_dir(
        "torch",
        f"{path.name}-{key.hexdigest()[:16]}",
        lambda to: _convert(path, files, to, progress),
    )


def _weight_files(path: Path) -> list[str]:
    """The .bin files of a directory, by its index if it has one."""
    if (path / _SINGLE).exists():
        return [_SINGLE]
    index = path / _INDEX
    if not index.exists():
        raise CheckpointError(f"{path}: expected {_SINGLE} or {_INDEX}, got neither")
    weight_map = read_json_object(index).get("weight_map")
    names = set(weight_map.values()) if _is_map_of_text(weight_map) else {""}
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.bin", name):
            raise CheckpointError(
                f"{index}: weight_map: expected names of .bin files in the same directory, "
                f"got {name!r:.80}"
            )
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: expected {name}, as {_INDEX} says, got nothing there")
    return sorted(names)


def _is_map_of_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _convert(path: Path, files: list[str], target: Path, progress: Progress | None) -> None:
    torch = _safe_torch(path)
    from safetensors.torch import save_file

    total = sum((path / name).stat().st_size for name in files)
    target.mkdir(parents=True)
    free = shutil.disk_usage(target).free
    if total > free:
        raise CapacityError(f"{target}: expected {total:,} free bytes to convert, got {free:,}")
    for name in TEXT_FILES:
        if (path / name).exists():
            shutil.copyfile(path / name, target / name)
    weight_map: dict[str, str] = {}
    done = 0
    for number, name in enumerate(files, 1):
        tensors = _read(torch, path / name)
        out = f"model-{number:05}-of-{len(files):05}.safetensors"
        if repeated := weight_map.keys() & tensors.keys():
            raise CheckpointError(
                f"{path / name}: expected each tensor once, got {min(repeated)} again"
            )
        try:
            save_file(tensors, target / out, metadata={"format": "pt"})
        except (KeyError, ValueError, RuntimeError) as error:  # such as a dtype it does not have
            raise CheckpointError(
                f"{path / name}: expected what safetensors can hold, got {error!r:.200}"
            ) from error
        weight_map |= dict.fromkeys(tensors, out)
        done += (path / name).stat().st_size
        if progress is not None:
            progress(done, total)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _safe_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise Unsupported(
            f"{path}: use_safetensors=False: expected torch to read .bin files with, got {error}; "
            "install it, or convert the weights to safetensors where it is"
        ) from error
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    # Before 2.6 weights_only could be made to run code (CVE-2025-32434).
    if release is None or tuple(map(int, release.groups())) < (2, 6):
        raise Unsupported(f"{path}: expected torch 2.6 or later, got {torch.__version__}")
    return torch


def _read(torch: Any, path: Path) -> dict[str, Any]:
    """The tensors of a file, each with storage of its own as safetensors wants it."""
    try:
        # Only the newer of torch's two formats, a zip, can be mapped.
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        first_line = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: expected tensors and nothing else, got: {first_line}"
        ) from error
    except Exception as error:  # whatever its parsing of untrusted bytes runs into
        raise CheckpointError(
            f"{path}: expected weights saved by torch, got {error!r:.200}"
        ) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: expected tensors by name, got {type(tensors).__name__}")
    size = path.stat().st_size
    seen = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: expected tensors by name, got {type(tensor).__name__} at {name!r:.80}"
            )
        # A view may repeat one element a billion times.
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: {name}: expected a dense tensor within the file's {size} bytes, "
                f"got {tuple(tensor.shape)} of {tensor.layout} on {tensor.device}"
            )
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if storage in seen or not whole or not tensor.is_contiguous():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage)
    return tensors
