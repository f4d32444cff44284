"""One prompt to a model that several processes share. A launcher starts --tp of these:

    torchrun --nproc-per-node 2 python/examples/ranks.py MODEL "Once upon a time" --tp 2

docs/launchers.md has the same for mpirun, srun and Ray. Only the process of rank 0 prints."""

from __future__ import annotations

import argparse

from longspan import EngineConfig, GenerationConfig, pipeline


def answer(model: str, prompt: str, tp: int, device: str = "auto") -> str:
    """Text of at most 64 tokens. Returns in rank 0's process alone: what pipeline() raises in the
    others, when rank 0 has closed its own, is SystemExit."""
    with pipeline(model, EngineConfig(tp=tp, device=device)) as pipe:
        text: str = pipe(prompt, GenerationConfig(max_new_tokens=64)).text
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--tp", type=int, required=True, help="processes that were started")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(answer(args.model, args.prompt, args.tp, args.device))


if __name__ == "__main__":
    main()
