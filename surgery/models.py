"""What users name: a checkpoint, `MODEL+ADAPTER` (one with LoRA adapters in it), an update."""

from __future__ import annotations

import os
from pathlib import Path

from surgery.checkpoint import Checkpoint
from surgery.errors import NotFoundError
from surgery.integrity.holes import refuse_holes
from surgery.lora.adapter import is_adapter, open_adapter
from surgery.lora.bake import adapter_task_vector, apply_adapter
from surgery.opening import open_checkpoint as open_files
from surgery.vectors import TaskVector, open_task_vector


def open_checkpoint(reference: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open a directory, a `.safetensors` file or a Hub id `org/name[@revision]`; with PEFT's LoRA
    adapters in its weights, computed as they are read, if it is written `MODEL+ADAPTER`.

    With `headers_only` nothing but headers and small files is fetched from the Hub, and reading
    a tensor fails. Raises NotFoundError, or FormatError with everything that is wrong; of an
    adapter also MismatchError and UnsupportedError.
    """
    model, *adapters = split_reference(str(reference))
    given = model if adapters else reference
    base = open_files(given, headers_only=headers_only)
    refuse_holes(base.values())
    if not adapters:
        return base
    opened = [open_adapter(adapter, headers_only=headers_only) for adapter in adapters]
    return apply_adapter(base, *opened)


def open_update(
    reference: str | Path, base: Checkpoint, *, headers_only: bool = False
) -> TaskVector:
    """Open a task vector, or a LoRA adapter as the task vector that it is for `base`."""
    if is_adapter(reference):
        return adapter_task_vector(base, open_adapter(reference, headers_only=headers_only))
    return open_task_vector(reference, headers_only=headers_only)


def split_reference(reference: str) -> list[str]:
    """The model, and the adapters after each `+`. A path that exists is taken whole, whatever
    is in its name; an id on the Hub holds no `+`."""
    pieces = reference.split("+")
    found = []
    while pieces:
        ends = range(len(pieces), 0, -1)
        paths = ("+".join(pieces[:end]) for end in ends)
        end = next((e for e, path in zip(ends, paths, strict=True) if _exists(path)), 1)
        found.append("+".join(pieces[:end]))
        pieces = pieces[end:]
    if len(found) > 1 and not all(found):
        raise NotFoundError(f"{reference!r} names nothing beside a +: write MODEL+ADAPTER")
    return found


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(os.path.expanduser(path))
