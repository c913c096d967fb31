"""`surgery lines`: scale the update of a fine-tuned model with depth."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .opening import open_model
from .options import (
    MODEL,
    AnatomyFile,
    AsJson,
    Checksums,
    DryRun,
    Fresh,
    MaxShardSize,
    Out,
    Overwrite,
    Scope,
    SignKey,
    Threads,
)
from .output import console, table
from .writes import Target, write_edited
from .writes import dry_run as show_plan

if TYPE_CHECKING:
    from surgery import Written


class Outside(str, Enum):
    """What tensors outside the blocks get."""

    alpha = "alpha"
    depth = "depth"


def lines(
    base: Annotated[str, typer.Argument(help=f"The model before fine-tuning. {MODEL}")],
    tuned: Annotated[str, typer.Argument(help="The model after it.")],
    out: Out,
    alpha: Annotated[float, typer.Option(help="Scale of the first block's update.")],
    beta: Annotated[
        float | None,
        typer.Option(help="What the last block's has on top. [default: 1 - alpha]"),
    ] = None,
    outside: Annotated[
        Outside,
        typer.Option(help="Final norm and head: alpha, or the last block's scale (depth)."),
    ] = Outside.alpha,
    scope: Scope = None,
    anatomy: AnatomyFile = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    checksums: Checksums = False,
    sign_key: SignKey = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    max_shard_size: MaxShardSize = "5GB",  # type: ignore[assignment]
    threads: Threads = None,
) -> None:
    """LiNeS: keep what fine-tuning taught, and get back what it overwrote.

    Each block's update is scaled with its depth, from alpha in the first to alpha + beta in the
    last: theta = theta_base + lambda(l) * (theta_tuned - theta_base). With --scope
    the tensors of other parts stay as the tuned model has them. arXiv 2410.17146.
    """
    import surgery

    target = Target(out, max_shard_size, threads, overwrite, json, fresh, checksums, sign_key)
    edited = surgery.lines(
        open_model(base, anatomy, headers_only=dry_run),
        open_model(tuned, anatomy, headers_only=dry_run),
        alpha=alpha,
        beta=beta,
        outside=outside.value,
        scope=scope,
    )
    if dry_run:
        show_plan(edited, target)
        return
    written = write_edited(edited, target)
    if not json:
        _print(written)


def _print(written: Written) -> None:
    """The scale of every block, and the norm of its update before and after."""
    details: dict[str, Any] = written.record["edits"][-1]["details"]
    norms: dict[str, Any] = written.record["norms"] or {"blocks": {}, "outside": {}}
    rows = table("block", "scale", "norm of update", "after", left=("block",))
    for stack, blocks in norms["blocks"].items():
        for number, (scale, norm) in enumerate(zip(details["scales"][stack], blocks, strict=True)):
            _add(rows, f"{stack}.{number}", scale, norm)
    for name, norm in norms["outside"].items():
        _add(rows, name, details["outside"][name], norm)
    out = console()
    out.print(rows)
    out.print(f"Written to {written.target}")


def _add(rows: Any, name: str, scale: float, norm: dict[str, float | None]) -> None:
    shown = ("not finite" if value is None else f"{value:.4g}" for value in norm.values())
    rows.add_row(name, f"{scale:.3f}", *shown)
