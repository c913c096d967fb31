"""Expand: add blocks that change nothing, so that training has new ones to fill.

Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", arXiv 2401.02415: copies of blocks
are put between the old ones, with zeros for every projection that writes to the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery.anatomy.residual import writes_to_residual
from surgery.checkpoint import Checkpoint, Edit
from surgery.errors import ArgumentError, UnsupportedError
from surgery.expansion import Expansion
from surgery.operations.blocks import assemble, main_stack
from surgery.operations.layers import parse_layers
from surgery.operations.pairs import check_unquantized
from surgery.values import zeros


def expand(base: Checkpoint, *, copies: int | None = None, after: str | None = None) -> Checkpoint:
    """The checkpoint with blocks added, and the same function.

    With `copies` = N the depth is cut into N groups, and behind the last block of each group a
    copy of it is put. `after` names the blocks behind which to put their copies: "3,7,-1". In a
    copy every projection that writes to the residual stream is zero, with its bias: attention's
    output or another mixer's, the MLP's down projection, that of every expert. So the copy
    returns its input, which is made sure of by following the stock block's own operations
    (`modeling/identity.py`).

    Raises ArgumentError or UnsupportedError before any tensor is read: for a block that would
    not return its input (a norm behind the addition, as in BERT), or can't be followed.
    """
    check_unquantized(base=base)
    stack = main_stack(base)
    chosen = _chosen(base.anatomy.stacks[stack], copies, after)
    check_identity(base, stack, chosen)
    expansion = _expansion(stack, base.anatomy.stacks[stack], chosen)
    made = assemble([(base, old) for old in expansion.sources], base, base)
    zeroed = {
        name: zeros(made[name].shape, made[name].dtype)
        for name, (_, is_zero) in expansion.tensors(base.anatomy).items()
        if is_zero
    }
    edit = Edit(
        "expand",
        {"copies": copies, "after": after},
        {"base": base.source},
        expansion.as_json(base.anatomy),
    )
    return made.edited(edit, zeroed)


def check_identity(base: Checkpoint, stack: str, blocks: Sequence[int]) -> None:
    """Raise UnsupportedError with every block that wouldn't return its input if its projections
    to the residual stream were zero."""
    if not base.config:
        raise UnsupportedError(
            f"{base.source.reference} has no config.json, so how its blocks compute can't be told"
        )
    from surgery.modeling.identity import not_identity

    reasons: dict[str, list[int]] = {}
    for block, why in not_identity(base, stack, blocks).items():
        reasons.setdefault(why, []).append(block)
    UnsupportedError.raise_if(
        f"{base.source.reference}: a copy of block {', '.join(map(str, numbers))} of {stack} with "
        f"zeros for {_found(base, stack, numbers[0])} would not return its input: {why}"
        for why, numbers in reasons.items()
    )


def _found(base: Checkpoint, stack: str, block: int) -> str:
    """The projections to the residual stream that were recognised in a block, for a message."""
    places = base.anatomy.places.values()
    names = [p.inner for p in places if (p.stack, p.block) == (stack, block)]
    found = [name for name in names if writes_to_residual(name)]
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return (", ".join(found[:6]) + more) or "what writes to its result (none was recognised)"


def _expansion(stack: str, depth: int, chosen: Sequence[int]) -> Expansion:
    sources: list[int] = []
    new: list[int] = []
    for block in range(depth):
        sources.append(block)
        if block in chosen:
            new.append(len(sources))
            sources.append(block)
    return Expansion(stack, tuple(sources), tuple(new))


def _chosen(depth: int, copies: int | None, after: str | None) -> list[int]:
    """The blocks behind which a copy is put."""
    if (copies is None) == (after is None):
        raise ArgumentError("give either copies or after: how many blocks to add, or behind which")
    if after is not None:
        return parse_layers(after, depth)
    assert copies is not None
    if not 1 <= copies <= depth:
        raise ArgumentError(
            f"copies is {copies}, and has to be 1 to {depth}: a group of at least one of the "
            f"{depth} blocks for each"
        )
    return [(group + 1) * depth // copies - 1 for group in range(copies)]
