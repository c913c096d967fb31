"""What most merges come down to: linear combinations, and task vectors fused into one update.

Every kernel here is given the base (or the first model) and the models, and makes
base + scale * tau_merged, rounded once to `dtype`; with `bare` it makes tau_merged alone, in
`compute`, for what has to be known of the update before it is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from surgery.dtypes import DTYPES, DType
from surgery.kernels import compiled
from surgery.on_demand import torch


@dataclass(frozen=True)
class Rounding:
    """How a merge ends: what it computes in, what it rounds to, the factor on the merged update,
    and whether the update is wanted alone."""

    compute: DType
    dtype: DType
    scale: float = 1.0
    bare: bool = False

    @property
    def plain(self) -> bool:
        """From float32 to bfloat16, as almost every merge ends."""
        ends = self.compute is DTYPES["F32"] and self.dtype is DTYPES["BF16"]
        return ends and not self.bare


@dataclass(frozen=True)
class Combination:
    """`start` * x_0 + the sum of `steps`[i] * (x_i - x_0).

    In differences, so that models that agree give what they agree on, bit for bit.
    """

    start: float
    steps: tuple[float, ...]


def updates(
    base: torch.Tensor, models: Sequence[torch.Tensor], compute: DType
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base in `compute`, and tau_i = theta_i - theta_base of every model, fresh."""
    start = base.to(compute.torch)
    return start, [
        model - start if model.dtype == compute.torch else model.to(compute.torch).sub_(start)
        for model in models
    ]


