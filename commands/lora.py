"""`surgery lora`: what fine-tuning changed, as a LoRA adapter."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from .opening import open_model
from .options import (
    MODEL,
    AnatomyFile,
    AsJson,
    Checksums,
    DryRun,
    Fresh,
    Out,
    Overwrite,
    SignKey,
    Threads,
)
from .output import console, progress, size, table
from .writes import Target, write_edited
from .writes import dry_run as show_plan

if TYPE_CHECKING:
    from surgery import Checkpoint, LoraAdapter

SHOWN = 12


class Method(str, Enum):
    """How singular vectors are found."""

    exact = "exact"
    randomized = "randomized"


class Stored(str, Enum):
    """The type that A and B are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def lora(
    base: Annotated[str, typer.Argument(help=MODEL)],
    tuned: Annotated[str, typer.Argument(help="The base after fine-tuning.")],
    out: Out,
    rank: Annotated[
        int | None, typer.Option(help="The rank of every update; with --energy, the highest.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Give each module the smallest rank that keeps this part: 0.95."),
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(help="Names or ends of names: q_proj,v_proj. [default: all in the blocks]"),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Randomized takes a small part of the time where ranks are low.")
    ] = Method.exact,
    dtype: Annotated[Stored, typer.Option(help="The type of the adapter.")] = Stored.float32,
    save_rest: Annotated[
        bool,
        typer.Option("--save-rest", help="Take along whole what else has changed (embeddings...)."),
    ] = False,
    seed: Annotated[int, typer.Option(help="For the randomized method.")] = 0,
    anatomy: AnatomyFile = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    checksums: Checksums = False,
    sign_key: SignKey = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Extract a LoRA adapter from a fine-tune: `surgery lora BASE TUNED --rank 16 -o ADAPTER`.

    The update of each linear layer is cut to its first singular directions; how much of it that
    keeps is shown, and what else has changed. PEFT loads the adapter, and Surgery takes it as
    BASE+ADAPTER.
    """
    import surgery
    from surgery.lora.extract import outline_lora
    from surgery.writing.plan import MAX_SHARD_BYTES

    target = Target(out, MAX_SHARD_BYTES, threads, overwrite, json, fresh, checksums, sign_key)
    before = open_model(base, anatomy, headers_only=dry_run)
    after = open_model(tuned, anatomy, headers_only=dry_run)
    patterns = None if modules is None else [part.strip() for part in modules.split(",")]
    if dry_run:
        outline = outline_lora(
            before,
            after,
            rank=rank,
            energy=energy,
            modules=patterns,
            method=method.value,
            dtype=dtype.value,
            save_rest=save_rest,
        )
        show_plan(outline, target)
        return
    from surgery.writing.staging import check_target

    check_target(out.absolute(), dict.fromkeys((*before.paths, *after.paths)), overwrite=overwrite)
    with progress("decomposing", after.nbytes) as advance:
        adapter = surgery.extract_lora(
            before,
            after,
            rank=rank,
            energy=energy,
            modules=patterns,
            method=method.value,
            dtype=dtype.value,
            save_rest=save_rest,
            seed=seed,
            threads=threads,
            progress=advance,
        )
    written = write_edited(adapter, target)
    if not json:
        _print(before, adapter, str(written.target))


def _print(base: Checkpoint, adapter: LoraAdapter, target: str) -> None:
    """A row for every kind of module over the blocks, and what isn't in the adapter."""
    out = console()
    rows = table("module", "matrices", "rank", "energy kept", "least", left=("module",))
    kinds: dict[str, list[tuple[int, float]]] = {}
    for part in adapter.parts:
        kind = base.anatomy.places[part.name].inner.removesuffix(".weight")
        kinds.setdefault(kind, []).append((part.rank, part.energy))
    for kind, found in kinds.items():
        ranks, kept = zip(*found, strict=True)
        shown = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"
        mean = sum(kept) / len(kept)
        rows.add_row(kind, f"{len(found):,}", shown, f"{mean:.1%}", f"{min(kept):.1%}")
    out.print(rows)
    whole = [rest.name for rest in adapter.rest if rest.saved]
    if whole:
        out.print(f"Saved whole: {_some(whole)}")
    if adapter.lost:
        out.print(
            "Changed too, and not in the adapter (--save-rest takes along what PEFT can hold):"
        )
        lost = table("tensor", "||tau|| / ||base||", left=("tensor",))
        for rest in sorted(adapter.lost, key=lambda rest: -rest.relative)[:SHOWN]:
            lost.add_row(rest.name, f"{rest.relative:.4f}")
        out.print(lost)
        if len(adapter.lost) > SHOWN:
            out.print(f"and {len(adapter.lost) - SHOWN:,} more")
    out.print(f"{size(adapter.nbytes)}; the factor on B A is 1")
    out.print(f"Written to {target}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
