"""What training changed: two checkpoints compared tensor by tensor, in one pass over both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from surgery.anatomy.scopes import names_in_scope
from surgery.checkpoint import Checkpoint
from surgery.measure import BLOCK_ELEMENTS
from surgery.operations.dequantize import computable
from surgery.parallel import Progress, run_all
from surgery.tensor import LazyTensor


@dataclass(frozen=True)
class Change:
    """How tensor `name` changed, or a module's tensors together.

    With tau = other - base: `relative` is ||tau|| / ||base|| (infinite from zero), `cosine` that
    of the angle between the two, `norm` is ||tau||. `effective_rank` is exp(entropy of tau's
    normalised singular values) (Roy & Vetterli 2007), None if it wasn't asked for or tau isn't
    a matrix.
    """

    name: str
    norm: float
    relative: float
    cosine: float
    equal: bool
    effective_rank: float | None = None


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints. `modules` maps (stack, module, block) to the change
    of the module's tensors taken as one vector; `outside` are the tensors in no block.
    `not_finite` are those of both that hold NaN or infinity: whether in base, and in other."""

    changes: tuple[Change, ...]
    outside: tuple[Change, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    retyped: Mapping[str, tuple[str, str]]
    modules: Mapping[tuple[str, str, int], Change]
    config: Mapping[str, tuple[Any, Any]]
    not_finite: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether nothing differs, the config included."""
        differs = self.added or self.removed or self.reshaped or self.retyped or self.config
        return not differs and all(change.equal for change in self.changes)


def diff(
    base: Checkpoint,
    other: Checkpoint,
    *,
    effective_rank: bool = False,
    scope: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Compare `other` with `base`. `effective_rank` takes an SVD of every changed matrix; with
    `scope` ("language", "vision", the name of a stack) only those tensors are looked at.

    8-bit floats are compared by what they stand for, times their scales; types and config are
    those of the files. Raises UnsupportedError for other packed weights.
    """
    stored = base, other
    base, other = computable(base=base, other=other)
    ours, theirs = (names_in_scope(model.anatomy, scope) for model in (base, other))
    names = [name for name in base if name in ours]
    common = [name for name in names if name in other and base[name].shape == other[name].shape]
    sums = _sums(base, other, common, threads, progress)
    ranks: dict[str, float] = {}
    if effective_rank:
        changed = [
            name for name in common if not sums[name].equal and not any(sums[name].not_finite)
        ]
        matrices = [name for name in changed if len(base[name].shape) == 2]
        ranks = _effective_ranks(base, other, matrices, threads)
    modules: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for name in common:
        place = base.anatomy.places[name]
        if place.stack is not None and place.block is not None:
            module = place.inner.rpartition(".")[0] or place.inner
            modules[place.stack, module, place.block].append(name)
    changes = {name: sums[name].change(name, ranks.get(name)) for name in common}
    return Difference(
        changes=tuple(changes.values()),
        outside=tuple(changes[n] for n in common if base.anatomy.places[n].stack is None),
        added=tuple(name for name in other if name not in base and name in theirs),
        removed=tuple(name for name in names if name not in other),
        reshaped={
            name: (base[name].shape, other[name].shape)
            for name in names
            if name in other and base[name].shape != other[name].shape
        },
        retyped={
            name: (stored[0][name].dtype.name, stored[1][name].dtype.name)
            for name in common
            if stored[0][name].dtype != stored[1][name].dtype
        },
        modules={
            key: _together([sums[name] for name in names]).change(
                f"{key[0]}.{key[2]}.{key[1]}",
                next((ranks[name] for name in names if name in ranks), None),
            )
            for key, names in modules.items()
        },
        config=_config_difference(stored[0].config, stored[1].config),
        not_finite={name: sums[name].not_finite for name in common if any(sums[name].not_finite)},
    )


@dataclass(frozen=True)
class _Sums:
    """Sums over a tensor: of tau^2, base^2, other^2, base * other; and whether all is equal."""

    update: float
    base: float
    other: float
    dot: float
    equal: bool

    @property
    def not_finite(self) -> tuple[bool, bool]:
        """Whether NaN or infinity is in base, and in other: their sums aren't finite then."""
        return not math.isfinite(self.base), not math.isfinite(self.other)

    def change(self, name: str, effective_rank: float | None) -> Change:
        if self.equal:  # infinity less itself is NaN, and no change
            return Change(name, 0.0, 0.0, 1.0, True, effective_rank)
        norm, length = math.sqrt(self.update), math.sqrt(self.base * self.other)
        relative = math.sqrt(self.update / self.base) if self.base else math.inf if norm else 0.0
        cosine = self.dot / length if length else 0.0
        return Change(name, norm, relative, cosine, False, effective_rank)


def _together(parts: list[_Sums]) -> _Sums:
    """The sums of several tensors taken as one vector."""
    return _Sums(
        math.fsum(part.update for part in parts),
        math.fsum(part.base for part in parts),
        math.fsum(part.other for part in parts),
        math.fsum(part.dot for part in parts),
        all(part.equal for part in parts),
    )


def _sums(
    base: Checkpoint,
    other: Checkpoint,
    names: list[str],
    threads: int | None,
    progress: Progress | None,
) -> dict[str, _Sums]:
    found: dict[str, list[_Sums]] = {name: [] for name in names}
    lock = Lock()

    def jobs() -> Iterator[tuple[str, int, int]]:
        for name in names:
            for start, stop in base[name].blocks(BLOCK_ELEMENTS):
                yield name, start, stop

    def work(job: tuple[str, int, int]) -> None:
        name, start, stop = job
        sums = _block_sums(base[name], other[name], start, stop)
        with lock:
            found[name].append(sums)
        if progress is not None:
            progress((stop - start) * other[name].width * other[name].dtype.bits // 8)

    run_all(jobs(), work, threads)
    return {name: _together(parts) for name, parts in found.items()}


def _block_sums(base: LazyTensor, other: LazyTensor, start: int, stop: int) -> _Sums:
    import torch

    a, b = (
        (tensor.exact or tensor).read(start, stop).to(torch.float64).reshape(-1)
        for tensor in (base, other)
    )
    tau = b - a
    update = float(torch.dot(tau, tau))
    equal = torch.equal(a, b)
    if not equal and math.isnan(update):  # NaN isn't equal to itself, and no change either
        equal = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    return _Sums(
        update,
        float(torch.dot(a, a)),
        float(torch.dot(b, b)),
        float(torch.dot(a, b)),
        equal,
    )


def _effective_ranks(
    base: Checkpoint, other: Checkpoint, names: list[str], threads: int | None
) -> dict[str, float]:
    ranks: dict[str, float] = {}

    def work(name: str) -> None:
        import torch

        a, b = ((model[name].exact or model[name]).whole() for model in (base, other))
        tau = b.to(torch.float32) - a.to(torch.float32)
        values = torch.linalg.svdvals(tau).to(torch.float64)
        share = values / values.sum()
        share = share[share > 0]
        ranks[name] = float(torch.exp(-(share * share.log()).sum()))

    run_all(iter(names), work, threads)
    return ranks


def _config_difference(
    base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in base, value in other), None where it is absent."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*base, *(key for key in other if key not in base)]:
        a, b = base.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= _config_difference(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found
