"""How a model was deepened: which block each block is, or is a copy of.

The one description of an expansion that the operation makes, the certificate checks, the record
keeps and a trainer reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.anatomy import Anatomy
from surgery.anatomy.residual import writes_to_residual


@dataclass(frozen=True)
class Expansion:
    """Block i of the deepened model is block `sources[i]` of the base, or, if i is in `new`, a
    copy of it that returns its input."""

    stack: str
    sources: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def kept(self) -> dict[int, int]:
        """Where every block of the base is now."""
        added = set(self.new)
        return {old: at for at, old in enumerate(self.sources) if at not in added}

    def tensors(self, base: Anatomy) -> dict[str, tuple[str, bool]]:
        """For the name of every tensor inside the blocks its source in the base, and whether it
        is zero instead: a projection of a new block that writes to the residual stream."""
        inside: list[dict[str, str]] = [{} for _ in range(base.stacks[self.stack])]
        for name, place in base.places.items():
            if place.stack == self.stack and place.block is not None:
                inside[place.block][place.inner] = name
        added = set(self.new)
        return {
            self.name(at, inner): (name, at in added and writes_to_residual(inner))
            for at, old in enumerate(self.sources)
            for inner, name in inside[old].items()
        }

    def name(self, block: int, inner: str) -> str:
        """The full name of a tensor inside a block."""
        return f"{self.stack}.{block}.{inner}" if self.stack else f"{block}.{inner}"

    def as_json(self, base: Anatomy) -> dict[str, Any]:
        """Plain data for the record: the new blocks, their sources, and what is zero in them."""
        zeroed = [name for name, (_, is_zero) in self.tensors(base).items() if is_zero]
        zero = {
            block: [name for name in zeroed if name.startswith(self.name(block, ""))]
            for block in self.new
        }
        return {
            "stack": self.stack,
            "blocks": list(self.sources),
            "new": [
                {"block": block, "source": self.sources[block], "zero": zero[block]}
                for block in self.new
            ],
        }


def expansion_of(record: Mapping[str, Any], base: Anatomy) -> Expansion:
    """The expansion as a record tells it. What is zero is not taken from there.

    Raises KeyError, TypeError, ValueError or OverflowError if the record isn't one of ours or of
    another base.
    """
    found = Expansion(
        str(record["stack"]),
        tuple(int(old) for old in record["blocks"]),
        tuple(int(entry["block"]) for entry in record["new"]),
    )
    depth = base.stacks[found.stack]
    if not found.new or list(found.kept) != list(range(depth)):
        raise ValueError(f"the record doesn't tell where the {depth} blocks of the base are")
    if any(not 0 <= old < depth for old in found.sources):
        raise ValueError("the record copies blocks that the base doesn't have")
    if any(not 0 <= block < len(found.sources) for block in found.new):
        raise ValueError("the record names new blocks that there aren't")
    return found
