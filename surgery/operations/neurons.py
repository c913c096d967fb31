"""The tensors of a wider MLP, made of those that it had: copied neurons, split outgoing weights."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any

from surgery.anatomy import Projection
from surgery.growth import Growth, Ranges, copy_numbers, source_neurons
from surgery.tensor import LazyTensor, gather
from surgery.values import noise, table, zeros

if TYPE_CHECKING:
    import torch

MANY_RUNS = 64
"""Runs of copied columns beyond which one lookup of all columns is faster than a slice each."""


def grown_tensors(
    base: Mapping[str, LazyTensor],
    growth: Growth,
    symmetry_break: float,
    seed: int,
    unsplit: Container[str] = (),
) -> dict[str, LazyTensor]:
    """The tensors that widen, in the place of those of that name. `base` is asked for shapes.
    Outgoing weights of that name in `unsplit` are copied as they are: something else splits
    them."""
    tensors = {}
    for name, projection, axis in growth.mlp.axes():
        tensor = base[name]
        shape = growth.shape(tensor.shape, axis)
        if projection is growth.mlp.down and name not in unsplit:
            tensors[name] = split_neurons(
                tensor, projection, growth, axis, shape, symmetry_break, seed
            )
        else:
            tensors[name] = copied_neurons(tensor, projection, growth, axis, shape)
    return tensors


def copied_neurons(
    tensor: LazyTensor, projection: Projection, growth: Growth, axis: int, shape: tuple[int, ...]
) -> LazyTensor:
    """A tensor whose neurons lie along `axis`, with the copied ones behind: of that shape."""
    if axis == len(shape) - 1 and axis > 0:
        return _wider_columns(tensor, growth, projection, shape)
    return _more_rows(tensor, growth, projection, prod(shape[axis + 1 : -1]), shape)


def _more_rows(
    tensor: LazyTensor, growth: Growth, up: Projection, each: int, shape: tuple[int, ...]
) -> LazyTensor:
    """The rows of all neurons and of the copied ones, in each piece; then rows of zeros. A neuron
    has `each` rows: the kernel of a convolution several."""
    runs = tuple(
        (int(at is None), each * start, each * stop) for at, start, stop in growth.runs(up)
    )
    inputs: tuple[LazyTensor, ...] = (tensor,)
    if growth.padding:
        rows = growth.padding * up.parts * each
        inputs += (zeros((rows, tensor.width) if len(shape) > 1 else (rows,), tensor.dtype),)
    return gather(inputs, runs, shape)


def _wider_columns(
    tensor: LazyTensor, growth: Growth, up: Projection, shape: tuple[int, ...]
) -> LazyTensor:
    import torch

    from surgery.kernels.columns import take_columns

    sources = torch.from_numpy(up.indices(growth.sources(), growth.mlp.width))
    return LazyTensor(
        shape,
        tensor.dtype,
        inputs=(tensor,),
        kernel=partial(take_columns, sources=sources),
    )


def split_neurons(
    tensor: LazyTensor,
    down: Projection,
    growth: Growth,
    axis: int,
    shape: tuple[int, ...],
    symmetry_break: float = 0.0,
    seed: int = 0,
) -> LazyTensor:
    """The same for a down projection, with the weights of every source split among its copies."""
    import numpy

    from surgery.kernels.split import split_columns, split_rows

    ordinals, copies = growth.shares()
    draws = int(copies.max()) - 1 if symmetry_break else 0
    draw = [noise(tensor.shape, seed, f"{down.weight}:{m}") for m in range(draws)]
    if axis == len(shape) - 1:
        runs = ((0, growth.mlp.width), *growth.copied)
        plain = not symmetry_break and len(runs) <= MANY_RUNS
        plan = _column_plan(runs, growth.padding, tensor.dtype.torch, plain)
        kernel = partial(split_columns, symmetry_break=symmetry_break, **plan)
        return LazyTensor(shape, tensor.dtype, inputs=(tensor, *draw), kernel=kernel)
    pieces, each = down.pieces(shape, axis), prod(shape[axis + 1 : -1])
    of_rows: list[tuple[int, int, int]] = []
    for at, start, stop in growth.runs(replace(down, experts=pieces)):
        # padding: any row, none of it is shared out
        some = (stop - start) * each
        of_rows += [(0, start * each, stop * each)] if at is not None else [(0, 0, 1)] * some
    rows = [gather((source,), tuple(of_rows), shape) for source in (tensor, *draw)]
    numbers = [numpy.tile(numpy.repeat(n, each), pieces) for n in (ordinals, copies)]
    every = [table(each_row) for each_row in numbers]
    return LazyTensor(
        shape,
        tensor.dtype,
        inputs=(rows[0], *every, *rows[1:]),
        kernel=partial(split_rows, symmetry_break=symmetry_break),
    )


@lru_cache(maxsize=32)  # a mixture has thousands of experts that grow alike
def _column_plan(runs: Ranges, padding: int, dtype: torch.dtype, plain: bool) -> dict[str, Any]:
    """What `split_columns` is told of columns that are copied as `runs` say."""
    import torch

    from surgery.kernels.split import Dyadic

    (_, width), *copied = runs
    sources = source_neurons(width, tuple(copied), padding)
    numbers = copy_numbers(width, tuple(copied), padding)
    ordinals, copies = torch.from_numpy(numbers[0]), torch.from_numpy(numbers[1])
    return {
        "sources": torch.from_numpy(sources.clip(min=0)),
        "ordinals": ordinals,
        "copies": copies,
        "dyadic": Dyadic.plan(runs, ordinals, copies, width, dtype) if plain else None,
    }
