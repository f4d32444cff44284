"""The same as ranks.py where Ray starts the processes: an actor to each rank.

    python python/examples/ray_ranks.py MODEL "Once upon a time" --tp 2 --device cuda

Ray deals out GPUs by itself, one to an actor, on whatever machines it has. The actors are told what
torchrun would have told them; with that in their environment they are ranks like any others."""

from __future__ import annotations

import argparse
import os
import socket
from collections import Counter
from typing import Any

import ranks


def environments(nodes: list[str], address: str, port: int) -> list[dict[str, str]]:
    """Of each rank, the variables that torchrun sets. nodes: of each rank, what names its machine,
    rank 0's first; address: rank 0's machine, for the others to reach; port: a free one there."""
    counts = Counter(nodes)
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(nodes)),
            "LOCAL_RANK": str(nodes[:rank].count(node)),
            "LOCAL_WORLD_SIZE": str(counts[node]),
            "MASTER_ADDR": address,
            "LONGSPAN_PORT": str(port),
        }
        for rank, node in enumerate(nodes)
    ]


class Rank:
    """What an actor does."""

    def place(self) -> tuple[str, str, int]:
        """The machine's name in Ray, its address and a port that is free there."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port

    def answer(self, environment: dict[str, str], *arguments: Any) -> str | None:
        """Rank 0's text; None of any other rank."""
        os.environ.update(environment)
        try:
            return ranks.answer(*arguments)
        except SystemExit:  # rank 0 has closed its pipeline, which this one served
            return None


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--tp", type=int, required=True, help="ranks to start")
    parser.add_argument("--device", default="cuda", help="cuda, a GPU to each rank, or cpu")
    args = parser.parse_args()

    here = os.path.dirname(os.path.abspath(__file__))  # where actors find ranks.py
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([here, *paths()])}})
    actor = ray.remote(num_gpus=1 if args.device == "cuda" else 0)(Rank)
    actors = [actor.remote() for _ in range(args.tp)]
    places = ray.get([one.place.remote() for one in actors])
    _, address, port = places[0]
    told = environments([node for node, _, _ in places], address, port)
    answers = [
        one.answer.remote(environment, args.model, args.prompt, args.tp, args.device)
        for one, environment in zip(actors, told, strict=True)
    ]
    print(next(text for text in ray.get(answers) if text is not None))


def paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


if __name__ == "__main__":
    main()
