"""Zero-filled pages: what a download that stopped, or a crash, leaves where bytes should be.

A file system hands out bytes nobody wrote as zeros, in pages of 4096 bytes counted from the start
of the file. Models hold zeros of their own: biases, rows of tokens that were never seen, blocks
that add nothing, neurons that pad. Those begin and end with a row of a tensor, or lie in the same
columns of the row beside it. A page that was never written knows nothing of rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import TYPE_CHECKING

import numpy

from surgery.errors import FormatError
from surgery.files import PAGE, InputFile
from surgery.header import read_header
from surgery.system import reading

if TYPE_CHECKING:
    from surgery.tensor import FileSpan, LazyTensor

WORDS = PAGE // 8
CHANCE = 16
"""Bytes of the values beside a page that may be zero by chance: the low bytes of two elements."""
ALLOW = "SURGERY_ALLOW_ZERO_PAGES"
"""The environment variable for zeros that are meant: with 1 nothing refuses them."""

Read = Callable[[int, int], numpy.ndarray]
"""Bytes `start` to `stop` of a file, as uint8."""


class Zeros(Enum):
    """What a run of zeros in a tensor looks like."""

    WHOLE = "whole"
    """Whole rows, or the whole tensor: the model's own, as far as one can see."""
    COLUMNS = "columns"
    """The same columns of neighbouring rows: a matrix that was padded, or is block-diagonal."""
    ODD = "odd"
    """From or to the inside of a row, and not at a page's edge."""
    FILLED = "filled"
    """From or to the inside of a row, at a page's edge or at the end of the file."""


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies in its file of `size` bytes: `start` to `stop`, in units of `unit`
    bytes, which are its rows."""

    start: int
    stop: int
    unit: int
    size: int


def unit_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of the smallest part of a tensor that may well be zero as a whole: a row; of a
    convolution, whose rows are a few elements, more of a filter; all of a vector."""
    if len(shape) < 2 or shape[-1] == 1:
        return max(1, prod(shape) * bits // 8)
    elements = shape[-1]
    for size in reversed(shape[1:-1]):
        if elements >= 64:
            break
        elements *= size
    return max(1, elements * bits // 8)


def zero_pages(data: numpy.ndarray | memoryview, offset: int) -> list[tuple[int, int]]:
    """Runs of pages without a bit set, as bytes of the file, in `data`, bytes from byte `offset`
    of the file on. One word of each page is looked at first."""
    first = -offset % PAGE
    count = (len(data) - first) // PAGE
    if count <= 0:
        return []
    words = numpy.frombuffer(data, numpy.uint64, count * WORDS, first)
    if words[::WORDS].all():
        return []
    maybe = numpy.flatnonzero(words[::WORDS] == 0)
    pages = words.reshape(count, -1)
    found = maybe[numpy.bitwise_or.reduce(pages[maybe], axis=1) == 0]
    if not found.size:
        return []
    breaks = numpy.flatnonzero(numpy.diff(found) > 1) + 1
    base = offset + first
    return [
        (base + int(run[0]) * PAGE, base + (int(run[-1]) + 1) * PAGE)
        for run in numpy.split(found, breaks)
    ]


def require_filled(data: memoryview, offset: int, span: FileSpan, tensor: LazyTensor) -> None:
    """Raise FormatError if pages of `data`, rows of `tensor` from byte `offset` of its file on,
    were never written."""
    runs = zero_pages(data, offset)
    if not runs or allowed():
        return
    layout = layout_of(span, tensor)
    read = reader(span.file)
    FormatError.raise_if(
        never_written(run, span) for run in runs if kind_of(run, layout, read) is Zeros.FILLED
    )


def layout_of(span: FileSpan, tensor: LazyTensor) -> Layout:
    """Where `tensor`, which lies in a file, lies."""
    unit = unit_bytes(tensor.shape, tensor.dtype.bits)
    with reading(span.file.path):
        size = os.fstat(span.file.descriptor.fd).st_size
    return Layout(span.offset, span.offset + span.length, unit, size)


def reader(file: InputFile) -> Read:
    """What reads the bytes of `file`."""

    def read(start: int, stop: int) -> numpy.ndarray:
        made = numpy.empty(stop - start, numpy.uint8)
        file.read_into(made.data, start)
        return made

    return read


def never_written(run: tuple[int, int], span: FileSpan, *, hole: bool = False) -> str:
    """What to say about zeros in place of values."""
    entries = read_header(span.file.path).entries.items()
    name = next((name for name, entry in entries if entry.start == span.offset), "a tensor")
    what = "are a hole in the file" if hole else "are zeros from or to the middle of a row"
    return (
        f"{span.file.path}: bytes {run[0]:,} to {run[1]:,}, in {name}, {what}: they were never "
        f"written, as after a download that stopped. Fetch the file again; `surgery check` shows "
        f"all such places. If the zeros are meant, set {ALLOW}=1"
    )


def kind_of(run: tuple[int, int], layout: Layout, read: Read) -> Zeros:
    """What the zeros around `run`, pages that lie in the tensor, look like. Reads no more than a
    few rows beside them: zeros that go on for longer are taken to end with a row."""
    start, starts_inside = _start(run[0], layout, read)
    stop, stops_inside = _stop(run[1], layout, read)
    ends = []
    if starts_inside:
        ends.append((_same_before(start, stop, layout, read), run[0] - start <= CHANCE))
    if stops_inside:
        ends.append((_same_after(start, stop, layout, read), stop - run[1] <= CHANCE))
    if not ends:
        return Zeros.WHOLE
    if all(same for same, _ in ends):
        return Zeros.COLUMNS
    to_the_end = starts_inside and stop == layout.size
    at_a_page = any(aligned and not same for same, aligned in ends)
    return Zeros.FILLED if at_a_page or to_the_end else Zeros.ODD


def _reach(layout: Layout) -> int:
    return min(2 * max(layout.unit, PAGE), 1 << 20)


def _start(at: int, layout: Layout, read: Read) -> tuple[int, bool]:
    """Where zeros that are known from byte `at` on begin, and whether that is inside a row."""
    limit = max(layout.start, at - _reach(layout))
    while at > limit:
        before = read(max(limit, at - PAGE), at)
        set_bytes = numpy.flatnonzero(before)
        if set_bytes.size:
            at -= len(before) - int(set_bytes[-1]) - 1
            return at, (layout.start - at) % layout.unit > CHANCE
        at -= len(before)
    return at, False


def _stop(at: int, layout: Layout, read: Read) -> tuple[int, bool]:
    """Where zeros that are known up to byte `at` end, and whether that is inside a row."""
    limit = min(layout.stop, at + _reach(layout))
    while at < limit:
        after = read(at, min(limit, at + PAGE))
        set_bytes = numpy.flatnonzero(after)
        if set_bytes.size:
            at += int(set_bytes[0])
            return at, (at - layout.start) % layout.unit > CHANCE
        at += len(after)
    return at, False


def _same_before(start: int, stop: int, layout: Layout, read: Read) -> bool:
    """Whether the row before has zeros in the columns in which these begin; where there is none,
    the row after, if these end in their row."""
    row_end = start + (layout.start - start) % layout.unit
    end = min(stop, row_end, start + PAGE)
    step = -layout.unit if start - layout.unit >= layout.start else layout.unit
    if step > 0 and (stop > row_end + CHANCE or end + step > layout.stop):
        return False
    return not read(min(start + CHANCE, end) + step, end + step).any()


def _same_after(start: int, stop: int, layout: Layout, read: Read) -> bool:
    """Whether the row after has zeros in the columns in which these end; where there is none,
    the row before, if these begin in their row."""
    row_start = stop - (stop - layout.start) % layout.unit
    begin = max(start, row_start, stop - PAGE)
    step = layout.unit if stop + layout.unit <= layout.stop else -layout.unit
    if step < 0 and (start < row_start - CHANCE or begin + step < layout.start):
        return False
    return not read(begin + step, max(stop - CHANCE, begin) + step).any()


def allowed() -> bool:
    """Whether the user has said that zeros are meant."""
    return os.environ.get(ALLOW, "") not in ("", "0")
