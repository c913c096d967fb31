"""A shard while it is written: its file, what is still to be done in it, and its finishing,
which goes on beside the writing of the next."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import pairwise
from math import fsum
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from surgery.system import naming
from surgery.tensor import FileSpan
from surgery.writing.digest import RunningDigest
from surgery.writing.journal import Finished, Journal
from surgery.writing.plan import FILE_BLOCK, Shard

STEP_BYTES = 1 << 26
"""Bytes after which the system is told to begin writing them to the disk."""
BEHIND_BYTES = 1 << 28
"""Bytes that the disk may be behind: what a slow one can't take waits in the writer, not in the
page cache, where gigabytes of it would stop every other process that writes."""
SLOW_SECONDS = 0.1
"""A disk that is waited for longer than this while it takes STEP_BYTES is slow to read as well."""
AHEAD = 4
"""Shards that may wait to be synced: a slow disk holds up the writer, and files stay few."""
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # linux/fs.h


class OpenShard:
    """A shard of which jobs are handed out. It is `finish`ed by whoever does the last of them:
    one is held by `close_jobs`, which is called when all are handed out."""

    def __init__(
        self,
        folder: Path,
        shard: Shard,
        finish: Callable[[OpenShard], object],
        *,
        digested: bool,
        cached: bool,
    ) -> None:
        self.shard = shard
        self._finish = finish
        self._lock = Lock()
        self._left = 1
        self._sums: dict[str, list[float]] = defaultdict(list)
        self.path = folder / shard.name
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._pace = _Pace(self.fd, cached=cached)
        self._digest = RunningDigest(self.fd) if digested else None
        try:
            with naming(self.path):
                os.ftruncate(self.fd, shard.size)
                self.write(memoryview(shard.head), 0)
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data`, which stays as it is, at `offset`."""
        write_at(self.fd, data, offset)
        if self._digest is not None:
            self._digest.add(offset, len(data), data)

    def copy(self, span: FileSpan, offset: int) -> None:
        """Copy a span to `offset`."""
        copy(self.fd, span, offset)
        if self._digest is not None:
            self._digest.add(offset, span.length)

    def hand_out(self) -> None:
        """One more job is to be done."""
        with self._lock:
            self._left += 1

    def done(self, nbytes: int = 0, name: str = "", tally: float | None = None) -> None:
        """A job is done: so many bytes, of this tensor, which this is to be added to its tally."""
        with self._lock:
            if tally is not None:
                self._sums[name].append(tally)
        self._pace.advance(nbytes)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish(self)

    def close_jobs(self) -> None:
        """All jobs are handed out."""
        self.done()

    @property
    def tallies(self) -> dict[str, float]:
        """The sums, exact, so that the order in which jobs were done can't show."""
        return {name: fsum(self._sums[name]) for name in self.shard.offsets if name in self._sums}

    def sync(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self.fd)
        self._pace.drop_rest()

    @property
    def digest(self) -> str:
        """The digest of all that was written, if one is made."""
        return "" if self._digest is None else self._digest.result(self.shard.size)

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # it is closed even where that fails, and its number given away
        if fd >= 0:
            with naming(self.path):
                os.close(fd)


class Finisher:
    """Syncs shards that are done and, with a journal, notes them, in a thread.
    `noted` is called after each that a later run could go on from."""

    def __init__(self, journal: Journal | None, noted: Callable[[], object]) -> None:
        self.finished: list[Finished] = []
        self._noted = noted
        self.failure: BaseException | None = None
        self._journal = journal
        self._queue: queue.Queue[OpenShard | None] = queue.Queue(AHEAD)
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, shard: OpenShard) -> None:
        self._queue.put(shard)

    def join(self) -> None:
        """Wait until all that was put is finished, or something has failed."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (shard := self._queue.get()) is not None:
            try:
                try:
                    if self.failure is None:
                        with naming(shard.path):
                            self._finish(shard)
                finally:
                    shard.close()
            except BaseException as error:  # noqa: BLE001  raised in the writer's thread
                self.failure = self.failure or error

    def _finish(self, shard: OpenShard) -> None:
        shard.sync()
        finished = Finished(shard.shard.name, shard.shard.size, shard.digest, shard.tallies)
        if self._journal is not None:
            self._journal.append(finished)
            self._noted()
        self.finished.append(finished)


class _Pace:
    """Has a file written to the disk as it grows. Jobs are handed out in the order of the file,
    so that the number of bytes done says about where the writing has come to.

    What a large file has on the disk leaves the page cache: the next bytes take its pages, which
    is faster than new ones, and nothing else is pushed out, the inputs least of all. Unless it is
    to stay `cached`, being read again soon, or the disk is slow.
    """

    def __init__(self, fd: int, *, cached: bool) -> None:
        self._fd = fd
        self._lock = Lock()
        self._done = 0
        self._started = 0
        self._dropped = False
        self._cached = cached

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._done - self._started < STEP_BYTES:
                return
            before, self._started = self._started, self._done
        sync_range(self._fd, max(0, before - STEP_BYTES), self._started, _WRITE)
        if before > BEHIND_BYTES:
            start, stop = max(0, before - BEHIND_BYTES - STEP_BYTES * 2), before - BEHIND_BYTES
            waiting = time.monotonic()
            sync_range(self._fd, start, stop, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            self._cached = self._cached or time.monotonic() - waiting > SLOW_SECONDS
            self._drop(start, stop)

    def drop_rest(self) -> None:
        """All is on the disk: what is left in the page cache goes the way of what came before."""
        if self._dropped:
            self._drop(0, 0)

    def _drop(self, start: int, stop: int) -> None:
        if not self._cached and hasattr(os, "posix_fadvise"):
            self._dropped = True
            with suppress(OSError):  # a hint: where it isn't taken, nothing is lost
                os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)


def sync_range(fd: int, start: int, stop: int, flags: int) -> None:
    """Begin to write these bytes of a file to the disk, or wait for it, as `flags` say. Only a
    hint where the system hasn't got the call: the file is synced as a whole in the end."""
    call = _sync_file_range()
    if call is None or call(fd, start, stop - start, flags) == 0:
        return
    error = ctypes.get_errno()
    if error not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP, errno.EINTR):
        raise OSError(error, os.strerror(error))


@cache
def _sync_file_range() -> Any:
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def copy(fd: int, span: FileSpan, offset: int) -> None:
    """Copy a span into a file at `offset`, inside the system where it can.

    Whole blocks go by themselves where they are whole blocks of both files: file systems that
    share blocks (XFS, Btrfs) then copy nothing.
    """
    cuts = [0, span.length]
    first = -offset % FILE_BLOCK
    if (span.offset - offset) % FILE_BLOCK == 0 and span.length >= first + FILE_BLOCK:
        cuts[1:1] = [first, span.length - (offset + span.length) % FILE_BLOCK]
    for start, stop in pairwise(cuts):
        _copy(fd, span.part(start, stop), offset + start)


def _copy(fd: int, span: FileSpan, offset: int) -> None:
    done = 0
    source = span.file.descriptor
    while done < span.length and hasattr(os, "copy_file_range"):
        try:
            got = os.copy_file_range(
                source.fd, fd, span.length - done, span.offset + done, offset + done
            )
        except OSError:  # not between these two files, or one of them fails: which of the two is
            break  # told by reading and writing
        if got == 0:
            break  # the file has ended, which read_into reports, or can't be copied from
        done += got
    buffer = bytearray(min(1 << 20, span.length - done))
    while done < span.length:
        part = memoryview(buffer)[: span.length - done]
        span.file.read_into(part, span.offset + done)
        write_at(fd, part, offset + done)
        done += len(part)
