"""Which columns of a grown down projection belong together, worked out once for all its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch

    Index = slice | torch.Tensor
    """Columns: a slice where they follow each other, which gives a view and no copy."""


@dataclass(frozen=True)
class Columns:
    """`alone` are the columns of neurons with one copy, and where those lie in the base. The
    others are added up copy by copy: `rounds` has the columns of the first copies, of the second
    ones, ..., each with its places among `shared`, the base's columns that they are copies of.
    `padding` are columns of no neuron, and `absent` columns of the base without a copy."""

    alone: tuple[Index, Index]
    shared: Index
    rounds: tuple[tuple[Index, Index], ...]
    padding: Index
    absent: Index


def columns_of(
    sources: numpy.ndarray, ordinals: numpy.ndarray, copies: numpy.ndarray, width: int
) -> Columns:
    """For every column of the grown projection its source (-1 for padding), which copy of that it
    is, and how many there are; and how many columns the base has."""
    import numpy

    alone = numpy.flatnonzero(copies == 1)
    shared = sources[(copies > 1) & (ordinals == 0)]
    rounds = [numpy.flatnonzero((copies > 1) & (ordinals == m)) for m in range(int(copies.max()))]
    places = numpy.empty(width, dtype=numpy.int64)
    places[shared] = numpy.arange(len(shared))
    absent = numpy.setdiff1d(numpy.arange(width), sources)
    return Columns(
        (_index(alone), _index(sources[alone])),
        _index(shared),
        tuple((_index(part), _index(places[sources[part]])) for part in rounds if len(part)),
        _index(numpy.flatnonzero(copies == 0)),
        _index(absent),
    )


def _index(columns: numpy.ndarray) -> Index:
    import torch

    if not len(columns):
        return slice(0, 0)
    first, last = int(columns[0]), int(columns[-1])
    if last - first + 1 == len(columns) and bool((columns[1:] == columns[:-1] + 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(columns)
