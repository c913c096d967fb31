"""How one MLP was widened: which neuron each hidden neuron is a copy of.

The one description of a growth that the operation makes, the certificate checks, the record
keeps and a trainer reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from surgery.anatomy import MLP, Projection

if TYPE_CHECKING:
    import numpy

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Growth:
    """The MLP `mlp` (as it was, width p) widened to `width` p'.

    Neurons 0 to p stay in place; the next ones are copies of the neurons in `copied`, half-open
    ranges in order; what is left up to p' is `padding`: neurons whose weights are zero.
    """

    mlp: MLP
    width: int
    copied: Ranges
    padding: int = 0

    def sources(self) -> numpy.ndarray:
        """s(j) for every neuron j of p', int64; -1 for padding. Growths that are alike share it:
        it is read, and not written to."""
        return source_neurons(self.mlp.width, self.copied, self.padding)

    def shares(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """For every neuron which of its source's copies it is, counted from 0, and how many
        there are; (0, 0) for padding. int64, shared as `sources` is."""
        return copy_numbers(self.mlp.width, self.copied, self.padding)

    @property
    def even(self) -> bool:
        """Whether every neuron has as many copies and none is padding, so that a mean over all of
        them stays what it was."""
        _, copies = self.shares()
        return bool((copies == copies[0]).all())

    def runs(self, projection: Projection) -> tuple[tuple[int | None, int, int], ...]:
        """What lies along the axis of a projection, all experts below each other: runs of the
        old indices as (0, start, stop), and of padding as (None, 0, how many)."""
        runs: list[tuple[int | None, int, int]] = []
        for start, step in self._pieces(projection, self.mlp.width):
            for first, last in ((0, self.mlp.width), *self.copied):
                runs.append((0, start + first * step, start + last * step))
            if self.padding:
                runs.append((None, 0, self.padding * step))
        return tuple(runs)

    def _pieces(self, projection: Projection, width: int) -> list[tuple[int, int]]:
        """Where each piece of the axis begins in which neurons follow each other, and how many
        indices a neuron takes there."""
        parts, experts = projection.parts, projection.experts or 1
        if projection.interleaved:
            return [(expert * parts * width, parts) for expert in range(experts)]
        return [(piece * width, 1) for piece in range(experts * parts)]

    def shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """The grown shape of a tensor whose neurons lie along `axis`."""
        size = shape[axis] // self.mlp.width * self.width
        return (*shape[:axis], size, *shape[axis + 1 :])

    def new_ranges(self, projection: Projection) -> Ranges:
        """The new indices along the axis of this projection's weight (or bias) that grew."""
        one = projection
        if one.experts is not None and not one.flat:
            one = replace(one, experts=None)
        p, wide = self.mlp.width, self.width
        pieces = self._pieces(one, wide)
        return tuple((start + p * step, start + wide * step) for start, step in pieces)

    def as_json(self) -> dict[str, Any]:
        """Plain data for the record. `tensors` has what a trainer needs for its masks."""
        tensors = {}
        followers = {follower.name for follower in self.mlp.followers}
        for name, projection, axis in self.mlp.axes():
            new = [list(pair) for pair in self.new_ranges(projection)]
            role = "down" if projection is self.mlp.down else "up"
            role = "follower" if name in followers else role
            tensors[name] = {"role": role, "axis": axis, "new": new}
        return {
            "stack": self.mlp.stack,
            "block": self.mlp.block,
            "kind": self.mlp.kind,
            "width": [self.mlp.width, self.width],
            "copied": [list(pair) for pair in self.copied],
            "padding": self.padding,
            "tensors": tensors,
        }


@lru_cache(maxsize=32)  # a mixture has thousands of experts that grow alike
def source_neurons(width: int, copied: Ranges, padding: int) -> numpy.ndarray:
    """`Growth.sources` of any MLP of this width."""
    import numpy

    pieces = [numpy.arange(start, stop) for start, stop in ((0, width), *copied)]
    return numpy.concatenate([*pieces, numpy.full(padding, -1)]).astype(numpy.int64)


@lru_cache(maxsize=32)
def copy_numbers(width: int, copied: Ranges, padding: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """`Growth.shares` of any MLP of this width."""
    import numpy

    sources = source_neurons(width, copied, padding)
    real = sources[sources >= 0]
    copies = numpy.bincount(real, minlength=width)[real]
    order = numpy.argsort(real, kind="stable")
    first = numpy.searchsorted(real[order], real[order])
    ordinals = numpy.empty_like(real)
    ordinals[order] = numpy.arange(len(real)) - first
    nothing = numpy.zeros(padding, dtype=numpy.int64)
    return numpy.concatenate([ordinals, nothing]), numpy.concatenate([copies, nothing])


def growths_of(record: Iterable[Mapping[str, Any]], mlps: Iterable[MLP]) -> list[Growth]:
    """The growths as a record tells them, on `mlps`, those of the base.

    Raises KeyError, TypeError, ValueError or OverflowError if the record isn't one of ours or of
    another base.
    """
    growths = []
    by_tensors = {frozenset(mlp.tensors): mlp for mlp in mlps}
    for entry in record:
        mlp = by_tensors[frozenset(entry["tensors"])]
        old, new = entry["width"]
        copied = tuple((int(start), int(stop)) for start, stop in entry["copied"])
        growth = Growth(mlp, int(new), copied, int(entry["padding"]))
        total = mlp.width + sum(stop - start for start, stop in copied) + growth.padding
        if old != mlp.width or total != new or growth.padding < 0:
            raise ValueError(f"block {mlp.block} is recorded with width {old} -> {new}")
        if any(not 0 <= start < stop <= mlp.width for start, stop in copied):
            raise ValueError(f"block {mlp.block} copies neurons that it doesn't have")
        growths.append(growth)
    return growths
