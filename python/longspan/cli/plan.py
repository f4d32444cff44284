"""longspan plan."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from longspan._core import (
    CostParts,
    CostPrediction,
    InvalidArgument,
    plan_memory,
    predict_cost,
)
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
#: Parts of a cost, as they are told.
_COSTS = {
    "attention": "attention",
    "products": "weights and products",
    "rows": "small kernels",
    "ranks": "between ranks",
}


@engine_options(
    "session_len",
    "max_batch_size",
    "cache_max_entry_count",
    "max_prefill_token_num",
    *COMPUTE,
    *SOURCE,
)
def plan(
    model: Model,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Predict time as well, on --tp of these: h100 or h200."),
    ] = None,
    sequences: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="With --gpus: how many decode together, each after --session-len.",
        ),
    ] = 1,
    gpus_per_host: Annotated[
        int,
        typer.Option(metavar="N", help="With --gpus: how many reach each other through NVLink."),
    ] = 8,
    link_gbps: Annotated[
        float,
        typer.Option(
            metavar="GBPS", help="With --gpus: of each GPU to other hosts, Gbit/s each way."
        ),
    ] = 400.0,
    json: Json = None,
    *,
    options: dict[str, Any],
) -> None:
    """Say what memory and time a session would take.

    Memory is reckoned without loading the weights; with --gpus, also how long the prefill of
    --session-len tokens and a token after it would take.

    --device may also name a GPU that is not there: h100, h200, a100-80g, a100-40g, l40s or
    rtx4090. Exits with 1 when one sequence of --session-len does not fit; what would make it fit is
    then listed. Times are predicted from measurements of one GPU and of links, which --json lists.

    \b
    Examples:
      longspan plan MODEL --session-len 1000000 --max-batch-size 1 --device h100
      longspan plan MODEL --session-len 1000000 --max-batch-size 1 --gpus h200 --tp 8
    """
    if gpus is not None:
        if "device" in options:
            raise InvalidArgument("gpus: expected it without device, got both")
        options["device"] = gpus
    config = EngineConfig(**options)
    folder, native = str(resolve_model(model, **config.source())), config.native()
    cost = gpus and predict_cost(folder, native, gpus_per_host, link_gbps, sequences)
    result = cost.memory if cost else plan_memory(folder, native)
    if json is not None:
        fields = {name: getattr(result, name) for name in _FIELDS}
        fields["remedies"] = [
            {name: getattr(remedy, name) for name in ("change", "total_bytes", "max_session_len")}
            for remedy in result.remedies
        ]
        if cost:
            fields |= _cost_fields(cost)
            fields |= {"gpus_per_host": gpus_per_host, "link_gbps": link_gbps}
            fields["sequences"] = sequences
        write_json(json, {"model": model, "options": options} | fields)
    if json != "-":
        _show(result, config.tp)
        if cost:
            _show_cost(cost, sequences)
    if not result.fits:
        raise typer.Exit(1)


def _show(result: Any, tp: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=None,
        show_header=False,
        title=f"of each of {tp} ranks" if tp > 1 else None,
        title_justify="left",
    )
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


def _cost_fields(cost: CostPrediction) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: {part: getattr(parts, part) for part in (*_COSTS, "total", "limit")}
        for name, parts in (("prefill_s", cost.prefill), ("decode_s", cost.decode))
    }
    names = ("name", "value", "unit", "source")
    fields["terms"] = [{name: getattr(term, name) for name in names} for term in cost.terms]
    return fields


def _show_cost(cost: CostPrediction, sequences: int) -> None:
    together = f" of {sequences} sequences" if sequences > 1 else ""
    typer.echo(
        f"Predicted: prefill {cost.prefill.total:,.2f} s ({_parts(cost.prefill)}); then a step"
        f"{together} {1000 * cost.decode.total:,.2f} ms ({_parts(cost.decode)})."
    )


def _parts(parts: CostParts) -> str:
    """The shares of a time, largest first."""
    shares = {words: getattr(parts, part) / parts.total for part, words in _COSTS.items()}
    told = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{words} {share:.0%}" for words, share in told if share >= 0.005)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f} GiB"
