"""The lock of a stage: one run, or many that write parts, and it goes with the process.

It is a file in the stage, locked with `flock` and opened for writing, which NFS needs. Removing it
is the last that a run does, so that whoever gets a lock has to look whether it is still the one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident

from surgery.errors import OutputError
from surgery.system import reason, remedy, sync
from surgery.writing.failures import told

STAGING, LOCK = ".staging", "lock"
_HELD: set[tuple[Path, int]] = set()
"""Targets that are locked, and by which thread."""


def staging_folder(target: Path) -> Path:
    """Where `target` is made."""
    return target.parent / f".{target.name}{STAGING}"


@contextmanager
def locked(target: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of the stage of `target`, which is made if need be. A thread that holds it
    may ask for it again: a long proof comes before the writing, under the same lock. A `shared`
    one can be had by many, who write parts, but not while a whole run has it, nor the reverse.

    Raises OutputError if another process holds it, or another thread.
    """
    target = target.absolute()
    holder = (target, get_ident())
    if holder in _HELD and not shared:
        yield
        return
    folder = staging_folder(target)
    if folder.is_symlink():
        raise OutputError(f"{folder} is a link, and staging needs that name: remove it")
    parents = [path for path in target.parents if not path.exists()]
    lock = None
    try:  # from the first moment on: an interrupt may come at any
        while lock is None:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(exist_ok=True)
                how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                lock = os.open(folder / LOCK, how, 0o666)
            except FileNotFoundError:  # another run has just removed the stage
                continue
            except OSError as error:
                where = error.filename or folder
                raise OutputError(
                    f"{where} can't be made: {reason(error)}{remedy(error)}"
                ) from error
            with told(folder, ()):
                _flock(lock, target, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
                for path in parents:
                    sync(path.parent)
                ours = _is(folder / LOCK, lock)
            if ours:
                if not shared:
                    _HELD.add(holder)
            else:  # the run that held it has removed it
                os.close(lock)
                lock = None
        yield
    finally:
        with suppress(OSError):  # there is none, somebody else has it, or the disk is gone
            if lock is None:  # the interrupt came when it was open, and had no name yet
                lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.listdir(folder) == [LOCK]:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(folder / LOCK, lock):
                    remove_stage(folder)
        _HELD.discard(holder)
        if lock is not None:
            with suppress(OSError):
                os.close(lock)
        for path in (folder, *parents):  # made here, and nothing came into it
            with suppress(OSError):
                path.rmdir()


def _flock(lock: int, target: Path, how: int) -> None:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another run is writing {target}: wait for it") from error
    except OSError as error:
        raise OutputError(
            f"{target.parent} can't be locked against other runs: {reason(error)}{remedy(error)}"
        ) from error


def remove_stage(folder: Path) -> None:
    """Remove a stage whose lock is held: the lock last, or another run could get into it."""
    empty(folder)
    (folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # another run has made its own lock there already
        folder.rmdir()


def empty(folder: Path) -> None:
    """Remove all but the lock, and what is noted of files before the files."""
    for path in sorted(folder.iterdir(), key=Path.is_dir):
        if path.name != LOCK:
            remove(path)


def _is(path: Path, fd: int) -> bool:
    """Whether what is open as `fd` still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
