"""The record, `surgery.json`: what was done to which inputs, and what the verification saw.

It holds no time and no path of this machine beyond the references that the user gave, so that
the same recipe gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

from surgery.checkpoint import RECORD, Checkpoint, Edit, Weights
from surgery.hub import Source
from surgery.system import naming
from surgery.writing.plan import Plan

FORMAT = 1


def make_record(
    layout: Plan,
    tallies: Mapping[str, float],
    verification: Mapping[str, Any] | None,
    command: str | None,
    recipe: Any = None,
) -> dict[str, Any]:
    """The record as plain data."""
    weights = layout.weights
    return {
        "format": FORMAT,
        "surgery": version("model-surgery"),
        "command": command,
        **({} if recipe is None else {"recipe": recipe}),
        "edits": [_edit(edit) for edit in weights.history],
        "norms": update_norms(weights, tallies),
        "verification": verification,
        "versions": {name: version(name) for name in ("torch", "safetensors", "transformers")},
        "notes": list(weights.notes),
    }


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """The record as JSON, with lists of plain values on a line of their own."""
    text = json.dumps(finite(record), indent=2, ensure_ascii=False, allow_nan=False)
    flat = re.compile(r"\[\n\s+([^\[\]{}\"]+?)\n\s+\]")  # no string of JSON has a line break
    text = flat.sub(lambda found: "[" + " ".join(found.group(1).split()) + "]", text)
    return (text + "\n").encode("utf-8", "backslashreplace")  # half a surrogate pair: its escape


def finite(value: Any) -> Any:
    """Plain data in which None stands for infinities and NaN, which JSON hasn't got."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def update_norms(weights: Weights, tallies: Mapping[str, float]) -> dict[str, Any] | None:
    """The norm of the update by stack, block by block, and outside: what it was, and what is
    left of it after scaling. None if nothing was tallied (an update inside a longer chain)."""
    if not tallies or not isinstance(weights, Checkpoint):
        return None
    if not weights.history or weights.history[-1].operation != "lines":
        return None
    anatomy = weights.anatomy
    squares: dict[str, list[float]] = {
        stack: [0.0] * depth for stack, depth in anatomy.stacks.items()
    }
    outside: dict[str, float] = {}
    for name, square in tallies.items():
        place = anatomy.places[name]
        if place.stack is None or place.block is None:
            outside[name] = square
        else:
            squares[place.stack][place.block] += square
    edit = weights.history[-1]
    scales: Mapping[str, list[float]] = edit.details["scales"]
    return {
        "blocks": {
            stack: [
                _norms(square, scale) for square, scale in zip(values, scales[stack], strict=True)
            ]
            for stack, values in squares.items()
        },
        "outside": {
            name: _norms(square, edit.details["outside"][name]) for name, square in outside.items()
        },
    }


def _norms(square: float, scale: float) -> dict[str, float | None]:
    """Six figures of each; None where the weights have a NaN or an infinity."""
    if not isfinite(square):
        return {"before": None, "after": None}
    before = square**0.5
    return {"before": float(f"{before:.6g}"), "after": float(f"{abs(scale) * before:.6g}")}


def _edit(edit: Edit) -> dict[str, Any]:
    return {
        "operation": edit.operation,
        "parameters": dict(edit.parameters),
        "inputs": {role: _source(source) for role, source in edit.inputs.items()},
        "details": dict(edit.details),
    }


def _source(source: Source) -> dict[str, Any]:
    """The reference, the revision, and of every weight file the size and, where the Hub's cache
    knows it, the SHA-256 (it names a large file's blob by its digest)."""
    if source.step:
        return {"step": source.reference}
    files: dict[str, dict[str, Any]] = {}
    folder = source.path if source.path.is_dir() else source.path.parent
    for name, size in source.files.items():
        files[name] = {"size": size, "sha256": blob_digest(folder / name)}
    return {
        "reference": source.reference,
        "revision": source.revision,
        "files": files,
        "edits": _earlier_edits(folder),
    }


def blob_digest(path: Path) -> str | None:
    """The SHA-256 of a file in the Hub's cache, which is the name that it has there."""
    blob = path.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None


def _earlier_edits(folder: Path) -> list[Any]:
    """What had been done to an input before, as its own record tells."""
    try:
        with naming(folder / RECORD):
            text = (folder / RECORD).read_text(encoding="utf-8")
        edits = json.loads(text)["edits"]
        json.dumps(edits, ensure_ascii=False, allow_nan=False).encode()
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return []  # no record, or not one of ours
    return edits if isinstance(edits, list) else []
