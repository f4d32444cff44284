"""longspan chat."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan._core import LongspanError
from longspan.cli.options import (
    COMPUTE,
    SOURCE,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    engine_options,
    tokens,
)
from longspan.cli.terminal import say, show, statistics
from longspan.config import EngineConfig, GenerationConfig
from longspan.describe import describe
from longspan.eval.text import from_file

if TYPE_CHECKING:
    from longspan.pipeline import Pipeline
    from longspan.response import Response
    from longspan.session import Session

_COMMANDS = """\
/file PATH    put a file in front of the next prompt
/system TEXT  set the system message, and begin anew
/reset        begin anew
/help         show this
/quit         leave; so does Ctrl-D
Ctrl-C stops an answer, which is then forgotten."""
_WIDTH = 40  # of the gauge, in characters


@engine_options(
    "session_len",
    "rope_scaling_factor",
    *COMPUTE,
    "num_threads",
    *SOURCE,
)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(parser=tokens, metavar="TOKENS", help="Most tokens of an answer.")
    ] = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    *,
    options: dict[str, Any],
) -> None:
    """Talk with a model. Turns stay cached, so that each computes only what is new; a gauge shows
    how much of the context is taken and where the trained length ends.

    \b
    Examples:
      longspan chat MODEL
      longspan chat MODEL --session-len 64k --rope-scaling-factor 8 --temperature 0.7
    """
    if max_new_tokens < 1:
        raise typer.BadParameter(
            f"expected at least 1, got {max_new_tokens}", param_hint="--max-new-tokens"
        )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        random_seed=seed,
    )
    from longspan.pipeline import pipeline

    engine = EngineConfig(max_batch_size=1, enable_prefix_caching=True, **options)
    with pipeline(model, engine) as pipe:
        Chat(pipe, pipe.session(system, config)).run()


class Chat:
    """Reads lines from standard input, prompts and commands, until it ends."""

    def __init__(self, pipe: Pipeline, session: Session) -> None:
        self._pipe = pipe
        self._session = session
        self._files: list[str] = []  # in front of the next prompt
        self._asks = sys.stdin.isatty()

    def run(self) -> None:
        if self._asks:
            _edit_lines()
            say(f"{describe(self._pipe.engine.model)}; /help for help")
        while True:
            try:
                line = input("> " if self._asks else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            try:
                if line.startswith("/"):
                    if not self._command(line):
                        return
                elif line.strip():
                    self._turn(line)
            except LongspanError as error:
                say(f"error: {error}")
            except KeyboardInterrupt:
                print()
                say("stopped; this turn is forgotten")

    def _command(self, line: str) -> bool:
        """False to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return False
        if name == "/help":
            say(_COMMANDS)
        elif name == "/reset":
            self._session.reset()
            self._files.clear()
        elif name == "/system":
            self._session.system = argument or None
            self._session.reset()
        elif name == "/file" and argument:
            self._file(Path(argument).expanduser())
        else:
            say(f"error: {name}: expected one of\n{_COMMANDS}")
        return True

    def _file(self, path: Path) -> None:
        text = from_file(path).text
        self._files.append(f"{path.name}:\n\n{text}\n\n")
        tokens = len(self._pipe.tokenizer.encode(text, add_special_tokens=False))
        say(f"{path.name}: {tokens:,} tokens, in front of your next prompt")

    def _turn(self, prompt: str) -> None:
        for piece in self._session.stream("".join(self._files) + prompt):
            show(piece.text)
        print(flush=True)
        self._files.clear()
        response = self._session.response
        assert response is not None
        if response.error_message is not None:
            say(f"error: {response.error_message}")
        elif self._asks:
            self._show(response)

    def _show(self, response: Response) -> None:
        engine = self._pipe.engine
        used, native = self._session.num_tokens, engine.model.native_length
        say(gauge(used, engine.config.session_len, native))
        say(statistics(response))
        session = self._session
        if session.recomputed_why is not None:
            say(f"{session.recomputed:,} tokens prefilled again: {session.recomputed_why}")
        if response.context_full:
            say("the context is full; /reset begins anew")


def gauge(used: int, session_len: int, native: int) -> str:
    """How much of the context is taken, in tokens, with a mark where the trained length ends."""
    filled = round(_WIDTH * min(used / session_len, 1.0))
    cells = ["█"] * filled + ["░"] * (_WIDTH - filled)
    text = f"{used:,} of {session_len:,} tokens"
    if native < session_len:
        cells.insert(round(_WIDTH * native / session_len), "|")
        text += f", trained to {native:,} (|)"
    return f"[{''.join(cells)}] {text}"


def _edit_lines() -> None:
    """Arrow keys and earlier lines at the prompt, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
