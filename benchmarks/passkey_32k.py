"""Ten passkeys at 32768 tokens, four times SmolLM2's trained length: at least nine found.

Too long for CI: its record belongs in results/. Exits 1 when fewer are found.

    python benchmarks/passkey_32k.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from longspan.smollm2 import gguf_path
from machine import results_path

NEEDED = 9


def main() -> int:
    path = results_path("passkey_32k")
    with tempfile.TemporaryDirectory() as scratch:
        # Names without this machine's paths, since the record keeps the command.
        gguf, written = gguf_path(), Path(scratch) / "record.json"
        (Path(scratch) / gguf.name).symlink_to(gguf)
        command = [sys.executable, "-m", "longspan.cli", "eval", "passkey", gguf.name]
        command += ["--length", "32768", "--rope-scaling-factor", "4", "--rounds", "10"]
        command += ["--device", "cpu"]
        run = subprocess.run([*command, "--seed", "0", "--json", written.name], cwd=scratch)
        if written.exists():
            path.write_text(written.read_text())  # also what an interrupted run has found
        if run.returncode != 0:
            return run.returncode
    record = json.loads(path.read_text())
    found = record["summary"]["found"]
    print(f"{found} of {record['summary']['rounds']} found, at least {NEEDED} needed; {path}")
    return 0 if found >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
