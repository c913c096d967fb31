"""Merges that decide entry by entry what to take from which model."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.dtypes import DType
from surgery.kernels.merging import Rounding, finish, fuse, updates
from surgery.on_demand import torch


def consensus(
    base: torch.Tensor,
    *models: torch.Tensor,
    weights: Sequence[float],
    mask: float,
    agreement: int,
    rounding: Rounding,
) -> torch.Tensor:
    """Consensus merging, Wang et al., arXiv 2405.07813.

    The TALL mask of a task keeps the entries where |tau_i| >= mask * |tau_sum - tau_i|;
    of tau_sum, the weighted sum, those entries stay that at least `agreement` masks keep.
    """
    start, taus = updates(base, models, rounding.compute)
    total = torch.zeros_like(start)
    for tau, weight in zip(taus, weights, strict=True):
        total.add_(tau if weight == 1 else tau.mul(weight))
    votes = torch.zeros(start.shape, dtype=torch.int32)
    for tau in taus:
        others = total.sub(tau).abs_().mul_(mask)
        votes.add_(tau.abs_() >= others)
    return finish(start, total.masked_fill_(votes < agreement, 0), rounding)


def magmax(base: torch.Tensor, *models: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Of each entry the update of largest magnitude, the first of equals. MagMax, Marczak et al.,
    arXiv 2407.06322."""
    start, (largest, *taus) = updates(base, models, rounding.compute)
    for tau in taus:
        largest = torch.where(tau.abs() > largest.abs(), tau, largest)
    return finish(start, largest, rounding)


def nearswap(
    base: torch.Tensor, model: torch.Tensor, *, t: float, rounding: Rounding
) -> torch.Tensor:
    """base + w * (model - base) with w = min(1, t / |model - base|), so entries nearer than t are
    swapped, and the others move by t. Alchemonaut, QuartetAnemoi-70B-t0.0001."""
    start, (tau,) = updates(base, (model,), rounding.compute)
    return finish(start, tau.clamp_(-t, t), rounding)


def ram(
    base: torch.Tensor,
    *models: torch.Tensor,
    epsilon: float,
    rounding: Rounding,
    measured: Sequence[float] | None = None,
) -> torch.Tensor:
    """Reinforced Agent Merging, arXiv 2601.13572: an entry that one model alone changed (by more
    than epsilon) is taken as it is, one that several did is averaged over those.

    `measured` holds the factor of each model's own entries (RAM+), 1 unless given.
    """
    start, taus = updates(base, models, rounding.compute)
    for tau in taus:
        torch.hardshrink(tau, epsilon, out=tau)
    changed = torch.zeros_like(start)
    for tau in taus:
        changed.add_(tau != 0)
    alone = changed == 1
    if measured is not None:
        for tau, factor in zip(taus, measured, strict=True):
            if factor != 1:
                tau.copy_(torch.where(alone, tau.mul(factor), tau))
    total = taus[0]
    for tau in taus[1:]:
        total.add_(tau)
    return finish(start, total.div_(changed.clamp_(min=1)), rounding)


def changed_alone(
    base: torch.Tensor, *models: torch.Tensor, epsilon: float, compute: DType
) -> list[tuple[int, int]]:
    """For each model: how many entries it changed with others, and how many alone."""
    _, taus = updates(base, models, compute)
    masks = [tau.abs_() > epsilon for tau in taus]
    count = torch.zeros(base.shape, dtype=torch.int32)
    for mask in masks:
        count.add_(mask)
    alone = count == 1
    counts = []
    for mask in masks:
        own = int((mask & alone).sum())
        counts.append((int(mask.sum()) - own, own))
    return counts


def variance(taus: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance of each entry over the models, divided by their number."""
    mean = taus[0].clone()
    for tau in taus[1:]:
        mean.add_(tau)
    mean.div_(len(taus))
    total = torch.zeros_like(mean)
    for tau in taus:
        apart = tau.sub(mean)
        total.add_(apart.mul_(apart))
    return total.div_(len(taus))


def sce(
    base: torch.Tensor,
    *models: torch.Tensor,
    rounding: Rounding,
    measured: tuple[float, Sequence[float]],
) -> torch.Tensor:
    """Select, Calculate, Erase: Wan et al., FuseChat, arXiv 2408.07990.

    Entries whose variance over the models is at least `measured`'s threshold are selected; the
    weight of a model is its share of the squares of what was selected; entries against the sign
    of the sum are erased, and the weights of the others divide the sum.
    """
    threshold, weights = measured
    start, taus = updates(base, models, rounding.compute)
    if threshold > 0:
        unselected = variance(taus) < threshold
        for tau in taus:
            tau.mul_(~unselected)
    total = taus[0].clone()
    for tau in taus[1:]:
        total.add_(tau)
    positive = total >= 0
    for tau in taus:
        tau.masked_fill_((tau > 0) != positive, 0)
    return finish(start, fuse(taus, weights, elect=True, normalize=True), rounding)
