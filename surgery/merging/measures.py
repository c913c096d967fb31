"""What merges have to know of a whole tensor first: streaming passes over the inputs of a lazy
tensor (see LazyTensor.measure), each of which returns a few numbers.

Blocks have a fixed size, and sums over them are exact (`math.fsum`), so that threads and the
writer's own blocks change nothing. numpy adds up the blocks: torch would split a sum among its
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import fsum

import numpy

from surgery.dtypes import DTYPES, DType
from surgery.kernels import compiled, elementwise, fusion
from surgery.kernels.merging import Combination, updates
from surgery.kernels.selection import Search, Window, magnitudes
from surgery.measure import BLOCK_ELEMENTS
from surgery.merging.finite import Inputs, names_of, require_finite, unchecked
from surgery.on_demand import torch
from surgery.tensor import LazyTensor

Bounds = tuple[float, float]
SAMPLE_PLACES, SAMPLE_ROWS, SAMPLE_ELEMENTS = 32, 4, 1 << 16
"""At least so many rows at so many places, and so many numbers, are looked at to guess where a
threshold is."""
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
    for products in _products(inputs, list(sums), from_base=from_base):
        for found, values in zip(sums.values(), products, strict=True):
            found.append(total(values))
    made = numpy.zeros((count, count))
    for (i, j), found in sums.items():
        made[i, j] = made[j, i] = fsum(found)
    return made


def _products(
    inputs: Inputs, pairs: Sequence[tuple[int, int]], *, from_base: bool
) -> Iterator[list[numpy.ndarray]]:
    """For some rows at a time, the products of each pair of inputs, or of differences from the
    first, in float64: sums of entries TILE apart, as the compiled kernel adds them up."""
    names, plain = names_of(inputs), tuple(map(unchecked, inputs))
    if not compiled.takes(plain):
        for rows in blocks(inputs):
            wide = [part.to(torch.float64).reshape(-1).numpy() for part in rows]
            if from_base:
                wide = [part - wide[0] for part in wide[1:]]
            yield [_tiled(wide[i] * wide[j]) for i, j in pairs]
        return
    for start, stop in ranges(plain):
        parts = [tensor.read_bytes(start, stop) for tensor in plain]
        if not all(map(compiled.finite, parts)):
            require_finite([tensor.read(start, stop) for tensor in plain], names)
        base = parts.pop(0) if from_base else None
        yield [compiled.products(parts[i], parts[j], base) for i, j in pairs]


def _tiled(values: numpy.ndarray) -> numpy.ndarray:
    """Sums of entries TILE apart, in order."""
    whole = len(values) // compiled.TILE * compiled.TILE
    sums: numpy.ndarray = numpy.add.reduce(values[:whole].reshape(-1, compiled.TILE), axis=0)
    sums[: len(values) - whole] += values[whole:]
    return sums


def magnitude_bounds(
    inputs: Inputs, *, kept: Sequence[tuple[int, int] | None], compute: DType
) -> list[Bounds | None]:
    """For the task vector of each model, the magnitudes of the ranks first to last, counted from
    the smallest; (inf, 0) for a model that keeps nothing. None where all is kept."""
    count = inputs[0].numel
    kept = [(0, 0) if ranks is not None and not count else ranks for ranks in kept]
    lows = {(at, r[0]) for at, r in enumerate(kept) if r is not None and 0 < r[0] < r[1]}
    highs = {(at, r[1] - 1) for at, r in enumerate(kept) if r is not None and r[0] < r[1] < count}
    found = _magnitudes(inputs, lows | highs, compute)

    def bounds(at: int, ranks: tuple[int, int]) -> Bounds:
        first, end = ranks
        if first >= end:
            return float("inf"), 0.0
        return found.get((at, first), 0.0), found.get((at, end - 1), float("inf"))

    return [None if ranks is None else bounds(at, ranks) for at, ranks in enumerate(kept)]


def _magnitudes(
    inputs: Inputs, wanted: set[tuple[int, int]], compute: DType
) -> dict[tuple[int, int], float]:
    """The magnitude of each (model, rank) of the task vectors, in one pass over them if a sample
    is as good as most are."""
    models = sorted({at for at, _ in wanted})
    samples = _samples(inputs, models, compute)
    windows = {
        (at, rank): Window(rank, inputs[0].numel, samples[at]) for at, rank in sorted(wanted)
    }
    _count_magnitudes(inputs, windows, compute)
    found = {key: window.found for key, window in windows.items()}
    searches = {
        key: Search([key[1]], compute) for key, magnitude in found.items() if magnitude is None
    }
    while not all(search.done for search in searches.values()):
        _count_magnitudes(inputs, searches, compute)
        for search in searches.values():
            search.narrow()
    missed = {key: search.found[0] for key, search in searches.items()}
    return {key: value for key, value in found.items() if value is not None} | missed


def _count_magnitudes(
    inputs: Inputs,
    counters: Mapping[tuple[int, int], Window] | Mapping[tuple[int, int], Search],
    compute: DType,
) -> None:
    """Let each counter see the magnitudes of its model's task vector."""
    models = sorted({at for at, _ in counters})
    if not models:
        return
    used = (inputs[0], *(inputs[1 + at] for at in models))
    names, plain = names_of(used), tuple(map(unchecked, used))
    if _in_bytes(plain, compute):
        for start, stop in ranges(plain):
            base, *tuned = (tensor.read_bytes(start, stop) for tensor in plain)
            parts = dict(zip(models, tuned, strict=True))
            seen = [counter.count_between(base, parts[at]) for (at, _), counter in counters.items()]
            if not all(seen):
                require_finite([tensor.read(start, stop) for tensor in plain], names)
        return
    for rows in blocks(plain):
        require_finite(rows, names)
        _, taus = updates(rows[0], rows[1:], compute)
        sizes = {at: tau.abs_().numpy() for at, tau in zip(models, taus, strict=True)}
        for (at, _), counter in counters.items():
            counter.count(sizes[at])


