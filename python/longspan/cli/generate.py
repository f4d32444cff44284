"""longspan generate."""

from __future__ import annotations

import sys
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan._core import InvalidArgument
from longspan.cli.options import (
    COMPUTE,
    SOURCE,
    Json,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    command_line,
    engine_options,
    tokens,
)
from longspan.cli.terminal import say, show, statistics
from longspan.config import EngineConfig, GenerationConfig
from longspan.eval.text import from_file


@engine_options(
    "session_len",
    "rope_scaling_factor",
    "rope_length",
    *COMPUTE,
    "num_threads",
    *SOURCE,
)
def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(parser=tokens, metavar="TOKENS", help="Most tokens to generate.")
    ] = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send no chat template.")] = False,
    save_context: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what the prompt took to compute in this file."),
    ] = None,
    checkpoint_tokens: Annotated[
        int,
        typer.Option(
            parser=tokens,
            metavar="TOKENS",
            help="Write that file after each so many tokens; if it is there, go on from it.",
        ),
    ] = 0,
    load_context: Annotated[
        Path | None,
        typer.Option(
            "--context",
            metavar="FILE",
            help="Go on from a prompt so kept; the new one follows it as it is, like --raw.",
        ),
    ] = None,
    json: Json = None,
    *,
    options: dict[str, Any],
) -> None:
    """Continue a prompt, or answer it if the model can chat.

    \b
    Examples:
      longspan generate MODEL "Why is the sky blue?" --max-new-tokens 64
      longspan generate MODEL --file book.txt --session-len 64k --rope-scaling-factor 8
      git log | longspan generate MODEL - --raw --temperature 0.7 --seed 1
      longspan generate MODEL --file book.txt --raw --max-new-tokens 0 --save-context book.ctx
      longspan generate MODEL "Who did it?" --context book.ctx
    """
    if checkpoint_tokens and save_context is None:
        raise typer.BadParameter("--checkpoint-tokens: expected --save-context too")
    text = _prompt(prompt, file)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        random_seed=seed,
    )
    from longspan.describe import describe
    from longspan.eval.record import Record, engine_facts, sha256_of_text
    from longspan.pipeline import pipeline
    from longspan.response import Response

    settings = {
        "prompt_sha256": sha256_of_text(text),
        "raw": raw,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }
    if load_context is not None:
        settings["context"] = str(load_context)
    caching = {"enable_prefix_caching": True} if save_context or load_context else {}
    with Record(
        "generate",
        json,
        model=model,
        command=command_line(context),
        options=options,
        settings=settings,
    ) as record:
        with pipeline(model, EngineConfig(max_batch_size=1, **options, **caching)) as pipe:
            record.describe(engine_facts(pipe.engine))
            if sys.stderr.isatty():
                say(describe(pipe.engine.model))
            asked: Any = text
            if load_context is not None:
                before = pipe.load_context(load_context).token_ids
                asked = [*before, *pipe.tokenizer.encode(text, add_special_tokens=False)]
            if save_context is not None:
                pipe.save_context(asked, save_context, not raw, checkpoint_tokens=checkpoint_tokens)
            pieces: list[Response] = []
            try:
                for piece in pipe.stream_infer(asked, config, do_preprocess=not raw):
                    pieces.append(piece)
                    if json != "-":
                        show(piece.text)
            finally:
                if pieces:  # after Ctrl-C, what came until then
                    record.add(response := reduce(Response.extend, pieces))
        if json != "-":
            typer.echo()
        record.finish({"finish_reason": response.finish_reason})
        if sys.stderr.isatty():
            say(statistics(response))
            if response.context_full:
                say("The context is full: --session-len makes room for more.")
            elif response.finish_reason == "length" and max_new_tokens > 0:
                say("There would be more: it ended at --max-new-tokens.")


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("expected a prompt, - or --file, and only one of them")
    if file is not None:
        return from_file(file).text
    try:
        return sys.stdin.read() if prompt == "-" else str(prompt)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"prompt: expected text in UTF-8, got {error}") from error
