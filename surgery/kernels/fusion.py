"""Arcee Fusion: take over only the changes that stand out."""

from __future__ import annotations

import numpy

from surgery.dtypes import DType
from surgery.kernels.merging import Rounding, finish, updates
from surgery.kernels.selection import order_statistics
from surgery.on_demand import torch

SMALL = 1e-8


def importance(base: torch.Tensor, model: torch.Tensor, compute: DType) -> torch.Tensor:
    """|model - base| times the Kullback-Leibler divergence of the softmax of the model's row
    from that of the base's. In float64 inside: the divergence of two like rows is far smaller
    than the rounding of its float32 terms."""
    _, (tau,) = updates(base, (model,), compute)
    one, other = _softmax(model), _softmax(base)
    divergence = numpy.add.reduce(one * numpy.log(one / other), axis=-1, keepdims=True)
    factor = torch.from_numpy(numpy.maximum(divergence, 0.0)).to(compute.torch)
    return tau.abs_().mul_(factor)


def _softmax(rows: torch.Tensor) -> numpy.ndarray:
    values = rows.to(torch.float64).numpy()
    powers = numpy.exp(values - values.max(axis=-1, keepdims=True))
    made: numpy.ndarray = powers / numpy.add.reduce(powers, axis=-1, keepdims=True) + SMALL
    return made


def quartile_ranks(count: int) -> list[int]:
    """Where the quartiles of `count` numbers lie."""
    return [int(part * (count - 1)) for part in (0.25, 0.5, 0.75)]


def outlier_bound(quartiles: list[float]) -> float:
    """The median and one and a half times the interquartile range."""
    low, median, high = quartiles
    return median + 1.5 * (high - low)


def fuse_rows(
    base: torch.Tensor, model: torch.Tensor, *, rounding: Rounding, measured: float
) -> torch.Tensor:
    """The updates whose importance is at least `measured`; method without a paper, by Arcee AI."""
    start, (tau,) = updates(base, (model,), rounding.compute)
    tau.masked_fill_(importance(base, model, rounding.compute) < measured, 0)
    return finish(start, tau, rounding)


def fuse_vector(base: torch.Tensor, model: torch.Tensor, *, rounding: Rounding) -> torch.Tensor:
    """The same for a vector or scalar, which is one row."""
    flat = [tensor.reshape(-1) for tensor in (base, model)]
    scores = importance(flat[0], flat[1], rounding.compute)
    bound = outlier_bound(order_statistics(scores.numpy(), quartile_ranks(len(scores))))
    return fuse_rows(flat[0], flat[1], rounding=rounding, measured=bound).reshape(base.shape)
