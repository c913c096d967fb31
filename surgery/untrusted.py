"""Small files of strangers, read whole but within limits: no pipe that never ends, no size that
fills the memory, no nesting that a stack can't hold."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, NotFoundError

MOST_BYTES = 100_000_000
MOST_VALUES = 2_000_000
"""Values in one JSON document: what they take in memory is some hundred times their bytes."""
DEEPEST = 100
"""Tables and lists in one another. What walks through them may be deep in a stack itself."""
LONGEST_REPR = 80


def open_regular(path: Path) -> int:
    """A descriptor of the file at `path`, for reading. A pipe, a socket or a device, which may
    wait or go on for ever, is refused. Raises NotFoundError or InputError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:  # a name that holds a zero byte, or half a surrogate pair
        raise NotFoundError(f"{str(path)!r} can't be the name of a file") from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    what = "Is a directory" if stat.S_ISDIR(mode) else "it is a pipe or a device, and no file"
    raise InputError(f"{path} can't be read: {what}")


def read_small(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file that has to be small. Raises NotFoundError, InputError, or
    FormatError if it isn't."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise FormatError(f"{path} has {size:,} bytes, and at most {most:,} can be meant")
        try:
            return file.read(most)
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror}") from error


def parse_json(raw: bytes, where: str, *, most_values: int = MOST_VALUES, **how: Any) -> Any:
    """A JSON document in UTF-8, `how` as `json.loads` takes it. Raises FormatError, which says
    `where`."""
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > most_values:
        raise FormatError(f"{where} has some {values:,} values, and {most_values:,} are the most")
    try:
        return json.loads(raw.decode("utf-8"), **how)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} isn't JSON: {error}") from error


def parse_table(raw: bytes, where: str, *, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """A JSON table, nested no deeper than any program can walk. Raises FormatError."""
    table = parse_json(raw, where, most_values=most_values)
    if not isinstance(table, dict):
        raise FormatError(f"{where} isn't a JSON table")
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return table
    raise FormatError(f"{where} has tables or lists that are nested more than {DEEPEST} deep")


def _inside(value: Any) -> Iterator[Any]:
    """The tables and lists that lie directly in one."""
    inner = value.values() if isinstance(value, dict) else value
    return (item for item in inner if isinstance(item, (dict, list)))


def brief(value: Any) -> str:
    """A value for a message, whatever it is: short, on one line, and never a walk into depths."""
    if isinstance(value, dict):
        return f"a table of {len(value):,}"
    if isinstance(value, list):
        shown = ", ".join("..." if isinstance(v, (dict, list)) else brief(v) for v in value[:8])
        return f"[{shown}, ...]" if len(value) > 8 else f"[{shown}]"
    text = repr(value)
    return text if len(text) <= LONGEST_REPR else text[: LONGEST_REPR - 3] + "..."
