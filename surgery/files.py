"""Bytes of a file: reading a range of them into a tensor, without mapping the file.

`pread` and not `mmap`: a mapped file that shrinks or vanishes under us kills the process, and a
short read is an error with a name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import FormatError, InputError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from surgery.tensor import LazyTensor


class _Descriptor:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@dataclass(frozen=True)
class InputFile:
    """A file to read from, opened at the first read and kept open: if another file is moved to
    its path meanwhile, we go on reading the one that was checked."""

    path: Path

    @cached_property
    def descriptor(self) -> _Descriptor:
        """Hold it while its number is in use: two threads may race to open the file."""
        try:
            return _Descriptor(self.path)
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.path} is gone: it was there when it was opened") from error
        except OSError as error:
            raise InputError(f"{self.path} can't be read: {error.strerror}") from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises FormatError if the file ends."""
        descriptor = self.descriptor
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(descriptor.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise InputError(
                    f"{self.path} can't be read at byte {offset + done}: {error.strerror}"
                ) from error
            if got == 0:
                raise FormatError(
                    f"{self.path} ends at byte {offset + done}, and its header promised more: "
                    f"it was cut short while it was read"
                )
            done += got


@dataclass(frozen=True)
class FileSpan:
    """`length` bytes of `file` from byte `offset`: the leaf of a tensor that lies in a file."""

    file: InputFile
    offset: int
    length: int

    def part(self, start: int, stop: int) -> FileSpan:
        """Bytes `start` to `stop` of this span."""
        assert 0 <= start <= stop <= self.length
        return FileSpan(self.file, self.offset + start, stop - start)

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of `tensor`, whose bytes these are."""
        import torch

        row_bits = tensor.width * tensor.dtype.bits
        if row_bits % 8:
            raise UnsupportedError(
                f"{self.file.path}: a row of {tensor.width} {tensor.dtype} values isn't whole "
                f"bytes, so the tensor can only be copied"
            )
        shape = (stop - start, tensor.width) if len(tensor.shape) > 1 else (stop - start,)
        out = torch.empty(shape, dtype=tensor.dtype.torch)
        if out.numel():
            self.file.read_into(as_bytes(out), self.offset + start * row_bits // 8)
        return out


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, byte by byte, shared with it."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data
