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
    Checksums,
    Device,
    DeviceOption,
    DryRun,
    Fresh,
    Logits,
    MaxShardSize,
    Out,
    Overwrite,
    Scope,
    SignKey,
    Text,
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


class Experts(str, Enum):
    """Which MLPs of a mixture of experts are grown."""

    all = "all"
    routed = "routed"
    shared = "shared"


def grow(
    base: Annotated[str, typer.Argument(help=MODEL)],
    out: Out,
    factor: Annotated[
        float | None,
        typer.Option(
            help="The new MLP width as a multiple of the old; a whole one where a norm goes over "
            "the neurons. [default: 2]"
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="The new MLP width.")] = None,
    layers: Annotated[
        str, typer.Option(help='"all", or blocks from 0, and back from -1: "8-15", "0,4,-1".')
    ] = "all",
    scope: Scope = None,
    experts: Annotated[
        Experts,
        typer.Option(
            help="In a mixture: every MLP, or only the experts that tokens are routed to, or only "
            "the shared ones."
        ),
    ] = Experts.all,
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
    text: Text = None,
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
    """Grow, don't overwrite: widen MLPs so that the function stays exactly the same.

    Neurons are copied, and each one's outgoing weights are split among its copies so that they
    sum to what they were, bit for bit. Of a model that reads images or audio the language model
    grows, unless --scope says otherwise; of an encoder-decoder both do. The result is verified
    before it is written, and again as it lies on disk. arXiv 2603.08647.
    """
    import surgery

    target = Target(out, max_shard_size, threads, overwrite, json, fresh, checksums, sign_key)
    proof = Proof(verify, logits, device.value, verify_dtype.value, text)
    given = open_model(base, anatomy, headers_only=dry_run)
    grown = surgery.grow(
        given,
        factor=factor,
        width=width,
        layers=layers,
        scope=scope,
        experts=experts.value,
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


_KINDS = {"dense": "plain", "routed": "routed experts", "shared": "shared experts"}


def _print(given: Checkpoint, grown: Checkpoint, mlps: list[dict[str, Any]], target: str) -> None:
    mixture = any(mlp["kind"] != "dense" for mlp in mlps)
    kinds = ("MLPs",) if mixture else ()
    rows = table(
        *("stack", "blocks", *kinds, "MLP width", "grown to", "of it padding"),
        left=("stack", "blocks", *kinds),
    )
    alike: dict[tuple[Any, ...], set[int]] = {}
    for mlp in mlps:
        key = mlp["stack"], _KINDS[mlp["kind"]], *mlp["width"], mlp["padding"]
        blocks = alike.setdefault(key, set())
        if mlp["block"] is not None:  # None for one outside the blocks
            blocks.add(mlp["block"])
    for (stack, kind, before, after, padding), blocks in alike.items():
        padded = f"{padding:,}" if padding else ""
        named = (kind,) if mixture else ()
        widths = (f"{before:,}", f"{after:,}", padded)
        rows.add_row(stack, block_ranges(sorted(blocks)), *named, *widths)
    out = console()
    out.print(rows)
    out.print(f"{count(given.numel)} parameters became {count(grown.numel)}.")
    out.print(f"Written to {target}")
