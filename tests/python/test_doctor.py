"""What the doctor says of machines that are not this one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from longspan import doctor
from longspan.cli.app import app
from typer.testing import CliRunner


def call(*args: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *args], prog_name="longspan")


def checks() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_machine_without_a_gpu_is_well(no_gpu: None, tmp_path: Path) -> None:
    result = call("--json", "-")
    assert result.exit_code == 0, result.output
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert found["GPU"]["state"] == "absent"
    assert found["cache directory"]["found"].startswith(str(tmp_path / "longspan"))
    assert {found[name]["state"] for name in ("CPU", "memory", "cache directory")} <= {
        "ok",
        "warning",
    }
    assert "cache directory" in call().stdout


def test_a_cache_that_cannot_be_written_is_broken(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = call()
    assert result.exit_code == 1
    assert "broken" in result.stdout and "XDG_CACHE_HOME" in result.stdout


def test_a_gpu_without_its_software_is_broken(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: 2)
    monkeypatch.setattr(doctor.ctypes, "CDLL", missing)
    why = SimpleNamespace(available=False, detail="no NVIDIA driver was found")
    monkeypatch.setattr(doctor, "backends", lambda: [SimpleNamespace(detail="any"), why])
    found = checks()
    for name in ("driver", "CUDA library", "cuBLASLt"):
        assert found[name].state == doctor.BROKEN and found[name].remedy, name
    assert found["NCCL"].state == doctor.WARNING and "nvidia-nccl" in found["NCCL"].remedy
    assert "peer access" not in found
    assert call().exit_code == 1


@pytest.mark.parametrize(
    ("gib", "cards", "state"), [(8, 2, "ok"), (0.06, 2, "warning"), (0.06, 1, "ok")]
)
def test_shared_memory_matters_to_several_gpus(
    monkeypatch: pytest.MonkeyPatch, gib: float, cards: int, state: str
) -> None:
    usage = SimpleNamespace(total=int(gib * (1 << 30)))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = doctor._shared_memory(cards)
    assert check.state == state and bool(check.remedy) == (state == "warning")


def test_versions_are_read_as_their_libraries_write_them() -> None:
    def cublasLtGetVersion() -> int:
        return 130100

    def ncclGetVersion(out: Any) -> int:
        out._obj.value = 22809
        return 0

    assert doctor._version(cublasLtGetVersion) == "13.1"
    assert doctor._version(ncclGetVersion) == "2.28.9"
