"""`surgery apply`: add task vectors to a base, or take them away."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from surgery.errors import ArgumentError

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
    SignKey,
    Threads,
)
from .output import console
from .writes import Target, write_edited
from .writes import dry_run as show_plan


def apply(
    base: Annotated[str, typer.Argument(help=f"The model to change. {MODEL}")],
    vectors: Annotated[
        list[str],
        typer.Argument(
            metavar="VECTOR...", help="What `surgery task-vector` wrote, or a LoRA adapter."
        ),
    ],
    out: Out,
    scale: Annotated[
        str,
        typer.Option(
            help="How much of each: one number for all, or one each: 0.5,-1. "
            "A negative one unlearns."
        ),
    ] = "1",
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
    """Apply task vectors: theta_base + the sum of scale_i * tau_i.

    A task vector of another base is refused. arXiv 2212.04089.
    """
    import surgery

    target = Target(out, max_shard_size, threads, overwrite, json, fresh, checksums, sign_key)
    given = open_model(base, anatomy, headers_only=dry_run)
    opened = [surgery.open_update(vector, given, headers_only=dry_run) for vector in vectors]
    if dry_run:  # whose they are is told by their base's weights, which aren't read
        opened = [replace(vector, base=given) for vector in opened]
    edited = surgery.apply(given, *opened, scale=_scales(scale))
    if dry_run:
        show_plan(edited, target)
        return
    written = write_edited(edited, target)
    if not json:
        console().print(f"Written to {written.target}")


def _scales(text: str) -> float | list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(
            f"--scale is {text!r}, and has to be a number, or one for each: 0.5,-1"
        ) from None
    return found[0] if len(found) == 1 else found
