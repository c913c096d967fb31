"""`surgery grow`: widen MLPs, and prove that nothing changed."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .opening import open_model
from .options import (
    MODEL,
    AnatomyFile,
    AsJson,
    Device,
    DeviceOption,
    DryRun,
    Logits,
    MaxShardSize,
    Out,
    Overwrite,
    Threads,
    Verify,
    VerifyDtype,
    VerifyDtypeOption,
)
from .output import block_ranges, console, count, table
from .writes import Proof, Target, write_proven
from .writes import dry_run as show_plan

if TYPE_CHECKING:
    from surgery import Checkpoint


class Choose(str, Enum):
    """Which neurons are copied where not all are."""

    first = "first"
    random = "random"
    norm = "norm"


def grow(
    base: Annotated[str, typer.Argument(help=MODEL)],
    out: Out,
    factor: Annotated[
        float | None, typer.Option(help="The new MLP width as a multiple of the old. [default: 2]")
    ] = None,
    width: Annotated[int | None, typer.Option(help="The new MLP width.")] = None,
    layers: Annotated[
        str, typer.Option(help='"all", or blocks from 0, and back from -1: "8-15", "0,4,-1".')
    ] = "all",
    multiple_of: Annotated[
        int, typer.Option(help="Round the width up to a multiple of this, such as 64.")
    ] = 1,
    choose: Annotated[
        Choose, typer.Option(help="The neurons to copy where not all are.")
    ] = Choose.first,
    break_symmetry: Annotated[
        float,
        typer.Option(
            metavar="EPS",
            help="Split outgoing weights 1/2 + e and 1/2 - e, |e| < EPS, so that training can "
            "tell copies apart.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="Pad the other layers with zero neurons to the same width."),
    ] = False,
    verify: Verify = True,
    logits: Logits = True,
    device: DeviceOption = Device.auto,
    verify_dtype: VerifyDtypeOption = VerifyDtype.float32,
    anatomy: AnatomyFile = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: AsJson = False,
    max_shard_size: MaxShardSize = "5GB",  # type: ignore[assignment]
    threads: Threads = None,
) -> None:
    """Grow, don't overwrite: widen MLPs so that the function stays exactly the same.

    Neurons are copied, and each one's outgoing weights are split among its copies so that they
    sum to what they were, bit for bit. The result is verified before it is written, and again
    as it lies on disk. arXiv 2603.08647.
    """
    import surgery

    target = Target(out, max_shard_size, threads, overwrite, json)
    proof = Proof(verify, logits, device.value, verify_dtype.value)
    given = open_model(base, anatomy, headers_only=dry_run)
    grown = surgery.grow(
        given,
        factor=factor,
        width=width,
        layers=layers,
        multiple_of=multiple_of,
        choose="first" if dry_run and choose is Choose.norm else choose.value,
        symmetry_break=break_symmetry,
        seed=seed,
        uniform=uniform,
    )
    if dry_run:
        show_plan(grown, target, proof)
        return
    written = write_proven(given, grown, surgery.find_growths(given, grown), target, proof)
    if not json:
        _print(given, grown, written.record["edits"][-1]["details"]["mlps"], str(written.target))


def _print(given: Checkpoint, grown: Checkpoint, mlps: list[dict[str, Any]], target: str) -> None:
    rows = table(
        "stack", "blocks", "MLP width", "grown to", "of it padding", left=("stack", "blocks")
    )
    alike: dict[tuple[Any, ...], list[int]] = {}
    for mlp in mlps:
        alike.setdefault((mlp["stack"], *mlp["width"], mlp["padding"]), []).append(mlp["block"])
    for (stack, before, after, padding), blocks in alike.items():
        padded = f"{padding:,}" if padding else ""
        rows.add_row(stack, block_ranges(sorted(blocks)), f"{before:,}", f"{after:,}", padded)
    out = console()
    out.print(rows)
    out.print(f"{count(given.numel)} parameters became {count(grown.numel)}.")
    out.print(f"Written to {target}")
    if "mlp_widths" in grown.config:
        out.print("Layers differ in width: load it with trust_remote_code=True.")
