"""LazyTensor: what a tensor is and how to get its rows, without having them.

Read this first. A checkpoint is a mapping of names to lazy tensors, an operation makes new lazy
tensors out of old ones, and nothing is computed until `read` is called, for as many rows as the
caller has room for. A lazy tensor is data and not a closure, so that a plan, the memory it needs
and what can be copied from file to file are read off it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from surgery.dtypes import DType
from surgery.errors import UnsupportedError
from surgery.files import PAGE, InputFile, as_bytes

if TYPE_CHECKING:
    import numpy
    import torch

Runs = tuple[tuple[int, int, int], ...]
"""Rows of inputs in order, as (input, start, stop): ((0, 0, 4), (0, 2, 3)) is rows 0, 1, 2, 3, 2
of the first input."""


class Leaf(Protocol):
    """Where the rows of a tensor without inputs come from: a file, or values made on demand."""

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor: ...


class BytesLeaf:
    """A leaf whose bytes can be had without torch."""

    def read_bytes(self, tensor: LazyTensor, start: int, stop: int) -> numpy.ndarray:
        """The bytes of rows `start` to `stop`."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileSpan(BytesLeaf):
    """`length` bytes of `file` from byte `offset`: the leaf of a tensor that lies in a file."""

    file: InputFile
    offset: int
    length: int

    def part(self, start: int, stop: int) -> FileSpan:
        """Bytes `start` to `stop` of this span."""
        assert 0 <= start <= stop <= self.length
        return FileSpan(self.file, self.offset + start, stop - start)

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of `tensor`, whose bytes these are."""
        import torch

        row = self._row_bytes(tensor)
        out = torch.empty(tensor.shape_of(stop - start), dtype=tensor.dtype.torch)
        self._fill(as_bytes(out), tensor, start * row)
        return out

    def read_bytes(self, tensor: LazyTensor, start: int, stop: int) -> numpy.ndarray:
        """The same as bytes, without torch."""
        import numpy

        row = self._row_bytes(tensor)
        out = numpy.empty((stop - start) * row, dtype=numpy.uint8)
        self._fill(out.data, tensor, start * row)
        return out

    def _row_bytes(self, tensor: LazyTensor) -> int:
        row_bits = tensor.width * tensor.dtype.bits
        if row_bits % 8:
            raise UnsupportedError(
                f"{self.file.path}: a row of {tensor.width} {tensor.dtype} values isn't whole "
                f"bytes, so the tensor can only be copied"
            )
        return row_bits // 8

    def _fill(self, data: memoryview, tensor: LazyTensor, at: int) -> None:
        if data.nbytes:
            self.file.read_into(data, self.offset + at)
        if data.nbytes >= PAGE:
            from surgery.pages import require_filled

            require_filled(data, self.offset + at, self, tensor)


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of `shape` and `dtype` that is read a range of rows at a time.

    A **row** is a run along the last axis, with the axes before it flattened: (experts, out, in)
    has experts * out rows of `in` elements. The elements of a vector are rows of one, and so is
    a scalar. It is one of three things:

    - a leaf: `leaf` says where the rows are;
    - a gather: `runs` says which rows of the inputs, in which order;
    - computed: `kernel` makes the rows from the same rows of every input, or from the whole
      inputs when `rowwise` is False.

    `measure` goes with a row-wise kernel that needs something of the whole tensor first (a
    threshold, norms): a streaming pass over the inputs, made once, before the first row; the
    kernel gets its result as the argument `measured`.

    `tally` goes with a row-wise kernel: it makes what the kernel makes, and with it a number of
    these rows (||tau||^2, say), which the writer adds up over the tensor as it passes, so that a
    statistic which only reports needs no pass of its own.

    `direct` goes with a kernel: of the bytes of its inputs' rows (of the whole, if that isn't
    row-wise) it makes the bytes of what the kernel makes, quicker and without torch, which takes
    longer to import than many a model takes to merge; or None, and the kernel has to, which can
    also say what is wrong. With a `tally` it makes the number too.

    `exact` is the wider tensor that this one is the rounding of, where there is one: arithmetic
    takes its values from there, so that what is computed is rounded once, at the end.
    """

    shape: tuple[int, ...]
    dtype: DType
    leaf: Leaf | None = None
    inputs: tuple[LazyTensor, ...] = ()
    runs: Runs | None = None
    kernel: Callable[..., torch.Tensor] | None = None
    rowwise: bool = True
    tally: Callable[..., tuple[torch.Tensor, float]] | None = None
    measure: Callable[[tuple[LazyTensor, ...]], Any] | None = None
    direct: Callable[..., Any] | None = None
    exact: LazyTensor | None = None

    def __post_init__(self) -> None:
        # not where it is first asked for: what stays there of a thread's memory, a few bytes
        # among the large temporaries of each tensor, keeps the next ones out of their place
        if self.measure is not None:
            object.__setattr__(self, "_measuring", Lock())

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.bits // 8

    @property
    def streams(self) -> bool:
        """Whether a range of rows can be had without computing the whole tensor."""
        return (self.kernel is None or self.rowwise) and all(t.streams for t in self.inputs)

    def shape_of(self, rows: int) -> tuple[int, ...]:
        """The shape in which `rows` rows are read."""
        return (rows, self.width) if len(self.shape) > 1 else (rows,)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (all by default): shape (rows, width), or (rows,) for a vector.

        What it returns belongs to the caller, who may overwrite it.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of a tensor that has {self.rows}")
        if (made := self._directly(start, stop)) is not None:
            import torch

            return (
                torch.from_numpy(made[0]).view(self.dtype.torch).view(self.shape_of(stop - start))
            )
        return self._rows(start, stop)

    def read_bytes(self, start: int, stop: int) -> numpy.ndarray:
        """The bytes of rows `start` to `stop`, as they are written; without torch if not
        `needs_torch`."""
        if isinstance(self.leaf, BytesLeaf):
            return self.leaf.read_bytes(self, start, stop)
        if (made := self._directly(start, stop)) is not None:
            return made[0]
        return self._bytes_of(self._rows(start, stop))

    def read_tallied(self, start: int, stop: int) -> tuple[numpy.ndarray, float | None]:
        """`read_bytes`, and the tally of these rows if there is one."""
        if self.tally is None:
            return self.read_bytes(start, stop), None
        if (made := self._directly(start, stop)) is not None:
            return made
        rows, number = self.tally(*self.read_inputs(start, stop))
        return self._bytes_of(rows), number

    @property
    def needs_torch(self) -> bool:
        """Whether its bytes can't be had without torch, if nothing is wrong with them."""
        if isinstance(self.leaf, BytesLeaf):
            return False
        return self.direct is None or any(tensor.needs_torch for tensor in self.inputs)

    def _bytes_of(self, rows: torch.Tensor) -> numpy.ndarray:
        import numpy

        assert rows.dtype == self.dtype.torch
        return numpy.frombuffer(as_bytes(rows.contiguous()), numpy.uint8)

    def _directly(self, start: int, stop: int) -> tuple[numpy.ndarray, float | None] | None:
        if self.direct is None or (stop - start) * self.width == 0:  # torch views no empty bytes
            return None
        if not self.rowwise and stop - start < self.rows:
            return None
        given = [tensor.read_bytes(start, stop) for tensor in self.inputs]
        found = {} if self.measure is None else {"measured": self.measured}
        made = self.direct(*given, **found)
        return made if made is None or self.tally is not None else (made, None)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        if self.leaf is not None:
            return self.leaf.read(self, start, stop)
        if self.runs is not None:
            return self._gather(start, stop)
        assert self.kernel is not None
        if self.rowwise:
            return self.compute(self.read_inputs(start, stop))
        whole = self.kernel(*(tensor.whole() for tensor in self.inputs))
        return whole.reshape(self.shape_of(self.rows))[start:stop]

    def read_inputs(self, start: int, stop: int) -> list[torch.Tensor]:
        """These rows of every input of a row-wise kernel."""
        return [tensor.read(start, stop) for tensor in self.inputs]

    def compute(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows that the kernel makes of these rows of the inputs."""
        assert self.kernel is not None
        if self.measure is None:
            return self.kernel(*inputs)
        return self.kernel(*inputs, measured=self.measured)

    @property
    def measured(self) -> Any:
        """What `measure` found, in one pass over the inputs, whichever thread asks first."""
        assert self.measure is not None
        with vars(self)["_measuring"]:
            if "_found" not in vars(self):
                vars(self)["_found"] = self.measure(self.inputs)
        return vars(self)["_found"]

    def whole(self) -> torch.Tensor:
        """The whole tensor, in its shape."""
        return self.read().reshape(self.shape)

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """Row ranges of about `elements` elements that together are the tensor; one range if
        any of it takes all of it."""
        if not self.streams:
            yield 0, self.rows
            return
        step = max(1, elements // max(1, self.width))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def file_spans(self) -> Iterator[FileSpan] | None:
        """The bytes of this tensor as they lie in files, in order; None if some are computed."""
        if isinstance(self.leaf, FileSpan):
            return iter((self.leaf,))
        if self.runs is None:
            return None
        spans = [tensor.leaf for tensor in self.inputs]
        row_bits = self.width * self.dtype.bits
        if row_bits % 8:
            return None
        if not all(isinstance(span, FileSpan) for span in spans):
            return None
        row = row_bits // 8
        return (
            span.part(start * row, stop * row)
            for at, start, stop in self.runs
            if isinstance(span := spans[at], FileSpan)
        )

    @cached_property
    def _run_ends(self) -> list[int]:
        """Where each run ends, counted in this tensor's own rows."""
        return list(accumulate(stop - start for _, start, stop in self.runs or ()))

    def _gather(self, start: int, stop: int) -> torch.Tensor:
        import torch

        assert self.runs is not None
        pieces = []
        at = bisect_right(self._run_ends, start)
        while start < stop:
            source, run_start, run_stop = self.runs[at]
            skipped = start - (self._run_ends[at] - (run_stop - run_start))
            first = run_start + skipped
            last = min(run_stop, first + stop - start)
            pieces.append(self.inputs[source].read(first, last))
            start += last - first
            at += 1
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if pieces else self.inputs[0].read(0, 0)


def input_files(tensors: Iterable[LazyTensor]) -> list[InputFile]:
    """The files that `tensors` are made of, each once."""
    files: dict[int, InputFile] = {}
    seen: set[int] = set()
    left = list(tensors)
    while left:
        tensor = left.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        left += tensor.inputs
        if tensor.exact is not None:
            left.append(tensor.exact)
        if isinstance(tensor.leaf, FileSpan):
            files[id(tensor.leaf.file)] = tensor.leaf.file
        elif tensor.leaf is not None:  # one that is made of others: an adapter's, scales
            parts = getattr(tensor.leaf, "__dict__", {}).values()
            left += [part for part in parts if isinstance(part, LazyTensor)]
    return list(files.values())


def gather(inputs: tuple[LazyTensor, ...], runs: Runs, shape: tuple[int, ...]) -> LazyTensor:
    """The rows `runs` of `inputs`, as a tensor of `shape`. The inputs agree in dtype and width."""
    made = LazyTensor(shape, inputs[0].dtype, inputs=inputs, runs=runs)
    assert made.rows == sum(stop - start for _, start, stop in runs)
    assert all((i.dtype, i.width) == (made.dtype, made.width) for i in inputs)
    return made
