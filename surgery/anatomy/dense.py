"""The plain MLPs of all blocks, those of blocks that have several, and those outside the blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.anatomy.experts import Experts
from surgery.anatomy.followers import apart, as_matrix, with_followers
from surgery.anatomy.layout import what_is_not_told
from surgery.anatomy.matrices import find_mlp, module_of, stores_in_out
from surgery.anatomy.mlp import MLP
from surgery.anatomy.places import Place, Role
from surgery.anatomy.several import another_may_be, around_others, find_several, misread
from surgery.tensor import LazyTensor

Key = tuple[str, int]
Tensors = Mapping[str, LazyTensor]


@dataclass
class Dense:
    """`mlps` where a block has one, `several` where it has more, `beside` what is in a block next
    to its one MLP, or outside the blocks, and has nothing that follows its width, which may be
    the size that it leads to; `no_growth` says why those of a block can't grow."""

    mlps: dict[Key, MLP] = field(default_factory=dict)
    several: dict[Key, tuple[MLP, ...]] = field(default_factory=dict)
    beside: list[MLP] = field(default_factory=list)
    no_growth: dict[Key, str] = field(default_factory=dict)


def find_dense(
    tensors: Tensors,
    places: Mapping[str, Place],
    hidden: Mapping[Key, int | None],
    widths: set[int],
    experts: Mapping[Key, Experts],
    layouts: Mapping[str, Collection[bool]],
    config: Mapping[str, Any],
) -> Dense:
    """What there is of them. `hidden` has the size of every block, `widths` are those that the
    config gives, `experts` what of a block belongs to a mixture, `layouts` what is told of how the
    matrices of a stack are stored."""
    found = Dense()
    blocks, outside = _apart(tensors, places, experts)
    in_out = {
        stack: stores_in_out(inside) or layouts.get(stack) == {True}
        for stack, inside in _by_stack(blocks).items()
    }
    for key, inside in blocks.items():
        _look(found, key, inside, places, hidden[key], widths, in_out[key[0]], key in experts)
        if key in experts or key in found.no_growth:
            continue
        rest = {
            name: tensor
            for name, tensor in inside.items()
            if places[name].role not in (Role.ATTENTION, Role.MIXER)
        }
        mlps = found.several.get(key) or ((found.mlps[key],) if key in found.mlps else ())
        doubts = [what_is_not_told(mlp, rest, layouts.get(key[0], ()), config) for mlp in mlps]
        if told := "; ".join(dict.fromkeys(filter(None, doubts))):
            found.no_growth[key] = told
    for mlp, problem in find_several(
        "", None, outside, places, None, widths, in_out=False, uneven=True
    ):
        if problem is None and not mlp.followers:
            found.beside.append(mlp)
    routed = {
        (place.stack, place.block)
        for place in places.values()
        if place.role is Role.ROUTER and place.stack is not None and place.block is not None
    }
    lost = routed - experts.keys() - found.mlps.keys()
    found.no_growth |= dict.fromkeys(lost, "it is a mixture whose experts weren't found")
    return found


def _look(
    found: Dense,
    key: Key,
    inside: Tensors,
    places: Mapping[str, Place],
    hidden: int | None,
    widths: set[int],
    in_out: bool,
    mixture: bool,
) -> None:
    """Add what one block has."""
    roles = (Role.UNKNOWN, Role.NORM, Role.MLP)
    plain = {name: tensor for name, tensor in inside.items() if places[name].role in roles}
    mlp: MLP | str | None = None
    if hidden is not None:
        mlp = find_mlp(*key, plain, hidden, widths, in_out)
    elif sum(len(tensor.shape) == 2 for tensor in plain.values()) > 1:
        mlp = "the hidden size is unknown: no config, embedding or norm tells it"
    if isinstance(mlp, MLP) and around_others(mlp, inside, places, widths):
        mlp = f"{mlp.down.weight} leads back from a bottleneck with MLPs in it"
    if isinstance(mlp, MLP) and not misread(mlp, inside, places):
        mlp, problem = with_followers(mlp, plain, inside, places)
        found.mlps[key] = mlp
        if problem is not None:
            found.no_growth[key] = problem
        left = {name: tensor for name, tensor in inside.items() if name not in mlp.tensors}
        more = find_several(*key, left, places, hidden, widths, in_out, uneven=True)
        found.beside += [mlp for mlp, problem in more if problem is None and not mlp.followers]
        return
    if mixture:
        return  # what is beside experts stays as it is
    these = find_several(*key, inside, places, hidden, widths, in_out)
    if not these and _add_convolutions(found, key, inside, places, widths):
        return
    if these and not another_may_be([mlp for mlp, _ in these], inside, places, hidden):
        found.several[key] = tuple(mlp for mlp, _ in these)
        if problems := [problem for _, problem in these if problem is not None]:
            found.no_growth[key] = "; ".join(problems)
    elif mlp is not None:
        found.no_growth[key] = (
            f"the MLP that it seems to have leads to another size than {mlp.hidden}"
            if isinstance(mlp, MLP)
            else mlp
        )


def _add_convolutions(
    found: Dense, key: Key, inside: Tensors, places: Mapping[str, Place], widths: set[int]
) -> bool:
    """Add the MLPs of a block whose matrices are kernels of convolutions, and whether there are
    some: pairs alone in a module that lead from the size of a norm to a larger one and back. What
    else there is is no reason to refuse, for most convolutions are no MLP's."""
    kernels = {name: as_matrix(name, inside) for name in inside}
    flat = {name: kernels[name] or tensor for name, tensor in inside.items()}
    these = [
        with_followers(mlp, _rest(inside, places), inside, places)
        for mlp, problem in find_several(*key, flat, places, None, widths, in_out=False)
        if problem is None and mlp.width > mlp.hidden and _alone(mlp, flat)
        if all(kernels[each.weight] for each in (*mlp.ups, mlp.down))
    ]
    whole = tuple(mlp for mlp, problem in apart(these) if problem is None)
    if whole:
        found.several[key] = whole
    return bool(whole)


def _alone(mlp: MLP, flat: Tensors) -> bool:
    """Whether an MLP has a module of its own, without other matrices."""
    own = module_of(f"{mlp.stack}.{mlp.block}.", mlp.tensors)
    theirs = {name for name, tensor in flat.items() if name.startswith(own)}
    matrices = {name for name in theirs if len(flat[name].shape) == 2}
    return bool(own) and matrices == {each.weight for each in (*mlp.ups, mlp.down)}


def _rest(inside: Tensors, places: Mapping[str, Place]) -> dict[str, LazyTensor]:
    return {n: t for n, t in inside.items() if places[n].role is not Role.ATTENTION}


def _apart(
    tensors: Tensors, places: Mapping[str, Place], experts: Mapping[Key, Experts]
) -> tuple[dict[Key, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """The tensors of every block without those of its experts, and those outside the blocks."""
    blocks: dict[Key, dict[str, LazyTensor]] = defaultdict(dict)
    outside = {}
    for name, place in places.items():
        if place.stack is None or place.block is None:
            outside[name] = tensors[name]
        elif (key := (place.stack, place.block)) not in experts or (
            name not in experts[key].tensors
        ):
            blocks[key][name] = tensors[name]
    return blocks, outside


def _by_stack(blocks: Mapping[Key, Tensors]) -> dict[str, dict[str, LazyTensor]]:
    stacks: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    for (stack, _), inside in blocks.items():
        stacks[stack] |= inside
    return stacks
