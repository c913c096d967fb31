"""What merges have to know of a whole tensor first: streaming passes over the inputs of a lazy
tensor (see LazyTensor.measure), each of which returns a few numbers.

Blocks have a fixed size, and sums over them are exact (`math.fsum`), so that threads and the
writer's own blocks change nothing. numpy adds up the blocks: torch would split a sum among its
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import fsum

import numpy
import torch

from surgery.kernels import elementwise, fusion
from surgery.kernels.merging import Combination, updates
from surgery.kernels.selection import Search
from surgery.measure import BLOCK_ELEMENTS
from surgery.tensor import LazyTensor

Inputs = tuple[LazyTensor, ...]
Bounds = tuple[float, float]
SAME = 1e-12
"""A sum of coefficients within this of 1 is 1: a merge of a model with itself is itself."""


def ranges(inputs: Inputs) -> Iterator[tuple[int, int]]:
    """Row ranges in which to stream tensors of one shape."""
    slow = [tensor for tensor in inputs if not tensor.streams]
    return (slow or inputs)[0].blocks(BLOCK_ELEMENTS)


def blocks(inputs: Inputs) -> Iterator[list[torch.Tensor]]:
    """The inputs, some rows of all at a time."""
    for start, stop in ranges(inputs):
        yield [tensor.read(start, stop) for tensor in inputs]


def total(values: numpy.ndarray) -> float:
    """The sum of a block of float64 values."""
    return float(numpy.add.reduce(values.reshape(-1)))


def combination(
    inputs: Inputs, *, rule: Callable[[numpy.ndarray], list[float]], from_base: bool
) -> Combination:
    """The coefficients that `rule` makes of the Gram matrix of the inputs, or, `from_base`, of
    the differences of the others from the first."""
    coefficients = rule(gram(inputs, from_base=from_base))
    if from_base:
        return Combination(1.0, tuple(coefficients))
    start = fsum(coefficients)
    return Combination(1.0 if abs(start - 1) < SAME else start, tuple(coefficients[1:]))


def gram(inputs: Inputs, *, from_base: bool) -> numpy.ndarray:
    """The inner product of every two inputs, or of every two differences from the first, in
    float64: (n, n)."""
    count = len(inputs) - from_base
    sums: dict[tuple[int, int], list[float]] = {
        (i, j): [] for i in range(count) for j in range(i, count)
    }
    for parts in blocks(inputs):
        wide = [part.to(torch.float64).reshape(-1).numpy() for part in parts]
        if from_base:
            wide = [part - wide[0] for part in wide[1:]]
        for (i, j), found in sums.items():
            found.append(total(wide[i] * wide[j]))
    made = numpy.zeros((count, count))
    for (i, j), found in sums.items():
        made[i, j] = made[j, i] = fsum(found)
    return made


def magnitude_bounds(
    inputs: Inputs, *, kept: Sequence[tuple[int, int] | None], compute: torch.dtype
) -> list[Bounds | None]:
    """For the task vector of each model, the magnitudes of the ranks first to last, counted from
    the smallest; (0, 0) for a model that keeps nothing is (inf, 0). None where all is kept."""
    searches = [
        Search([] if rank is None or rank[0] >= rank[1] else [rank[0], rank[1] - 1], compute)
        for rank in kept
    ]
    while not all(search.done for search in searches):
        open_ones = [at for at, search in enumerate(searches) if not search.done]
        chosen = (inputs[0], *(inputs[1 + at] for at in open_ones))
        for base, *models in blocks(chosen):
            _, taus = updates(base, models, compute)
            for at, tau in zip(open_ones, taus, strict=True):
                searches[at].count(tau.abs_())
        for search in searches:
            search.narrow()
    return [
        _bounds(search, rank, inputs[0].numel) for search, rank in zip(searches, kept, strict=True)
    ]


def _bounds(search: Search, rank: tuple[int, int] | None, count: int) -> Bounds | None:
    if rank is None:
        return None
    if rank[0] >= rank[1]:
        return float("inf"), 0.0
    low, high = search.found
    return low, float("inf") if rank[1] == count else high


def selected_shares(
    inputs: Inputs, *, topk: float, compute: torch.dtype
) -> tuple[float, list[float]]:
    """For SCE: the variance from which on an entry is selected, and each model's share of the
    squares of what was selected."""
    threshold = _variance_threshold(inputs, topk, compute) if topk < 1 else 0.0
    squares: list[list[float]] = [[] for _ in inputs[1:]]
    for base, *models in blocks(inputs):
        _, taus = updates(base, models, compute)
        unselected = elementwise.variance(taus) < threshold
        for tau, found in zip(taus, squares, strict=True):
            wide = tau.masked_fill_(unselected, 0).to(torch.float64).numpy()
            found.append(total(wide * wide))
    sums = [fsum(found) for found in squares]
    whole = fsum(sums)
    return threshold, [part / whole if whole > 0 else 1 / len(sums) for part in sums]


def _variance_threshold(inputs: Inputs, topk: float, compute: torch.dtype) -> float:
    """The smallest variance among the `topk` part of those that aren't 0, the largest."""
    there = 0
    for base, *models in blocks(inputs):
        _, taus = updates(base, models, compute)
        there += int(torch.count_nonzero(elementwise.variance(taus)))
    count = int(there * topk)
    if count == 0:
        return float("inf")
    search = Search([inputs[0].numel - count], compute)
    while not search.done:
        for base, *models in blocks(inputs):
            _, taus = updates(base, models, compute)
            search.count(elementwise.variance(taus))
        search.narrow()
    return search.found[0]


def importance_bound(inputs: Inputs, *, compute: torch.dtype) -> float:
    """For Arcee Fusion: the importance from which on an update is taken over."""
    search = Search(fusion.quartile_ranks(inputs[0].numel) if inputs[0].numel else [], compute)
    while not search.done:
        for base, model in blocks(inputs):
            search.count(fusion.importance(base, model, compute))
        search.narrow()
    return fusion.outlier_bound(search.found) if inputs[0].numel else 0.0


def own_factors(
    inputs: Inputs, *, r: float, alpha: float, epsilon: float, compute: torch.dtype
) -> list[float]:
    """For RAM+: 1 + r * min(alpha, shared / own) for each model, of the entries that it changed
    with others and alone."""
    shared, own = [0] * (len(inputs) - 1), [0] * (len(inputs) - 1)
    for base, *models in blocks(inputs):
        found = elementwise.changed_alone(base, *models, epsilon=epsilon, compute=compute)
        for at, (together, alone) in enumerate(found):
            shared[at] += together
            own[at] += alone
    ratios = [
        many / few if few else (float("inf") if many else 0.0)
        for many, few in zip(shared, own, strict=True)
    ]
    return [1 + r * min(alpha, ratio) for ratio in ratios]
