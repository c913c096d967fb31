"""The automatic alpha of LiNeS for a merge: how much smaller than the merged update the sum of
the task vectors is, per model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import fsum
from threading import Lock

from surgery.errors import UnsupportedError
from surgery.merging.measures import ranges, total
from surgery.on_demand import torch
from surgery.parallel import Progress, run_all
from surgery.tensor import LazyTensor

Pair = tuple[LazyTensor, LazyTensor]


def automatic_alpha(
    updates: Mapping[str, Pair], models: int, threads: int | None, progress: Progress | None
) -> float:
    """alpha = ||sum tau_i||_1 / (N ||tau_merged||_1), over all tensors; LiNeS, arXiv 2410.17146.

    `updates` has, by name, the sum of the task vectors and the merged one.
    """
    sums: dict[str, list[list[float]]] = defaultdict(lambda: [[], []])
    lock = Lock()

    def work(job: tuple[str, int, int]) -> None:
        name, start, stop = job
        found = [_norm(tensor, start, stop) for tensor in updates[name]]
        with lock:
            for values, value in zip(sums[name], found, strict=True):
                values.append(value)
        if progress is not None:
            progress((stop - start) * updates[name][1].width * updates[name][1].dtype.bits // 8)

    run_all(_jobs(updates), work, threads)
    whole, merged = (fsum(v for parts in sums.values() for v in parts[at]) for at in (0, 1))
    if not merged > 0:
        raise UnsupportedError(
            "lines=auto divides by the norm of the merged update, and it is "
            f"{merged:g}: the models don't differ from the base, or hold no finite numbers"
        )
    return whole / (models * merged)


def _jobs(updates: Mapping[str, Pair]) -> Iterator[tuple[str, int, int]]:
    for name, pair in updates.items():
        for start, stop in ranges(pair):
            yield name, start, stop


def _norm(tensor: LazyTensor, start: int, stop: int) -> float:
    """||.||_1 of some rows."""
    return total(tensor.read(start, stop).to(torch.float64).abs_().numpy())
