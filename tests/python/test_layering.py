"""Dependencies run one way. A new edge fails here before anyone has to untangle it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "cpp"
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")', re.MULTILINE)

# Folder -> the folders it may include, beside itself and the public headers (include/longspan).
ALLOWED = {
    "include": set(),
    "core": set(),
    "rope": {"core"},
    "backend": {"core", "parallel"},
    "checkpoint": {"core", "rope"},
    "kv": {"core"},
    "parallel": {"core"},
    "model": {"core", "rope", "backend", "checkpoint", "parallel"},
    "engine": {"core", "rope", "backend", "checkpoint", "kv", "parallel", "model"},
    "bindings": set(),
    "examples": set(),
}
# Outside dependencies -> the folders that may include them.
THIRD_PARTY = {"nlohmann/": {"checkpoint"}, "pybind11/": {"bindings"}, "Python.h": {"bindings"}}
# Private parts -> the folder prefixes that may include them.
PRIVATE = {"backend/cpu/": "backend/", "backend/cuda/": "backend/"}
# CUDA's own headers, which only the CUDA backend may include.
CUDA_HEADERS = ("cublas", "cuda_", "library_types.h", "nccl")

# Python: module -> the modules of the package that must not reach it. Text never needs to know
# how it is run.
CORE_ONLY = {
    "cache",
    "chat_template",
    "config",
    "detokenizer",
    "fast_tokenizer",
    "generation",
    "gguf",
    "gguf_tokenizer",
    "hub",
    "inputs",
    "model_path",
    "response",
    "sentencepiece_tokenizer",
    "tokenizer",
    "torch_weights",
}


def includes(path: Path) -> list[str]:
    return [a or b for a, b in INCLUDE.findall(path.read_text())]


def violations(relative: str, names: list[str]) -> list[str]:
    """What a file at cpp/<relative> includes but may not."""
    folder = relative.split("/")[0]
    bad = []
    for name in names:
        target = name.split("/")[0]
        if target in ALLOWED and target not in {folder, *ALLOWED[folder]}:
            bad.append(f"cpp/{relative} includes {name}: {folder} must not depend on {target}")
        for prefix, folders in THIRD_PARTY.items():
            if name.startswith(prefix) and folder not in folders:
                bad.append(f"cpp/{relative} includes {name}: only {sorted(folders)} may")
        if name.startswith(CUDA_HEADERS) and not relative.startswith("backend/cuda/"):
            bad.append(f"cpp/{relative} includes {name}: only cpp/backend/cuda may")
        for prefix, owner in PRIVATE.items():
            if name.startswith(prefix) and not relative.startswith(owner):
                bad.append(f"cpp/{relative} includes {name}: private to cpp/{owner}")
    return bad


def test_every_cpp_folder_has_a_place() -> None:
    folders = {p.relative_to(CPP).parts[0] for p in CPP.rglob("*.h")}
    assert folders <= set(ALLOWED), "add the new folder to ALLOWED and to ARCHITECTURE.md"


def test_cpp_includes() -> None:
    files = [p for p in CPP.rglob("*") if p.suffix in {".h", ".cc", ".inc", ".cu", ".cuh"}]
    assert len(files) > 20
    bad = [v for p in files for v in violations(p.relative_to(CPP).as_posix(), includes(p))]
    assert not bad, "\n".join(bad)


def test_public_headers_are_plain() -> None:
    """Embedders get the standard library and nothing else, the same with every build option."""
    for path in (CPP / "include" / "longspan").glob("*.h"):
        for name in includes(path):
            assert name.startswith("longspan/") or "/" not in name, f"{path.name} includes {name}"
        conditionals = re.findall(r"^\s*#\s*if.*", path.read_text(), re.MULTILINE)
        assert not conditionals, f"{path.name}: {conditionals}"


@pytest.mark.parametrize(
    ("relative", "name"),
    [
        ("core/dtype.h", "backend/backend.h"),
        ("kv/block_pool.cc", "engine/scheduler.h"),
        ("model/decoder.cc", "engine/scheduler.h"),
        ("model/decoder.cc", "backend/cpu/panel.h"),
        ("model/decoder.cc", "backend/cuda/kv_layout.h"),
        ("backend/registry.cc", "cuda_runtime_api.h"),
        ("engine/engine.cc", "nlohmann/json.hpp"),
        ("engine/engine.cc", "pybind11/pybind11.h"),
        ("bindings/bind_engine.cc", "core/dtype.h"),
        ("include/longspan/engine.h", "core/dtype.h"),
    ],
)
def test_forbidden_edges_are_seen(relative: str, name: str) -> None:
    assert violations(relative, [name])


def imported_modules(path: Path) -> set[str]:
    """Names of the package's own modules that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {n.split(".")[1] for n in names if n.startswith("longspan.")}
    return found


def test_python_imports() -> None:
    """pipeline is built from parts that do not know it; eval and cli are built on pipeline."""
    package = ROOT / "python" / "longspan"
    upper = {"aio", "cli", "demo", "eval", "pipeline", "session"}
    for name in sorted(CORE_ONLY):
        reached = imported_modules(package / f"{name}.py") & upper
        assert not reached, f"{name}.py imports {sorted(reached)}"
    assert not imported_modules(package / "pipeline.py") & (upper - {"pipeline", "session"})
    assert "cli" not in set().union(*map(imported_modules, (package / "eval").glob("*.py")), set())


def test_torch_and_transformers_are_never_needed_to_run() -> None:
    for path in (ROOT / "python" / "longspan").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            used = {n.split(".")[0] for n in names} & {"torch", "transformers"}
            if path.name == "torch_weights.py":  # only the reader of torch's own files
                used.discard("torch")
            assert not used, f"{path.name} imports {used}"
