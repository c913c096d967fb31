"""Experts that work on states of another size than the hidden size: two matrices beside them lead
there and back, as the latent ones of Nemotron 3 do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.tensor import LazyTensor

_BACK = re.compile(r"(^|[._])(post|out|down|back)([._]|$)")
_IN_AN_EXPERT = re.compile(r"experts?[._]\d|shared?_(experts?|mlp)\b")


@dataclass(frozen=True)
class Inner:
    """The sizes that there are inside the modules of a block, and by which matrices."""

    hidden: int
    ways: Mapping[tuple[str, int], frozenset[str]]
    """By the module and the size, the names of the matrix there and of the one back."""

    def at(self, path: str) -> set[int]:
        """What experts at that path may work on."""
        return {self.hidden, *(size for module, size in self.ways if _is_around(module, path))}

    def of(self, path: str, group: Mapping[str, LazyTensor]) -> tuple[int, frozenset[str]]:
        """What the matrices of an expert do work on, the hidden size if they may, and the names of
        the matrices that lead there and back, if any do."""
        if not self.ways:
            return self.hidden, frozenset()
        sides = [tensor.shape[-2:] for tensor in group.values() if len(tensor.shape) > 1]
        for size in (self.hidden, *sorted(self.at(path) - {self.hidden})):
            if all(size in pair for pair in sides):
                near = [m for m, own in self.ways if own == size and _is_around(m, path)]
                return size, self.ways[max(near, key=len), size] if near else frozenset()
        return self.hidden, frozenset()


def find_inner(block: str, tensors: Mapping[str, LazyTensor], hidden: int) -> Inner:
    """The pairs of matrices of the block (with a dot behind it) that lead from the hidden size to
    another and back, each alone in its module. To the same size, names have to say that it is for
    experts."""
    found: dict[tuple[str, int], dict[bool, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, tensor in tensors.items():
        inner, shape = name.removeprefix(block), tensor.shape
        module, _, last = inner.removesuffix(".weight").rpartition(".")
        if len(shape) != 2 or hidden not in shape or not module or _IN_AN_EXPERT.search(inner):
            continue
        if shape[0] != shape[1]:
            size = shape[0] + shape[1] - hidden
            found[module, size][shape[0] == hidden].add(name)
        elif "expert" in last:
            found[module, hidden][bool(_BACK.search(last))].add(name)
    return Inner(
        hidden,
        {
            key: frozenset(ways[False] | ways[True])
            for key, ways in found.items()
            if len(ways[False]) == len(ways[True]) == 1
        },
    )


def _is_around(module: str, path: str) -> bool:
    return f"{path}.".startswith(f"{module}.")
