"""The hidden size of every block: a model of several parts has several, and a config isn't always
there to tell."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from surgery.anatomy.places import Place, Role
from surgery.tensor import LazyTensor


def hidden_sizes(
    tensors: Mapping[str, LazyTensor], places: Mapping[str, Place], usual: int | None
) -> dict[tuple[str, int], int | None]:
    """The size of what goes from block to block, for every (stack, block).

    Norms have it, and most matrices lead from it or to it. `usual` is what the config or the
    embedding says, which holds for every block that has a norm of that size, or no norm at all;
    else it is the norm's, if more matrices have it.
    """
    blocks: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, place in places.items():
        if place.stack is not None and place.block is not None:
            blocks[place.stack, place.block].append(name)
    return {key: _hidden(tensors, places, names, usual) for key, names in blocks.items()}


def _hidden(
    tensors: Mapping[str, LazyTensor],
    places: Mapping[str, Place],
    names: list[str],
    usual: int | None,
) -> int | None:
    norms = {
        tensors[name].shape[0]
        for name in names
        if places[name].role is Role.NORM and len(tensors[name].shape) == 1
    }
    if usual in norms or (usual is not None and not norms):
        return usual
    if not norms:
        return _common_side(tensors[name].shape for name in names)
    sides = Counter(
        size
        for name in names
        if len(tensors[name].shape) == 2
        for size in set(tensors[name].shape) & (norms | {usual})
    )
    sizes = sorted(norms, key=lambda size: (-sides[size], size))
    return usual if usual is not None and sides[usual] >= sides[sizes[0]] else sizes[0]


def _common_side(shapes: Iterable[tuple[int, ...]]) -> int | None:
    """The one size that every matrix of a block leads from or to."""
    matrices = [set(shape) for shape in shapes if len(shape) == 2]
    common = set.intersection(*matrices) if len(matrices) > 1 else set()
    return common.pop() if len(common) == 1 else None
