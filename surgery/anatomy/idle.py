"""Experts that return their input. LongCat has them, and stores what would lead into their hidden
activations all the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery.anatomy.mlp import Projection
from surgery.tensor import LazyTensor

Group = Mapping[str, LazyTensor]

_IDLE = re.compile(r"(^|_)(zero|identity|idle|null|noop|skip|copy|pass)(_|$)")


def idle_projections(
    ups: tuple[Projection, ...],
    block: str,
    path: str,
    groups: Mapping[str, Group],
    config: Mapping[str, Any],
) -> dict[str, tuple[Projection, ...]]:
    """Of the experts that have just what `ups` are in the one at `path`, and nothing that leads out
    again, those matrices. None where no key of the config says that there are so many, for then
    a part of the checkpoint is missing."""
    counts = _counts(config)
    if not counts:
        return {}
    found = {}
    for other, group in groups.items():
        moved = tuple(up.moved(f"{block}{path}.", f"{block}{other}.") for up in ups)
        names = {
            new: old
            for pair in zip(moved, ups, strict=True)
            for new, old in zip(*((up.weight, up.bias) for up in pair), strict=True)
            if new is not None and old is not None
        }
        if group.keys() == names.keys() and all(
            group[new].shape == groups[path][old].shape for new, old in names.items()
        ):
            found[other] = moved
    return found if len(found) in counts else {}


def _counts(config: Mapping[str, Any]) -> set[int]:
    return {
        value
        for key, value in config.items()
        if type(value) is int and "expert" in key and _IDLE.search(key)
    }
