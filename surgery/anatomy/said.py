"""What a user says of the MLPs of some blocks: plain ones, or the experts of a mixture, one by one
or stacked, by the names of their matrices inside a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from surgery.anatomy.followers import as_matrix, follower_axis
from surgery.anatomy.matrices import bias_name
from surgery.anatomy.mlp import MLP, Follower, Kind, Projection
from surgery.tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]
KINDS: tuple[Kind, ...] = ("dense", "routed", "shared")


@dataclass(frozen=True)
class MLPCorrection:
    """The MLP of some blocks of `stack` (of all where `blocks` is None), by the names of its
    matrices inside a block; `parts`, `in_out` and `interleaved` as in `Projection`.

    A * in every name stands for the number of an expert, or of one of several plain MLPs. Experts
    may be stacked in tensors of three dimensions instead, or, `experts` of them, below each other
    in matrices whose rows are their neurons. `idle` is how many numbers have ups and no down.
    `biases` are by the weight that they belong to, where their names don't say it. `followers` are
    those that the inference doesn't find: by name, and whether they are `even` (see `Follower`).
    `sparse` is why an activation goes by all neurons, if it does.
    """

    stack: str
    ups: tuple[str, ...]
    down: str
    parts: int = 1
    in_out: bool = False
    blocks: frozenset[int] | None = None
    interleaved: bool = False
    followers: tuple[tuple[str, bool], ...] = ()
    kind: Kind = "dense"
    biases: tuple[tuple[str, str], ...] = ()
    experts: int | None = None
    idle: int = 0
    sparse: str | None = None

    def meant_for(self, stack: str, block: int) -> bool:
        """Whether it speaks of that block."""
        return stack == self.stack and (self.blocks is None or block in self.blocks)

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What can't be meant of any model: the key, and what is wrong with it."""
        if len(self.ups) == 2 and self.parts == 2:
            yield "parts", "2 is for gate and up in one matrix, and ups has two"
        if self.interleaved and self.parts != 2:
            yield "interleaved", "this is for gate and up in one matrix: parts: 2"
        stars = {name.count("*") for name in self._names()}
        if stars not in ({0}, {1}):
            yield "down", "a * stands for one number: every name has one, or none has"
        if len(set(names := list(self._names()))) != len(names):
            yield "ups", "a name is given twice"
        for weight, _ in self.biases:
            if weight not in (*self.ups, self.down):
                yield "biases", f"{weight} is none of ups and down"
        if self.experts is not None:
            yield from self._mistakes_below_each_other(stars)
        if self.idle < 0 or (self.idle and (self.kind != "routed" or stars != {1})):
            yield "idle", "this is how many numbers of routed experts, named with a *, have no down"

    def _mistakes_below_each_other(self, stars: set[int]) -> Iterator[tuple[str, str]]:
        if self.experts is not None and self.experts < 1:
            yield "experts", f"{self.experts} is no number of experts"
        if self.kind == "dense" or stars != {0}:
            why = "this is for experts below each other in one matrix: a kind of them, and no *"
            yield "experts", why
        for key in ("in_out", "biases", "followers"):
            if getattr(self, key):
                yield key, "this isn't for experts that lie below each other in one matrix"

    def problems(self, inside: Tensors, block: int) -> list[str]:
        """Why what is `inside` a block can't be that MLP, or those experts."""
        if "*" not in self.down:
            return self._problems(inside, block)
        for name in (*self.ups, self.down):
            if not self._numbers(name, inside, block):
                return [f"there is no {self.name(block, name)}"]
        found = [
            problem
            for number in self._used(inside, block)
            for problem in self._at(number)._problems(inside, block)
        ]
        if self.idle and not found:
            found += self._problems_of_idle(inside, block)
        return found

    def mlps(self, inside: Tensors, block: int) -> list[MLP]:
        """The MLPs of a block that it fits, in the order of their tensors."""
        if "*" not in self.down:
            return [self._mlp(inside, block)]
        order = {name: number for number, name in enumerate(inside)}
        made = [self._at(number)._mlp(inside, block) for number in self._used(inside, block)]
        made.sort(key=lambda mlp: min(order[name] for name in mlp.tensors))
        idle = [
            self._at(number)._projection(inside, block, up, self.parts)
            for number in self._idle(inside, block)
            for up in self._at(number).ups
        ]
        return [replace(made[0], idle=tuple(idle)), *made[1:]] if idle else made

    def name(self, block: int, inner: str) -> str:
        """The full name of a tensor of a block."""
        return f"{self.stack}.{block}.{inner}" if self.stack else f"{block}.{inner}"

    def _names(self) -> Iterator[str]:
        yield from (*self.ups, self.down)
        yield from (name for name, _ in self.followers)
        yield from (bias for _, bias in self.biases)

    def _numbers(self, inner: str, inside: Tensors, block: int) -> list[str]:
        return numbers(self.name(block, inner), inside)

    def _used(self, inside: Tensors, block: int) -> list[str]:
        """The numbers of all MLPs: with nothing idle also those that lack their down."""
        names = (self.down,) if self.idle else (self.down, *self.ups)
        return list(dict.fromkeys(n for name in names for n in self._numbers(name, inside, block)))

    def _idle(self, inside: Tensors, block: int) -> list[str]:
        """The numbers of those that have ups alone."""
        if not self.idle:
            return []
        used = set(self._used(inside, block))
        return [n for n in self._numbers(self.ups[0], inside, block) if n not in used]

    def _at(self, number: str) -> MLPCorrection:
        """The same of one number."""

        def filled(name: str) -> str:
            return name.replace("*", number)

        return replace(
            self,
            ups=tuple(map(filled, self.ups)),
            down=filled(self.down),
            followers=tuple((filled(name), even) for name, even in self.followers),
            biases=tuple((filled(weight), filled(bias)) for weight, bias in self.biases),
            idle=0,
        )

    def _problems_of_idle(self, inside: Tensors, block: int) -> list[str]:
        idle = self._idle(inside, block)
        if len(idle) != self.idle:
            down = self.name(block, self.down)
            return [f"{len(idle)} numbers have no {down}, and idle is {self.idle}"]
        one = self._at(self._used(inside, block)[0])
        found = []
        for number in idle:
            for up, like in zip(self._at(number).ups, one.ups, strict=True):
                name, other = self.name(block, up), self.name(block, like)
                if name not in inside:
                    found.append(f"there is no {name}")
                elif inside[name].shape != inside[other].shape:
                    found.append(
                        f"{name} is {list(inside[name].shape)}, and would be as {other} is, "
                        f"{list(inside[other].shape)}"
                    )
        return found

    def _problems(self, inside: Tensors, block: int) -> list[str]:
        """Those of one MLP, or of stacked experts: names, then dimensions, then sizes."""
        inside = self._matrices(inside, block)
        names = [self.name(block, inner) for inner in (*self.ups, self.down)]
        others = [self.name(block, inner) for inner in [*self._names()][len(names) :]]
        missing = [f"there is no {name}" for name in (*names, *others) if name not in inside]
        stackable = self.kind != "dense" and self.experts is None
        said = "and neither a matrix nor one for each expert" if stackable else "and no matrix"
        flat = [
            f"{name} is {list(inside[name].shape)}, {said}"
            for name in names
            if name in inside and len(inside[name].shape) not in ((2, 3) if stackable else (2,))
        ]
        if missing or flat:
            return missing + flat
        *ups, down = names
        rows = inside[down].shape[0]
        if self.experts is not None and rows % self.experts:
            return [f"{down} has {rows:,} rows, which {self.experts} experts can't share"]
        hidden, width = self._sides(inside[down])
        if not width:
            return [f"{down} is {list(inside[down].shape)}, and has no neurons"]
        return [
            *self._unlike(inside, ups, down),
            *self._biases_unlike(inside, block, hidden, width),
            *(
                f"{name} is {list(inside[name].shape)}, and has to have {width} once, as its first "
                f"size behind ones or as its last"
                for name in (self.name(block, inner) for inner, _ in self.followers)
                if follower_axis(inside[name].shape, width) is None
            ),
        ]

    def _matrices(self, inside: Tensors, block: int) -> Tensors:
        """The same with kernels of convolutions as the matrices that they are at each place."""
        if self.kind != "dense":
            return inside
        names = [self.name(block, inner) for inner in (*self.ups, self.down)]
        seen = {name: as_matrix(name, inside) for name in names if name in inside}
        return {**inside, **{name: matrix for name, matrix in seen.items() if matrix is not None}}

    def _unlike(self, inside: Tensors, ups: Sequence[str], down: str) -> Iterator[str]:
        """Ups whose shape isn't that which goes with the down projection."""
        hidden, width = self._sides(inside[down])
        wanted = [(self.experts or 1) * self.parts * width, hidden]
        if self.in_out:
            wanted.reverse()
        wanted = [*inside[down].shape[:-2], *wanted]
        for name in ups:
            if list(inside[name].shape) != wanted:
                yield (
                    f"{name} is {list(inside[name].shape)}, and beside {down}, which is "
                    f"{list(inside[down].shape)}, it would be {wanted}"
                )

    def _biases_unlike(self, inside: Tensors, block: int, hidden: int, width: int) -> Iterator[str]:
        lead = inside[self.name(block, self.down)].shape[:-2]
        for inner in (*self.ups, self.down):
            bias = self._bias(inside, block, inner)
            wanted = [*lead, hidden if inner == self.down else self.parts * width]
            if bias is not None and list(inside[bias].shape) != wanted:
                yield (
                    f"{bias} is {list(inside[bias].shape)}, and as the bias of "
                    f"{self.name(block, inner)} it would be {wanted}"
                )

    def _sides(self, down: LazyTensor) -> tuple[int, int]:
        """The hidden size and the width, of the down projection."""
        rows, columns = down.shape[-2:]
        if self.experts is not None:
            return columns, rows // self.experts
        return (columns, rows) if self.in_out else (rows, columns)

    def _mlp(self, inside: Tensors, block: int) -> MLP:
        """One MLP, or stacked experts, that it fits."""
        inside = self._matrices(inside, block)
        hidden, width = self._sides(inside[self.name(block, self.down)])
        down = self._projection(inside, block, self.down, 1)
        return MLP(
            stack=self.stack,
            block=block,
            ups=tuple(self._projection(inside, block, inner, self.parts) for inner in self.ups),
            down=down if self.experts is None else replace(down, in_out=True),
            width=width,
            hidden=hidden,
            kind=self.kind,
            followers=tuple(self._followers(inside, block, width)),
            sparse=self.sparse,
        )

    def _followers(self, inside: Tensors, block: int, width: int) -> Iterator[Follower]:
        for inner, even in self.followers:
            name = self.name(block, inner)
            if (axis := follower_axis(inside[name].shape, width)) is not None:
                yield Follower(name, axis, even)

    def _projection(self, inside: Tensors, block: int, inner: str, parts: int) -> Projection:
        name = self.name(block, inner)
        shape = inside[name].shape
        return Projection(
            name,
            self._bias(inside, block, inner),
            self.in_out,
            parts,
            interleaved=self.interleaved and parts == 2,
            experts=shape[0] if len(shape) == 3 else self.experts,
            flat=self.experts is not None,
        )

    def _bias(self, inside: Tensors, block: int, inner: str) -> str | None:
        """The bias that is given to a weight, or that its name says is its own."""
        if (given := dict(self.biases).get(inner)) is not None:
            return self.name(block, given)
        if self.experts is not None:
            return None
        weight = self.name(block, inner)
        names = bias_names(weight, stacked=len(inside[weight].shape) == 3)
        return next((name for name in names if name in inside), None)


def numbers(pattern: str, names: Iterable[str]) -> list[str]:
    """What the * of a pattern stands for in these names, in their order."""
    before, _, after = pattern.partition("*")
    start, end = len(before), len(after)
    between = (
        name[start : len(name) - end]
        for name in names
        if len(name) > start + end and name.startswith(before) and name.endswith(after)
    )
    return [number for number in between if number.isascii() and number.isdigit()]


def bias_names(weight: str, *, stacked: bool) -> tuple[str, ...]:
    """What the bias of a weight may be called, or of one that is stacked."""
    return (bias_name(weight), *((f"{weight}_bias", f"{weight}.bias") if stacked else ()))
