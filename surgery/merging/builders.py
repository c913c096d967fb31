"""One tensor of a merge: for each method, the lazy tensor that it makes of the models' tensors.

A builder chooses a kernel, its inputs, and what has to be measured first. Arithmetic is in
`surgery/kernels/`, what a method is and takes in `methods.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from surgery.dtypes import DType
from surgery.merging.finite import unchecked
from surgery.merging.job import Job
from surgery.tensor import LazyTensor
from surgery.values import noise

if TYPE_CHECKING:
    import numpy
    import torch

    from surgery.kernels.merging import Combination


def _combined(job: Job, combination: Combination) -> LazyTensor:
    from surgery.kernels.merging import combine, combine_bytes

    kernel = partial(combine, combination=combination)
    direct = partial(combine_bytes, combination=combination)
    return job.tensor(kernel, spreads=True, direct=direct)


def _on_sphere(
    job: Job, rule: Callable[[numpy.ndarray], list[float]], *, from_base: bool
) -> LazyTensor:
    from surgery.kernels.merging import combine, combine_bytes
    from surgery.merging.measures import combination

    measure = partial(combination, rule=rule, from_base=from_base)
    return job.tensor(combine, measure=measure, measures_all=True, direct=combine_bytes)


def _shares(weights: tuple[float, ...], *, normalize: bool) -> tuple[float, ...]:
    """The weights, made to add up to 1 if they are to and can."""
    whole = sum(weights)
    if not normalize or abs(whole) < 1e-8:
        return weights
    return tuple(weight / whole for weight in weights)


def linear(job: Job) -> LazyTensor:
    """A weighted average."""
    from surgery.kernels.merging import Combination

    weights = job.parameters["weight"]
    normalize = job.parameters["normalize"]
    shares = _shares(weights, normalize=normalize)
    return _combined(job, Combination(1.0 if normalize else sum(shares), shares[1:]))


def passthrough(job: Job) -> LazyTensor:
    """One model, scaled."""
    from surgery.kernels.merging import scaled

    factor = job.parameters["scale"]
    if factor == 1 and job.models[0].dtype == job.dtype:
        return unchecked(job.models[0])
    return job.tensor(partial(scaled, factor=factor), job.models, spreads=True)


def slerp(job: Job) -> LazyTensor:
    """From the base to the model on a sphere."""
    from surgery.kernels import spheres

    return _on_sphere(job, partial(spheres.slerp, t=job.parameters["t"]), from_base=False)


def nuslerp(job: Job) -> LazyTensor:
    """Between two models, or their updates, on a sphere."""
    from surgery.kernels import spheres

    first, second = job.parameters["weight"]
    whole = first + second
    t = 0.5 if abs(whole) < 1e-6 else second / whole
    rule = partial(spheres.slerp, t=t, parallel=1 - 1e-12)
    return _on_sphere(job, rule, from_base=job.base is not None)


def multislerp(job: Job) -> LazyTensor:
    """The weighted mean direction of several models, or updates."""
    from surgery.kernels import spheres

    weights = _shares(job.parameters["weight"], normalize=job.parameters["normalize_weights"])
    rule = partial(spheres.multislerp, weights=weights)
    return _on_sphere(job, rule, from_base=job.base is not None)


def karcher(job: Job) -> LazyTensor:
    """The Karcher mean of several models."""
    from surgery.kernels import spheres

    rule = partial(
        spheres.karcher,
        weights=_shares(job.parameters["weight"], normalize=True),
        max_iter=job.parameters["max_iter"],
        tol=job.parameters["tol"],
    )
    return _on_sphere(job, rule, from_base=False)


def model_stock(job: Job) -> LazyTensor:
    """The average, pulled to the base."""
    from surgery.kernels import spheres

    return _on_sphere(job, spheres.model_stock, from_base=True)


def task_arithmetic(job: Job) -> LazyTensor:
    """A weighted sum of task vectors."""
    from surgery.kernels.merging import Combination

    shares = _shares(job.parameters["weight"], normalize=job.parameters["normalize"])
    return _combined(job, Combination(1.0, shares))


def wise_ft(job: Job) -> LazyTensor:
    """Part of a task vector."""
    from surgery.kernels.merging import Combination

    return _combined(job, Combination(1.0, (job.parameters["alpha"],)))


def expo(job: Job) -> LazyTensor:
    """More than a task vector."""
    from surgery.kernels.merging import Combination

    return _combined(job, Combination(1.0, (1 + job.parameters["alpha"],)))


def average(job: Job) -> LazyTensor:
    """The base and the mean of the task vectors: what methods for matrices do with the rest."""
    from surgery.kernels.merging import Combination

    return _combined(job, Combination(1.0, (1 / len(job.models),) * len(job.models)))


def ties(job: Job) -> LazyTensor:
    """Trim what is small, elect signs, average."""
    return _trimmed(job, _largest(job.numel, job.parameters["density"]), elect=True)


def breadcrumbs(job: Job, *, elect: bool) -> LazyTensor:
    """Trim both ends, and add up; with `elect`, by elected signs."""
    kept = _middle(job.numel, job.parameters["density"], job.parameters["gamma"])
    return _trimmed(job, kept, elect=elect)


Ranks = tuple[tuple[int, int] | None, ...]
"""For each model the first rank of magnitude that is kept, counted from the smallest, and the one
after the last; None where all are."""


@lru_cache(maxsize=1 << 12)  # many tensors have the same size
def _largest(count: int, densities: tuple[float, ...]) -> Ranks:
    return tuple(
        None if density >= 1 else (count - max(1, int(density * count)), count)
        for density in densities
    )


@lru_cache(maxsize=1 << 12)
def _middle(count: int, densities: tuple[float, ...], gammas: tuple[float, ...]) -> Ranks:
    kept: list[tuple[int, int] | None] = []
    for density, gamma in zip(densities, gammas, strict=True):
        size = int(density * count)
        first = max(0, count - size - int(gamma * count))
        kept.append(None if density >= 1 else (first, first + size))
    return tuple(kept)


def _trimmed(job: Job, kept: Ranks, *, elect: bool) -> LazyTensor:
    kernel, direct = _trimming(job.parameters["weight"], elect, job.parameters["normalize"])
    if all(ranks is None for ranks in kept):
        return job.tensor(partial(kernel, measured=kept), direct=partial(direct, measured=kept))
    return job.tensor(
        kernel,
        direct=direct,
        measure=_bounds(kept, job.compute),
        measures_all=all(ranks is not None and 0 < ranks[0] < ranks[1] for ranks in kept),
    )


@lru_cache(maxsize=1 << 12)
def _trimming(
    weights: tuple[float, ...], elect: bool, normalize: bool
) -> tuple[Callable[..., torch.Tensor], Callable[..., numpy.ndarray]]:
    from surgery.kernels.merging import trim, trim_bytes

    how: dict[str, Any] = {"weights": weights, "elect": elect, "normalize": normalize}
    return partial(trim, **how), partial(trim_bytes, **how)


@lru_cache(maxsize=1 << 12)
def _bounds(kept: Ranks, compute: DType) -> Callable[..., list[tuple[float, float] | None]]:
    from surgery.merging.measures import magnitude_bounds

    return partial(magnitude_bounds, kept=kept, compute=compute)


def dropped(job: Job, *, elect: bool, by_rank: bool) -> LazyTensor:
    """DARE and, `by_rank`, DELLA. A vector is one row to rank, and so is taken whole."""
    from surgery.kernels.merging import drop, drop_bytes

    shape = job.models[0].shape
    noises = [noise(shape, job.seed, f"{at}:{job.name}") for at in range(len(job.models))]
    how: dict[str, Any] = {
        "weights": job.parameters["weight"],
        "densities": job.parameters["density"],
        "spreads": job.parameters["epsilon"] if by_rank else None,
        "rescale": job.parameters["rescale"],
        "elect": elect,
        "normalize": job.parameters["normalize"],
    }
    return job.tensor(
        partial(drop, **how),
        (*job.inputs, *noises),
        rowwise=not by_rank or len(shape) > 1,
        direct=partial(drop_bytes, width=shape[-1] if shape else 1, **how),
    )


def consensus(job: Job) -> LazyTensor:
    """Keep what several tasks need."""
    from surgery.kernels import elementwise

    kernel = partial(
        elementwise.consensus,
        weights=job.parameters["weight"],
        mask=job.parameters["mask"],
        agreement=job.parameters["agreement"],
    )
    return job.tensor(kernel)


def magmax(job: Job) -> LazyTensor:
    """The largest update of every entry."""
    from surgery.kernels import elementwise

    return job.tensor(elementwise.magmax)


def nearswap(job: Job) -> LazyTensor:
    """Near values are swapped."""
    from surgery.kernels import elementwise

    return job.tensor(partial(elementwise.nearswap, t=job.parameters["t"]))


def sce(job: Job) -> LazyTensor:
    """Select, calculate, erase."""
    from surgery.kernels import elementwise
    from surgery.merging.measures import selected_shares

    topk = job.parameters["select_topk"]
    return job.tensor(
        elementwise.sce, measure=partial(selected_shares, topk=topk, compute=job.compute)
    )


def ram(job: Job, *, local: bool) -> LazyTensor:
    """Reinforced Agent Merging; `local` makes it RAM+ with factors for each tensor."""
    from surgery.kernels import elementwise
    from surgery.merging.measures import own_factors

    given = job.parameters
    kernel = partial(elementwise.ram, epsilon=given["epsilon"])
    if not local:
        return job.tensor(kernel)
    measure = partial(
        own_factors,
        r=given["r"],
        alpha=given["alpha"],
        epsilon=given["epsilon"],
        compute=job.compute,
    )
    return job.tensor(kernel, measure=measure)


def arcee_fusion(job: Job) -> LazyTensor:
    """The updates that stand out."""
    from surgery.kernels import fusion
    from surgery.merging.measures import importance_bound

    if not job.numel:
        return average(job)
    if len(job.models[0].shape) < 2:
        return job.tensor(fusion.fuse_vector, rowwise=False)
    return job.tensor(fusion.fuse_rows, measure=partial(importance_bound, compute=job.compute))


def spectral(job: Job, *, method: str) -> LazyTensor:
    """A method for matrices, by the name of its kernel, which takes parameters of its own."""
    from surgery.kernels import spectral

    if not job.matrix or not job.numel:
        return average(job)
    merge = getattr(spectral, method)
    if method == "iso_cts":
        merge = partial(merge, common=job.parameters["common"])
    if method == "knots_ties":
        merge = partial(
            merge, weights=job.parameters["weight"], densities=job.parameters["density"]
        )
    return job.tensor(partial(spectral.merge_matrices, merge=merge), rowwise=False)
