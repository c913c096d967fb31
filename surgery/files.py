"""Bytes of a file: reading a range of them into memory, without mapping the file.

`pread` and not `mmap`: a mapped file that shrinks or vanishes under us kills the process, and a
short read is an error with a name.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from surgery.errors import FormatError, InputError, NotFoundError
from surgery.system import reading, reason, remedy

if TYPE_CHECKING:
    import torch

PAGE = 4096
"""Bytes that a file system gives to a file at a time, at least."""


class Stamp(NamedTuple):
    """What tells that a file is still the one that it was: where it lies, its size in bytes, and
    when it was last written to."""

    device: int
    inode: int
    size: int
    written: int

    @classmethod
    def of(cls, fd: int) -> Stamp:
        """The stamp of an open file."""
        seen = os.fstat(fd)
        return cls(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)


class _Descriptor:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            with suppress(OSError):  # it was only read from: nothing can get lost
                os.close(self.fd)


@dataclass(frozen=True)
class InputFile:
    """A file to read from, opened at the first read and kept open: if another file is moved to
    its path meanwhile, we go on reading the one that was checked. `stamp` is of when its header
    was."""

    path: Path
    stamp: Stamp | None = field(default=None, compare=False)

    @cached_property
    def descriptor(self) -> _Descriptor:
        """Hold it while its number is in use: two threads may race to open the file."""
        try:
            made = _Descriptor(self.path)
            self._compare(made.fd)
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.path} is gone: it was there when it was opened") from error
        except OSError as error:
            raise InputError(
                f"{self.path} can't be read: {reason(error)}{remedy(error)}"
            ) from error
        return made

    def check_unchanged(self) -> None:
        """Raise FormatError if somebody has written to what was read."""
        if "descriptor" in vars(self):
            with reading(self.path):
                self._compare(self.descriptor.fd)

    def _compare(self, fd: int) -> None:
        now = Stamp.of(fd)
        if self.stamp is None or now == self.stamp:
            return
        if now.size < self.stamp.size:
            raise self._cut_short(now.size)
        raise FormatError(
            f"{self.path} was changed while it was in use, and what was read of it may be of two "
            f"models: run again when nobody writes to it"
        )

    def _cut_short(self, size: int) -> FormatError:
        return FormatError(
            f"{self.path} ends at byte {size:,}, and its header promised more: it was cut short "
            f"while it was read"
        )

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises FormatError if the file ends."""
        descriptor = self.descriptor
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(descriptor.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise InputError(
                    f"{self.path} can't be read at byte {offset + done}: {reason(error)}"
                    f"{remedy(error)}"
                ) from error
            if got == 0:
                with reading(self.path):
                    raise self._cut_short(os.fstat(descriptor.fd).st_size)
            done += got

    def holes(self, size: int) -> list[tuple[int, int]]:
        """The parts of the file, which has `size` bytes, that were never written, as the file
        system tells them: they read as zeros. Takes two system calls where there are none."""
        found: list[tuple[int, int]] = []
        if not hasattr(os, "SEEK_HOLE"):
            return found
        descriptor = self.descriptor
        at = 0
        while at < size:
            try:
                start = os.lseek(descriptor.fd, at, os.SEEK_HOLE)
            except OSError:  # a file system that doesn't tell, or the file has shrunk meanwhile
                break
            if start >= size:
                break
            try:
                at = os.lseek(descriptor.fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    break
                at = size  # no data from there on
            found.append((start, min(at, size)))
        return found


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, byte by byte, shared with it and held.

    Not by `view` and `numpy`: every operation of torch hands the interpreter to another thread,
    and to get it back takes many times as long as this.
    """
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    if not tensor.nbytes:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")
