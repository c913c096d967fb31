"""Going on where an earlier run stopped: which of its shards are kept, or why none is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from surgery.errors import OutputError
from surgery.parallel import Progress, run_all
from surgery.writing.digest import digest_of
from surgery.writing.identity import Identity, differences, identify
from surgery.writing.journal import Finished, read_journals
from surgery.writing.plan import Plan, Shard
from surgery.writing.staging import Stage

Tell = Callable[[str], object]
PART_LOCKS = "part-*-of-*.lock"


def begin(
    stage: Stage,
    layout: Plan,
    *,
    resume: bool = True,
    complete: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> dict[str, Finished]:
    """Make the stage ready: keep the shards of an earlier run that was about to write the same,
    after their bytes are checked, and remove all else. Returns what is kept, by name.

    With `complete` all shards have to be there, and OutputError says which aren't.
    """
    say = tell or (lambda _: None)
    now = identify(layout)
    before = stage.read_identity()
    found = read_journals(stage.folder) if stage.files.is_dir() else {}  # or it was published
    kept: dict[str, Finished] = {}
    if complete:
        kept = _all_of(stage, layout, before, now, found, threads, progress)
    elif found and not resume:
        say(f"starting anew: {len(found)} finished shards of an earlier run are removed")
    elif found and (why := why_not(before, now)):
        say(f"starting anew, not with the shards that an earlier run has finished: {why}")
    elif found:
        kept = checked(
            stage.files, layout.shards, found, threads, progress,
            lambda text: say(f"{text}, and is written again"),
        )  # fmt: skip
    stage.clear(keep=[*kept])
    if now is not None and not kept:
        stage.write_identity(now)
    stage.finished, stage.shards, stage.known = len(kept), len(layout.shards), now is not None
    if kept and not complete:
        say(f"going on: {len(kept)} of {len(layout.shards)} shards were finished")
    return kept


def why_not(before: Any, now: Identity | None) -> str:
    """Why nothing can be kept; empty if it can be."""
    if now is None:
        return "a tensor is computed by a function without a name, which can't be told from another"
    if not isinstance(before, dict):
        return "it isn't known what that was about to write"
    try:
        return "; ".join(differences(before, now))
    except (KeyError, TypeError, AttributeError, ValueError):
        return "it isn't known what that was about to write"


def _all_of(
    stage: Stage,
    layout: Plan,
    before: Any,
    now: Identity | None,
    found: Mapping[str, Finished],
    threads: int | None,
    progress: Progress | None,
) -> dict[str, Finished]:
    if why := why_not(before, now):
        raise OutputError(f"{stage.folder} holds parts of another output: {why}")
    require_all(stage, layout)
    damaged: list[str] = []
    kept = checked(stage.files, layout.shards, found, threads, progress, damaged.append)
    OutputError.raise_if(f"{text}: run its part again" for text in sorted(damaged))
    return kept


def require_all(stage: Stage, layout: Plan) -> None:
    """Raise OutputError if there are shards that no part has finished; a quick look, before a
    proof that takes long."""
    found = read_journals(stage.folder) if stage.folder.is_dir() else {}
    missing = [number for number, s in enumerate(layout.shards) if s.name not in found]
    if not missing:
        return
    counts = {int(path.stem.rpartition("-")[2]) for path in stage.folder.glob(PART_LOCKS)}
    if len(counts) == 1:
        (count,) = counts
        parts = sorted({number % count + 1 for number in missing})
        again = ", ".join(f"--shards {part}/{count}" for part in parts)
        raise OutputError(
            f"{len(missing)} of {len(layout.shards)} shards of {stage.target} aren't finished: "
            f"run {again} again"
        )
    raise OutputError(
        f"{len(missing)} of {len(layout.shards)} shards of {stage.target} aren't finished: run "
        f"their parts first"
    )


def checked(
    folder: Path,
    shards: Sequence[Shard],
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
            say(f"{shard.name} isn't what was written any more")
            return
        with lock:
            kept[shard.name] = finished
        if progress is not None:
            progress(shard.size - len(shard.head))

    there = (shard for shard in shards if shard.name in found)
    run_all(there, check, threads, with_torch=False)
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
