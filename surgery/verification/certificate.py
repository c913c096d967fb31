"""The certificate: from weights alone, for every input, an edited checkpoint computes what its
base does.

Grown: in every widened MLP the rows of up and gate are bitwise those of their sources, and the columns
of a source neuron's copies sum to its column in exact arithmetic; every other tensor is bitwise
what it was. So each hidden neuron's copies have its activation and together its effect.

Expanded: every tensor of the base is bitwise what it was, at its new place; in every new block
the projections that write to the residual stream are zero, and all else is bitwise the source's.
That such a block returns its input is followed in the code that will run
(`modeling/identity.py`).

Nothing is assumed of how the weights were made: they are read and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING

from surgery.anatomy import Projection
from surgery.checkpoint import Checkpoint
from surgery.expansion import Expansion
from surgery.growth import Growth
from surgery.measure import BLOCK_ELEMENTS
from surgery.parallel import Progress, run_all
from surgery.tensor import LazyTensor
from surgery.values import zeros

if TYPE_CHECKING:
    import numpy
    import torch


Relation = Sequence[Growth] | Expansion
"""How a checkpoint was made of its base so that it has the same function."""

INEXACT = "the outgoing weights of a neuron's copies have no sum that two float64 can hold"


@dataclass(frozen=True)
class Certificate:
    """What was compared, and what didn't hold: `failures` has a sentence for each tensor."""

    grown_mlps: int
    tensors_compared: int
    bytes_compared: int
    failures: tuple[str, ...]
    new_blocks: int = 0

    @property
    def holds(self) -> bool:
        return not self.failures

    @property
    def what(self) -> str:
        """What was edited, in a few words."""
        if self.new_blocks:
            return f"{self.new_blocks} new blocks"
        return f"{self.grown_mlps:,} grown MLPs"


