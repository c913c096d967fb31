"""What an error of the system is called, and what can be done about it; and syncing, which
writing asks of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import InputError, NotFoundError

_REMEDIES = {
    errno.ENOSPC: "Make room, or choose another place",
    errno.EDQUOT: "Make room within your quota, or choose another place",
    errno.EFBIG: "The file system takes no file of that size: pass a smaller --max-shard-size",
    errno.EACCES: "Check who owns it and its permissions",
    errno.EPERM: "Check who owns it and its permissions",
    errno.EROFS: "The file system is read-only: choose another place",
    errno.EIO: "The disk, or the connection to it, may be failing: see the system's log (dmesg)",
    errno.ESTALE: "The file system was lost while it was in use: mount it again",
    errno.ENOTCONN: "The file system was lost while it was in use: mount it again",
    errno.EMFILE: "Raise the limit of open files with `ulimit -n`",
    errno.ENOLCK: "The file system has no locks: choose a place on another",
}


def reason(error: OSError) -> str:
    """What the system says, in its words or plainer ones."""
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def remedy(error: OSError) -> str:
    """What to do about it, as a sentence of its own with a stop before it; nothing if that isn't
    known."""
    text = _REMEDIES.get(error.errno or 0)
    return f". {text}" if text else ""


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Have an error of the system name the file: calls on a descriptor don't know it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Make an error of the system an InputError that names the file, or else `where`."""
    try:
        yield
    except OSError as error:
        kind = NotFoundError if isinstance(error, FileNotFoundError) else InputError
        place = error.filename or where
        raise kind(f"{place} can't be read: {reason(error)}{remedy(error)}") from error


def sync(path: Path) -> None:
    """Have a file or a directory written to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)
