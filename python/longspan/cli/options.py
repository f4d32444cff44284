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
from longspan.eval import axes


def tokens(value: str | int) -> int:
    """What an option that counts tokens takes: 65536, 64k or 1m."""
    count = axes.count(str(value))
    if count is None:
        raise typer.BadParameter(f"expected a number of tokens, such as 65536 or 64k, got {value}")
    return count


def _rope_length(value: str) -> str | int:
    count = axes.count(value)
    return value if count is None else count


#: By their names in EngineConfig. None leaves an option at its default there.
_ENGINE: dict[str, Any] = {
    "session_len": Annotated[
        int | None,
        typer.Option(
            parser=tokens,
            metavar="TOKENS",
            help="Longest prompt + output, such as 65536, 64k or 1m (k is 1024). May pass the "
            "trained length, which is the default.",
        ),
    ],
    "rope_scaling_factor": Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="Dynamic NTK RoPE scaling with this factor, >= 1. Default: 0, as the model says.",
        ),
    ],
    "rope_length": Annotated[
        str | None,
        typer.Option(
            metavar="LENGTH",
            help="What RoPE is scaled for: request (prompt + output), prompt, session (the longest "
            "there may be), bucket (the next power of two times the trained length) or a number of "
            "tokens. Default: request; in a sweep the length that is measured.",
        ),
    ],
    "device": Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="auto, cpu, cuda or cuda:N. Default: auto, a GPU where there is one.",
        ),
    ],
    "tp": Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tensor-parallel ranks: GPUs, or shares of the CPU's threads. Default: 1.",
        ),
    ],
    "cp": Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Context-parallel ranks among the tp: they share the KV cache. Default: 1.",
        ),
    ],
    "dtype": Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="bfloat16, float32 or auto, the default: bfloat16 where the device is fast in it.",
        ),
    ],
    "num_threads": Annotated[
        int | None,
        typer.Option("--threads", metavar="N", help="CPU threads. Default: all there are."),
    ],
    "max_batch_size": Annotated[
        int | None, typer.Option(metavar="N", help="Sequences that run at once. Default: 8.")
    ],
    "max_prefill_token_num": Annotated[
        int | None,
        typer.Option(
            parser=tokens,
            metavar="TOKENS",
            help="Most prompt tokens in one step. Default: the device's best.",
        ),
    ],
    "revision": Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a model of the hub: a branch, tag or commit."),
    ],
    "use_safetensors": Annotated[
        bool | None,
        typer.Option(
            "--use-safetensors/--no-safetensors",
            help="Read weights from safetensors, the default, or from torch's .bin files: these "
            "are converted once, and code in them is never run.",
        ),
    ],
    "cache_max_entry_count": Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="KV cache: a fraction of the free memory or a number of blocks. Default: 0.8.",
        ),
    ],
    "kv_cache_dtype": Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="KV cache: auto (as --dtype), int8, fp8, int8_fp8 (keys, values), int8_int4 or "
            "int4. Default: auto.",
        ),
    ],
    "prefill_attention": Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Products of attention in prompts: auto (as --dtype) or, on Hopper GPUs, int8 "
            "(queries and keys) or int8_fp8 (and weights and values). Default: auto.",
        ),
    ],
    "linear_dtype": Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Weight matrices of the layers: auto (as --dtype) or, on Hopper GPUs, int8. "
            "Default: auto.",
        ),
    ],
    "enable_prefix_caching": Annotated[
        bool | None,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Compute what prompts have in common at their beginning once. Default: on where "
            "--depths or several --lengths make a sweep.",
        ),
    ],
}

#: The options that say where a model comes from.
SOURCE = ("revision", "use_safetensors")
#: And those that say what the engine runs on and computes in.
COMPUTE = (
    "device",
    "tp",
    "cp",
    "dtype",
    "kv_cache_dtype",
    "prefill_attention",
    "linear_dtype",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face model directory, a GGUF file or a hub id, organisation/name.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="Greedy unless this, --top-p or --top-k is given."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Draw from the likeliest tokens whose shares add up to P, in (0, 1]."
    ),
]
TopK = Annotated[
    int | None, typer.Option(metavar="N", help="Draw from the N likeliest tokens; 0: from all.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Same seed, same text.")]
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
