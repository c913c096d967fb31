"""Exact order statistics of more numbers than are held at once, without a sort.

The bits of nonnegative IEEE floats, read as whole numbers, are in the order of the floats. So a
histogram over the top 16 bits says in which bin the value of a given rank lies, and a second
pass over the numbers, counting the next 16 bits of those in that bin, says which it is (float64
takes four passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

BINS = 1 << 16


@dataclass
class _Target:
    """The value of `rank` among those whose leading bits are `prefix`."""

    rank: int
    prefix: int


class Search:
    """The values at `ranks` (0 is the smallest) of a stream of nonnegative floats.

    Count all of the stream, then `narrow`; again until `done`. NaN counts as the largest.
    """

    def __init__(self, ranks: Sequence[int], dtype: torch.dtype) -> None:
        self._type = numpy.float64 if dtype == torch.float64 else numpy.float32
        self._levels = self._type().itemsize // 2
        self._level = 0
        self._targets = [_Target(rank, 0) for rank in ranks]
        self._counts = {0: numpy.zeros(BINS, dtype=numpy.int64)} if ranks else {}

    @property
    def done(self) -> bool:
        return self._level == self._levels or not self._targets

    def count(self, values: torch.Tensor) -> None:
        """Take a part of the stream into account."""
        if self.done or not values.numel():
            return
        flat = values.reshape(-1).numpy()
        parts = flat.view(numpy.uint16)  # little-endian: the last is the most significant
        last = self._levels - 1 - self._level
        digits = parts[last :: self._levels]
        if self._level == 0:
            self._counts[0] += numpy.bincount(digits, minlength=BINS)
            return
        above = _leading_bits(flat, self._level)
        for prefix, counts in self._counts.items():
            counts += numpy.bincount(digits[above == prefix], minlength=BINS)

    def narrow(self) -> None:
        """After a pass: find the bin of every target, and look inside it from now on."""
        if self.done:
            return
        ends = {prefix: numpy.cumsum(counts) for prefix, counts in self._counts.items()}
        for target in self._targets:
            end = ends[target.prefix]
            digit = int(numpy.searchsorted(end, target.rank, side="right"))
            target.rank -= int(end[digit - 1]) if digit else 0
            target.prefix = target.prefix << 16 | digit
        self._level += 1
        self._counts = {t.prefix: numpy.zeros(BINS, dtype=numpy.int64) for t in self._targets}

    @property
    def found(self) -> list[float]:
        """The values, one for each rank."""
        assert self.done
        bits = numpy.array([target.prefix for target in self._targets], dtype=numpy.uint64)
        whole = bits.astype(numpy.uint32 if self._levels == 2 else numpy.uint64)
        return [float(value) for value in whole.view(self._type)]


def _leading_bits(flat: numpy.ndarray, level: int) -> numpy.ndarray:
    """The first 16 * `level` bits of every number."""
    if level == 1:
        step = flat.itemsize // 2
        return flat.view(numpy.uint16)[step - 1 :: step]
    whole: numpy.ndarray = flat.view(numpy.uint64) >> numpy.uint64(64 - 16 * level)
    return whole


def order_statistics(values: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """The values at `ranks` of nonnegative floats that are held whole."""
    search = Search(ranks, values.dtype)
    while not search.done:
        search.count(values)
        search.narrow()
    return search.found
