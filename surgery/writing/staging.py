"""The staging directory: nothing appears under the final name until it is complete and synced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import InputError, NotFoundError, OutputError
from surgery.system import naming, reason, remedy, sync
from surgery.writing.failures import NOTHING
from surgery.writing.locks import empty, locked, remove, remove_stage, staging_folder

REPLACED = ".replaced"
FILES, OLD, IDENTITY, JOURNALS = "files", "old", "identity.json", "journal*.jsonl"


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

    What gets the final name is in `files`; beside it lie the lock, the journal of finished shards,
    what tells a later run whether it may go on from them, and in the end what was replaced.
    """

    target: Path
    folder: Path
    finished: int = 0
    """Shards that a later run could keep."""
    shards: int = 0
    known: bool = False
    """Whether it says what is about to be written, so that a later run can go on."""

    @property
    def files(self) -> Path:
        return self.folder / FILES

    def read_identity(self) -> Any:
        """What an earlier run was about to write; None if that isn't known."""
        try:
            return json.loads((self.folder / IDENTITY).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def write_identity(self, identity: Any) -> bool:
        """Say what is about to be written, as a whole or not at all; False if another run has
        said so already."""
        path = self.folder / f"{IDENTITY}.{os.getpid()}.{os.urandom(4).hex()}"
        with naming(path):
            path.write_text(json.dumps(identity), "utf-8")
        sync(path)
        try:
            os.link(path, self.folder / IDENTITY)  # which no two can do
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            os.rename(path, self.folder / IDENTITY)
        finally:
            path.unlink(missing_ok=True)
        sync(self.folder)
        return True

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
            empty(self.folder)
        self.files.mkdir(exist_ok=True)
        for path in self.files.iterdir():
            if path.name not in keep:
                remove(path)

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
                _clear_away(folder, tell)


def _clear_away(folder: Path, tell: Callable[[str], object] | None) -> None:
    """Remove a stage; that this fails, on a disk that is gone, say, must not hide why it is."""
    try:
        remove_stage(folder)
    except OSError as error:
        if tell is not None:
            tell(f"{folder} can't be removed: {error}")


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
    # away from its name in one step: nobody is to take what is half removed for a model
    try:
        os.rename(aside, folder.parent / OLD)
    except OSError as error:
        raise OutputError(
            f"{target} is written, and what it has replaced is left in {aside}: {error}"
        ) from error


def staged_bytes(target: Path) -> int:
    """Bytes on the disk that a run before this one has left: used again, or freed."""
    total = 0
    for path in staging_folder(target).rglob("*"):
        with suppress(FileNotFoundError):  # the run may be at work
            total += path.lstat().st_blocks * 512
    return total


def replaced_folder(target: Path) -> Path:
    """Where what `target` replaces lies for a moment."""
    return target.parent / f".{target.name}{REPLACED}"
