"""What a user says of a checkpoint's anatomy where the inference is wrong.

Corrections go by names inside blocks, and hold for whatever checkpoint they fit: they stay true
of a model that was widened or got more blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from surgery.anatomy.followers import apart, with_followers
from surgery.anatomy.mlp import MLP
from surgery.anatomy.places import Place, Role, place_in_block
from surgery.anatomy.said import MLPCorrection
from surgery.tensor import LazyTensor

Key = tuple[str, int]
Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Corrections:
    """Prefixes of lists of blocks; roles by name or pattern, the first that fits; MLPs. What isn't
    mentioned stays as it was inferred."""

    stacks: tuple[str, ...] = ()
    roles: tuple[tuple[str, Role], ...] = ()
    mlps: tuple[MLPCorrection, ...] = ()

    def role(self, name: str) -> Role | None:
        """The role that is given to a tensor. A name comes before patterns."""
        exact = (role for pattern, role in self.roles if pattern == name)
        fitting = (role for pattern, role in self.roles if fnmatchcase(name, pattern))
        return next(exact, None) or next(fitting, None)

    def moved(self, stack: str, numbers: Mapping[int, Sequence[int]]) -> Corrections:
        """The same of blocks of `stack` that have got other numbers: by the old one, the new."""
        roles: list[tuple[str, Role]] = []
        for pattern, role in self.roles:
            if spot := block_of(pattern, stack):
                prefix = f"{stack}." if stack else ""
                roles += [(f"{prefix}{new}.{spot[1]}", role) for new in numbers.get(spot[0], ())]
            else:
                roles.append((pattern, role))
        mlps = tuple(
            replace(
                mlp,
                blocks=frozenset(
                    new
                    for old, several in numbers.items()
                    if mlp.blocks is None or old in mlp.blocks
                    for new in several
                ),
            )
            if mlp.stack == stack
            else mlp
            for mlp in self.mlps
        )
        return Corrections(self.stacks, tuple(roles), mlps)

    def __add__(self, other: Corrections) -> Corrections:
        return Corrections(
            tuple(dict.fromkeys((*self.stacks, *other.stacks))),
            tuple(dict.fromkeys((*self.roles, *other.roles))),
            tuple(dict.fromkeys((*self.mlps, *other.mlps))),
        )

    def place(self, tensors: Tensors, places: dict[str, Place], stacks: dict[str, int]) -> None:
        """Put right the places and the stacks that were inferred."""
        for stack in self.stacks:
            found = {name: spot for name in tensors if (spot := block_of(name, stack))}
            numbers = {number for number, _ in found.values()}
            if not numbers or numbers != set(range(len(numbers))):
                continue
            stacks[stack] = len(numbers)
            for name, (number, inner) in found.items():
                places[name] = place_in_block(inner, tensors[name], stack, number)
        for name in tensors if self.roles else ():
            if (role := self.role(name)) is not None:
                places[name] = replace(places[name], role=role)

    def said(self, blocks: Mapping[Key, Tensors]) -> dict[Key, tuple[MLP, ...]]:
        """The MLPs that are said to be in each block, by what fits what is inside. Of several that
        claim a tensor, the last counts."""
        found: dict[Key, list[MLP]] = {}
        for correction in self.mlps:
            for (stack, block), inside in blocks.items():
                if not correction.meant_for(stack, block) or correction.problems(inside, block):
                    continue
                made = correction.mlps(inside, block)
                theirs = {name for mlp in made for name in mlp.tensors}
                before = found.get((stack, block), [])
                kept = [mlp for mlp in before if theirs.isdisjoint(mlp.tensors)]
                found[stack, block] = kept + made
        return {key: tuple(mlps) for key, mlps in found.items()}


def put_plain(
    said: Mapping[Key, Sequence[MLP]],
    blocks: Mapping[Key, Tensors],
    places: Mapping[str, Place],
    hidden: Mapping[Key, int | None],
    mlps: dict[Key, MLP],
    several: dict[Key, tuple[MLP, ...]],
    no_growth: dict[Key, str],
) -> None:
    """Put right the plain MLPs that were inferred, and why some can't be grown."""
    for key, every in said.items():
        plain = [mlp for mlp in every if mlp.kind == "dense"]
        if not plain:
            continue
        experts = names_of(mlp for mlp in every if mlp.kind != "dense")
        inside = {name: t for name, t in blocks[key].items() if name not in experts}
        theirs = names_of(plain)
        loose = {
            name: tensor
            for name, tensor in inside.items()
            if name not in theirs and places[name].role is not Role.ATTENTION
        }
        found = [with_followers(mlp, loose, inside, places, hidden[key]) for mlp in plain]
        no_growth.pop(key, None)
        mlps.pop(key, None)
        several.pop(key, None)
        if len(found) == 1:
            [(mlps[key], _)] = found
        else:
            found = apart(found)
            several[key] = tuple(mlp for mlp, _ in found)
        if problems := [problem for _, problem in found if problem is not None]:
            no_growth[key] = "; ".join(problems)


def names_of(mlps: Iterable[MLP]) -> set[str]:
    """All tensors of these MLPs."""
    return {name for mlp in mlps for name in (*mlp.tensors, mlp.down.bias) if name is not None}


def block_of(name: str, stack: str) -> tuple[int, str] | None:
    """The number of the block of `stack` that a tensor is in, and its name in there."""
    prefix = f"{stack}." if stack else ""
    if not name.startswith(prefix):
        return None
    number, dot, inner = name[len(prefix) :].partition(".")
    return (int(number), inner) if dot and re.fullmatch("[0-9]{1,9}", number) else None
