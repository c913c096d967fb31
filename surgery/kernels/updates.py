"""What fine-tuning did, scaled: theta = theta_base + scale * (theta_tuned - theta_base)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from surgery.dtypes import DType
from surgery.kernels import compiled
from surgery.on_demand import torch


def scale_update(
    base: torch.Tensor,
    tuned: torch.Tensor,
    *,
    scale: float,
    compute: DType,
    dtype: DType,
) -> torch.Tensor:
    """base + scale * tau with tau = tuned - base, in `compute`, rounded once to `dtype`.

    Scale 1 gives the tuned weights and scale 0 the base's, bit for bit; computed, the round trip
    over tau could miss them. Ilharco et al. (arXiv 2212.04089); the scale is LiNeS's lambda(l)
    (Wang et al., arXiv 2410.17146, eq. 3).
    """
    if scale == 1:
        return tuned.to(dtype.torch)
    start = base.to(compute.torch)
    if scale == 0:
        return start.to(dtype.torch)
    update = tuned.to(compute.torch).sub_(start) if tuned.dtype != compute.torch else tuned - start
    return update.mul_(scale).add_(start).to(dtype.torch)


def total_update(*updates: torch.Tensor, scales: Sequence[float], compute: DType) -> torch.Tensor:
    """The sum of scale_i * tau_i, in `compute`. The updates are overwritten."""
    total: torch.Tensor | None = None
    for update, scale in zip(updates, scales, strict=True):
        wide = update.to(compute.torch)
        weighted = wide if scale == 1 else wide.mul_(scale)
        total = weighted if total is None else total.add_(weighted)
    assert total is not None
    return total


def apply_updates(
    base: torch.Tensor,
    *updates: torch.Tensor,
    scales: Sequence[float],
    compute: DType,
    dtype: DType,
) -> torch.Tensor:
    """base + the sum of scale_i * tau_i in `compute`, rounded once to `dtype`; arXiv 2212.04089."""
    return (
        total_update(*updates, scales=scales, compute=compute)
        .add_(base.to(compute.torch))
        .to(dtype.torch)
    )


def scale_and_square(
    base: torch.Tensor,
    tuned: torch.Tensor,
    *,
    scale: float,
    compute: DType,
    dtype: DType,
) -> tuple[torch.Tensor, float]:
    """What `scale_update` makes of these rows, and ||tuned - base||^2."""
    start = base.to(compute.torch)
    update = tuned.to(compute.torch).sub_(start) if tuned.dtype != compute.torch else tuned - start
    square = _square(update.reshape(-1))
    if scale == 1:
        return tuned.to(dtype.torch), square
    if scale == 0:
        return start.to(dtype.torch), square
    return update.mul_(scale).add_(start).to(dtype.torch), square


def scale_and_square_bytes(
    base: numpy.ndarray, tuned: numpy.ndarray, *, scale: float
) -> tuple[numpy.ndarray, float] | None:
    """`scale_and_square` of bytes of bfloat16; None where not all that is computed is finite."""
    square = float(numpy.add.reduce(compiled.products(tuned, tuned, base)))
    if scale in (0, 1):
        return (tuned if scale else base), square
    made = compiled.combine(base, [tuned], 0.0, [scale], 1.0)
    return (made, square) if compiled.finite(made) else None


def _square(update: torch.Tensor) -> float:
    square = float(torch.dot(update, update))
    if math.isfinite(square) or update.dtype == torch.float64:
        return square
    return _square(update.to(torch.float64))  # too large for float32