def _samples(inputs: Inputs, models: Sequence[int], compute: DType) -> dict[int, numpy.ndarray]:
    """Magnitudes of the models' task vectors, sorted: some of rows from all over the tensor, or
    all of a small one."""
    if not models:
        return {}
    like = inputs[0]
    rows = max(1, min(SAMPLE_ROWS, like.rows))
    places = max(SAMPLE_PLACES, -(-SAMPLE_ELEMENTS // (rows * like.width)))
    starts = range(0, like.rows - rows + 1, max(rows, like.rows // places))
    spans: Iterable[tuple[int, int]] = ((at, at + rows) for at in starts)
    step = max(1, rows * like.width * len(starts) // SAMPLE_ELEMENTS)
    if like.numel <= BLOCK_ELEMENTS or not all(tensor.streams for tensor in inputs):
        spans, step = ranges(inputs), 1
    elif like.width == 1:  # rows of one aren't worth a read each
        length = BLOCK_ELEMENTS // 16
        spans = ((at, at + length) for at in range(0, like.rows - length, like.rows // 4))
        step = 1
    found: list[list[numpy.ndarray]] = []
    plain = [unchecked(inputs[at]) for at in (0, *(1 + at for at in models))]
    in_bytes = _in_bytes(plain, compute)
    for start, stop in spans:
        if in_bytes:
            base, *tuned = (t.read_bytes(start, stop).view(numpy.uint16)[::step] for t in plain)
            found.append([magnitudes(base, model) for model in tuned])
        else:
            first, *others = (t.read(start, stop).reshape(-1)[::step] for t in plain)
            _, taus = updates(first, others, compute)
            found.append([tau.abs_().numpy() for tau in taus])
    sorts = (numpy.sort(numpy.concatenate(parts)) for parts in zip(*found, strict=True))
    return dict(zip(models, sorts, strict=True))


def _in_bytes(inputs: Sequence[LazyTensor], compute: DType) -> bool:
    """Whether compiled kernels can measure them."""
    return compute is DTYPES["F32"] and compiled.takes(inputs)


def selected_shares(inputs: Inputs, *, topk: float, compute: DType) -> tuple[float, list[float]]:
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


def _variance_threshold(inputs: Inputs, topk: float, compute: DType) -> float:
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
            search.count(elementwise.variance(taus).numpy())
        search.narrow()
    return search.found[0]


def importance_bound(inputs: Inputs, *, compute: DType) -> float:
    """For Arcee Fusion: the importance from which on an update is taken over."""
    search = Search(fusion.quartile_ranks(inputs[0].numel) if inputs[0].numel else [], compute)
    while not search.done:
        for base, model in blocks(inputs):
            search.count(fusion.importance(base, model, compute).numpy())
        search.narrow()
    return fusion.outlier_bound(search.found) if inputs[0].numel else 0.0


def own_factors(
    inputs: Inputs, *, r: float, alpha: float, epsilon: float, compute: DType
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
