"""Ranks as forked processes, one of which is killed at a random moment after all have met:

    python killed_ranks.py MODEL SEED

For each group of GROUPS rank and moment are drawn, and a line of JSON is printed when the others
have ended: see Death.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time

from longspan import ParallelError
from longspan._core import Engine, EngineConfig, GenerationConfig
from ranks import free_port

#: tp, cp
GROUPS = [(2, 1), (2, 2), (4, 1), (4, 2)] * 3
#: Loading a tiny model and the first requests; later nothing new comes.
LATEST_S = 0.3
#: Seconds that the others are given.
GIVEN_S = 20
RAISED, ENDED = 3, 4


@dataclasses.dataclass
class Death:
    tp: int
    cp: int
    rank: int
    after_s: float  # of the first weights that were read
    seconds: float = 0.0  # until the others were gone
    exits: dict[int, int] = dataclasses.field(default_factory=dict)  # status of each other
    errors: dict[int, str] = dataclasses.field(default_factory=dict)  # their ParallelError


def live(model: str, rank: int, death: Death, port: int, met: int, said: int) -> int:
    """A rank until it raises; what it exits with."""
    launch = {"RANK": rank, "WORLD_SIZE": death.tp, "LOCAL_RANK": rank, "LONGSPAN_PORT": port}
    os.environ.update({name: str(value) for name, value in launch.items()})
    config = EngineConfig(
        device="cpu", dtype="float32", session_len=512, num_threads=1, tp=death.tp, cp=death.cp
    )

    def progress(done: int, total: int) -> None:
        os.write(met, b".")

    try:
        if Engine.follow(model, config, progress):
            return ENDED
        generation = GenerationConfig(max_new_tokens=30, ignore_eos=True)
        with Engine.load(model, config, progress) as engine:
            while True:
                engine.generate(list(range(200)), generation).wait()
    except ParallelError as error:
        os.write(said, str(error).encode())
        return RAISED


def watch(model: str, death: Death) -> None:
    port = free_port()
    met, tell_met = os.pipe()
    hears = {}
    ranks = {}
    for rank in range(death.tp):
        hears[rank], say = os.pipe()
        ranks[rank] = os.fork()
        if ranks[rank] == 0:
            try:
                os._exit(live(model, rank, death, port, tell_met, say))
            finally:
                os._exit(1)
        os.close(say)
    os.close(tell_met)
    os.read(met, 1)
    time.sleep(death.after_s)
    os.kill(ranks[death.rank], signal.SIGKILL)
    killed = time.monotonic()
    os.waitpid(ranks.pop(death.rank), 0)
    while ranks and time.monotonic() - killed < GIVEN_S:
        for rank, pid in list(ranks.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done == 0:
                continue
            del ranks[rank]
            death.exits[rank] = os.waitstatus_to_exitcode(status)
            death.errors[rank] = os.read(hears[rank], 4096).decode()
        time.sleep(0.002)
    death.seconds = time.monotonic() - killed
    for pid in ranks.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for end in (met, *hears.values()):
        os.close(end)


def main() -> None:
    model, seed = sys.argv[1:]
    draw = random.Random(int(seed))
    for tp, cp in GROUPS:
        death = Death(tp, cp, draw.randrange(tp), draw.uniform(0, LATEST_S))
        watch(model, death)
        print(json.dumps(dataclasses.asdict(death)), flush=True)


if __name__ == "__main__":
    main()
