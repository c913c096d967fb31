"""What a user says of a checkpoint's anatomy where the inference is wrong.

Corrections go by names inside blocks, and hold for whatever checkpoint they fit: they stay true
of a model that was widened or got more blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from surgery.anatomy.followers import follower_axis, with_followers
from surgery.anatomy.mlp import MLP, Follower, Projection
from surgery.anatomy.places import Place, Role, place_in_block
from surgery.tensor import LazyTensor

Key = tuple[str, int]
Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class MLPCorrection:
    """The MLP of some blocks of `stack` (of all where `blocks` is None), by the names of its
    matrices inside a block; `parts`, `in_out` and `interleaved` as in `Projection`. `followers` are
    those that the inference doesn't find: by name, and whether they are `even` (see `Follower`)."""

    stack: str
    ups: tuple[str, ...]
    down: str
    parts: int = 1
    in_out: bool = False
    blocks: frozenset[int] | None = None
    interleaved: bool = False
    followers: tuple[tuple[str, bool], ...] = ()

    def meant_for(self, stack: str, block: int) -> bool:
        """Whether it speaks of that block."""
        return stack == self.stack and (self.blocks is None or block in self.blocks)

    def problems(self, tensors: Tensors, block: int) -> list[str]:
        """Why the matrices of a block can't be that MLP."""
        names = [self.name(block, inner) for inner in (*self.ups, self.down)]
        others = [self.name(block, inner) for inner, _ in self.followers]
        missing = [f"there is no {name}" for name in (*names, *others) if name not in tensors]
        flat = [
            f"{name} is {list(tensors[name].shape)}, and no matrix"
            for name in names
            if name in tensors and len(tensors[name].shape) != 2
        ]
        if missing or flat:
            return missing + flat
        *ups, down = names
        hidden, width = self._sides(tensors[down])
        wanted = [self.parts * width, hidden]
        if self.in_out:
            wanted.reverse()
        return [
            f"{name} is {list(tensors[name].shape)}, and beside {down}, which is "
            f"{list(tensors[down].shape)}, it would be {wanted}"
            for name in ups
            if list(tensors[name].shape) != wanted
        ] + [
            f"{name} is {list(tensors[name].shape)}, and has to have {width} once, as its first "
            f"size behind ones or as its last"
            for name in others
            if follower_axis(tensors[name].shape, width) is None
        ]

    def mlp(self, tensors: Tensors, block: int) -> MLP:
        """The MLP of a block that it fits."""
        hidden, width = self._sides(tensors[self.name(block, self.down)])
        return MLP(
            stack=self.stack,
            block=block,
            ups=tuple(self._projection(tensors, block, inner, self.parts) for inner in self.ups),
            down=self._projection(tensors, block, self.down, 1),
            width=width,
            hidden=hidden,
            followers=tuple(self._followers(tensors, block, width)),
        )

    def _followers(self, tensors: Tensors, block: int, width: int) -> Iterator[Follower]:
        for inner, even in self.followers:
            name = self.name(block, inner)
            if (axis := follower_axis(tensors[name].shape, width)) is not None:
                yield Follower(name, axis, even)

    def name(self, block: int, inner: str) -> str:
        """The full name of a tensor of a block."""
        return f"{self.stack}.{block}.{inner}" if self.stack else f"{block}.{inner}"

    def _sides(self, down: LazyTensor) -> tuple[int, int]:
        """The hidden size and the width, of the down projection."""
        rows, columns = down.shape
        return (columns, rows) if self.in_out else (rows, columns)

    def _projection(self, tensors: Tensors, block: int, inner: str, parts: int) -> Projection:
        name = self.name(block, inner)
        bias = name.removesuffix("weight") + "bias"
        return Projection(
            name,
            bias if bias in tensors else None,
            self.in_out,
            parts,
            interleaved=self.interleaved and parts == 2,
        )


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
        for name in tensors:
            if (role := self.role(name)) is not None:
                places[name] = replace(places[name], role=role)

    def put_mlps(
        self,
        tensors: Tensors,
        places: Mapping[str, Place],
        mlps: dict[Key, MLP],
        no_growth: dict[Key, str],
    ) -> None:
        """Put right the MLPs that were inferred, and why some can't be grown."""
        blocks: dict[Key, dict[str, LazyTensor]] = {}
        for name, place in places.items():
            if place.stack is not None and place.block is not None:
                blocks.setdefault((place.stack, place.block), {})[name] = tensors[name]
        for correction in self.mlps:
            for (stack, block), inside in blocks.items():
                if not correction.meant_for(stack, block) or correction.problems(tensors, block):
                    continue
                no_growth.pop((stack, block), None)
                loose = {n: t for n, t in inside.items() if places[n].role is not Role.ATTENTION}
                mlp, problem = with_followers(correction.mlp(tensors, block), loose, inside, places)
                mlps[stack, block] = mlp
                if problem is not None:
                    no_growth[stack, block] = problem


def block_of(name: str, stack: str) -> tuple[int, str] | None:
    """The number of the block of `stack` that a tensor is in, and its name in there."""
    prefix = f"{stack}." if stack else ""
    if not name.startswith(prefix):
        return None
    number, dot, inner = name[len(prefix) :].partition(".")
    return (int(number), inner) if dot and re.fullmatch("[0-9]{1,9}", number) else None
