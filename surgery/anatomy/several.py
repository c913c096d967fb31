"""Find MLPs where a block holds several, as a stage of blocks, a block with one MLP before
attention and one behind it, or one for each kind of input; and MLPs outside the stacks.

Modules are gone through from the inside out: what lies in one module belongs together, and
between modules the words of their names tell what does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from surgery.anatomy.followers import apart, with_followers
from surgery.anatomy.matrices import DOWN, bias_name, find_mlp, module_of, parent, second_of_two
from surgery.anatomy.mlp import MLP, Projection
from surgery.anatomy.places import ATTENTION, NORM, Place, Role
from surgery.tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]

_DIRECTION = re.compile(
    r"inter|intermediate|output|out|up|down|gate|proj|dense|fc\d?|linear\d?|layer|wi|wo|w\d|\d+"
)
"""Words that say where in an MLP a matrix is, and not in which."""


def find_several(
    stack: str,
    block: int | None,
    tensors: Tensors,
    places: Mapping[str, Place],
    hidden: int | None,
    widths: set[int],
    in_out: bool,
    *,
    uneven: bool = False,
) -> list[tuple[MLP, str | None]]:
    """All MLPs among `tensors`, those of one block or those outside the blocks, each with the
    reason why it can't be grown, if it can't. `hidden` is the size that the block has, for an MLP
    that has no norm nearby which tells its own; with `uneven` it may lead to another size."""
    search = Search(stack, block, tensors, places, hidden, widths, in_out, uneven)
    prefix = "" if block is None else f"{stack}.{block}." if stack else f"{block}."
    matrices = [
        name
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
        and places[name].role in search.roles
        and not ATTENTION.search(name.removeprefix(prefix))
    ]
    found = list(search.inside(prefix, matrices))
    found = [mlp for mlp in found if not _leads_to_others(mlp, found, hidden)]
    theirs = {name for mlp in found for name in (*mlp.tensors, mlp.down.bias)}
    others = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in theirs and places[name].role is not Role.ATTENTION
    }
    return apart([with_followers(mlp, others, tensors, places, hidden) for mlp in found])


def _leads_to_others(mlp: MLP, found: list[MLP], hidden: int | None) -> bool:
    """Whether the matrices lead from the size of a block to that which other MLPs in it work on,
    and back: those of a bottleneck, which has them in between and no activation."""
    own = module_of("", mlp.tensors)
    at_edge = mlp.block is not None and mlp.hidden == hidden
    return at_edge and any(
        mlp.width == other.hidden != hidden and other.down.weight.startswith(own) for other in found
    )


def misread(mlp: MLP, tensors: Tensors, places: Mapping[str, Place]) -> bool:
    """Whether the norms around an MLP of a block say that its hidden size is another: a stage
    of blocks is as wide as the model only at the end."""
    search = Search(mlp.stack, mlp.block, tensors, places, mlp.hidden, set(), in_out=False)
    return search.hidden_of([up.weight for up in mlp.ups] + [mlp.down.weight]) != mlp.hidden


def around_others(
    mlp: MLP, tensors: Tensors, places: Mapping[str, Place], widths: set[int]
) -> bool:
    """Whether what was taken for the MLP of a block is a bottleneck around others: norms have its
    width, and MLPs lead from that and back."""
    search = Search(mlp.stack, mlp.block, tensors, places, mlp.hidden, set(), in_out=False)
    if mlp.width in (mlp.hidden, *widths) or mlp.width not in search.norms("", ""):
        return False
    found = find_several(mlp.stack, mlp.block, tensors, places, mlp.hidden, widths, in_out=False)
    return any(other.hidden == mlp.width for other, _ in found)


def another_may_be(
    found: list[MLP], tensors: Tensors, places: Mapping[str, Place], hidden: int | None
) -> bool:
    """Whether matrices are left in the module of an MLP, or beside it, that lead somewhere and
    back, as those of one that wasn't found do. In a module apart they say nothing of it, and from
    the `hidden` size of the block to that of an MLP and back lead those of a bottleneck
    (MobileBERT)."""
    theirs = {name for mlp in found for name in mlp.tensors}
    for mlp in found:
        own = module_of(f"{mlp.stack}.{mlp.block}.", mlp.tensors)
        left = {
            tensor.shape
            for name, tensor in tensors.items()
            if len(tensor.shape) == 2 and name not in theirs
            if name.startswith(own) or own.startswith(parent(name))
            if places[name].role is Role.UNKNOWN and set(tensor.shape) != {hidden, mlp.hidden}
        }
        if any(rows != columns and (columns, rows) in left for rows, columns in left):
            return True
    return False


@dataclass(frozen=True)
class Search:
    """What is known of the tensors among which MLPs are looked for."""

    stack: str
    block: int | None
    tensors: Tensors
    places: Mapping[str, Place]
    hidden: int | None
    widths: set[int]
    in_out: bool
    uneven: bool = False
    """Whether an MLP may lead from one size to another, as a projector between two parts does."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those that a matrix of an MLP may have been given. What isn't in a block may be called
        after a head that it is in."""
        inside = (Role.UNKNOWN, Role.MLP)
        return inside if self.block is not None else (*inside, Role.HEAD)

    def inside(self, module: str, names: list[str]) -> Iterator[MLP]:
        """The MLPs of a module (with a dot behind it): those of the modules in it, then what is
        left."""
        if (mlp := self._as_in_bert(module, names)) is not None:
            yield mlp
            names = [name for name in names if name not in mlp.tensors]
        children: dict[str, list[str]] = defaultdict(list)
        for name in names:
            child, dot, _ = name.removeprefix(module).partition(".")
            children[child + dot].append(name)
        left = []
        for child, inner in children.items():
            found = list(self.inside(module + child, inner)) if len(inner) > 1 else []
            yield from found
            taken = {name for mlp in found for name in mlp.tensors}
            left += [name for name in inner if name not in taken]
        yield from self._made_of(left)

    def _as_in_bert(self, module: str, names: list[str]) -> MLP | None:
        """The MLP of a matrix in `intermediate` and one in `output` that are no part of another."""
        pair = [
            name
            for side in ("intermediate.", "output.")
            for name in names
            if name.startswith(module + side) and "." not in _within(name, module + side)
        ]
        return self._one(pair) if len(pair) == 2 else None

    def _made_of(self, names: list[str]) -> Iterator[MLP]:
        """The MLPs of the matrices that are left in a module: one of all, or one for each set of
        words that their names share."""
        if len(names) < 2:
            return
        mlp = self._one(names)
        if mlp is not None and (self.uneven or set(names) <= set(mlp.tensors)):
            yield mlp
            return
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in names:
            words = re.split(r"[._]", name.removesuffix(".weight"))
            alike[tuple(w for w in words if not _DIRECTION.fullmatch(w))].append(name)
        for group in alike.values():
            if len(group) > 1 and (mlp := self._one(group)) is not None:
                yield mlp

    def _one(self, names: list[str]) -> MLP | None:
        """The MLP of these matrices. In different modules, they need a name for the last one."""
        parents = {name.removesuffix(".weight").rpartition(".")[0] for name in names}
        named = any(DOWN.search(name.rpartition(".")[0]) for name in names)
        if len(parents) > 1 and not named and second_of_two(names) is None:
            return None
        inside = {name: self.tensors[name] for name in names}
        for name in names:
            if (bias := bias_name(name)) in self.tensors:
                inside[bias] = self.tensors[bias]
        stack = module_of("", names).removesuffix(".") if self.block is None else self.stack
        if (hidden := self.hidden_of(names)) is not None:
            mlp = find_mlp(stack, self.block, inside, hidden, self.widths, self.in_out)
            if isinstance(mlp, MLP):
                return mlp
        return _uneven(stack, self.block, names, inside) if self.uneven else None

    def hidden_of(self, names: list[str]) -> int | None:
        """The size of what goes in and comes out: what a norm beside the last matrix has, or a side
        of the matrices that a norm nearby has. A norm in the MLP's own module may be of its width,
        and is asked last."""
        if (size := self._behind(names)) is not None:
            return size
        sides = {size for name in names for size in self.tensors[name].shape}
        own = module_of("", names)
        parents = {name.removesuffix(".weight").rpartition(".")[0] for name in names}
        of_a_block = len(parents) > 1 or own.rstrip(".").rpartition(".")[2].isdigit()
        around = ["", *(own[: dot.end()] for dot in re.finditer(r"\.", own))][-2::-1]
        inside = self.norms(own, "")
        levels = [self.norms(module, own) for module in around]
        for sizes in [inside, *levels] if of_a_block else [*levels[:1], inside, *levels[1:]]:
            if len(found := sizes & sides) == 1:
                return found.pop()
        return self.hidden if self.hidden in sides else None

    def _behind(self, names: list[str]) -> int | None:
        """The size of the norm that is with the last matrix in a module of their own, if that is
        what the matrix gives."""
        last = [name for name in names if DOWN.search(name.rpartition(".")[0])]
        if len(last) != 1 or self.in_out:
            return None
        module = parent(last[0])
        sizes = {
            tensor.shape[0]
            for name, tensor in self.tensors.items()
            if name.startswith(module) and len(tensor.shape) == 1
            if "." not in (inner := _within(name, module)) and NORM.search(inner)
        }
        alone = not any(name.startswith(module) for name in names if name != last[0])
        rows = self.tensors[last[0]].shape[0]
        return rows if alone and sizes == {rows} else None

    def norms(self, module: str, without: str) -> set[int]:
        """The sizes of the norms in a module, but in the one inside that is left out."""
        return {
            tensor.shape[0]
            for name, tensor in self.tensors.items()
            if name.startswith(module) and not (without and name.startswith(without))
            if len(tensor.shape) == 1 and NORM.search(name)  # even in what is called a head
        }


def _within(name: str, module: str) -> str:
    """What the module is called in which a weight or a bias is, inside another."""
    return name.removeprefix(module).rpartition(".")[0]


def _uneven(stack: str, block: int | None, names: list[str], tensors: Tensors) -> MLP | None:
    """The MLP that leads from one size to another, if there is one way to see the matrices so:
    the rows of those before it are the columns of the last one, and no other has that size."""
    found = []
    for down in names:
        width = tensors[down].shape[1]
        ups = [name for name in names if tensors[name].shape[0] == width and name != down]
        rest = [name for name in names if name != down and name not in ups]
        alike = len({tensors[name].shape for name in ups}) == 1
        if alike and len(ups) <= 2 and not any(width in tensors[name].shape for name in rest):
            found.append((ups, down, width))
    if len(found) != 1:
        return None
    [(ups, down, width)] = found

    def projection(name: str) -> Projection:
        bias = bias_name(name)
        return Projection(name, bias if bias in tensors else None)

    made = tuple(map(projection, ups))
    return MLP(stack, block, made, projection(down), width, tensors[ups[0]].shape[1])
