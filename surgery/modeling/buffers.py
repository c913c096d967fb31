"""Memory for large tensors that come and go: given out again, rather than back to the system.

malloc returns what is larger than 32 MB at once, and touching new pages costs several times what
filling them does.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Sequence
from math import prod
from threading import Lock

import numpy
import torch

SMALL = 1 << 20
_PAGE = 1 << 21
_FITS = 1.25
"""Small tensors are malloc's. Buffers are whole huge pages, and serve tensors a bit smaller."""


class Buffers:
    """Uninitialised tensors in memory that comes back by itself, as the last tensor that shares
    it dies. At most `keep` bytes wait to be given out again."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._free: list[mmap.mmap] = []
        self._lock = Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, its values anything."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < SMALL:
            return torch.empty(tuple(shape), dtype=dtype)
        memory = self._take(-(-nbytes // _PAGE) * _PAGE)
        lent = numpy.frombuffer(memory, dtype=numpy.uint8)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return torch.from_numpy(lent)[:nbytes].view(dtype).view(tuple(shape))

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            fitting = [m for m in self._free if size <= len(m) <= _FITS * size]
            if fitting:
                best = min(fitting, key=len)
                self._free.remove(best)
                return best
        made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                made.madvise(mmap.MADV_HUGEPAGE)
        return made

    def _give_back(self, memory: mmap.mmap) -> None:
        with self._lock:
            self._free.append(memory)
            while sum(map(len, self._free)) > self._keep:
                self._free.pop(0)  # unmapped as nobody holds it any more
