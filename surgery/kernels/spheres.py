"""Merges along spheres: the coefficients of each model, from the Gram matrix of them all.

SLERP, its relatives and Model Stock are linear combinations whose coefficients depend on the
inputs through their inner products alone. So one pass for the Gram matrix G[i, j] = <x_i, x_j>,
in float64, and these few lines, replace arithmetic on unit vectors of the model's size.

A rule returns the coefficients c of sum c_i x_i. Where the sphere gives no answer (zero tensors,
models that are parallel or opposite) it falls back to the straight line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

PARALLEL = 0.9995
"""Cosine beyond which SLERP goes along the straight line."""
TINY = 1e-8


def slerp(gram: numpy.ndarray, *, t: float, parallel: float = PARALLEL) -> list[float]:
    """Spherical interpolation from x_0 (t = 0) to x_1 (t = 1); Shoemake 1985.

    The angle is that between the two directions, and the norms are interpolated along.
    """
    cosine = _cosines(gram)[0, 1]
    if not abs(cosine) < parallel:  # NaN too
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp(gram: numpy.ndarray, *, weights: Sequence[float]) -> list[float]:
    """The direction of the weighted mean of the directions, times the weighted mean of the norms:
    Multi-SLERP (Goddard), whose step in the tangent space at that mean adds up to zero."""
    norms = _norms(gram)
    part = numpy.asarray(weights, dtype=numpy.float64)
    if norms.min() > 0:
        length = math.sqrt(max(0.0, part @ _cosines(gram) @ part))
        if length > TINY:
            found: list[float] = (part / length * float(part @ norms) / norms).tolist()
            return found
    straight: list[float] = part.tolist()
    return straight


def karcher(
    gram: numpy.ndarray, *, weights: Sequence[float], max_iter: int, tol: float
) -> list[float]:
    """The Karcher mean of the directions, times the mean of the norms; arXiv 2603.04972.

    The point of the sphere whose squared angles to the models, weighted, are least: repeated
    averages in the tangent space, until one is shorter than `tol`. Zero tensors don't count.
    """
    norms = _norms(gram)
    there = norms > 0
    length = float(numpy.asarray(weights) @ norms)
    part = numpy.where(there, weights, 0.0)
    if not part.sum() > 0:
        return [0.0] * len(weights)
    part = part / part.sum()
    cosines = numpy.where(numpy.outer(there, there), _cosines(gram), 0.0)
    mean = part.copy()
    spread = math.sqrt(max(0.0, mean @ cosines @ mean))
    mean = mean / spread if spread > tol else numpy.eye(len(part))[int(there.argmax())]
    for _ in range(max_iter):
        dots = numpy.clip(cosines @ mean, -1.0, 1.0)
        angles = numpy.arccos(dots)
        sines = numpy.maximum(numpy.sin(angles), TINY)
        pull = part * numpy.where(angles < TINY, 1.0, angles / sines)
        tangent = pull - float(pull @ dots) * mean
        step = math.sqrt(max(0.0, tangent @ cosines @ tangent))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / math.sqrt(mean @ cosines @ mean)
    found: list[float] = (mean * length / numpy.where(there, norms, 1.0)).tolist()
    return found


def model_stock(gram: numpy.ndarray) -> list[float]:
    """Model Stock, Jang et al., arXiv 2403.19522: base + t * (mean - base), here for task vectors.

    t = k cos / (1 + (k - 1) cos) for k models, with the mean cosine of pairs of task vectors.
    Where no t exists (models pulling apart evenly) the base stays.
    """
    count = len(gram)
    cosines = _cosines(gram)
    pairs = [cosines[i, j] for i in range(count) for j in range(i + 1, count)]
    cosine = float(numpy.nan_to_num(pairs).mean()) if pairs else 1.0
    divisor = 1 + (count - 1) * cosine
    ratio = count * cosine / divisor if abs(divisor) > 1e-6 else 0.0
    return [ratio / count] * count


def _norms(gram: numpy.ndarray) -> numpy.ndarray:
    made: numpy.ndarray = numpy.sqrt(numpy.diagonal(gram))
    return made


def _cosines(gram: numpy.ndarray) -> numpy.ndarray:
    """The cosine of every pair; NaN for a zero tensor."""
    squares = numpy.diagonal(gram)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        made: numpy.ndarray = gram / numpy.sqrt(numpy.outer(squares, squares))
    return made.clip(-1.0, 1.0)
