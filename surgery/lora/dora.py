"""DoRA: base + update, with the norm of every output's weights set to a magnitude that was
trained. Liu et al., arXiv 2402.09353."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from surgery.dtypes import DType
from surgery.lora.product import wide
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch


def with_magnitudes(
    base: LazyTensor, update: LazyTensor, magnitude: LazyTensor, dtype: DType, *, columns: bool
) -> LazyTensor:
    """magnitude * (base + update) / ||base + update||, with norms of rows, or of `columns` where
    the outputs are those: in a matrix stored (in, out), and, as PEFT has it, in an embedding."""
    from surgery.kernels import low_rank

    compute = wide(base, update)
    if columns:
        kernel = partial(low_rank.with_magnitudes_of_columns, compute=compute, dtype=dtype)
        measure = partial(_column_factors, magnitude=magnitude, compute=compute)
        inputs = (base, update)
        return LazyTensor(base.shape, dtype, inputs=inputs, kernel=kernel, measure=measure)
    kernel = partial(low_rank.with_magnitudes_of_rows, compute=compute, dtype=dtype)
    return LazyTensor(base.shape, dtype, inputs=(base, update, magnitude), kernel=kernel)


def _column_factors(
    inputs: tuple[LazyTensor, ...], *, magnitude: LazyTensor, compute: DType
) -> torch.Tensor:
    """magnitude / norm of every column of base + update."""
    import numpy

    from surgery.kernels.low_rank import stretch
    from surgery.merging.measures import blocks

    squares = numpy.zeros(inputs[0].width)
    for base, update in blocks(inputs):
        moved = update.add_(base.to(compute.torch)).double().numpy()
        squares += numpy.add.reduce(moved * moved, axis=0)
    return stretch(squares, magnitude.read())
