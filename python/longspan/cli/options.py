"""Options that several commands share, each declared once."""

from __future__ import annotations

import functools
import inspect
import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.config import EngineConfig


def _rope_length(value: str) -> str | int:
    return int(value) if value.isdecimal() else value


#: By their names in EngineConfig. None leaves an option at its default there.
_ENGINE: dict[str, Any] = {
    "session_len": Annotated[
        int | None,
        typer.Option(help="Longest prompt + output in tokens; may pass the trained length."),
    ],
    "rope_scaling_factor": Annotated[
        float | None,
        typer.Option(help="Dynamic NTK RoPE scaling with this factor, >= 1; 0: as the model says."),
    ],
    "rope_length": Annotated[
        str | None,
        typer.Option(
            help="The length that RoPE is scaled for: request, prompt, session, bucket or tokens.",
        ),
    ],
    "device": Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:N. auto takes a GPU where there is one."),
    ],
    "tp": Annotated[
        int | None,
        typer.Option(help="Tensor-parallel ranks: GPUs, or shares of the CPU's threads."),
    ],
    "cp": Annotated[
        int | None,
        typer.Option(help="Context-parallel ranks among the tp: they share the KV cache."),
    ],
    "dtype": Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")],
    "num_threads": Annotated[
        int | None, typer.Option("--threads", help="CPU threads. Default: all there are.")
    ],
    "max_batch_size": Annotated[
        int | None, typer.Option(help="Sequences that run at once. Default: 8.")
    ],
    "max_prefill_token_num": Annotated[
        int | None,
        typer.Option(help="Most prompt tokens in one step. Default: the device's best."),
    ],
    "revision": Annotated[
        str | None, typer.Option(help="Of a model of the hub: a branch, tag or commit.")
    ],
    "use_safetensors": Annotated[
        bool | None,
        typer.Option(
            "--use-safetensors/--no-safetensors",
            help="Where the weights are; without, torch's .bin files are read, never run.",
        ),
    ],
    "cache_max_entry_count": Annotated[
        float | None,
        typer.Option(help="KV cache: a fraction of the free memory or a number of blocks."),
    ],
    "kv_cache_dtype": Annotated[
        str | None,
        typer.Option(
            help="KV cache: auto (as --dtype), int8, fp8, int8_fp8 (keys, values), int8_int4 or "
            "int4."
        ),
    ],
    "prefill_attention": Annotated[
        str | None,
        typer.Option(help="Products of queries and keys in prompts: auto (as --dtype) or int8."),
    ],
    "enable_prefix_caching": Annotated[
        bool | None,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Compute what prompts have in common at their beginning once. Default: off.",
        ),
    ],
}

#: The options that say where a model comes from.
SOURCE = ("revision", "use_safetensors")
#: And those that say what the engine runs on and computes in.
COMPUTE = ("device", "tp", "cp", "dtype", "kv_cache_dtype", "prefill_attention")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face model directory, a GGUF file or a hub id, organisation/name.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="Greedy unless this, --top-p or --top-k is given.")
]
TopP = Annotated[float | None, typer.Option(help="Nucleus: a share in (0, 1].")]
TopK = Annotated[int | None, typer.Option(help="The most likely tokens; 0: all.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write a record here; - for standard output."),
]


def engine_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the named engine options. Its keyword `options` receives those that were
    set, ready for EngineConfig(**options)."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            options = {name: value for name, value in given.items() if value is not None}
            if "rope_length" in options:
                options["rope_length"] = _rope_length(options["rope_length"])
            EngineConfig(**options)  # a bad option is told before anything is loaded
            command(options=options, **values)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "options"]
        shared = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_ENGINE[name]
            )
            for name in names
        ]
        wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
        )
        wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
        return wrapped

    return decorate


def resolve(model: str, options: dict[str, Any]) -> Path:
    """The directory of a model; takes those of SOURCE out of the options. Throws as
    resolve_model."""
    from longspan.model_path import resolve_model

    return resolve_model(model, **{name: options.pop(name) for name in SOURCE if name in options})


def write_json(json: str, content: Any) -> None:
    """To where --json says."""
    text = jsonlib.dumps(content, indent=2) + "\n"
    if json == "-":
        typer.echo(text, nl=False)
    else:
        Path(json).write_text(text, encoding="utf-8")


def command_line(context: typer.Context) -> list[str]:
    """The command as it was typed."""
    return ["longspan", *context.find_root().obj]