def finish(base: torch.Tensor, update: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """base + scale * update, rounded once. `update` is overwritten."""
    if rounding.bare:
        return update
    if rounding.scale != 1:
        update.mul_(rounding.scale)
    return update.add_(base).to(rounding.dtype.torch)


def combine(
    first: torch.Tensor,
    *others: torch.Tensor,
    rounding: Rounding,
    combination: Combination | None = None,
    measured: Combination | None = None,
) -> torch.Tensor:
    """A linear combination of the inputs, all of one shape.

    Averages (model soups, arXiv 2203.05482), task arithmetic (arXiv 2212.04089; the first input
    is the base), WiSE-FT (arXiv 2109.01903), ExPO (arXiv 2404.16792), and whatever has its
    coefficients from a Gram matrix (kernels/spheres.py).
    """
    chosen = combination or measured
    assert chosen is not None
    start, taus = updates(first, others, rounding.compute)
    total: torch.Tensor | None = None
    if chosen.start != 1:
        total = start.mul(chosen.start - 1)
    for tau, step in zip(taus, chosen.steps, strict=True):
        weighted = tau if step == 1 else tau.mul_(step)
        total = weighted if total is None else total.add_(weighted)
    return finish(start, torch.zeros_like(start) if total is None else total, rounding)


def combine_bytes(
    first: numpy.ndarray,
    *others: numpy.ndarray,
    scale: float,
    combination: Combination | None = None,
    measured: Combination | None = None,
) -> numpy.ndarray | None:
    """`combine` of bytes of bfloat16; None where not all that comes out is finite."""
    chosen = combination or measured
    assert chosen is not None
    made = compiled.combine(first, others, chosen.start - 1, chosen.steps, scale)
    return made if compiled.finite(made) else None


def scaled(tensor: torch.Tensor, *, factor: float, rounding: Rounding) -> torch.Tensor:
    """factor * tensor."""
    return tensor.to(rounding.compute.torch).mul(factor).to(rounding.dtype.torch)


def difference(
    base: torch.Tensor, other: torch.Tensor, *, compute: DType, dtype: DType
) -> torch.Tensor:
    """other - base, the update from one to the other."""
    return (other.to(compute.torch) - base.to(compute.torch)).to(dtype.torch)


def fuse(
    taus: Sequence[torch.Tensor], weights: Sequence[float], *, elect: bool, normalize: bool
) -> torch.Tensor:
    """Weighted task vectors, overwritten, as one.

    With `elect` only the entries count whose sign is that of the weighted sum (zero sums count
    as positive), and `normalize` divides by the weights that counted: with weights of 1 that is
    the disjoint mean of TIES (arXiv 2306.01708). Without `elect` it is a plain sum,
    divided by the sum of all weights.
    """
    weights = _effective(weights, elect, normalize)
    for tau, weight in zip(taus, weights, strict=True):
        if weight != 1:
            tau.mul_(weight)
    if not elect:
        total = taus[0]
        for tau in taus[1:]:
            total.add_(tau)
        return total.div_(_divisor(weights)) if normalize else total
    total = taus[0].add(taus[1]) if len(taus) > 1 else taus[0]
    for tau in taus[2:]:
        total.add_(tau)
    sign = torch.copysign(torch.ones((), dtype=total.dtype), total)
    merged = counted = None
    for tau, weight in zip(taus, weights, strict=True):
        agreeing = tau.mul_(sign).clamp_(min=0)  # an entry against the sign becomes 0
        if normalize:
            share = agreeing.sign()
            share = share if weight == 1 else share.mul_(weight)
            counted = share if counted is None else counted.add_(share)
        merged = agreeing if merged is None else merged.add_(agreeing)
    assert merged is not None
    if counted is not None:
        least = _least(weights)  # a clamp takes a small part of the time of a comparison
        merged.div_(counted.clamp_(min=least) if least else counted.masked_fill_(counted == 0, 1))
    return merged.mul_(sign)


def _effective(weights: Sequence[float], elect: bool, normalize: bool) -> Sequence[float]:
    """The weights, or ones where a division takes out what they have in common."""
    if elect and normalize and weights[0] > 0 and len(set(weights)) == 1:
        return (1.0,) * len(weights)
    return weights


def _divisor(weights: Sequence[float]) -> float:
    """What makes a sum an average, where anything does."""
    whole = sum(weights)
    return whole if abs(whole) > 1e-8 else 1.0


def _least(weights: Sequence[float]) -> float:
    """The least that a sum of some of the weights can be, but for the sum of none; 0 where sums of
    some may be 0."""
    return min((w for w in weights if w > 0), default=0.0) if min(weights) >= 0 else 0.0


def trim(
    base: torch.Tensor,
    *models: torch.Tensor,
    weights: Sequence[float],
    elect: bool,
    normalize: bool,
    rounding: Rounding,
    measured: Sequence[tuple[float, float] | None],
) -> torch.Tensor:
    """Keep the entries of each task vector whose magnitude is within `measured`'s bounds, both
    included, and fuse.

    TIES trims what is small (arXiv 2306.01708), Model Breadcrumbs both ends (arXiv 2312.06795).
    """
    start, taus = updates(base, models, rounding.compute)
    for tau, bounds in zip(taus, measured, strict=True):
        if bounds is not None:
            keep_between(tau, *bounds)
    return finish(start, fuse(taus, weights, elect=elect, normalize=normalize), rounding)


def trim_bytes(
    base: numpy.ndarray,
    *models: numpy.ndarray,
    weights: Sequence[float],
    elect: bool,
    normalize: bool,
    scale: float,
    measured: Sequence[tuple[float, float] | None],
) -> numpy.ndarray:
    """`trim` of bytes of bfloat16."""
    bounds = [(0.0, float("inf")) if pair is None else pair for pair in measured]
    weights, fusing = _fusing(weights, elect=elect, normalize=normalize, scale=scale)
    return compiled.trim(base, models, bounds, weights, fusing)


def _fusing(
    weights: Sequence[float], *, elect: bool, normalize: bool, scale: float
) -> tuple[Sequence[float], compiled.Fusing]:
    """What `fuse` and `finish` do, as compiled kernels are told."""
    weights = _effective(weights, elect, normalize)
    divisor = _divisor(weights) if normalize else 1.0
    return weights, compiled.Fusing(elect, normalize, divisor, _least(weights), scale)


def keep_between(tau: torch.Tensor, low: float, high: float) -> None:
    """Zero what is smaller or larger in magnitude. `hardshrink` keeps what is larger than its
    bound, at a tenth of the time of a mask."""
    if low > 0:
        below = torch.nextafter(
            torch.tensor(low, dtype=tau.dtype), torch.zeros((), dtype=tau.dtype)
        )
        torch.hardshrink(tau, float(below), out=tau)
    if high < float("inf"):
        tau.sub_(torch.hardshrink(tau, high))


def keep_where(tau: torch.Tensor, positive: torch.Tensor) -> None:
    """Zero the entries of tau where `positive`, which is overwritten, isn't. A product, because a
    mask of which nobody can guess the next entry takes a hundred times as long."""
    tau.mul_(positive.sign_().clamp_(min=0))


def drop(
    base: torch.Tensor,
    *rest: torch.Tensor,
    weights: Sequence[float],
    densities: Sequence[float],
    spreads: Sequence[float] | None,
    rescale: bool,
    elect: bool,
    normalize: bool,
    rounding: Rounding,
) -> torch.Tensor:
    """Drop entries of each task vector at random, and fuse. `rest` is the models, then noise for
    each, uniform in [-1, 1).

    DARE (arXiv 2311.03099): every entry is kept with probability `density` and then divided by
    it. DELLA (arXiv 2406.11617): the probability goes from density - spread for the smallest
    magnitude of a row to density + spread for its largest, by rank, and each entry is divided by
    its own.
    """
    count = len(weights)
    start, taus = updates(base, rest[:count], rounding.compute)
    for at, (tau, noise) in enumerate(zip(taus, rest[count:], strict=True)):
        density = densities[at]
        if density >= 1:
            continue
        uniform = noise.add_(1).mul_(0.5).to(rounding.compute.torch)  # exact: 24 bits
        if spreads is None:
            keep_where(tau, density - uniform)
            if rescale:
                tau.div_(density)
        else:
            kept = by_rank(tau, density, spreads[at])
            keep_where(tau, kept - uniform)
            if rescale:
                tau.div_(kept)
    return finish(start, fuse(taus, weights, elect=elect, normalize=normalize), rounding)


def drop_bytes(
    base: numpy.ndarray,
    *rest: numpy.ndarray,
    width: int,
    weights: Sequence[float],
    densities: Sequence[float],
    spreads: Sequence[float] | None,
    rescale: bool,
    elect: bool,
    normalize: bool,
    scale: float,
) -> numpy.ndarray:
    """`drop` of bytes of bfloat16, and noise in float32, in rows of `width`."""
    count = len(densities)
    noises = [
        noise if density < 1 else None
        for noise, density in zip(rest[count:], densities, strict=True)
    ]
    if spreads is None or width == 1:
        odds = [compiled.Odds(density, None) for density in densities]
    else:
        odds = [
            compiled.Odds(density - spread, 2 * spread / (width - 1))
            for density, spread in zip(densities, spreads, strict=True)
        ]
    weights, fusing = _fusing(weights, elect=elect, normalize=normalize, scale=scale)
    return compiled.drop(
        base, rest[:count], noises, odds, weights, fusing, width=width, rescale=rescale
    )


def by_rank(tau: torch.Tensor, density: float, spread: float) -> torch.Tensor:
    """The probability to keep each entry, by the rank of its magnitude in its row; those of one
    magnitude are ranked as they stand. A row is the last axis, or all of a vector."""
    width = tau.shape[-1] if tau.dim() else 1
    if width == 1:
        return torch.full_like(tau, density)
    ranks = _ranks(tau.abs())
    return ranks.mul_(2 * spread / (width - 1)).add_(density - spread)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """The rank of each nonnegative value in its row, those of one value as they stand.

    The bits of such floats are in the order of the floats. Float32 is ordered by their lower
    half and then by their upper half: numpy orders 16 bits by counting, several times as fast as
    either library finds the order of floats.
    """
    if values.dtype == torch.float32:
        halves = values.numpy().view(numpy.uint16).reshape(*values.shape, 2)  # little-endian
        order = _order(halves[..., 0])
        upper = torch.from_numpy(halves[..., 1].view(numpy.int16)).gather(-1, order)
        order = order.gather(-1, _order(upper.numpy()))
    else:
        order = values.argsort(dim=-1, stable=True)
    ranks = torch.arange(values.shape[-1], dtype=values.dtype)
    return torch.empty_like(values).scatter_(-1, order, ranks.expand_as(values))


def _order(keys: numpy.ndarray) -> torch.Tensor:
    """The places of the keys of each row in ascending order, those of one key as they stand."""
    return torch.from_numpy(keys.argsort(axis=-1, kind="stable"))
