"""longspan eval passkey, longspan eval ppl."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.options import Json, Model, command_line, engine_options
from longspan.config import EngineConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure whether a model still understands at a length.",
)

Length = Annotated[int, typer.Option(min=2, help="Context length in tokens.")]

_ENGINE = ("rope_scaling_factor", "rope_length", "dtype", "num_threads")


@app.command()
@engine_options(*_ENGINE)
def passkey(
    context: typer.Context,
    model: Model,
    length: Length,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts, each with its own key.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the keys and their depths.")] = 0,
    json: Json = None,
    *,
    options: dict[str, Any],
) -> None:
    """Hide a number in filler text and ask for it at the end.

    A prompt and its answer take --length tokens. The prompt is sent raw, without a chat template,
    and continued greedily; the key, from 1 to 49999, is found when the first run of digits of the
    answer is the key.

    Example:

        longspan eval passkey MODEL --length 16384 --rope-scaling-factor 4 --rounds 10 --json out.json
    """  # noqa: E501
    from longspan.eval import passkey as evaluation
    from longspan.eval.record import Record
    from longspan.pipeline import pipeline

    options |= {"session_len": length, "max_batch_size": 1}
    settings = {
        "length": length,
        "rounds": rounds,
        "seed": seed,
        "answer_tokens": evaluation.ANSWER_TOKENS,
        "rule": evaluation.RULE,
    }
    say = _printer(json)
    with Record(
        "passkey",
        json,
        model=model,
        command=command_line(context),
        options=options,
        settings=settings,
    ) as record:
        found = 0
        with pipeline(model, EngineConfig(**options)) as pipe:
            record.describe(pipe.engine)
            for result in evaluation.run(pipe, length, rounds, seed, _progress()):
                record.add(result)
                found += result.found
                say(
                    f"round {result.round + 1} of {rounds}: "
                    f"{'found' if result.found else 'not found'}, key {result.key} at depth "
                    f"{result.depth:.0%}, answer {result.answer.strip()!r}, "
                    f"{result.prompt_tokens:,} tokens in {result.seconds:.1f} s "
                    f"({result.prefill_tokens_per_s:,.0f} tokens/s)"
                )
        record.finish({"found": found, "rounds": rounds})
        say(f"{found} of {rounds} passkeys found at {length:,} tokens")


@app.command()
@engine_options(*_ENGINE)
def ppl(
    context: typer.Context,
    model: Model,
    length: Length,
    file: Annotated[
        Path | None, typer.Option(help="A text. Default: Python's language reference.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Consecutive windows of --length.")] = 1,
    json: Json = None,
    *,
    options: dict[str, Any],
) -> None:
    """The perplexity of a text, read in windows of --length tokens.

    Every token of a window but the first is scored given all before it in the window.

    Example:

        longspan eval ppl MODEL --length 16384 --rope-scaling-factor 4 --file book.txt --windows 4
    """
    from longspan.eval import perplexity, text
    from longspan.eval.record import Record, sha256_of_text
    from longspan.model_path import resolve_model
    from longspan.pipeline import pipeline
    from longspan.tokenizer import Tokenizer

    source = text.from_file(file) if file else text.python_documentation()
    ids = Tokenizer.from_dir(resolve_model(model)).encode(source.text)
    parts = perplexity.cut(ids, length, windows)
    options |= {"session_len": length, "max_batch_size": 1}
    settings = {
        "length": length,
        "windows": windows,
        "text": source.source,
        "text_sha256": sha256_of_text(source.text),
    }
    say = _printer(json)
    with Record(
        "perplexity",
        json,
        model=model,
        command=command_line(context),
        options=options,
        settings=settings,
    ) as record:
        results = []
        with pipeline(model, EngineConfig(**options)) as pipe:
            record.describe(pipe.engine)
            for result in perplexity.run(pipe, parts, _progress()):
                record.add(result)
                results.append(result)
                say(
                    f"window {len(results)} of {windows}: perplexity {result.perplexity:.3f}, "
                    f"{length:,} tokens in {result.seconds:.1f} s "
                    f"({result.tokens_per_s:,.0f} tokens/s)"
                )
        total = perplexity.overall(results)
        record.finish({"perplexity": total, "num_tokens": sum(r.num_tokens for r in results)})
        say(f"perplexity {total:.3f} in contexts of {length:,} tokens of {source.source}")


def _progress() -> Any:
    """None, which is the pipeline's own bar, on a terminal; elsewhere a line now and then."""
    from longspan.eval.heartbeat import Heartbeat

    if sys.stderr.isatty():
        return None
    return Heartbeat(lambda line: typer.echo(line, err=True))


def _printer(json: str | None) -> Any:
    """Prints a line, on stderr when the record goes to standard output."""
    return lambda line: typer.echo(line, err=json == "-")
