"""The staging directory: nothing appears under the final name until it is complete and synced."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import OutputError
from surgery.system import naming, reason, remedy


def check_target(target: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise OutputError if writing to `target` could harm what is there, or an input."""
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, a parent that is a file
        raise OutputError(f"{target} can't be written: {error.strerror}") from error
    problems = []
    real = target.resolve()
    ours = {staging_folder(target).resolve(), _replaced_folder(target).resolve()}
    for path in inputs:
        given = path.resolve()
        if given in ours or not ours.isdisjoint(given.parents):
            problems.append(
                f"{path} is an input, under a name that writing {target} needs: move it"
            )
        if real == given or real in given.parents or given in real.parents:
            problems.append(
                f"{target} is, contains or lies inside the input {path}: choose another place"
            )
    if (target.exists() or target.is_symlink()) and not problems:
        if target.is_symlink():
            problems.append(f"{target} is a link: give the place that it leads to, or another")
        elif not target.is_dir():
            problems.append(f"{target} exists and is no directory: choose another place")
        elif target.is_mount():
            problems.append(
                f"{target} is a mount point, which can't be replaced in one step: choose a "
                f"directory in it"
            )
        elif any(target.iterdir()) and not overwrite:
            problems.append(
                f"{target} exists already: choose another place, or replace it with --overwrite"
            )
        elif any(target.iterdir()) and not _holds_weights(target):
            problems.append(
                f"{target} holds no model that could be replaced: choose another place, or remove "
                f"what is there yourself"
            )
    aside = _replaced_folder(target)
    if overwrite and aside.exists() and not problems:
        problems.append(
            f"{aside} is there: it is what an interrupted run was about to replace. Move it back "
            f"or remove it"
        )
    OutputError.raise_if(problems)


def _holds_weights(folder: Path) -> bool:
    """Whether a directory is a model, a task vector or an adapter, and not somebody's home."""
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, gone when the block is left, however it is left.

    It is locked while it is in use; the lock goes with the process, so that one that was killed
    leaves nothing that stops the next run: what it left behind is removed here.
    """
    folder = staging_folder(target)
    if folder.is_symlink():
        raise OutputError(f"{folder} is a link, and staging needs that name: remove it")
    lock = None
    held = False
    try:  # from the first moment on: an interrupt may come at any
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise OutputError(f"{folder} can't be made: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another run is writing {target}: wait for it") from error
        held = _is(folder, lock)
        if not held:  # another run has published what we locked
            raise OutputError(f"another run has just written {target}")
        _empty(folder)
        yield folder
    finally:
        if lock is None:
            with suppress(OSError):  # made, and interrupted before it was opened; or not ours
                folder.rmdir()
        else:
            with suppress(OSError):  # why we are here is what is to be told, and the next run
                if held and _is(folder, lock):  # removes what is left
                    shutil.rmtree(folder)
            with suppress(OSError):
                os.close(lock)


def publish(folder: Path, target: Path, *, overwrite: bool) -> None:
    """Move `folder` to `target`, in the place of what is there. Everything in it is synced.

    Raises OutputError, and leaves what is there as it is, if something came there meanwhile and
    `overwrite` is False, or the move fails.
    """
    try:
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        if target.exists() and any(target.iterdir()):
            if not overwrite:
                raise OutputError(f"{target} was made by somebody else meanwhile: nothing written")
            _replace(folder, target)
        else:
            os.rename(folder, target)  # also over an empty directory
        _sync(target.parent)
    except OSError as error:
        where = f", at {error.filename}" if error.filename else ""
        raise OutputError(
            f"{target} can't be published{where}: {reason(error)}{remedy(error)}"
        ) from error


def _replace(folder: Path, target: Path) -> None:
    aside = _replaced_folder(target)
    try:
        os.rename(target, aside)
        os.rename(folder, target)
    except BaseException:  # an interrupt too: what was there comes back
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside)


def staging_folder(target: Path) -> Path:
    """Where what will be `target` is made."""
    return target.parent / f".{target.name}.staging"


def _replaced_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _is(folder: Path, lock: int) -> bool:
    """Whether the directory that is open as `lock` still has this name."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)
