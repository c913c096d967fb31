"""What a model that refuses inputs says of those that it takes.

The layer that the inputs don't fit has the size that they should have; an argument that is missing
is named in the error, or stands in the line that failed. Each gives other inputs to try.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Any

from surgery.verification.arguments import argument
from surgery.verification.draws import Values, noise, ones

if TYPE_CHECKING:
    from surgery.modeling.hollow import Attempt, HollowModel

MOST_SIDE = 2048
"""Of an image that a model calls too small."""
MOST_VALUES = 1 << 24
"""Of an argument: a size that was misread asks for more."""
_MULTIPLE = re.compile(r"(?:multiple of|divisible by)[^\d`]*(?:`[^`]*`)?\D*(\d+)")
_WORD = re.compile(r"[A-Za-z_]\w*")


def mended(
    values: Values, attempt: Attempt, hollow: HollowModel, seed: int, method: str = "forward"
) -> Iterator[Values]:
    """Other values, by why these were refused; the likeliest first."""
    names = hollow.accepts if method == "forward" else hollow.names(method)
    for name in _asked_for(attempt.error, names, values):
        yield from (values | made for made in argument(name, hollow, values, seed))
    for mend in (_sized_for_layer, _sized_as_said, _in_range, _yes_or_no):
        yield from mend(values, attempt, seed)


def _asked_for(error: Exception | None, accepts: Mapping[str, bool], values: Values) -> list[str]:
    """The arguments that an error is about and that weren't given."""
    absent = {name for name in accepts if name not in values}
    text = str(error)
    named = [word for word in _WORD.findall(text) if word in absent]
    if named:
        return list(dict.fromkeys(named))
    if "None" not in text and not isinstance(error, AssertionError):
        return []
    for names in _lines(error.__traceback__ if error else None):
        if asked := [name for name in names if name in absent]:
            return list(dict.fromkeys(asked))
    return []


def _lines(traceback: TracebackType | None) -> list[list[str]]:
    """What stands for None in the line that runs in each frame, the innermost first."""
    found: list[list[str]] = []
    while traceback is not None:
        frame = traceback.tb_frame
        line = linecache.getline(frame.f_code.co_filename, traceback.tb_lineno)
        here = frame.f_locals
        found.append([w for w in _WORD.findall(line) if w in here and here[w] is None])
        traceback = traceback.tb_next
    return found[::-1]


def _sized_for_layer(values: Values, attempt: Attempt, seed: int) -> Iterator[Values]:
    """The layer that failed takes another number of channels or features than it got."""
    wanted = _width(attempt.module)
    if wanted is None or not attempt.shapes:
        return
    size, from_end, dims = wanted
    shape = attempt.shapes[0]
    axis = -1 if from_end else -1 - dims
    if len(shape) < 1 - axis - (1 if from_end else 0) or shape[axis] == size:
        return
    yield from _resized(values, {shape[axis]: size}, seed)
    got = shape[axis]
    for old in sorted({n for value in values.values() for n in value.shape[1:]}, reverse=True):
        if old != got and old * size % got == 0:  # stacked or cut on the way
            yield from _resized(values, {old: old * size // got}, seed)


def _width(module: Any) -> tuple[int, bool, int] | None:
    """What size a layer takes, whether that is its last axis, and how many are behind it."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.in_features, True, 0
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1]), True, 0
    for dims, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
        if isinstance(module, kind):
            return module.in_channels, False, dims
    return None


def _sized_as_said(values: Values, attempt: Attempt, seed: int) -> Iterator[Values]:
    """Sizes that the error names: of an image, or that one has to be a multiple of."""
    text = str(attempt.error)
    for height, width in re.findall(r"\(?\b(\d+)\s*[*x]\s*(\d+)\b", text):
        yield from _with_sides(values, lambda *_, s=(int(height), int(width)): s, seed)
    if of := _MULTIPLE.search(text):
        n = int(of[1])
        said = [int(word) for word in re.findall(r"\d+", text) if int(word) % n]
        yield from _resized(values, {size: -(-size // n) * n for size in said}, seed)
        yield from _with_sides(values, lambda h, w: (-(-h // n) * n, -(-w // n) * n), seed)
    if "small" in text or "out of range" in text:
        yield from _with_sides(values, lambda h, w: (2 * h, 2 * w), seed)
    if unlike := re.search(r"\((\d+)\) must match\D*\((\d+)\)", text):
        a, b = int(unlike[1]), int(unlike[2])
        yield from _resized(values, {a: b}, seed)
        yield from _resized(values, {b: a}, seed)


def _with_sides(
    values: Values, sides: Callable[[int, int], tuple[int, int]], seed: int
) -> Iterator[Values]:
    """Images of another height and width."""
    changed = dict(values)
    for name, value in values.items():
        if value.dim() < 4 or not value.is_floating_point():
            continue
        height, width = sides(value.shape[-2], value.shape[-1])
        if max(height, width) <= MOST_SIDE and (height, width) != tuple(value.shape[-2:]):
            changed[name] = noise((*value.shape[:-2], height, width), seed)
    if any(changed[name] is not value for name, value in values.items()):
        yield changed


def _resized(values: Values, sizes: Mapping[int, int], seed: int) -> Iterator[Values]:
    """With one axis of one argument, or all of a size, as long as it should be."""
    for name, value in values.items():
        for axis in range(value.dim() - 1, 0, -1):
            if value.is_floating_point() and value.shape[axis] in sizes:
                shape = list(value.shape)
                shape[axis] = sizes[shape[axis]]
                if prod(shape) > MOST_VALUES:
                    continue
                yield {**values, name: noise(tuple(shape), seed)}
    changed = dict(values)
    for name, value in values.items():
        shape = [n if not at else sizes.get(n, n) for at, n in enumerate(value.shape)]
        if shape == list(value.shape) or prod(shape) > MOST_VALUES:
            continue
        if value.is_floating_point():
            changed[name] = noise(tuple(shape), seed)
        elif bool((value == 1).all()):
            changed[name] = ones(tuple(shape)).to(value.dtype)
    if sum(changed[name] is not value for name, value in values.items()) > 1:
        yield changed


def _in_range(values: Values, attempt: Attempt, _seed: int) -> Iterator[Values]:
    """Numbers that are looked up in a table with fewer rows."""
    if not isinstance(attempt.error, IndexError):
        return
    rows = getattr(attempt.module, "num_embeddings", None)
    changed = {
        name: value % rows if rows else value * 0
        for name, value in values.items()
        if not value.is_floating_point()
        and value.numel()
        and (not rows or int(value.max()) >= rows)
    }
    for name, value in changed.items():
        yield {**values, name: value}


def _yes_or_no(values: Values, attempt: Attempt, _seed: int) -> Iterator[Values]:
    """Masks of another type; False where it says what is filled up with something else."""
    import torch

    if "bool" in str(attempt.error):
        fills = "masked_fill" in str(attempt.error)
        masks = {
            name: value.bool() ^ fills
            for name, value in values.items()
            if value.dtype == torch.int64 and "mask" in name
        }
        if masks:
            yield values | masks
