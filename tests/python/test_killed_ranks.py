"""A rank that dies at any moment ends the others, at once and with an error that names it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import write_tiny_llama
from killed_ranks import GROUPS, RAISED

#: What docs/launchers.md says of processes that die.
SECONDS = 10


def test_a_rank_killed_at_a_random_moment_is_named_by_all_others(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, num_attention_heads=8, num_key_value_heads=2)
    program = Path(__file__).with_name("killed_ranks.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(deaths) == len(GROUPS), done.stderr
    for death in deaths:
        others = {str(rank) for rank in range(death["tp"])} - {str(death["rank"])}
        assert death["exits"] == dict.fromkeys(others, RAISED), death
        said = f"rank {death['rank']}: expected a living process"
        assert all(error.startswith(said) for error in death["errors"].values()), death
        assert death["seconds"] < SECONDS, death
