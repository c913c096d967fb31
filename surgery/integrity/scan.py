"""One pass over the bytes of weight files: their digests, and what the numbers in them look like.

A file is read in parts, in order, each by whichever thread is free; memory is one part for each
thread. A digest takes the parts in their order, while other threads look at the next ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition, Lock

import numpy

from surgery.files import InputFile
from surgery.pages import Layout, Zeros, kind_of, layout_of, reader, zero_pages
from surgery.parallel import Progress, run_all
from surgery.tensor import FileSpan, LazyTensor

PART = 1 << 21
"""Bytes read at a time; a multiple of the page, so that no page is cut in two."""


@dataclass(frozen=True)
class _Format:
    """How to tell what isn't a number from the bits of an element: `bits ^ flipped & mask` is
    `top` or more; `top` itself is infinity, where the type has it."""

    word: str
    mask: int
    top: int
    infinite: bool = False
    flipped: int = 0
    words: int = 1


_FORMATS = {
    "F64": _Format("<u8", (1 << 63) - 1, 0x7FF0 << 48, infinite=True),
    "F32": _Format("<u4", (1 << 31) - 1, 0x7F80 << 16, infinite=True),
    "F16": _Format("<u2", 0x7FFF, 0x7C00, infinite=True),
    "BF16": _Format("<u2", 0x7FFF, 0x7F80, infinite=True),
    "F8_E5M2": _Format("u1", 0x7F, 0x7C, infinite=True),
    "F8_E4M3": _Format("u1", 0x7F, 0x7F),
    "F8_E8M0": _Format("u1", 0xFF, 0xFF),
    "F8_E5M2FNUZ": _Format("u1", 0xFF, 0xFF, flipped=0x7F),
    "F8_E4M3FNUZ": _Format("u1", 0xFF, 0xFF, flipped=0x7F),
    "C64": _Format("<u4", (1 << 31) - 1, 0x7F80 << 16, infinite=True, words=2),
}
"""The types that can hold something else than a number. FNUZ's only NaN is 0x80, minus zero; no
type of 6 bits or 4 has any, nor has an integer."""


@dataclass
class Found:
    """What was seen of one tensor: how many values are NaN and infinite, the place of the first
    of them among its elements, whether it is all zeros, and runs of pages of zeros, as bytes of
    the file."""

    nan: int = 0
    infinite: int = 0
    first: int | None = None
    zero: bool = True
    runs: list[tuple[int, int, Zeros]] = field(default_factory=list)
    columns: int = 0
    """Runs that are the same columns of neighbouring rows; there can be one in each row."""


def scan(
    files: Mapping[InputFile, Sequence[tuple[str, LazyTensor]]],
    hashed: frozenset[InputFile],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Found], dict[InputFile, str]]:
    """Read `files`, the tensors of each in the order of their bytes: what was found of each
    tensor, and the digests of the files in `hashed`."""
    found = {name: Found() for tensors in files.values() for name, _ in tensors}
    digests = {file: _InOrder() for file in hashed}
    lock = Lock()

    def work(job: _Part) -> None:
        try:
            data = _read(job)
            if job.file in digests:
                digests[job.file].add(job.number, data[: job.stop - job.start])
            if job.tensor is not None:
                seen = _look(job, job.tensor, data)
                with lock:
                    _add(found[job.name], seen)
        except BaseException:
            for digest in digests.values():
                digest.give_up()
            raise
        if progress is not None and job.tensor is not None:
            progress(job.stop - job.start)

    run_all(_parts(files, hashed), work, threads, with_torch=False)
    return found, {file: digest.hexdigest() for file, digest in digests.items()}


@dataclass(frozen=True)
class _Part:
    """Bytes `start` to `stop` of a file, the `number`th of its parts: of a tensor, or of the
    header."""

    file: InputFile
    number: int
    start: int
    stop: int
    name: str = ""
    tensor: LazyTensor | None = None
    layout: Layout | None = None


def _parts(
    files: Mapping[InputFile, Sequence[tuple[str, LazyTensor]]], hashed: frozenset[InputFile]
) -> Iterator[_Part]:
    for file, tensors in files.items():
        number = 0
        spans = [(name, t, t.leaf) for name, t in tensors if isinstance(t.leaf, FileSpan)]
        data = min((span.offset for _, _, span in spans), default=0)
        if file in hashed:
            for start in range(0, data, PART):
                yield _Part(file, number, start, min(start + PART, data))
                number += 1
        for name, tensor, span in spans:
            layout = layout_of(span, tensor)
            start = span.offset
            while start < layout.stop:
                stop = min(start - start % PART + PART, layout.stop)
                yield _Part(file, number, start, stop, name, tensor, layout)
                number, start = number + 1, stop


def _read(part: _Part) -> numpy.ndarray:
    """The bytes of a part, and those that complete its last element."""
    more = 0
    if part.tensor is not None and part.layout is not None:
        more = min(part.tensor.dtype.bits // 8, part.layout.stop - part.stop)
    data = numpy.empty(part.stop - part.start + more, numpy.uint8)
    part.file.read_into(data.data, part.start)
    return data


def _look(part: _Part, tensor: LazyTensor, data: numpy.ndarray) -> Found:
    assert part.layout is not None
    seen = Found()
    own = data[: part.stop - part.start]
    read = reader(part.file)
    for run in zero_pages(own, part.start):
        kind = kind_of(run, part.layout, read)
        if kind is Zeros.COLUMNS:
            seen.columns += 1
        else:
            seen.runs.append((*run, kind))
    kind_of_number = _FORMATS.get(tensor.dtype.name)
    if kind_of_number is None:
        seen.zero = not own.any()
    else:
        _look_at_numbers(seen, part.start - part.layout.start, own, data, tensor, kind_of_number)
    return seen


def _look_at_numbers(
    seen: Found,
    offset: int,
    own: numpy.ndarray,
    data: numpy.ndarray,
    tensor: LazyTensor,
    how: _Format,
) -> None:
    """Count what isn't a number among the elements that begin in `own`, whose first byte is byte
    `offset` of the tensor."""
    size = tensor.dtype.bits // 8
    before = -offset % size
    count = -(-(len(own) - before) // size)
    if count <= 0:
        return
    bits = numpy.frombuffer(data, how.word, count * how.words, before)
    shown = (bits ^ how.flipped if how.flipped else bits) & bits.dtype.type(how.mask)
    highest = int(shown.max())
    seen.zero = highest == 0 if how.infinite else not own.any()
    if highest < how.top:
        return
    bad = shown >= how.top
    infinite = shown == how.top if how.infinite else numpy.zeros_like(bad)
    if how.words > 1:  # a complex number is infinite, or no number, as either part is
        bad, infinite = bad.reshape(count, -1), infinite.reshape(count, -1)
        not_a_number = (bad & ~infinite).any(axis=1)
        bad = bad.any(axis=1)
        infinite = bad & ~not_a_number
    seen.infinite = int(infinite.sum())
    seen.nan = int(bad.sum()) - seen.infinite
    seen.first = (offset + before) // size + int(numpy.argmax(bad))


def _add(total: Found, seen: Found) -> None:
    total.nan += seen.nan
    total.infinite += seen.infinite
    if seen.first is not None:
        total.first = seen.first if total.first is None else min(total.first, seen.first)
    total.zero = total.zero and seen.zero
    total.runs += seen.runs
    total.columns += seen.columns


class _InOrder:
    """A digest of parts that several threads bring, each as it comes to its turn. Parts are
    handed out in order, so the one that is waited for is always being worked on."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._next = 0
        self._turn = Condition()
        self._given_up = False

    def add(self, number: int, data: numpy.ndarray) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._given_up or self._next == number)
            if self._given_up:
                return
        self._digest.update(
            data.data
        )  # outside of the lock: nobody else's turn comes before the next
        with self._turn:
            self._next += 1
            self._turn.notify_all()

    def give_up(self) -> None:
        """Let those go who wait for a part that won't come."""
        with self._turn:
            self._given_up = True
            self._turn.notify_all()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
