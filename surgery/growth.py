"""How one MLP was widened: which neuron each hidden neuron is a copy of.

The one description of a growth that the operation makes, the certificate checks, the record
keeps and a trainer reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
        """s(j) for every neuron j of p', int64; -1 for padding."""
        import numpy

        pieces = [numpy.arange(start, stop) for start, stop in ((0, self.mlp.width), *self.copied)]
        return numpy.concatenate([*pieces, numpy.full(self.padding, -1)]).astype(numpy.int64)

    def shares(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """For every neuron which of its source's copies it is, counted from 0, and how many
        there are; (0, 0) for padding. int64."""
        import numpy

        sources = self.sources()
        real = sources[sources >= 0]
        copies = numpy.bincount(real, minlength=self.mlp.width)[real]
        order = numpy.argsort(real, kind="stable")
        first = numpy.searchsorted(real[order], real[order])
        ordinals = numpy.empty_like(real)
        ordinals[order] = numpy.arange(len(real)) - first
        nothing = numpy.zeros(self.padding, dtype=numpy.int64)
        return numpy.concatenate([ordinals, nothing]), numpy.concatenate([copies, nothing])

    def new_ranges(self, projection: Projection, bias: bool = False) -> tuple[int, Ranges]:
        """The axis of this projection's weight (or bias) that grew, and the new indices on it."""
        axis = 0 if bias else int((projection is self.mlp.down) != projection.in_out)
        p, wide = self.mlp.width, self.width
        return axis, tuple((part * wide + p, (part + 1) * wide) for part in range(projection.parts))

    def as_json(self) -> dict[str, Any]:
        """Plain data for the record. `tensors` has what a trainer needs for its masks."""
        named = [(up.weight, up, False) for up in self.mlp.ups]
        named += [(up.bias, up, True) for up in self.mlp.ups if up.bias]
        named.append((self.mlp.down.weight, self.mlp.down, False))
        tensors = {}
        for name, projection, bias in named:
            axis, new = self.new_ranges(projection, bias)
            role = "down" if projection is self.mlp.down else "up"
            tensors[name] = {"role": role, "axis": axis, "new": [list(pair) for pair in new]}
        return {
            "stack": self.mlp.stack,
            "block": self.mlp.block,
            "width": [self.mlp.width, self.width],
            "copied": [list(pair) for pair in self.copied],
            "padding": self.padding,
            "tensors": tensors,
        }


def growths_of(
    record: Iterable[Mapping[str, Any]], mlps: Mapping[tuple[str, int], MLP]
) -> list[Growth]:
    """The growths as a record tells them, on the MLPs that `mlps` found in the base.

    Raises KeyError, TypeError or ValueError if the record isn't one of ours or of another base.
    """
    growths = []
    for entry in record:
        mlp = mlps[entry["stack"], entry["block"]]
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
