"""Weight files that don't seem to belong to the others, told from the numbers alone.

What goes from block to block is one vector, and which of its channels matter is a model's own: in
trained models the weights that read it have similar sizes, channel by channel, in neighbouring
blocks, and in another model other channels are large. So for each weight that has the hidden size
as its last axis: the size of every channel, ranked, and the correlation of the ranks with those
of the same weight in the next block. Where blocks in different files don't agree, and those of
one file do, the files are of different models. A fine-tune of the same base has the base's
channels, and can't be told in this way: digests can.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy

from surgery.anatomy import Anatomy
from surgery.files import InputFile
from surgery.kernels.numbers import in_float64
from surgery.tensor import FileSpan, LazyTensor

SAMPLE = 1 << 20
"""Elements of each weight that are looked at: whole rows from the first on."""
FEWEST = 32
"""Channels below which a correlation says nothing."""
TELLING = 0.25
"""The usual correlation of a weight with the next block's from which on it is asked."""

FEWEST_WEIGHTS = 3
"""Telling weights of a block below which there is no judgement."""


@dataclass(frozen=True)
class Seam:
    """Neighbouring blocks in different files: the correlation between them over all the weights
    that were asked (their median), and the usual one."""

    first: InputFile
    second: InputFile
    blocks: tuple[str, str]
    found: float
    usual: float


def strange_seams(tensors: Mapping[str, LazyTensor], anatomy: Anatomy) -> list[Seam]:
    """Where one file ends and another begins, and the weights don't agree as they do elsewhere."""
    files = {_file(tensor) for tensor in tensors.values()}
    width = Counter(t.shape[-1] for t in tensors.values() if _is_asked(t)).most_common(1)
    if len(files) < 2 or not width or width[0][0] < FEWEST:
        return []
    weights: dict[tuple[str, str], dict[int, LazyTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = anatomy.places[name]
        asked = _is_asked(tensor) and tensor.shape[-1] == width[0][0]
        if asked and place.stack is not None and place.block is not None:
            weights[place.stack, place.inner][place.block] = tensor
    inside: dict[tuple[str, str], list[float]] = defaultdict(list)
    across: dict[tuple[str, int, InputFile, InputFile], dict[str, float]] = defaultdict(dict)
    for (stack, inner), blocks in weights.items():
        channels = {block: _channels(tensor) for block, tensor in blocks.items()}
        for block in blocks:
            if block + 1 not in blocks:
                continue
            if not (numpy.ptp(channels[block]) and numpy.ptp(channels[block + 1])):
                continue  # all channels alike, as in norms that were never trained
            agree = float(numpy.corrcoef(channels[block], channels[block + 1])[0, 1])
            first, second = _file(blocks[block]), _file(blocks[block + 1])
            if first == second:
                inside[stack, inner].append(agree)
            else:
                across[stack, block, first, second][inner] = agree
    return _judged(inside, across, width[0][0])


def _judged(
    inside: Mapping[tuple[str, str], list[float]],
    across: Mapping[tuple[str, int, InputFile, InputFile], Mapping[str, float]],
    channels: int,
) -> list[Seam]:
    """The seams whose correlation is neither what is usual, nor more than chance."""
    found = []
    for seam, weights in across.items():
        stack, block, first, second = seam
        usual = {}
        for inner in weights:
            others = [
                a[inner] for s, a in across.items() if s[0] == stack and s != seam and inner in a
            ]
            if elsewhere := [*inside[stack, inner], *others]:
                usual[inner] = float(numpy.median(elsewhere))
        asked = [inner for inner, value in usual.items() if value >= TELLING]
        if len(asked) < FEWEST_WEIGHTS:
            continue
        here = float(numpy.median([weights[inner] for inner in asked]))
        there = float(numpy.median([usual[inner] for inner in asked]))
        # the median of n correlations by chance has a standard deviation of
        # 1.25 / sqrt(n * channels)
        chance = 3 * 1.25 / (len(asked) * channels) ** 0.5
        if here < min(there / 3, max(0.1, chance)):
            blocks = (f"{stack}.{block}", f"{stack}.{block + 1}")
            found.append(Seam(first, second, blocks, here, there))
    return found


def _is_asked(tensor: LazyTensor) -> bool:
    return tensor.numel > 0 and bool(tensor.shape) and tensor.dtype.kind == "float"


def _file(tensor: LazyTensor) -> InputFile:
    assert isinstance(tensor.leaf, FileSpan)
    return tensor.leaf.file


def _channels(tensor: LazyTensor) -> numpy.ndarray:
    """The ranks of the channels by size; equal ones share the middle of theirs."""
    width = tensor.shape[-1]
    rows = tensor.rows
    if len(tensor.shape) > 1:
        rows = min(rows, max(1, SAMPLE // width))
    numbers = in_float64(tensor.read_bytes(0, rows), tensor.dtype).reshape(-1, width)
    with numpy.errstate(over="ignore"):  # the squares of huge float64 are infinite alike
        size = (numbers**2).mean(0)
    _, place, count = numpy.unique(size, return_inverse=True, return_counts=True)
    return (numpy.cumsum(count) - (count - 1) / 2)[place]
