"""Which blocks are meant: "all", or numbers and ranges such as "0,8-15,-1"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from surgery.errors import ArgumentError

_RANGE = re.compile(r"\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?")


def parse_layers(text: str, depth: int) -> list[int]:
    """The blocks that `text` names of `depth`, in order. They count from 0, and from -1 back; a
    range has both its ends. Raises ArgumentError for what isn't there."""
    if not isinstance(text, str):
        raise ArgumentError(f"layers is {text!r}, and has to be text: 'all', '8-15' or '0,4,-1'")
    if text.strip() == "all":
        return list(range(depth))
    chosen: set[int] = set()
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise ArgumentError(
                f"layers: {item.strip()!r} is neither a number nor a range such as 8-15"
            )
        ends = [int(end) for end in match.groups() if end is not None]
        first, last = (end + depth if end < 0 else end for end in (ends[0], ends[-1]))
        if not 0 <= first <= last < depth:
            raise ArgumentError(
                f"layers: {item.strip()} isn't among the {depth} layers, which are 0 to {depth - 1}"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def as_ranges(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as half-open ranges: 0, 1, 2, 7 is (0, 3), (7, 8)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)
