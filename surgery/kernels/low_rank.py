"""Updates of low rank: multiplied out, found in a matrix, and DoRA's magnitudes."""

from __future__ import annotations

import numpy

from surgery.dtypes import DType
from surgery.on_demand import torch


def product(
    left: torch.Tensor, right: torch.Tensor, *, scale: float, compute: DType
) -> torch.Tensor:
    """scale * left @ right in `compute`; left is (rows, r) and right is (r, columns).

    Rank by rank, each one multiplication and one addition: a matrix product adds up in an order
    that goes by its shape and the machine, so that a row would depend on the rows beside it.
    """
    left, right = left.to(compute.torch), right.to(compute.torch)
    total = left[:, :1] * right[0]
    term = torch.empty_like(total)
    for rank in range(1, len(right)):
        total.add_(torch.mul(left[:, rank : rank + 1], right[rank], out=term))
    return total if scale == 1 else total.mul_(scale)


def with_magnitudes_of_rows(
    base: torch.Tensor,
    update: torch.Tensor,
    magnitudes: torch.Tensor,
    *,
    compute: DType,
    dtype: DType,
) -> torch.Tensor:
    """DoRA: the rows of base + update, each made as long as its magnitude; arXiv 2402.09353."""
    moved = update.to(compute.torch).add_(base.to(compute.torch))
    wide = moved.to(torch.float64).numpy()
    factors = stretch(numpy.add.reduce(wide * wide, axis=1), magnitudes)
    return moved.mul_(factors.to(compute.torch)[:, None]).to(dtype.torch)


def with_magnitudes_of_columns(
    base: torch.Tensor,
    update: torch.Tensor,
    *,
    measured: torch.Tensor,
    compute: DType,
    dtype: DType,
) -> torch.Tensor:
    """DoRA on a matrix that is stored (in, out): `measured` has a factor for each column."""
    moved = update.to(compute.torch).add_(base.to(compute.torch))
    return moved.mul_(measured.to(compute.torch)).to(dtype.torch)


def stretch(squares: numpy.ndarray, magnitudes: torch.Tensor) -> torch.Tensor:
    """magnitude / norm, in float64, of norms given as squares. What is zero has no direction, and
    stays zero."""
    norms = torch.from_numpy(squares).sqrt()
    return torch.where(norms > 0, magnitudes.to(torch.float64) / norms, 0.0)


OVERSAMPLING, POWER_ITERATIONS = 10, 4


def leading_directions(
    matrix: torch.Tensor, sketch: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, singular values and V^T of a matrix (out, in): all of them, or, with a random `sketch`
    (in, k), the first k or so.

    The randomised range finder with power iterations, Halko, Martinsson and Tropp, arXiv
    0909.4061, algorithm 4.4. Its error is far below that of the truncation where singular values
    fall off at all.
    """
    if sketch is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ left, values, right


def balanced(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with B A = U S V^T, each with half of the singular values."""
    half = values.sqrt()
    return half[:, None] * right, left * half
