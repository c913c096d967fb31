"""The header of a safetensors file: read, and checked against everything that can be wrong.

The format: 8 bytes of little-endian header length, a JSON object of name -> {dtype, shape,
data_offsets}, then the tensors' bytes, which the offsets cover from 0 to the end of the file
without gap or overlap. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from surgery.dtypes import DTYPES, DType
from surgery.errors import FormatError, InputError
from surgery.files import Stamp
from surgery.untrusted import brief, open_regular, parse_json

LENGTH_BYTES = 8
LONGEST = 100_000_000  # bytes of JSON: the limit of the reference reader
LONGEST_NAME = 1_000
_KEYS = frozenset(("dtype", "shape", "data_offsets"))
MOST_AXES = 64
"""What numpy knows; the product of a million sides takes hours."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes are `start` to `stop` of the file."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says it holds, in the order of its bytes. `stamp` is the file's own."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    stamp: Stamp | None = field(default=None, compare=False)


def read_header(path: Path) -> Header:
    """The checked header of the file at `path`. Raises FormatError with all that is wrong."""
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or not 0 < length <= min(LONGEST, size - LENGTH_BYTES):
                raise FormatError(
                    f"{path} isn't a safetensors file, or it was cut short: it has {size:,} bytes "
                    f"and asks for a header of {length:,}"
                )
            raw = file.read(length)
            stamp = Stamp.of(file.fileno())
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror}") from error
    return replace(parse_header(raw, size, str(path)), stamp=stamp)


def parse_header(raw: bytes, size: int, where: str) -> Header:
    """The header from its JSON bytes, checked against the `size` of the file, in bytes."""
    table = _json(raw, where)
    metadata = table.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{where}: __metadata__ isn't a table of strings")
    data = LENGTH_BYTES + len(raw)
    entries: list[tuple[str, Entry]] = []
    for name, value in table.items():
        entry = _entry(name, value, data)
        if isinstance(entry, str):
            problems.append(f"{where}: {entry}")
        else:
            entries.append((name, entry))
    FormatError.raise_if(problems)
    entries.sort(key=lambda item: (item[1].start, item[1].stop))
    end = data
    for name, entry in entries:
        if entry.start != end:
            kind = "leaves a gap after" if entry.start > end else "overlaps"
            problems.append(
                f"{where}: {name} starts at byte {entry.start - data:,} and {kind} the tensor "
                f"before it, which ends at {end - data:,}"
            )
        end = max(end, entry.stop)
    if end != size:
        problems.append(
            f"{where} has {size:,} bytes and its header describes {end:,}: the file was "
            + ("cut short" if size < end else "added to")
            + "; fetch it again"
        )
    FormatError.raise_if(problems)
    return Header(dict(entries), metadata)


def _entry(name: str, value: Any, data: int) -> Entry | str:
    """The entry, or what is wrong with it."""
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        return f"{brief(name)} is a name that no encoding can write"
    if len(name) > LONGEST_NAME:
        return f"{brief(name)} is a name of {len(name):,} characters"
    if not isinstance(value, dict) or not value.keys() >= _KEYS:
        return f"{name} has no dtype, shape and data_offsets"
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        return f"{name} has the type {brief(value['dtype'])}, which safetensors doesn't know"
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return f"{name} has shape {brief(shape)} and data_offsets {brief(offsets)}"
    if len(shape) > MOST_AXES:
        return f"{name} has {len(shape):,} axes, and {MOST_AXES} are the most"
    bits = prod(shape) * dtype.bits
    if bits % 8:
        return f"{name} is {dtype} {shape}, which takes {bits:,} bits: no whole number of bytes"
    if bits // 8 != offsets[1] - offsets[0]:
        return (
            f"{name} is {dtype} {shape}, which takes {bits // 8:,} bytes, and has "
            f"{offsets[1] - offsets[0]:,}"
        )
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for size in value:  # noqa: SIM110  a generator takes twice as long, of 100,000 tensors
        if type(size) is not int or not 0 <= size < 2**63:
            return False
    return True


def _json(raw: bytes, where: str) -> dict[str, Any]:
    table = parse_json(raw, f"{where}: the header")
    if not isinstance(table, dict):
        raise FormatError(f"{where}: the header isn't a table")
    inner = sum(len(value) for value in table.values() if isinstance(value, dict))
    if raw.count(b":") != len(table) + inner:  # a name is there twice, or one holds a colon
        parse_json(raw, f"{where}: the header", object_pairs_hook=partial(_unique, where))
    return table


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)[:5]
        raise FormatError(f"{where}: the header names {', '.join(map(_unquoted, twice))} twice")
    return table


def _unquoted(name: str) -> str:
    return brief(name)[1:-1]
