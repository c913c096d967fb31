"""One output written by many processes, each its part of the shards, into one stage.

A part holds the stage's lock together with the other parts, and a lock of its own alone. Locks are
`flock`: on NFS they hold between machines unless it is mounted with `nolock` or `local_lock`, and
Lustre needs the mount option `flock`; where they don't, nobody may start one part twice at once.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import ArgumentError, OutputError, UnsupportedError
from surgery.parallel import Progress
from surgery.writing.identity import identify
from surgery.writing.journal import Finished, read_journals
from surgery.writing.locks import locked, staging_folder
from surgery.writing.plan import Plan, Shard
from surgery.writing.resume import PART_LOCKS, Tell, checked, why_not
from surgery.writing.staging import Stage


@dataclass(frozen=True)
class Part:
    """The part `number`, counted from 1, of `count`: every count-th shard."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ArgumentError(f"there is no part {self}: give 1/{self.count} to the last of them")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """As it stands in the names of files."""
        return f"{self.number}-of-{self.count}"

    def shards(self, layout: Plan) -> tuple[Shard, ...]:
        """The shards that are this part's to write."""
        return layout.shards[self.number - 1 :: self.count]


def parse_part(text: str) -> Part:
    """A part, from "3/16"."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    if match is None:
        raise ArgumentError(f"{text!r} is no part of the shards: the third of sixteen is 3/16")
    return Part(int(match.group(1)), int(match.group(2)))


@contextmanager
def part_of_stage(target: Path, part: Part) -> Iterator[Stage]:
    """The stage of `target`, shared with other parts, and left as it is in the end. Raises
    OutputError if a whole run, or another process with this part, is using it."""
    stage = Stage(target, staging_folder(target))
    with locked(target, shared=True), _own_lock(stage, part):
        stage.finished = stage.noted
        yield stage


@contextmanager
def _own_lock(stage: Stage, part: Part) -> Iterator[None]:
    path = stage.folder / PART_LOCKS.replace("*-of-*", part.name)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another process is writing part {part} of {stage.target}: wait for it"
            ) from error
        others = {_count(other) for other in stage.folder.glob(PART_LOCKS)} - {part.count}
        if others:  # they would cut the shards otherwise, and two would write the same
            path.unlink()
            raise OutputError(
                f"{stage.target} is being written in {min(others)} parts, and this is part {part}: "
                f"give the same number, or remove what is there with `surgery clean {stage.target}`"
            )
        yield
    finally:
        os.close(lock)


def forget_parts(target: Path) -> None:
    """Let `target` be cut into another number of parts than before; what is finished stays.
    Raises OutputError if a part is being written."""
    with locked(target):
        for path in staging_folder(target).glob(PART_LOCKS):
            path.unlink()


def _count(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def join(
    stage: Stage,
    layout: Plan,
    part: Part,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> dict[str, Finished]:
    """Make sure that the other parts are of the same plan; returns the shards of this one that
    are finished, their bytes checked, and removes those that aren't."""
    say = tell or (lambda _: None)
    now = identify(layout)
    if now is None:
        raise UnsupportedError(
            f"{stage.target} can't be written in parts: {why_not(None, now)}, so that parts "
            f"couldn't be known to belong together"
        )
    stage.files.mkdir(exist_ok=True)
    if not stage.write_identity(now) and (why := why_not(stage.read_identity(), now)):
        raise OutputError(
            f"part {part} is of another output than what {stage.folder} holds: {why}. If that is "
            f"to go, remove it with `surgery clean {stage.target}`"
        )
    shards = part.shards(layout)
    kept = checked(
        stage.files, shards, read_journals(stage.folder), threads, progress,
        lambda text: say(f"{text}, and is written again"),
    )  # fmt: skip
    for shard in shards:
        if shard.name not in kept:
            with suppress(FileNotFoundError):
                (stage.files / shard.name).unlink()
    stage.shards, stage.known = len(layout.shards), True
    if kept:
        say(f"part {part}, going on: {len(kept)} of {len(shards)} shards were finished")
    return kept
