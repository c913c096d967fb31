"""What is finished: a line for every shard that lies on the disk, with the digest of its bytes
and the tallies of its tensors, so that a later run can keep it.

A line is written after its shard was synced, and synced itself. A last line that was cut short
is no line: its shard is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.system import naming, sync
from surgery.writing.staging import JOURNALS


@dataclass(frozen=True)
class Finished:
    """A shard as it was finished."""

    shard: str
    size: int
    digest: str
    tallies: Mapping[str, float]


class Journal:
    """The journal of one run in the folder of a stage."""

    def __init__(self, folder: Path, part: str = "") -> None:
        self.path = folder / JOURNALS.replace("*", part)

    def append(self, finished: Finished) -> None:
        """Add a line, and wait until it is on the disk."""
        line = {
            "shard": finished.shard,
            "size": finished.size,
            "digest": finished.digest,
            "tallies": {name: value.hex() for name, value in finished.tallies.items()},
        }
        with naming(self.path):
            if self._add(json.dumps(line).encode() + b"\n"):
                sync(self.path.parent)

    def _add(self, line: bytes) -> bool:
        """Returns whether it was the first."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(fd).st_size
            cut = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            data = b"\n" * cut + line
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        return size == 0


def read_journals(folder: Path) -> dict[str, Finished]:
    """What every run in this stage has finished, by shard; of two lines the later holds."""
    found = {}
    for path in sorted(folder.glob(JOURNALS)):
        for line in path.read_bytes().splitlines():
            if (one := _parsed(line)) is not None:
                found[one.shard] = one
    return found


def _parsed(line: bytes) -> Finished | None:
    try:
        given: Any = json.loads(line)
        tallies = {str(name): float.fromhex(value) for name, value in given["tallies"].items()}
        return Finished(str(given["shard"]), int(given["size"]), str(given["digest"]), tallies)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
