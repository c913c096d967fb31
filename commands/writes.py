"""What the verbs that write a checkpoint have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .output import plan_as_json, print_json, print_plan

if TYPE_CHECKING:
    from surgery.checkpoint import Weights


def dry_run(
    edited: Weights,
    out: Path,
    max_shard_size: int,
    threads: int | None,
    *,
    overwrite: bool,
    json: bool,
    verification_memory: int = 0,
) -> None:
    """Show what writing `edited` would do; raise what it would raise, but for a full disk."""
    from surgery.writing.plan import free_bytes, plan
    from surgery.writing.write import peak_memory, prepare

    prepare(edited, out.absolute(), overwrite=overwrite)
    layout = plan(edited, max_shard_bytes=max_shard_size)
    memory = max(peak_memory(layout, threads), verification_memory)
    shown = plan_as_json(layout, free_bytes(out), memory)
    if json:
        print_json(shown)
    else:
        print_plan(shown, out)