def certify(
    base: Checkpoint,
    other: Checkpoint,
    relation: Relation,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Compare `other` with `base`, tensor by tensor, as `relation` says it was made of it.

    Raises UnsupportedError if the blocks of an expansion can't be followed.
    """
    if isinstance(relation, Expansion):
        return _certify_expansion(base, other, relation, threads, progress)
    failures: dict[str, str] = {}
    missing = [f"{name} is missing in the grown checkpoint" for name in base if name not in other]
    missing += [f"{name} isn't in the base" for name in other if name not in base]
    _run(_checks(base, other, relation, failures), failures, threads, progress)
    return Certificate(
        grown_mlps=len(relation),
        tensors_compared=sum(1 for name in base if name in other),
        bytes_compared=sum(tensor.nbytes for tensor in other.values()),
        failures=(*missing, *(failures[name] for name in base if name in failures)),
    )


def _certify_expansion(
    base: Checkpoint,
    other: Checkpoint,
    expansion: Expansion,
    threads: int | None,
    progress: Progress | None,
) -> Certificate:
    from surgery.modeling.identity import not_identity

    inside = expansion.tensors(base.anatomy)
    outside = {n: n for n, place in base.anatomy.places.items() if place.stack != expansion.stack}
    wanted: dict[str, str | None] = {**outside, **inside}
    failures: dict[str, str] = {}
    checks: list[_Check] = []
    sources = sorted({expansion.sources[block] for block in expansion.new})
    moving = not_identity(base, expansion.stack, sources)
    missing = [
        f"a copy of block {block} doesn't return its input: {why}" for block, why in moving.items()
    ]
    missing += [f"{name} is missing in the expanded checkpoint" for name in wanted - other.keys()]
    missing += [f"{name} has no source in the base" for name in other if name not in wanted]
    for name, source in wanted.items():
        if name not in other:
            continue
        new = other[name]
        old = base[source] if source is not None else zeros(new.shape, new.dtype)
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            failures[name] = (
                f"{name} is {new.dtype} {list(new.shape)}, and should be {old.dtype} "
                f"{list(old.shape)}"
            )
            continue
        kind = _Check if source is not None else _Zero
        checks += [kind(name, old, new, rows) for rows in new.blocks(BLOCK_ELEMENTS)]
    _run(checks, failures, threads, progress)
    return Certificate(
        grown_mlps=0,
        tensors_compared=sum(1 for name in wanted if name in other),
        bytes_compared=sum(tensor.nbytes for tensor in other.values()),
        failures=(*missing, *(failures[name] for name in wanted if name in failures)),
        new_blocks=len(expansion.new),
    )


def _run(
    checks: Sequence[_Check],
    failures: dict[str, str],
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Make all comparisons; what is wrong goes into `failures`, the first for each tensor."""
    lock = Lock()

    def work(check: _Check) -> None:
        start, stop = check.rows
        wrong = check.run(start, stop)
        if wrong is not None:
            with lock:
                failures.setdefault(check.name, f"{check.name}: {wrong}")
        if progress is not None:
            progress(check.nbytes)

    run_all(iter(checks), work, threads)


class _Check:
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
            return f"rows {start} to {stop} differ from the base's, and nothing should"
        return None


class _Zero(_Check):
    """A projection of a new block that writes to the residual stream: zero."""

    def run(self, start: int, stop: int) -> str | None:
        if bool((self.grown.read(start, stop) != 0).any()):
            return "it belongs to a new block and writes to the residual stream, and isn't zero"
        return None


class _Rows(_Check):
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
                    return f"rows {at} to {end} are padding, and aren't zero"
            elif not same_bits(part, self.base.read(source, source + end - at)):
                return f"rows {at} to {end} aren't those they are copies of, from row {source} on"
        return None


class _UpColumns(_Check):
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


class _DownColumns(_Check):
    """Neurons are columns of the down projection: those of a source's copies sum to its own."""

    def __init__(
        self,
        name: str,
        base: LazyTensor,
        grown: LazyTensor,
        rows: tuple[int, int],
        sources: torch.Tensor,
        rounds: Sequence[torch.Tensor],
    ):
        super().__init__(name, base, grown, rows)
        self.sources, self.rounds = sources, rounds

    def run(self, start: int, stop: int) -> str | None:
        import torch

        rows = self.grown.read(start, stop).to(torch.float64)
        total = torch.zeros(stop - start, self.base.width, dtype=torch.float64)
        lost = torch.zeros_like(total)
        for columns in self.rounds:
            at = self.sources[columns]
            total[:, at], rest = two_sum(total[:, at], rows[:, columns])
            lost[:, at], inexact = two_sum(lost[:, at], rest)
            if bool((inexact != 0).any()):
                return INEXACT
        return _sums(total, lost, self.base.read(start, stop), rows[:, self.sources < 0])


class _DownRows(_Check):
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
        padding = int((self.sources < 0).sum()) if stop == self.base.rows else 0
        zeros = self.grown.read(self.grown.rows - padding, self.grown.rows)
        return _sums(total, lost, self.base.read(start, stop), zeros)


def _sums(
    total: torch.Tensor, lost: torch.Tensor, base: torch.Tensor, padding: torch.Tensor
) -> str | None:
    """Whether total + lost is exactly the base's weight, and padding is zero. `lost` is what
    float64 lost of the sum: 0 for types up to float32, a last bit or two for float64."""
    import torch

    off, inexact = two_sum(total, -base.to(torch.float64))
    if not torch.equal(off, -lost) or bool((inexact != 0).any()):
        worst = float((off + lost).abs().nan_to_num(nan=float("inf")).max())
        return (
            f"the outgoing weights of a neuron's copies don't sum to what it had "
            f"(off by up to {worst:.3g})"
        )
    if bool((padding != 0).any()):
        return "outgoing weights of padding aren't zero"
    return None


def two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a + b rounded, and what the rounding lost: together exactly a + b (Knuth, TAOCP 4.2.2)."""
    total = a + b
    second = total - a
    return total, (a - (total - second)) + (b - second)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in every bit: NaN equals itself, and -0 isn't 0."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    size = a.element_size()
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


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


def _checks(
    base: Checkpoint,
    grown: Checkpoint,
    growths: Sequence[Growth],
    failures: dict[str, str],
) -> list[_Check]:
    """All comparisons; a tensor whose shape or type is wrong goes into `failures` instead."""
    of_tensor: dict[str, tuple[Growth, Projection]] = {}
    for growth in growths:
        for projection in (*growth.mlp.ups, growth.mlp.down):
            of_tensor[projection.weight] = growth, projection
            if projection.bias is not None and projection is not growth.mlp.down:
                of_tensor[projection.bias] = growth, projection
    checks: list[_Check] = []
    for name, tensor in base.items():
        if name not in grown:
            continue
        shape = list(tensor.shape)
        if name in of_tensor:
            growth, projection = of_tensor[name]
            axis, _ = growth.new_ranges(projection, bias=name == projection.bias)
            shape[axis] = projection.parts * growth.width
        wanted, found = (tensor.dtype, shape), (grown[name].dtype, list(grown[name].shape))
        if wanted != found:
            failures[name] = (
                f"{name} is {found[0]} {found[1]}, and should be {wanted[0]} {wanted[1]}"
            )
        elif name in of_tensor:
            checks += _grown_checks(name, tensor, grown[name], *of_tensor[name])
        else:
            checks += [
                _Check(name, tensor, grown[name], rows) for rows in tensor.blocks(BLOCK_ELEMENTS)
            ]
    return checks


def _grown_checks(
    name: str, base: LazyTensor, grown: LazyTensor, growth: Growth, projection: Projection
) -> Iterator[_Check]:
    import numpy
    import torch

    sources = growth.sources()
    if projection is growth.mlp.down:
        if projection.in_out:
            for rows in base.blocks(BLOCK_ELEMENTS):
                yield _DownRows(name, base, grown, rows, sources)
            return
        ordinals, copies = growth.shares()
        rounds = [
            torch.from_numpy(numpy.flatnonzero((ordinals == m) & (copies > 0)))
            for m in range(int(copies.max()))
        ]
        for rows in grown.blocks(BLOCK_ELEMENTS):
            yield _DownColumns(name, base, grown, rows, torch.from_numpy(sources), rounds)
    elif projection.in_out and name == projection.weight:
        for rows in grown.blocks(BLOCK_ELEMENTS):
            yield _UpColumns(name, base, grown, rows, torch.from_numpy(sources))
    else:
        p = growth.mlp.width
        offset = numpy.repeat(numpy.arange(projection.parts) * p, growth.width)
        stacked = numpy.tile(sources, projection.parts)
        stacked = numpy.where(stacked < 0, -1, stacked + offset)
        for rows in grown.blocks(BLOCK_ELEMENTS):
            yield _Rows(name, base, grown, rows, stacked)
