"""Merges of whole matrices through their singular vectors. They take the task vectors of one
weight matrix each, of shape (out, in), all in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from surgery.kernels.merging import Rounding, finish, fuse, keep_between, updates
from surgery.kernels.selection import order_statistics
from surgery.on_demand import torch

Merge = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def merge_matrices(
    base: torch.Tensor, *models: torch.Tensor, merge: Merge, rounding: Rounding
) -> torch.Tensor:
    """base + scale * merge(task vectors). On one thread: on several, a product of matrices adds
    up in another order."""
    start, taus = updates(base, models, rounding.compute)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return finish(start, merge(taus), rounding)
    finally:
        torch.set_num_threads(threads)


def tsv_m(taus: Sequence[torch.Tensor]) -> torch.Tensor:
    """TSV-Merge, Gargiulo et al., arXiv 2412.00081.

    Of each task vector the first 1/T of its singular vectors; those of all tasks side by side
    are made orthonormal, left and right, which takes out what tasks would do to each other.
    """
    rank = max(1, min(taus[0].shape) // len(taus))
    lefts, values, rights = [], [], []
    for tau in taus:
        left, value, right = _svd(tau)
        lefts.append(left[:, :rank])
        values.append(value[:rank])
        rights.append(right[:rank])
    left, right = orthonormal(torch.cat(lefts, 1)), orthonormal(torch.cat(rights, 0))
    return (left * torch.cat(values)) @ right


def iso_c(taus: Sequence[torch.Tensor]) -> torch.Tensor:
    """Isotropic merging in the common subspace, Marczak et al., arXiv 2502.04959:
    the sum of the task vectors, with every singular value replaced by their mean."""
    left, values, right = _svd(_sum(taus))
    return left @ right.mul_(_flat(values)[:, None])


def iso_cts(taus: Sequence[torch.Tensor], *, common: float) -> torch.Tensor:
    """Isotropic merging in common and task-specific subspaces, arXiv 2502.04959.

    The first singular directions of the sum (`common` of them, at least), completed by as many
    of what each task vector has outside them; made orthonormal, and all of one singular value.
    """
    full = min(taus[0].shape)
    each = min(round((full - int(full * common)) / len(taus)), full // len(taus))
    shared = full - each * len(taus)
    left, values, right = _svd(_sum(taus))
    left, right = left[:, :shared], right[:shared]
    lefts, rights, sizes = [left], [right], [values[:shared]]
    for tau in taus:
        own = _svd(tau - left @ (left.mT @ tau), of=torch.linalg.matrix_norm(tau))
        lefts.append(own[0][:, :each])
        sizes.append(own[1][:each])
        rights.append(own[2][:each])
    size = _flat(torch.cat(sizes))
    made = orthonormal(torch.cat(lefts, 1) * (size > 0))
    return made @ (orthonormal(torch.cat(rights, 0) * (size > 0)[:, None]) * size[:, None])


def wudi(taus: Sequence[torch.Tensor]) -> torch.Tensor:
    """WUDI-Merging, Cheng et al., arXiv 2503.08099: the tau that minimises the sum over tasks of
    ||(tau - tau_i) tau_i^T||^2 / ||tau_i||^2.

    The paper descends the gradient from the sum of the task vectors; the minimum that it
    approaches has a closed form, tau = (sum w_i tau_i G_i) (sum w_i G_i)^+ with G_i = tau_i^T
    tau_i and w_i = 1 / ||tau_i||^2. In float64, since the products square the condition.
    """
    width = taus[0].shape[1]
    grams = torch.zeros(width, width, dtype=torch.float64)
    target = torch.zeros(taus[0].shape, dtype=torch.float64)
    for tau in taus:
        wide = tau.double()
        norm = torch.linalg.matrix_norm(wide)
        if norm == 0:
            continue
        wide = wide / norm
        gram = wide.mT @ wide
        grams += gram
        target += (wide @ gram).mul_(norm)
    values, vectors = torch.linalg.eigh(grams)
    there = values > values.max().clamp(min=0) * width * torch.finfo(torch.float64).eps
    inverse = torch.where(there, values, 1).reciprocal_().mul_(there)
    made: torch.Tensor = (target @ vectors) * inverse @ vectors.mT
    return made.to(taus[0].dtype)


def knots_ties(
    taus: Sequence[torch.Tensor], *, weights: Sequence[float], densities: Sequence[float]
) -> torch.Tensor:
    """KnOTS-TIES, Stoica et al., arXiv 2410.19735.

    The task vectors side by side have left singular vectors U in common; what each of them is in
    that basis, S V_i^T, is trimmed and merged by elected signs (TIES), and brought back by U.
    """
    left, values, right = _svd(torch.cat(list(taus), 1))
    aligned, width = values[:, None] * right, taus[0].shape[1]
    parts = [aligned[:, at * width : (at + 1) * width].clone() for at in range(len(taus))]
    for part, density in zip(parts, densities, strict=True):
        kept = max(1, int(density * part.numel()))
        if kept < part.numel():
            low = order_statistics(part.abs().numpy(), [part.numel() - kept])[0]
            keep_between(part, low, float("inf"))
    return left @ fuse(parts, weights, elect=True, normalize=True)


def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns (or rows): U V^T of its singular value
    decomposition, without the directions that it lacks."""
    left, values, right = _svd(matrix)
    return left @ right.mul_((values > 0)[:, None])


def _svd(
    matrix: torch.Tensor, of: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, the singular values, V^T. Values within rounding of 0 are 0, since their vectors are
    noise; `of` is the size of what the rounding was done on, if not of the matrix itself."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    size = values.max() if of is None else of
    noise = size * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return left, values.masked_fill(values <= noise, 0), right


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Their mean in the place of each, but for those that are 0."""
    return values.mean() * (values > 0)


def _sum(taus: Sequence[torch.Tensor]) -> torch.Tensor:
    total = taus[0].clone()
    for tau in taus[1:]:
        total.add_(tau)
    return total
