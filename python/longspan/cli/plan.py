"""longspan plan."""

from __future__ import annotations

from typing import Any

import typer

from longspan._core import plan_memory
from longspan.cli.options import COMPUTE, SOURCE, Json, Model, engine_options, write_json
from longspan.config import EngineConfig
from longspan.model_path import resolve_model

_PARTS = {
    "weights": "weight_bytes",
    "KV cache": "kv_bytes",
    "activations": "activation_bytes",
    "workspaces": "workspace_bytes",
    "driver and libraries": "overhead_bytes",
}
_FIELDS = (
    *_PARTS.values(),
    "total_bytes",
    "device_bytes",
    "headroom_bytes",
    "num_blocks",
    "block_bytes",
    "session_kv_bytes",
    "kv_capacity",
    "session_len",
    "max_session_len",
    "fits",
)


@engine_options(
    "session_len",
    "max_batch_size",
    "cache_max_entry_count",
    "max_prefill_token_num",
    *COMPUTE,
    *SOURCE,
)
def plan(model: Model, json: Json = None, *, options: dict[str, Any]) -> None:
    """Say what memory a session length takes, without loading the weights.

    --device may also name a GPU that is not there: h100, h200, a100-80g, a100-40g, l40s or
    rtx4090. Exits with 1 when one sequence of --session-len does not fit; what would make it fit is
    then listed.

    Example:

        longspan plan MODEL --session-len 1000000 --max-batch-size 1 --device h100
    """
    config = EngineConfig(**options)
    result = plan_memory(str(resolve_model(model, **config.source())), config.native())
    if json is not None:
        fields = {name: getattr(result, name) for name in _FIELDS}
        fields["remedies"] = [
            {name: getattr(remedy, name) for name in ("change", "total_bytes", "max_session_len")}
            for remedy in result.remedies
        ]
        write_json(json, {"model": model, "options": options} | fields)
    if json != "-":
        _show(result)
    if not result.fits:
        raise typer.Exit(1)


def _show(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, field in _PARTS.items():
        table.add_row(name, _gib(getattr(result, field)))
    table.add_row("total", _gib(result.total_bytes), style="bold")
    table.add_row("the device has", _gib(result.device_bytes))
    table.add_row("headroom", _gib(result.headroom_bytes))
    console = Console(highlight=False)
    console.print(table)
    if result.fits:
        console.print(
            f"A session of {result.session_len:,} tokens fits; the cache holds "
            f"{result.kv_capacity:,} tokens in all.",
            soft_wrap=True,
        )
    else:
        console.print(
            f"A session of {result.session_len:,} tokens does not fit: it needs "
            f"{_gib(result.session_kv_bytes)} of KV cache. The longest that fits has "
            f"{result.max_session_len:,} tokens.",
            soft_wrap=True,
        )
        for remedy in result.remedies:
            console.print(
                f"It would fit with {remedy.change}: {_gib(remedy.total_bytes)}, up to "
                f"{remedy.max_session_len:,} tokens.",
                soft_wrap=True,
            )


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f} GiB"
