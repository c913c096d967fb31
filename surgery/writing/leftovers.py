"""What runs that were stopped have left: found, told apart from what is in use, and cleared."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from surgery.errors import NotFoundError
from surgery.writing.locks import LOCK, STAGING, locked, remove_stage, staging_folder
from surgery.writing.staging import (
    FILES,
    IDENTITY,
    OLD,
    REPLACED,
    Stage,
    holds_weights,
    put_back,
    replaced_folder,
)


@dataclass(frozen=True)
class Leftover:
    """A stage, or what one was about to replace: `remove` it, or `put back` what has lost its
    name."""

    path: Path
    target: Path
    remedy: Literal["remove", "put back"]
    nbytes: int
    age: float
    """Seconds since something in it was changed."""
    finished: int
    """Shards that the next run could keep."""
    in_use: bool


def find_leftovers(place: Path) -> list[Leftover]:
    """What was left below the directory `place`, and beside it if it is a target itself, whether
    that is there or not. Links aren't followed."""
    place = place.absolute()
    if not place.parent.is_dir():
        raise NotFoundError(f"there is no directory {place.parent}")
    beside = [path for path in (staging_folder(place), replaced_folder(place)) if path.is_dir()]
    if not (beside or place.is_dir()):
        raise NotFoundError(f"{place} isn't there, and nothing was left of a run that wrote it")
    found = dict.fromkeys([*beside, *_below(place)])
    return [leftover for path in found if (leftover := _look_at(path)) is not None]


def _below(place: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(place):
        names.sort()
        ours = [
            name for name in names if name.startswith(".") and name.endswith((STAGING, REPLACED))
        ]
        yield from (Path(folder, name) for name in ours)
        names[:] = [name for name in names if name not in ours]


def _look_at(path: Path) -> Leftover | None:
    """What this directory is, or None if it is none of ours, whatever its name."""
    if path.is_symlink():
        return None
    staged = path.name.endswith(STAGING)
    target = path.parent / path.name[1 : -len(STAGING if staged else REPLACED)]
    if staged:
        names = {one.name for one in path.iterdir()}
        if names and names.isdisjoint({FILES, IDENTITY, LOCK, OLD}):
            return None
    elif not holds_weights(path):
        return None
    lost = not staged and not os.path.lexists(target)
    files = [path, *path.rglob("*")]
    stats = []
    for one in files:
        with suppress(FileNotFoundError):
            stats.append(one.lstat())
    return Leftover(
        path,
        target,
        "put back" if lost else "remove",
        sum(stat.st_blocks * 512 for stat in stats),
        max(0.0, time.time() - max((stat.st_mtime for stat in stats), default=0)),
        Stage(target, path).noted if staged else 0,
        _in_use(staging_folder(target) / LOCK),
    )


def _in_use(lock: Path) -> bool:
    """Whether a process holds this lock."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def clear(leftover: Leftover) -> None:
    """Remove it, or put it back. Raises OutputError if a run is using it."""
    target, folder = leftover.target, staging_folder(leftover.target)
    with locked(target):
        if leftover.remedy == "put back":
            put_back(target)
        elif leftover.path != folder:
            shutil.rmtree(folder / OLD, ignore_errors=True)
            os.rename(leftover.path, folder / OLD)  # it is a model to the last, or has no name
            shutil.rmtree(folder / OLD)
        if leftover.path == folder:
            remove_stage(folder)
