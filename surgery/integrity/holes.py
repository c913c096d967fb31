"""Files that lack bytes which their header promises: found before anything is read."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from os import fstat
from typing import TYPE_CHECKING

from surgery.errors import FormatError
from surgery.files import InputFile
from surgery.system import reading
from surgery.tensor import FileSpan, LazyTensor

if TYPE_CHECKING:
    from surgery.pages import Zeros

Range = tuple[int, int]


def refuse_holes(tensors: Iterable[LazyTensor]) -> None:
    """Raise FormatError with every hole in the files of `tensors` that stands for values.

    A hole reads as zeros, and may stand for zeros: a copy that leaves them out makes one. It does
    where the zeros around it are whole rows, or columns (see surgery/pages.py).
    """
    FormatError.raise_if(_problems(tensors))


def _problems(tensors: Iterable[LazyTensor]) -> Iterator[str]:
    found: dict[InputFile, list[Range]] = {}
    file, holes = None, list[Range]()
    for tensor in tensors:
        span = tensor.leaf
        if not isinstance(span, FileSpan):
            continue
        if span.file is not file:  # the tensors of a file come together
            file = span.file
            if file not in found:
                found[file] = holes_of(file)
            holes = found[file]
        if holes and not _in_one(span, holes):
            from surgery.pages import Zeros, allowed, never_written

            for run, kind in holes_in(tensor, span, holes):
                if kind in (Zeros.FILLED, Zeros.ODD) and not allowed():
                    yield never_written(run, span, hole=True)


def _in_one(span: FileSpan, holes: Sequence[Range]) -> bool:
    """Whether a tensor is a hole from end to end, which may be a tensor of zeros."""
    at = bisect_left(holes, (span.offset + 1,)) - 1
    around = holes[at] if at >= 0 else (0, 0)
    return span.length > 0 and span.offset + span.length <= around[1]


def holes_of(file: InputFile) -> list[Range]:
    """The holes of a file; none of one that stayed on the Hub. The file is open for that only: a
    checkpoint that is just looked at holds no descriptors."""
    with reading(file.path):
        if not file.path.exists():
            return []
        opened = InputFile(file.path)
        return opened.holes(fstat(opened.descriptor.fd).st_size)


def holes_in(
    tensor: LazyTensor, span: FileSpan, holes: Sequence[Range]
) -> Iterator[tuple[Range, Zeros]]:
    """The parts of `tensor` that lie in holes of its file, which come in order, and what they look
    like."""
    from surgery.pages import Zeros, kind_of, layout_of, reader

    whole = span.offset, span.offset + span.length
    first = bisect_right(holes, whole[0], key=lambda hole: hole[1])
    for at in range(first, len(holes)):
        start, stop = holes[at]
        if start >= whole[1]:
            break
        run = max(start, whole[0]), min(stop, whole[1])
        if run == whole and span.length:
            yield run, Zeros.WHOLE
        elif run[0] < run[1]:
            yield run, kind_of(run, layout_of(span, tensor), reader(span.file))
