"""The comparisons that certificates are made of: a range of rows of one tensor each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from surgery.kernels.bits import same_bits
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy
    import torch

    from surgery.verification.columns import Columns

INEXACT = "the outgoing weights of a neuron's copies have no sum that two float64 can hold"


class Check:
    """A range of rows of one tensor to compare. `run` returns what is wrong, or None."""

    def __init__(self, name: str, base: LazyTensor, grown: LazyTensor, rows: tuple[int, int]):
        self.name, self.base, self.grown, self.rows = name, base, grown, rows

    @property
    def nbytes(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.grown.width * self.grown.dtype.bits // 8

    def run(self, start: int, stop: int) -> str | None:
        """Rows `start` to `stop` are bitwise those of the base."""
        if self.grown.leaf is not None and self.grown.leaf == self.base.leaf:
            return None  # the same bytes of the same file
        if not same_bits(self.grown.read(start, stop), self.base.read(start, stop)):
            return f"rows {start} to {stop - 1} differ from the base's, and nothing should"
        return None


class Zero(Check):
    """A projection of a new block that writes to the residual stream: zero."""

    def run(self, start: int, stop: int) -> str | None:
        if bool((self.grown.read(start, stop) != 0).any()):
            return "it belongs to a new block and writes to the residual stream, and isn't zero"
        return None


class Rows(Check):
    """Neurons are rows (of up, or its bias): each is bitwise its source; padding is zero."""

    def __init__(
        self,
        name: str,
        base: LazyTensor,
        grown: LazyTensor,
        rows: tuple[int, int],
        sources: numpy.ndarray,
    ):
        super().__init__(name, base, grown, rows)
        self.sources = sources

    def run(self, start: int, stop: int) -> str | None:
        rows = self.grown.read(start, stop)
        for at, end, source in _stretches(self.sources, start, stop):
            part = rows[at - start : end - start]
            if source < 0:
                if bool((part != 0).any()):
                    return f"rows {at} to {end - 1} are padding, and aren't zero"
            elif not same_bits(part, self.base.read(source, source + end - at)):
                return f"rows {at} to {end - 1} aren't copies of those from row {source} on"
        return None


class UpColumns(Check):
    """Neurons are columns of an up projection (in, out): each is bitwise its source."""

    def __init__(
        self,
        name: str,
        base: LazyTensor,
        grown: LazyTensor,
        rows: tuple[int, int],
        sources: torch.Tensor,
    ):
        super().__init__(name, base, grown, rows)
        self.sources = sources

    def run(self, start: int, stop: int) -> str | None:
        rows = self.grown.read(start, stop)
        real = self.sources >= 0
        if not same_bits(rows[:, real], self.base.read(start, stop)[:, self.sources[real]]):
            return "columns aren't those they are copies of"
        if bool((rows[:, ~real] != 0).any()):
            return "columns of padding aren't zero"
        return None


class DownColumns(Check):
    """Neurons are columns of the down projection: those of a source's copies sum to its own."""

    def __init__(
        self,
        name: str,
        base: LazyTensor,
        grown: LazyTensor,
        rows: tuple[int, int],
        columns: Columns,
    ):
        super().__init__(name, base, grown, rows)
        self.columns = columns

    def run(self, start: int, stop: int) -> str | None:
        import torch

        columns = self.columns
        base, rows = self.base.read(start, stop), self.grown.read(start, stop)
        copies, sources = columns.alone
        if wrong := _difference(rows[:, copies], base[:, sources]):
            return wrong
        if wrong := _difference(torch.zeros_like(base[:, columns.absent]), base[:, columns.absent]):
            return wrong
        wanted = base[:, columns.shared]
        total = torch.zeros(wanted.shape, dtype=torch.float64)
        lost = torch.zeros_like(total)
        for number, (copies, at) in enumerate(columns.rounds):
            part = rows[:, copies].to(torch.float64)
            if not number:
                total[:, at] = part
                continue
            total[:, at], rest = two_sum(total[:, at], part)
            lost[:, at], inexact = two_sum(lost[:, at], rest)
            if bool((inexact != 0).any()):
                return INEXACT
        return _sums(total, lost, wanted, rows[:, columns.padding])


class DownRows(Check):
    """The same where neurons are rows of the down projection; `rows` are rows of the base."""

    def __init__(
        self,
        name: str,
        base: LazyTensor,
        grown: LazyTensor,
        rows: tuple[int, int],
        sources: numpy.ndarray,
    ):
        super().__init__(name, base, grown, rows)
        self.sources = sources

    def run(self, start: int, stop: int) -> str | None:
        import numpy
        import torch

        total = torch.zeros(stop - start, self.base.width, dtype=torch.float64)
        lost = torch.zeros_like(total)
        here = numpy.flatnonzero((self.sources >= start) & (self.sources < stop))
        sources = self.sources[here]
        apart = (numpy.diff(here) != 1) | (numpy.diff(sources) != 1)
        edges = [0, *(numpy.flatnonzero(apart) + 1).tolist(), len(here)]
        for first, last in pairwise(edges):
            neuron, at = int(here[first]), int(sources[first]) - start
            rows = self.grown.read(neuron, neuron + last - first).to(torch.float64)
            part = slice(at, at + last - first)
            total[part], rest = two_sum(total[part], rows)
            lost[part], inexact = two_sum(lost[part], rest)
            if bool((inexact != 0).any()):
                return INEXACT
        nothing = [self.grown.read(0, 0)]
        if stop == self.base.rows:
            nothing += [
                self.grown.read(at, end)
                for at, end, source in _stretches(self.sources, 0, len(self.sources))
                if source < 0
            ]
        return _sums(total, lost, self.base.read(start, stop), torch.cat(nothing))


def _sums(
    total: torch.Tensor, lost: torch.Tensor, base: torch.Tensor, padding: torch.Tensor
) -> str | None:
    """Whether total + lost is exactly the base's weight, and padding is zero. `lost` is what
    float64 lost of the sum: 0 for types up to float32, a last bit or two for float64."""
    import torch

    off, inexact = two_sum(total, -base.to(torch.float64))
    if not torch.equal(off, -lost) or bool((inexact != 0).any()):
        return _off(off + lost)
    if bool((padding != 0).any()):
        return "outgoing weights of padding aren't zero"
    return None


def _difference(grown: torch.Tensor, base: torch.Tensor) -> str | None:
    """What is wrong if outgoing weights of neurons that weren't copied aren't the base's."""
    import torch

    if bool((grown == base).all()):
        return None
    off = grown.to(torch.float64) - base.to(torch.float64)
    return _off(off)


def _off(off: torch.Tensor) -> str:
    worst = float(off.abs().nan_to_num(nan=float("inf")).max())
    return (
        f"the outgoing weights of a neuron's copies don't sum to what it had "
        f"(off by up to {worst:.3g})"
    )


def two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a + b rounded, and what the rounding lost: together exactly a + b (Knuth, TAOCP 4.2.2)."""
    total = a + b
    second = total - a
    return total, (a - (total - second)) + (b - second)


def _stretches(sources: numpy.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Maximal (start, stop, source) with row start + i a copy of source + i; -1 for padding."""
    import numpy

    part = sources[start:stop]
    step = numpy.where(part[:-1] < 0, part[1:] < 0, part[1:] == part[:-1] + 1)
    breaks = numpy.flatnonzero(~step) + 1
    edges = [0, *breaks.tolist(), len(part)]
    for first, last in pairwise(edges):
        if last > first:
            yield start + first, start + last, int(part[first])
