"""Exact order statistics of more numbers than are held at once, without a sort.

A sample says about where the value of a rank lies; a pass that counts what is below, and keeps
what is near, then says exactly which it is (`Window`). Where the sample misled, a search does it
in any case:

The bits of nonnegative IEEE floats, read as whole numbers, are in the order of the floats. So a
histogram over the top 16 bits says in which bin the value of a given rank lies, and a second
pass over the numbers, counting the next 16 bits of those in that bin, says which it is (float64
takes four passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from surgery.dtypes import DTYPES, DType
from surgery.kernels import compiled
from surgery.kernels.numbers import widened

BINS = 1 << 16


MARGIN = 0.01
"""How far from its place in the sample, as a part of all numbers, a value is looked for."""


class Window:
    """The value at `rank` of a stream of `count` nonnegative floats, if it lies where a sorted
    `sample` of them suggests.

    What lies inside the window is kept. Its two ends and the likeliest value are only counted:
    differences of bfloat16 have few values, and one of them can be a tenth of all numbers.
    """

    def __init__(self, rank: int, count: int, sample: numpy.ndarray) -> None:
        self.rank = rank
        last = len(sample) - 1
        first, end = ((rank / count + way * MARGIN) * last for way in (-1, 1))
        low = sample[int(first)] if first > 0 else sample.dtype.type(0)
        high = sample[int(end) + 1] if end < last else sample.dtype.type("inf")
        self._marks = numpy.unique([low, sample[round(rank / count * last)], high])
        self._equal = [0] * len(self._marks)
        self._below = 0
        self._near: list[numpy.ndarray] = []
        self._room = max(1 << 16, int(8 * MARGIN * count))

    @property
    def full(self) -> bool:
        """Whether there were more numbers near than a window should hold: it won't find any."""
        return self._room < 0

    def count_between(self, base: numpy.ndarray, model: numpy.ndarray) -> bool:
        """Take |model - base| in float32 into account, of bytes of bfloat16. Returns whether they
        were seen to be finite."""
        if self.full:
            return False
        seen = compiled.window(base, model, self._marks.tolist())
        self._take(seen.below, seen.equal, seen.near)
        return seen.finite

    def count(self, values: numpy.ndarray) -> None:
        """Take a part of the stream into account."""
        if self.full:
            return
        flat = values.reshape(-1)
        below = flat < self._marks[0]
        inside = (flat <= self._marks[-1]) ^ below
        equal = []
        for mark in self._marks:
            same = flat == mark
            inside ^= same
            equal.append(int(numpy.count_nonzero(same)))
        self._take(int(numpy.count_nonzero(below)), equal, numpy.compress(inside, flat))

    def _take(self, below: int, equal: Sequence[int], near: numpy.ndarray) -> None:
        self._below += below
        for at, count in enumerate(equal):
            self._equal[at] += count
        self._near.append(near)
        self._room -= len(near)

    @property
    def found(self) -> float | None:
        """The value, or None: it wasn't in the window."""
        if self.full or self.rank < self._below:
            return None
        near = numpy.concatenate([self._marks[:0], *self._near])
        at = self.rank - self._below  # among what is near, and the marks that were passed
        for mark, equal in zip(self._marks, self._equal, strict=True):
            smaller = int(numpy.count_nonzero(near < mark))
            if at < smaller:
                # no partition: it is slow where many are equal
                return order_statistics(near, [at])[0]
            if at < smaller + equal:
                return float(mark)
            at -= equal
        return None


@dataclass
class _Target:
    """The value of `rank` among those whose leading bits are `prefix`."""

    rank: int
    prefix: int


class Search:
    """The values at `ranks` (0 is the smallest) of a stream of nonnegative floats.

    Count all of the stream, then `narrow`; again until `done`. NaN counts as the largest.
    """

    def __init__(self, ranks: Sequence[int], dtype: DType) -> None:
        self._type = numpy.float64 if dtype is DTYPES["F64"] else numpy.float32
        self._levels = self._type().itemsize // 2
        self._level = 0
        self._targets = [_Target(rank, 0) for rank in ranks]
        self._counts = {0: numpy.zeros(BINS, dtype=numpy.int64)} if ranks else {}

    @property
    def done(self) -> bool:
        return self._level == self._levels or not self._targets

    def count_between(self, base: numpy.ndarray, model: numpy.ndarray) -> bool:
        """Take |model - base| in float32 into account, as a `Window` does."""
        self.count(magnitudes(base, model))
        return False

    def count(self, values: numpy.ndarray) -> None:
        """Take a part of the stream into account."""
        if self.done or not values.size:
            return
        flat = values.reshape(-1)
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


def magnitudes(base: numpy.ndarray, model: numpy.ndarray) -> numpy.ndarray:
    """|model - base| in float32, of values of bfloat16, given as bytes or as 16 bits each."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        made: numpy.ndarray = numpy.abs(widened(model) - widened(base))
    return made


def order_statistics(values: numpy.ndarray, ranks: Sequence[int]) -> list[float]:
    """The values at `ranks` of nonnegative floats that are held whole."""
    search = Search(ranks, DTYPES["F64" if values.dtype == numpy.float64 else "F32"])
    while not search.done:
        search.count(values)
        search.narrow()
    return search.found
