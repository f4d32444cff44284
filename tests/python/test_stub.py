"""_core.pyi says exactly what the extension module holds."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from longspan import _core

STUB = Path(__file__).resolve().parents[2] / "python" / "longspan" / "_core.pyi"


def public(names: Any) -> set[str]:
    return {n for n in names if not n.startswith("_")}


def stub_names(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return public(names)


def stub_classes() -> list[ast.ClassDef]:
    classes = [n for n in ast.parse(STUB.read_text()).body if isinstance(n, ast.ClassDef)]
    return [c for c in classes if not c.name.startswith("_")]


def test_module_names() -> None:
    assert stub_names(ast.parse(STUB.read_text()).body) == public(vars(_core))


def test_class_members() -> None:
    for node in stub_classes():
        cls = getattr(_core, node.name)
        if not issubclass(cls, Exception):  # their attributes are set on instances
            assert stub_names(node.body) == public(vars(cls)), node.name


def test_error_bases() -> None:
    for node in stub_classes():
        cls = getattr(_core, node.name)
        if issubclass(cls, Exception):
            assert [b.__name__ for b in cls.__bases__] == [ast.unparse(b) for b in node.bases]


def test_stub_arguments() -> None:
    """Argument names as the docstring signatures of pybind11 give them."""
    for node in stub_classes():
        cls = getattr(_core, node.name)
        for method in node.body:
            if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
                continue
            if any(ast.unparse(d) == "property" for d in method.decorator_list):
                continue
            signature = getattr(cls, method.name).__doc__.splitlines()[0]
            for argument in method.args.args:
                assert f"{argument.arg}:" in signature, f"{node.name}.{method.name}: {signature}"
