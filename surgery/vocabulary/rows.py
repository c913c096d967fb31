"""Rows in the order of another vocabulary: which row comes from where, worked out from the tokens
alone, and then the tensors, as gathers of ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

from surgery.dtypes import DTYPES, DType
from surgery.tensor import LazyTensor, gather
from surgery.values import zeros

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a matrix of `count` rows, by the token that each belongs to. A row may have no
    token: padding, or an id that the tokenizer leaves out."""

    count: int
    ids: Mapping[str, int]

    @classmethod
    def of(cls, count: int, ids: Mapping[str, int]) -> Rows:
        """Without the tokens that have no row: some tokenizers name more than there are."""
        return cls(count, {token: row for token, row in ids.items() if row < count})

    @cached_property
    def names(self) -> Mapping[int, str]:
        return {row: token for token, row in self.ids.items()}

    def unnamed(self, row: int) -> bool:
        return row < self.count and row not in self.names


@dataclass(frozen=True)
class Piece:
    """`length` rows of the model `holders[0]` from row `starts[0]` on; or the average of several
    models' rows, each from a start of its own; or, of no model, zeros."""

    holders: tuple[int, ...]
    starts: tuple[int, ...]
    length: int

    def grown_by(self, holders: tuple[int, ...], starts: tuple[int, ...]) -> Piece | None:
        """This piece and the row of `holders` at `starts`, if that is the next one."""
        ends = tuple(start + self.length for start in self.starts)
        if (holders, starts) != (self.holders, ends):
            return None
        return Piece(self.holders, self.starts, self.length + 1)


@dataclass(frozen=True)
class Origin:
    """Where one row of an aligned model comes from, and what is said of it."""

    how: str
    holders: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Matching:
    """The rows of `every` model (the base first, with `base`), matched with those of `target`.

    Unnamed rows below `kept` are those of `owner`, the model whose order it is (None: of none of
    them); rows from there on are new.
    """

    every: Sequence[Rows]
    target: Rows
    kept: int
    base: bool
    owner: int | None

    def origin(self, model: int, row: int) -> Origin:
        """Where `row` of the target comes from in `model`."""
        token = self.target.names.get(row)
        start = (0,) if self.base else ()
        if token is None:
            owner = () if self.owner is None else (self.owner,)
            for at in (model, *start, *owner) if row < self.kept else ():
                if self.every[at].unnamed(row):
                    how = "unnamed" if at == model else "unnamed_from_another"
                    return Origin(how, (at,), (row,))
            return Origin("zeros")
        for at in (model, *start):
            if token in self.every[at].ids:
                how = "matched" if at == model else "from_base"
                return Origin(how, (at,), (self.every[at].ids[token],))
        holders = tuple(at for at, rows in enumerate(self.every) if token in rows.ids)
        starts = tuple(self.every[at].ids[token] for at in holders)
        how = "averaged" if len(holders) > 1 else "from_another" if holders else "zeros"
        return Origin(how, holders, starts)

    def pieces(self, model: int) -> tuple[list[Piece], Counter[str]]:
        """All rows of the target for `model`, in as few pieces as there are, and how many rows
        came about in which way."""
        own = self.every[model]
        if own.count == self.target.count and own.ids == self.target.ids:
            named = len(own.ids)
            counts = Counter({"matched": named, "unnamed": own.count - named})
            return [Piece((model,), (0,), own.count)], +counts  # without zeros
        pieces: list[Piece] = []
        counts = Counter()
        for row in range(self.target.count):
            origin = self.origin(model, row)
            counts[origin.how] += 1
            if pieces and (grown := pieces[-1].grown_by(origin.holders, origin.starts)):
                pieces[-1] = grown
            else:
                pieces.append(Piece(origin.holders, origin.starts, 1))
        return pieces, counts

    def nowhere(self) -> list[str]:
        """Tokens of the target that no model has a row for."""
        have = set().union(*(rows.ids for rows in self.every))
        return [token for token in self.target.ids if token not in have]


def unmoved(pieces: Sequence[Piece], model: int, count: int) -> bool:
    """Whether the pieces are the `count` rows of `model` as they were."""
    return list(pieces) == [Piece((model,), (0,), count)]


def arranged(
    tensors: Mapping[int, LazyTensor], pieces: Sequence[Piece], like: LazyTensor, dtype: DType
) -> LazyTensor:
    """The rows `pieces` of `tensors` (by number of the model) as one tensor of `dtype`, shaped
    as `like` but for its rows."""
    inputs: list[LazyTensor] = []
    at: dict[tuple[int, ...], int] = {}
    starts: dict[tuple[int, ...], list[int]] = {}
    for holders in dict.fromkeys(piece.holders for piece in pieces):
        own = [piece for piece in pieces if piece.holders == holders]
        ends = accumulate((piece.length for piece in own), initial=0)
        starts[holders] = [p.starts[0] for p in own] if len(holders) == 1 else list(ends)[:-1]
        at[holders] = len(inputs)
        inputs.append(_source(tensors, holders, own, like, dtype))
    nexts = {holders: iter(found) for holders, found in starts.items()}
    runs = []
    for piece in pieces:
        start = next(nexts[piece.holders])
        runs.append((at[piece.holders], start, start + piece.length))
    count = sum(piece.length for piece in pieces)
    return gather(tuple(inputs), tuple(runs), (count, *like.shape[1:]))


def _source(
    tensors: Mapping[int, LazyTensor],
    holders: tuple[int, ...],
    pieces: Sequence[Piece],
    like: LazyTensor,
    dtype: DType,
) -> LazyTensor:
    """What the rows of `pieces`, all of `holders`, are taken from."""
    shape = (sum(piece.length for piece in pieces), *like.shape[1:])
    if not holders:
        return zeros(shape, dtype)
    if len(holders) == 1:
        tensor = tensors[holders[0]]
        return tensor if tensor.dtype == dtype else _averaged((tensor,), dtype)
    rows = []
    for number, holder in enumerate(holders):
        runs = tuple((0, p.starts[number], p.starts[number] + p.length) for p in pieces)
        rows.append(gather((tensors[holder],), runs, shape))
    return _averaged(tuple(rows), dtype)


def _averaged(rows: tuple[LazyTensor, ...], dtype: DType) -> LazyTensor:
    from surgery.kernels.vocabulary import average

    wide = common_type([tensor.dtype for tensor in rows])
    kernel = partial(average, compute=wide.compute, dtype=dtype)
    return LazyTensor(rows[0].shape, dtype, inputs=rows, kernel=kernel)


def common_type(dtypes: Sequence[DType]) -> DType:
    """A type that holds all values of `dtypes`, which are floats."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return DTYPES["F64" if any(dtype.name == "F64" for dtype in dtypes) else "F32"]


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """The same elements in another shape: for small tensors, since all of it is read at once."""
    assert prod(shape) == tensor.numel
    return LazyTensor(shape, tensor.dtype, inputs=(tensor,), kernel=_same, rowwise=False)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
