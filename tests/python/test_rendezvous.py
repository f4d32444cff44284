"""`longspan doctor` under a launcher: ranks that meet, that do not come, and that do not answer."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from typing import Any

import pytest
from longspan import InvalidArgument
from longspan._core import check_rendezvous
from ranks import free_port
from test_tensor_parallel import LAUNCHERS

STEPS = [
    "meeting",
    "machines",
    "sum in host memory",
    "device",
    "connecting devices",
    "sum on devices",
    "leaving",
]


def doctor(
    rank: int, size: int, port: int, *options: Any, launcher: str = "torchrun"
) -> subprocess.Popen[str]:
    """The process that a launcher would start."""
    known = {name for names in LAUNCHERS.values() for name in names}
    values = dict(zip(LAUNCHERS[launcher], map(str, (rank, size, rank, size)), strict=True))
    environment = {k: v for k, v in os.environ.items() if k not in known} | values
    environment |= {"MASTER_ADDR": "127.0.0.1", "LONGSPAN_PORT": str(port), "COLUMNS": "200"}
    command = [
        sys.executable,
        "-m",
        "longspan.cli",
        "doctor",
        "--device",
        "cpu",
        *map(str, options),
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("launcher", "size"), [("torchrun", 3), ("mpirun", 2), ("srun", 2)])
def test_ranks_that_meet_are_well(launcher: str, size: int) -> None:
    port = free_port()
    ranks = [doctor(r, size, port, "--json", "-", launcher=launcher) for r in range(size)]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    checks = {check["name"]: check for check in json.loads(outputs[0][0])}
    for step in STEPS:
        assert checks[f"ranks: {step}"]["state"] == "ok", outputs[0]
    everyone = ", ".join(map(str, range(size)))
    assert checks["ranks: machines"]["found"].startswith(f"{socket.gethostname()}: {everyone}")
    assert all(out == "" and err == "" for out, err in outputs[1:])


def test_a_rank_that_does_not_come_is_named_by_those_that_do() -> None:
    port, begin = free_port(), time.monotonic()
    ranks = [doctor(r, 3, port, "--timeout", 6) for r in (0, 1)]
    (out, _), (_, err) = (rank.communicate(timeout=60) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert time.monotonic() - begin < 30
    assert "ranks: meeting" in out and "within 6 s, without rank 2" in out
    assert err.startswith("rank 1: ranks: meeting: ") and "without rank 2" in err


def test_a_rank_that_does_not_answer_is_named_with_the_step() -> None:
    port = free_port()
    ranks = [doctor(r, 3, port, "--timeout", 6) for r in (0, 1)]
    silent = socket.socket()
    while silent.connect_ex(("127.0.0.1", port)) != 0:
        silent.close()
        silent = socket.socket()
        time.sleep(0.05)
    # "LSPM", of eight bytes: rank 2 of 3, which says nothing more.
    silent.sendall(struct.pack("<IIQii", 0x4C53504D, 0, 8, 2, 3))
    (out, _), (_, err) = (rank.communicate(timeout=60) for rank in ranks)
    silent.close()
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "ranks: meeting" in out
    assert "rank 2: expected a living process, got: no answer in time" in out
    assert "ranks: machines: rank 2: expected" in err


def test_a_rank_whose_device_is_missing_is_named_with_the_step() -> None:
    port = free_port()
    ranks = [doctor(0, 2, port), doctor(1, 2, port, "--device", "cuda:999")]
    (out, _), (_, err) = (rank.communicate(timeout=60) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "rank 1 of 2: device: " in out
    assert "rank 1: ranks: device: device: " in err


def test_without_a_launcher_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    met = check_rendezvous("cpu")
    assert (met.rank, met.size, met.steps, met.ok) == (0, 1, [], True)
    with pytest.raises(InvalidArgument, match=r"timeout_s: expected an integer in \[1, 3600\]"):
        check_rendezvous("cpu", 0)
