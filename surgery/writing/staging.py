"""The staging directory: nothing appears under the final name until it is complete and synced."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any

from surgery.errors import InputError, NotFoundError, OutputError
from surgery.system import naming, reason, remedy
from surgery.writing.failures import NOTHING, told

STAGING, REPLACED = ".staging", ".replaced"
_HELD: set[tuple[Path, int]] = set()
"""Targets that are locked, and by which thread."""
FILES, LOCK, IDENTITY, JOURNALS = "files", "lock", "identity.json", "journal*.jsonl"


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
    ours = {staging_folder(target).resolve(), replaced_folder(target).resolve()}
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
        elif any(target.iterdir()) and not holds_weights(target):
            problems.append(
                f"{target} holds no model that could be replaced: choose another place, or remove "
                f"what is there yourself"
            )
    aside = replaced_folder(target)
    if overwrite and aside.exists() and target.exists() and not problems:
        problems.append(
            f"{aside} is there: it is what a run that was stopped has replaced. Look at it, and "
            f"remove it with `surgery clean {target}`"
        )
    OutputError.raise_if(problems)


def holds_weights(folder: Path) -> bool:
    """Whether a directory is a model, a task vector or an adapter, and not somebody's home."""
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


@dataclass
class Stage:
    """The directory beside `target` in which it is made, ours alone while the lock is held.

    What gets the final name is in `files`; beside it lie the lock, the journal of finished shards
    and what tells a later run whether it may go on from them.
    """

    target: Path
    folder: Path
    finished: int = 0
    """Shards that a later run could keep."""
    shards: int = 0

    @property
    def files(self) -> Path:
        return self.folder / FILES

    def read_identity(self) -> Any:
        """What an earlier run was about to write; None if that isn't known."""
        try:
            return json.loads((self.folder / IDENTITY).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def write_identity(self, identity: Any) -> None:
        """Say what is about to be written. It is there as a whole or not at all."""
        path = self.folder / f"{IDENTITY}.new"
        with naming(path):
            path.write_text(json.dumps(identity), "utf-8")
        sync(path)
        os.rename(path, self.folder / IDENTITY)
        sync(self.folder)

    def count_one(self) -> None:
        """One more shard is finished."""
        self.finished += 1

    @property
    def noted(self) -> int:
        """Shards that earlier runs have noted as finished."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob(JOURNALS))

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what an earlier run left, but for the files `keep`; with none, all of it."""
        if not keep:
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    _remove(path)
        self.files.mkdir(exist_ok=True)
        for path in self.files.iterdir():
            if path.name not in keep:
                _remove(path)

    def discard(self) -> None:
        """Nothing of this is to be kept: it isn't what it has to be."""
        self.finished = 0
        self.clear()

    def keeps(self, error: BaseException) -> bool:
        """Whether what is finished is left for a later run: it is if this one was stopped from
        outside, and not if it would fail again."""
        outside = (OSError, MemoryError, OutputError)
        unread = type(error) in (InputError, NotFoundError)  # but not what is wrong in a file
        stopped = not isinstance(error, Exception) or isinstance(error, outside) or unread
        return self.finished > 0 and self.files.is_dir() and stopped

    @property
    def what_is_kept(self) -> str:
        return self.how_to_go_on if self.finished else NOTHING

    @property
    def how_to_go_on(self) -> str:
        return (
            f"{self.finished} of {self.shards} shards are finished and kept in {self.folder}: run "
            f"the same command again to go on, or remove them with `surgery clean {self.target}`"
        )


@contextmanager
def staging(
    target: Path, *, overwrite: bool = False, tell: Callable[[str], object] | None = None
) -> Iterator[Stage]:
    """A stage for `target`, gone when the block is left, unless it `keeps` what is finished.

    It is locked while it is in use, and the lock goes with the process. What a killed run had
    put aside to replace it gets its name back. `tell` is called with what is to be known.
    """
    folder = staging_folder(target)
    stage = Stage(target, folder)
    kept = False
    with locked(target):
        try:
            stage.finished = stage.shards = stage.noted
            _put_back(target, overwrite, tell)
            yield stage
        except BaseException as error:
            kept = stage.keeps(error)
            if kept and tell is not None and not isinstance(error, OutputError):
                tell(stage.how_to_go_on)
            raise
        finally:
            if not kept:
                with suppress(OSError):  # why we are here is what is to be told, and the next
                    remove_stage(folder)  # run removes what is left


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of the stage of `target`, which is made if need be. A thread that holds it
    may ask for it again: a long proof comes before the writing, under the same lock.

    Raises OutputError if another process holds it, or another thread.
    """
    target = target.absolute()
    holder = (target, get_ident())
    if holder in _HELD:
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
                _flock(lock, target)
                for path in parents:
                    sync(path.parent)
                ours = _is(folder / LOCK, lock)
            if ours:
                _HELD.add(holder)
            else:  # the run that held it has removed it
                os.close(lock)
                lock = None
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                if holder in _HELD and _is(folder / LOCK, lock) and os.listdir(folder) == [LOCK]:
                    remove_stage(folder)
            _HELD.discard(holder)
            with suppress(OSError):
                os.close(lock)
        for path in (folder, *parents):  # made here, and nothing came into it
            with suppress(OSError):
                path.rmdir()


def _flock(lock: int, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another run is writing {target}: wait for it") from error
    except OSError as error:
        raise OutputError(
            f"{target.parent} can't be locked against other runs: {reason(error)}{remedy(error)}"
        ) from error


def remove_stage(folder: Path) -> None:
    """Remove a stage whose lock is held: the lock last, or another run could get into it."""
    for path in folder.iterdir():
        if path.name != LOCK:
            _remove(path)
    (folder / LOCK).unlink()
    with suppress(OSError):  # another run has made its own lock there already
        folder.rmdir()


def _put_back(target: Path, overwrite: bool, tell: Callable[[str], object] | None) -> None:
    """Give what a killed run had put aside its name back."""
    if not put_back(target):
        return
    text = f"{target} was put aside by a run that was stopped, and has its name back"
    if not overwrite:
        raise OutputError(f"{text}: choose another place, or replace it with --overwrite")
    if tell is not None:
        tell(text)


def put_back(target: Path) -> bool:
    """Rename what was put aside to be replaced back to `target`, if nothing has that name."""
    aside = replaced_folder(target)
    if not holds_weights(aside) or aside.is_symlink() or os.path.lexists(target):
        return False
    os.rename(aside, target)
    sync(target.parent)
    return True


def publish(stage: Stage, *, overwrite: bool) -> None:
    """Move the files of `stage` to its target, in the place of what is there, synced.

    Raises OutputError, and leaves what is there as it is, if something came there meanwhile and
    `overwrite` is False, or the move fails.
    """
    folder, target = stage.files, stage.target
    try:
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        if target.exists() and any(target.iterdir()):
            if not overwrite:
                raise OutputError(f"{target} was made by somebody else meanwhile: nothing written")
            _replace(folder, target)
        else:
            os.rename(folder, target)  # also over an empty directory
            sync(target.parent)
    except OSError as error:
        where = f", at {error.filename}" if error.filename else ""
        raise OutputError(
            f"{target} can't be published{where}: {reason(error)}{remedy(error)}"
        ) from error


def _replace(folder: Path, target: Path) -> None:
    aside = replaced_folder(target)
    try:
        os.rename(target, aside)
        os.rename(folder, target)
    except BaseException:  # an interrupt too: what was there comes back
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    sync(target.parent)
    try:
        shutil.rmtree(aside)
    except OSError as error:
        raise OutputError(
            f"{target} is written, and what it has replaced can't be removed: {error}"
        ) from error


def staged_bytes(target: Path) -> int:
    """Bytes on the disk that a run before this one has left: used again, or freed."""
    total = 0
    for path in staging_folder(target).rglob("*"):
        with suppress(FileNotFoundError):  # the run may be at work
            total += path.lstat().st_blocks * 512
    return total


def staging_folder(target: Path) -> Path:
    """Where `target` is made."""
    return target.parent / f".{target.name}{STAGING}"


def replaced_folder(target: Path) -> Path:
    """Where what `target` replaces lies for a moment."""
    return target.parent / f".{target.name}{REPLACED}"


def _is(path: Path, fd: int) -> bool:
    """Whether what is open as `fd` still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Have a file or a directory written to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)
