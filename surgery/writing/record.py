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

from surgery.anatomy import Corrections
from surgery.anatomy.stored import KEY, as_data
from surgery.checkpoint import RECORD, Checkpoint, Edit, Weights
from surgery.errors import FormatError, NotFoundError
from surgery.hub import Source
from surgery.integrity.digests import hub_digest
from surgery.opening import read_json
from surgery.writing.plan import Plan

FORMAT = 1


def make_record(
    layout: Plan,
    tallies: Mapping[str, float],
    verification: Mapping[str, Any] | None,
    command: str | None,
    recipe: Any = None,
    digests: Mapping[Path, str] | None = None,
) -> dict[str, Any]:
    """The record as plain data. `digests` are the SHA-256 of input files, where they are wanted."""
    weights = layout.weights
    return {
        "format": FORMAT,
        "surgery": version("model-surgery"),
        "command": command,
        **({} if recipe is None else {"recipe": recipe}),
        **_corrections(weights),
        "edits": [_edit(edit, digests or {}) for edit in weights.history],
        "norms": update_norms(weights, tallies),
        "verification": verification,
        "versions": {name: version(name) for name in ("torch", "safetensors", "transformers")},
        "notes": notes_of(weights),
    }


def notes_of(weights: Weights) -> list[str]:
    """What there is to say of `weights` when they are written: how to load them too, which the
    next edit may change."""
    if not isinstance(weights, Checkpoint) or not weights.needs_code:
        return list(weights.notes)
    return [*weights.notes, "layers differ in MLP width: load it with trust_remote_code=True"]


def _corrections(weights: Weights) -> dict[str, Any]:
    """What a user said of the anatomy, so that it needn't be said again of the result."""
    if not isinstance(weights, Checkpoint) or weights.corrections == Corrections():
        return {}
    return {KEY: as_data(weights.corrections)}


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
            if stack in scales  # a scope leaves others as they are
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


def _edit(edit: Edit, digests: Mapping[Path, str]) -> dict[str, Any]:
    return {
        "operation": edit.operation,
        "parameters": dict(edit.parameters),
        "inputs": {role: _source(source, digests) for role, source in edit.inputs.items()},
        "details": dict(edit.details),
    }


def _source(source: Source, digests: Mapping[Path, str]) -> dict[str, Any]:
    """The reference, the revision, and of every weight file the size and, where it was asked for
    or the Hub's cache knows it, the SHA-256; where it was asked for, of the other files too."""
    if source.step:
        return {"step": source.reference}
    folder = source.path if source.path.is_dir() else source.path.parent
    files: dict[str, dict[str, Any]] = {
        name: {"size": size, "sha256": digests.get(folder / name) or hub_digest(folder / name)}
        for name, size in source.files.items()
    }
    others = sorted(path for path in digests if path.is_relative_to(folder))
    for path in others:
        name = path.relative_to(folder).as_posix()
        if name not in files:
            files[name] = {"size": path.stat().st_size, "sha256": digests[path]}
    return {
        "reference": source.reference,
        "revision": source.revision,
        "files": files,
        "edits": _earlier_edits(folder),
    }


def _earlier_edits(folder: Path) -> list[Any]:
    """What had been done to an input before, as its own record tells."""
    try:
        edits = read_json(folder / RECORD)["edits"]
        json.dumps(edits, ensure_ascii=False, allow_nan=False).encode()
    except (NotFoundError, FormatError, KeyError, ValueError):
        return []  # no record, or not one of ours
    return edits if isinstance(edits, list) else []
