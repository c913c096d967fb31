"""Going on where an earlier run stopped: which of its shards are kept, or why none is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from surgery.parallel import Progress, run_all
from surgery.writing.identity import Identity, differences, identify
from surgery.writing.journal import Finished, digest_of, read_journals
from surgery.writing.plan import Plan, Shard
from surgery.writing.staging import Stage

Tell = Callable[[str], object]


def begin(
    stage: Stage,
    layout: Plan,
    *,
    resume: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> dict[str, Finished]:
    """Make the stage ready: keep the shards of an earlier run that was about to write the same,
    after their bytes are checked, and remove all else. Returns what is kept, by name."""
    say = tell or (lambda _: None)
    now = identify(layout)
    before = stage.read_identity()
    found = read_journals(stage.folder)
    kept: dict[str, Finished] = {}
    if found and not resume:
        say(f"starting anew: {len(found)} finished shards of an earlier run are removed")
    elif found and (why := _why_not(before, now)):
        say(f"starting anew, not with the shards that an earlier run has finished: {why}")
    elif found:
        kept = _checked(stage.files, layout, found, threads, progress, say)
    stage.clear(keep=[*kept])
    if now is not None and not kept:
        stage.write_identity(now)
    stage.finished, stage.shards = len(kept), len(layout.shards)
    if kept:
        say(f"going on: {len(kept)} of {len(layout.shards)} shards were finished")
    return kept


def _why_not(before: Any, now: Identity | None) -> str:
    """Why nothing can be kept; empty if it can be."""
    if now is None:
        return "a tensor is computed by a function without a name, which can't be told from another"
    if not isinstance(before, dict):
        return "it isn't known what that was about to write"
    try:
        return "; ".join(differences(before, now))
    except (KeyError, TypeError, AttributeError, ValueError):
        return "it isn't known what that was about to write"


def _checked(
    folder: Path,
    layout: Plan,
    found: Mapping[str, Finished],
    threads: int | None,
    progress: Progress | None,
    say: Tell,
) -> dict[str, Finished]:
    """Those of the finished shards whose bytes are what they were."""
    kept: dict[str, Finished] = {}
    lock = Lock()

    def check(shard: Shard) -> None:
        finished = found[shard.name]
        if not is_intact(folder / shard.name, finished):
            say(f"{shard.name} isn't what was written any more, and is written again")
            return
        with lock:
            kept[shard.name] = finished
        if progress is not None:
            progress(shard.size - len(shard.head))

    run_all((shard for shard in layout.shards if shard.name in found), check, threads)
    return kept


def is_intact(path: Path, finished: Finished) -> bool:
    """Whether the bytes of a file are those that were written; not if they can't be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_size == finished.size and digest_of(fd) == finished.digest
    except OSError:
        return False
    finally:
        os.close(fd)
