"""The staging directory: nothing appears under the final name until it is complete and synced."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import OutputError


def check_target(target: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise OutputError if writing to `target` could harm what is there, or an input."""
    problems = []
    real = target.resolve()
    for path in inputs:
        given = path.resolve()
        if real == given or real in given.parents or given in real.parents:
            problems.append(
                f"{target} is, contains or lies inside the input {path}: choose another place"
            )
    if (target.exists() or target.is_symlink()) and not problems:
        if not target.is_dir():
            problems.append(f"{target} exists and is no directory: choose another place")
        elif any(target.iterdir()) and not overwrite:
            problems.append(
                f"{target} exists already: choose another place, or replace it with --overwrite"
            )
    OutputError.raise_if(problems)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, gone when the block is left, however it is left.

    It is locked while it is in use; the lock goes with the process, so that one that was killed
    leaves nothing that stops the next run: what it left behind is removed here.
    """
    folder = target.parent / f".{target.name}.staging"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_symlink():
            raise OutputError(f"{folder} is a link, and staging needs that name: remove it")
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"{folder} can't be made: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another run is writing {target}: wait for it") from error
        try:
            _empty(folder)
            yield folder
        finally:
            if folder.exists() and os.path.samestat(folder.stat(), os.fstat(lock)):
                shutil.rmtree(folder)
    finally:
        os.close(lock)


def publish(folder: Path, target: Path) -> None:
    """Move `folder` to `target`, in the place of what is there. Everything in it is synced."""
    try:
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        if target.exists() and any(target.iterdir()):
            aside = target.parent / f".{target.name}.replaced"
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(target, aside)
            os.rename(folder, target)
            shutil.rmtree(aside)
        else:
            os.rename(folder, target)  # also over an empty directory
        _sync(target.parent)
    except OSError as error:
        raise OutputError(f"{target} can't be published: {error}") from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
