"""Weights on their way into several models at once: each is read and made once, and dropped when
nobody needs it any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event, Lock
from typing import Generic, TypeVar

import torch

from surgery.files import as_bytes
from surgery.modeling.buffers import Buffers
from surgery.tensor import FileSpan, LazyTensor

Value = TypeVar("Value")

BLOCK_ELEMENTS = 1 << 20


@dataclass(eq=False)
class _Slot(Generic[Value]):
    nbytes: int
    made: Event = field(default_factory=Event)
    value: Value | None = None


class Shelf(Generic[Value]):
    """Values by key, each made by whoever needs it first, and kept until it was taken as often
    as `uses` says. Beyond `budget` bytes the oldest goes, and is made again if need be."""

    def __init__(self, uses: Counter[Hashable], budget: int) -> None:
        self._left = Counter(uses)
        self._budget = budget
        self._slots: dict[Hashable, _Slot[Value]] = {}
        self._lock = Lock()

    def take(self, key: Hashable, nbytes: int, make: Callable[[], Value]) -> Value:
        """The value, made now unless it is there, or another thread is making it."""
        with self._lock:
            self._left[key] -= 1
            slot = self._slots.get(key)
            mine = slot is None
            if slot is None:
                slot = _Slot(nbytes)
                if self._left[key] > 0:
                    self._slots[key] = slot
            if self._left[key] <= 0:
                self._slots.pop(key, None)
            self._shrink(slot)
        if mine:
            try:
                slot.value = make()
            finally:
                slot.made.set()
        slot.made.wait()
        # None where the other thread failed: so will this one, or it makes what the other couldn't
        return make() if slot.value is None else slot.value

    def _shrink(self, newest: _Slot[Value]) -> None:
        total = sum(slot.nbytes for slot in self._slots.values())
        for key, slot in list(self._slots.items()):
            if total <= self._budget:
                return
            if slot is not newest:
                del self._slots[key]
                total -= slot.nbytes


class Reader:
    """Reads lazy tensors whole. Bytes of files that are needed more than once, as `uses` says,
    are read once and shared."""

    def __init__(self, uses: Counter[Hashable], budget: int, buffers: Buffers) -> None:
        self._shared = {key for key, count in uses.items() if count > 1}
        self._shelf: Shelf[torch.Tensor] = Shelf(uses, budget)
        self.buffers = buffers

    def read(self, tensor: LazyTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor, in its own type or in `dtype`. Others may hold it too: it isn't to be
        written to."""
        own = tensor.dtype.torch
        if isinstance(tensor.kernel, partial) and tensor.kernel.func is torch.index_select:
            return self._selected(tensor, dtype or own)
        held = {}
        for leaf in leaves(tensor):
            key = same_bytes(leaf)
            if key in self._shared and key not in held:
                held[key] = self._shelf.take(key, leaf.nbytes, partial(self._from_file, leaf))
        if isinstance(tensor.leaf, FileSpan):
            found = held.get(same_bytes(tensor))
            found = self._from_file(tensor) if found is None else found
            return self._cast(found, dtype or own)
        return self._filled(_with_leaves(tensor, held), dtype or own)

    def _from_file(self, leaf: LazyTensor) -> torch.Tensor:
        if not isinstance(leaf.leaf, FileSpan):
            return self._filled(leaf, leaf.dtype.torch)
        out = self.buffers.empty(leaf.shape, leaf.dtype.torch)
        if out.numel():
            leaf.leaf.file.read_into(as_bytes(out), leaf.leaf.offset)
        return out

    def _selected(self, tensor: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows or columns in another order, cast first: 16 bits are picked one by one, at several
        times the cost of 32."""
        kernel, (given,) = tensor.kernel, tensor.inputs
        assert isinstance(kernel, partial)
        dim, index = kernel.keywords["dim"], kernel.keywords["index"]
        values = self.read(given, dtype)
        out = self.buffers.empty(tensor.shape, dtype)
        if dim in (-1, values.dim() - 1):  # by all threads, which index_select has one of
            return torch.gather(values, -1, index.expand(out.shape), out=out)
        return torch.index_select(values, dim, index, out=out)

    def _cast(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if values.dtype == dtype:
            return values
        return self.buffers.empty(values.shape, dtype).copy_(values)

    def _filled(self, tensor: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        out = self.buffers.empty(tensor.shape, dtype)
        rows = out.view(tensor.shape_of(tensor.rows))
        for start, stop in tensor.blocks(BLOCK_ELEMENTS):
            rows[start:stop] = tensor.read(start, stop)
        return out


def leaves(tensor: LazyTensor) -> Iterator[LazyTensor]:
    """The tensors in files that it is made of."""
    if isinstance(tensor.leaf, FileSpan):
        yield tensor
    for given in tensor.inputs:
        yield from leaves(given)


def same_bytes(leaf: LazyTensor) -> Hashable:
    """What tensors that are the same bytes of a file have in common."""
    return leaf.leaf, leaf.shape, leaf.dtype


@dataclass(frozen=True)
class _Held:
    """The leaf of a tensor whose bytes are in memory. Rows that are `lent` are only copied from,
    others belong to whoever reads them, as those of any leaf do."""

    values: torch.Tensor
    lent: bool

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        rows = self.values.view(tensor.shape_of(tensor.rows))[start:stop]
        return rows if self.lent else rows.clone()


def _with_leaves(
    tensor: LazyTensor, held: Mapping[Hashable, torch.Tensor], *, lent: bool = True
) -> LazyTensor:
    """The same tensor, made of bytes that are in memory where they are."""
    if tensor.leaf is not None:
        values = held.get(same_bytes(tensor)) if isinstance(tensor.leaf, FileSpan) else None
        return tensor if values is None else replace(tensor, leaf=_Held(values, lent))
    lent = lent and tensor.kernel is None  # which may overwrite what it is given
    inputs = tuple(_with_leaves(given, held, lent=lent) for given in tensor.inputs)
    made = replace(tensor, inputs=inputs)
    if "_found" in tensor.__dict__:  # what a pass over all of it has found before
        made.__dict__["_found"] = tensor.__dict__["_found"]
    return made
