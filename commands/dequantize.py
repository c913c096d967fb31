"""`surgery dequantize`: 8-bit floats with scales become what they stand for."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from .options import (
    MODEL,
    AsJson,
    Checksums,
    DryRun,
    Fresh,
    MaxShardSize,
    Out,
    Overwrite,
    SignKey,
    Threads,
)
from .output import console, size
from .writes import Target, write_edited
from .writes import dry_run as show_plan


class StoredAs(str, Enum):
    """The type that weights are stored in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def dequantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Out,
    dtype: Annotated[
        StoredAs, typer.Option(help="The type of the weights; float32 holds them unrounded.")
    ] = StoredAs.bfloat16,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    checksums: Checksums = False,
    sign_key: SignKey = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    max_shard_size: MaxShardSize = "5GB",  # type: ignore[assignment]
    threads: Threads = None,
) -> None:
    """Write an FP8 model in bfloat16: every weight times its scale, rounded once.

    What adds or rearranges blocks takes such a model; lines, merge, diff, task-vector, apply and
    grow (in whole blocks) take the FP8 model as it is. Scales of 128 x 128 blocks (DeepSeek-V3),
    rows or whole matrices.
    """
    import surgery

    target = Target(out, max_shard_size, threads, overwrite, json, fresh, checksums, sign_key)
    given = surgery.open_checkpoint(model, headers_only=dry_run)
    edited = surgery.dequantize(given, dtype=dtype.value)
    if dry_run:
        show_plan(edited, target)
        return
    written = write_edited(edited, target)
    if not json:
        for note in edited.notes[len(given.notes) :]:
            console().print(note)
        console().print(f"{size(given.nbytes)} became {size(edited.nbytes)}.")
        console().print(f"Written to {written.target}")
