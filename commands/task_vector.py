"""`surgery task-vector`: what fine-tuning did, as a thing of its own."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

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
    SignKey,
    Threads,
)
from .output import console, size
from .writes import Target, write_edited
from .writes import dry_run as show_plan


class StoredAs(str, Enum):
    """The type that a task vector is stored in."""

    float32 = "float32"
    tuned = "tuned"


def task_vector(
    base: Annotated[str, typer.Argument(help=f"The model before fine-tuning. {MODEL}")],
    tuned: Annotated[str, typer.Argument(help="The model after it.")],
    out: Out,
    dtype: Annotated[
        StoredAs, typer.Option(help="Store it as float32, or rounded to the tuned model's type.")
    ] = StoredAs.float32,
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
    """Take the difference of two models: tau = theta_tuned - theta_base.

    The result is a directory of its own kind, which knows the base that it belongs to;
    `surgery apply` adds it, or takes it away. arXiv 2212.04089.
    """
    import surgery

    target = Target(out, max_shard_size, threads, overwrite, json, fresh, checksums, sign_key)
    vector = surgery.task_vector(
        open_model(base, anatomy, headers_only=dry_run),
        open_model(tuned, anatomy, headers_only=dry_run),
        dtype=dtype.value,
    )
    if dry_run:
        show_plan(vector, target)
        return
    written = write_edited(vector, target)
    if not json:
        out_ = console()
        out_.print(f"{len(vector):,} tensors, {size(vector.nbytes)}, belong to {base}")
        out_.print(f"Written to {written.target}")
