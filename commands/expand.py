"""`surgery expand`: add blocks that change nothing, and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .opening import open_model
from .options import (
    MODEL,
    AnatomyFile,
    AsJson,
    Checksums,
    Device,
    DeviceOption,
    DryRun,
    Fresh,
    Logits,
    MaxShardSize,
    Out,
    Overwrite,
    SignKey,
    Threads,
    Verify,
    VerifyDtype,
    VerifyDtypeOption,
)
from .output import block_ranges, console, count, table
from .writes import Proof, Target, write_proven
from .writes import dry_run as show_plan

if TYPE_CHECKING:
    from surgery import Checkpoint, Written


def expand(
    base: Annotated[str, typer.Argument(help=MODEL)],
    out: Out,
    copies: Annotated[
        int | None,
        typer.Option(help="How many blocks to add, spread evenly: one behind each group."),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", help='Or the blocks to put a copy behind, from 0: "3,7,-1", "all".'
        ),
    ] = None,
    verify: Verify = True,
    logits: Logits = True,
    device: DeviceOption = Device.auto,
    verify_dtype: VerifyDtypeOption = VerifyDtype.float32,
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
    """LLaMA Pro: add blocks that return their input, so that the function stays the same.

    A new block is a copy of the one before it, with zeros where it writes to the residual
    stream. Train the new blocks alone, and what the model knew is kept. The result is verified
    before it is written, and again as it lies on disk. arXiv 2401.02415.
    """
    import surgery
    from surgery.verification import find_relation

    target = Target(out, max_shard_size, threads, overwrite, json, fresh, checksums, sign_key)
    proof = Proof(verify, logits, device.value, verify_dtype.value)
    given = open_model(base, anatomy, headers_only=dry_run)
    expanded = surgery.expand(given, copies=copies, after=after)
    if dry_run:
        show_plan(expanded, target, proof)
        return
    written = write_proven(given, expanded, find_relation(given, expanded), target, proof)
    if not json:
        _print(given, expanded, written)


def _print(given: Checkpoint, expanded: Checkpoint, written: Written) -> None:
    details: dict[str, Any] = written.record["edits"][-1]["details"]
    rows = table("stack", "blocks", "now", "new", "copies of", left=("stack", "new", "copies of"))
    rows.add_row(
        details["stack"],
        str(len(details["blocks"]) - len(details["new"])),
        str(len(details["blocks"])),
        block_ranges([entry["block"] for entry in details["new"]]),
        block_ranges([entry["source"] for entry in details["new"]]),
    )
    out = console()
    out.print(rows)
    out.print(f"{count(given.numel)} parameters became {count(expanded.numel)}.")
    out.print(f"Written to {written.target}")
    out.print("To keep what the model knew, train the new blocks alone: surgery.json names them.")
