"""The experts of every block, those that a user says among them, and what is around them: their
routers, and the reasons why some can't be grown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.anatomy.corrections import Corrections, names_of
from surgery.anatomy.experts import Experts, find_experts, left_over
from surgery.anatomy.inner import find_inner
from surgery.anatomy.layout import SAY, what_is_not_told
from surgery.anatomy.matrices import follows_width, module_of
from surgery.anatomy.mlp import MLP
from surgery.anatomy.places import Place, Role
from surgery.tensor import LazyTensor

Key = tuple[str, int]
Tensors = Mapping[str, LazyTensor]


def find_mixtures(
    blocks: Mapping[Key, Tensors],
    places: Mapping[str, Place],
    hidden: Mapping[Key, int | None],
    config: Mapping[str, Any],
    part: Mapping[str, Any],
    layouts: Mapping[str, Collection[bool]],
    said: Mapping[Key, Sequence[MLP]],
) -> dict[Key, Experts]:
    """The experts of every block that has some. `part` is the config of the language model; what is
    `said` of a block isn't inferred."""
    found = {}
    seen: dict[object, tuple[str, Experts]] = {}
    for key, block in blocks.items():
        every = said.get(key, ())
        given = _said(
            [mlp for mlp in every if mlp.kind != "dense"], key, block, places, hidden[key]
        )
        taken = given.tensors | names_of(every)
        inside = {
            name: tensor
            for name, tensor in block.items()
            if places[name].role in (Role.UNKNOWN, Role.EXPERT) and name not in taken
        }
        form = None if every else _form(key, block, inside, places, hidden[key])
        if form is not None and form in seen:
            prefix, first = seen[form]
            experts = first.moved(prefix, f"{key[0]}.{key[1]}.", key[1])
        else:
            experts = _inferred(key, block, inside, places, hidden[key], config, part, layouts)
            if form is not None and not experts.problems:  # those name tensors
                seen[form] = f"{key[0]}.{key[1]}.", experts
        routed = any(mlp.kind == "routed" for mlp in experts.mlps)
        if given.mlps:
            order = {name: number for number, name in enumerate(block)}
            experts.mlps += given.mlps
            experts.mlps.sort(key=lambda mlp: min(order[name] for name in mlp.tensors))
            experts.tensors |= given.tensors
            experts.problems += given.problems
        if routed or experts.problems or given.mlps:
            found[key] = experts  # what is shared by no others is a plain MLP
    return found


def _form(
    key: Key, block: Tensors, inside: Tensors, places: Mapping[str, Place], hidden: int | None
) -> object:
    """All that the experts of a block are told by, which is the same in blocks that differ in
    nothing but their number; None where names don't begin with that."""
    if hidden is None:
        return None
    prefix = f"{key[0]}.{key[1]}."
    if not all(name.startswith(prefix) for name in inside):
        return None
    cut = len(prefix)
    told = [(n[cut:], t.shape, t.dtype, places[n].role) for n, t in inside.items()]
    return key[0], hidden, frozenset(_choices(block, hidden)), tuple(told)


def _inferred(
    key: Key,
    block: Tensors,
    inside: Tensors,
    places: Mapping[str, Place],
    hidden: int | None,
    config: Mapping[str, Any],
    part: Mapping[str, Any],
    layouts: Mapping[str, Collection[bool]],
) -> Experts:
    """Those of what is left `inside` a block."""
    if hidden is None:
        return Experts()
    told, choices = layouts[key[0]], _choices(block, hidden)
    experts = find_experts(*key, inside, hidden, part, choices, in_out=told == {True})
    doubts = [what_is_not_told(mlp, {}, told, config) for mlp in experts.mlps]
    experts.problems += dict.fromkeys(filter(None, doubts))
    left = [
        name
        for name in inside
        if places[name].role is Role.EXPERT and name not in experts.tensors
        if "attention" not in name and left_over(name, inside[name])
    ]
    if left:
        experts.problems.append(f"what {', '.join(sorted(left))} does isn't known")
    return experts


def _said(
    mlps: list[MLP], key: Key, block: Tensors, places: Mapping[str, Place], hidden: int | None
) -> Experts:
    """The experts that a user says, with the matrices to the states that they work on and back,
    and what in their modules is as wide as they are and of nobody."""
    found = Experts(mlps, names_of(mlps))
    if not mlps:
        return found
    prefix = f"{key[0]}.{key[1]}."
    inner = find_inner(prefix, block, hidden) if hidden is not None else None
    modules = [module_of(prefix, mlp.tensors) for mlp in mlps]
    for mlp, module in zip(mlps, modules, strict=True):
        if inner is not None:
            theirs = {name: block[name] for name in mlp.tensors}
            size, ways = inner.of(module.removeprefix(prefix).removesuffix("."), theirs)
            found.tensors |= ways if size == mlp.hidden else frozenset()
    loose = {
        name: tensor
        for name, tensor in block.items()
        if name not in found.tensors and places[name].role is not Role.ATTENTION
    }
    for mlp, module in zip(mlps, modules, strict=True):
        if module and (others := follows_width(mlp, loose)):
            found.problems.append(
                f"{', '.join(others)} follows the MLP's width of {mlp.width:,}; {SAY}"
            )
    return found


def not_understood(experts: Mapping[Key, Experts]) -> dict[Key, str]:
    """Why the blocks of some experts can't be grown."""
    return {
        key: f"its experts aren't understood: {'; '.join(found.problems)}"
        for key, found in experts.items()
        if found.problems
    }


def place_experts(
    places: dict[str, Place],
    experts: Mapping[Key, Experts],
    said: Mapping[Key, Sequence[MLP]],
    corrections: Corrections,
) -> None:
    """Give the role to the tensors of experts: to those without one, and to those that a user
    says are an expert's, if nothing else is said of them."""
    for name in (name for found in experts.values() for name in found.tensors):
        if places[name].role is Role.UNKNOWN:
            places[name] = replace(places[name], role=Role.EXPERT)
    for every in said.values():
        for mlp in every:
            norms = {f.name for f in mlp.followers if places[f.name].role is Role.NORM}
            for name in names_of([mlp]) - norms if mlp.kind != "dense" else ():
                if corrections.role(name) is None:
                    places[name] = replace(places[name], role=Role.EXPERT)


def place_routers(
    tensors: Tensors,
    places: dict[str, Place],
    blocks: Mapping[Key, Tensors],
    experts: Mapping[Key, Experts],
) -> None:
    """Give the role to a matrix without one that has a row for each expert beside it."""
    for key, found in experts.items():
        routed = [mlp for mlp in found.mlps if mlp.kind == "routed"]
        if not routed:
            continue
        shape = routed[0].down.experts or len(routed), routed[0].hidden
        fitting = [name for name in blocks[key] if tensors[name].shape == shape]
        if any(places[name].role is Role.ROUTER for name in fitting):
            continue  # another of that shape is an adapter beside it
        for name in fitting:
            if places[name].role is Role.UNKNOWN:
                places[name] = replace(places[name], role=Role.ROUTER)


def _choices(block: Tensors, hidden: int) -> set[int]:
    """Between how many things a matrix of the block may choose."""
    matrices = [set(t.shape) for t in block.values() if len(t.shape) == 2 and hidden in t.shape]
    return set().union(*matrices) - {hidden}
