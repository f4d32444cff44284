"""The examples of docs/launchers.md, by the launchers themselves where they are installed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_tiny_llama
from longspan import EngineConfig, GenerationConfig, pipeline
from test_rendezvous import free_port
from test_tensor_parallel import LAUNCHERS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "python" / "examples"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    known = {name for names in LAUNCHERS.values() for name in names}
    clean = {k: v for k, v in os.environ.items() if k not in known}
    return clean | {"LONGSPAN_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launched")
    write_tiny_llama(path, num_attention_heads=4, num_key_value_heads=2)
    return path


@pytest.fixture(scope="module")
def answer(model: Path) -> str:
    """Of as many ranks in one process, which add up in the same order."""
    with pipeline(model, EngineConfig(device="cpu", tp=2)) as pipe:
        return str(pipe(PROMPT, GenerationConfig(max_new_tokens=64)).text)


def commands(launcher: str) -> Iterator[str]:
    """Those of the page that run on one machine, in one line."""
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "launchers.md").read_text(), re.S):
        for line in block.splitlines():
            if line.startswith(f"{launcher} ") and not line.endswith("\\"):
                yield line


def run(command: str, model: Path, environment: dict[str, str]) -> str:
    words = shlex.split(command.replace("MODEL", str(model)))
    done = subprocess.run(
        [*words, "--device", "cpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_commands_of_a_launcher(
    launcher: str, model: Path, answer: str, environment: dict[str, str]
) -> None:
    if shutil.which(launcher) is None:
        pytest.skip(f"{launcher} is not installed")
    found = list(commands(launcher))
    assert found
    for command in found:
        told = run(command, model, environment)
        assert ("ranks: sum on devices" if "doctor" in command else answer) in told, command


def test_what_ray_ranks_tells_its_actors_makes_ranks_of_processes(
    model: Path, answer: str, environment: dict[str, str]
) -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from ray_ranks import environments
    finally:
        sys.path.remove(str(EXAMPLES))
    spread = environments(["a", "b", "a", "b", "b"], "10.0.0.1", 77)
    assert [e["LOCAL_RANK"] for e in spread] == ["0", "0", "1", "1", "2"]
    assert [e["LOCAL_WORLD_SIZE"] for e in spread] == ["2", "3", "2", "3", "3"]
    assert [e["RANK"] for e in spread] == list("01234")
    assert {(e["WORLD_SIZE"], e["MASTER_ADDR"], e["LONGSPAN_PORT"]) for e in spread} == {
        ("5", "10.0.0.1", "77")
    }
    command = [sys.executable, EXAMPLES / "ranks.py", model, PROMPT, "--tp", "2", "--device", "cpu"]
    ranks = [
        subprocess.Popen(
            list(map(str, command)), env=environment | told, stdout=subprocess.PIPE, text=True
        )
        for told in environments(["here", "here"], "127.0.0.1", free_port())
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert answer in outputs[0] and outputs[1] == ""


def test_ranks_in_actors_of_ray(model: Path, answer: str, environment: dict[str, str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    script = f"{sys.executable} {EXAMPLES}/ray_ranks.py MODEL '{PROMPT}' --tp 2"
    assert answer in run(script, model, environment)
