"""Find the experts of a mixture: one tensor each, or all of a layer stacked in one; routed to, or
shared by all tokens.

Names say what is an expert, shapes what its projections are. How stacked gates and ups lie
(halves, or neuron by neuron) shows in neither: that is a small table of families.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from surgery.anatomy.idle import idle_projections
from surgery.anatomy.inner import Inner, find_inner
from surgery.anatomy.matrices import DOWN, INTERLEAVED_NAME, find_mlp, follows_width
from surgery.anatomy.mlp import MLP, Kind, Projection
from surgery.tensor import LazyTensor

INTERLEAVED = frozenset({"gpt_oss"})
"""Model types whose stacked experts have gate and up neuron by neuron: g0, u0, g1, u1, ..."""

_ATTENTION = re.compile(r"(^|[._])[^\W_]*(attn|attention)\.")  # JetMoE: attention of experts
_CONVOLUTION = re.compile(r"(^|[._])[^\W_]*convs?\d*([._]|$)")  # (out, in, length), and no experts
_NUMBERED = re.compile(r"(?:^|.*\.)\w*experts?[._]\d+(?=\.)")
_MEMBER = re.compile(r"((?:.*?\.)?[A-Za-z_]\w*)\.(\d+)(?=\.)")
_SHARED = re.compile(r"(?:^|.*\.)\w*shared?_(?:experts?|mlp)(?=\.)")
_SHARED_NAME = re.compile(r"share_|shared")
_FLAT = re.compile(r"(?:^|.*\.)experts\.mlp(?=\.(w1|v1|w2)$)")  # DBRX
_GATE = re.compile(r"(^|[._])[^\W_]*gate(\.weight)?$")
_EXPERT_COUNTS = ("moe_num_experts", "num_local_experts", "num_experts", "n_routed_experts")


@dataclass
class Experts:
    """The experts of one block, the tensors that are theirs, and what wasn't understood."""

    mlps: list[MLP] = field(default_factory=list)
    tensors: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def moved(self, prefix: str, other: str, block: int) -> Experts:
        """The same of `block`, whose names begin with `other` where these begin with `prefix`."""
        return Experts(
            [mlp.moved(prefix, other, block) for mlp in self.mlps],
            {other + name.removeprefix(prefix) for name in self.tensors},
            list(self.problems),
        )


def find_experts(
    stack: str,
    block: int,
    tensors: Mapping[str, LazyTensor],
    hidden: int,
    config: Mapping[str, Any],
    choices: Container[int] = (),
    *,
    in_out: bool = False,
) -> Experts:
    """The experts among the tensors of one block. `config` is that of the language model,
    `choices` are the numbers of things between which a matrix of the block may choose, `in_out`
    says how its stack stores matrices."""
    found, prefix = Experts(), f"{stack}.{block}."
    interleaved = str(config.get("model_type")) in INTERLEAVED
    inner = find_inner(prefix, tensors, hidden)
    groups = _groups(prefix, tensors, inner, choices)
    routed = {path: group for (kind, path), group in groups.items() if kind == "routed"}
    idle: dict[str, tuple[Projection, ...]] | None = None
    refused: dict[str, str] = {}
    alike: dict[object, tuple[str, MLP]] = {}
    for (kind, path), group in groups.items():
        size, ways = inner.of(path, group)
        found.tensors |= group.keys() | ways
        form = _form(kind, size, prefix + path, group)
        if form in alike:
            module, first = alike[form]
            found.mlps.append(first.moved(module, prefix + path))
            continue
        mlp: MLP | str | None
        if any(len(tensor.shape) == 3 for tensor in group.values()):
            mlp = _stacked(stack, block, group, size, interleaved)
        elif any(_FLAT.match(name) for name in group):
            mlp = _flat(stack, block, group, size, _count(config))
        else:
            mlp = find_mlp(stack, block, group, size, set(), in_out)
        if mlp is None:
            mlp = "it has no matrix of the hidden size"
        elif not isinstance(mlp, str) and (others := follows_width(mlp, group)):
            mlp = f"{', '.join(others)} follows the MLP's width of {mlp.width:,}"
        if isinstance(mlp, str):
            refused[path] = mlp
            continue
        mlp = replace(mlp, kind=kind)
        alike[form] = prefix + path, mlp
        if idle is None and kind == "routed":
            idle = idle_projections(mlp.ups, prefix, path, routed, config)
            mlp = replace(mlp, idle=tuple(up for ups in idle.values() for up in ups))
        found.mlps.append(mlp)
    found.problems = [f"{path}: {why}" for path, why in refused.items() if path not in (idle or ())]
    return found


def _form(kind: Kind, hidden: int, module: str, group: Mapping[str, LazyTensor]) -> object:
    """What the experts of a block that differ in nothing but their number have in common."""
    inside = [(name.removeprefix(module), t.shape, t.dtype.kind) for name, t in group.items()]
    above, _, number = module.rpartition(".")
    return kind, hidden, above if number.isdigit() else module, tuple(inside)


def _groups(
    block: str, tensors: Mapping[str, LazyTensor], sizes: Inner, choices: Container[int]
) -> dict[tuple[Kind, str], dict[str, LazyTensor]]:
    """The tensors of each expert, or stack of experts, by its kind and the path of its module."""
    groups: dict[tuple[Kind, str], dict[str, LazyTensor]] = defaultdict(dict)
    stacks: dict[str, int] = defaultdict(int)
    lists = _lists_of_experts([name.removeprefix(block) for name in tensors], choices)
    stacked = set()
    for name, tensor in tensors.items():
        path = _parent(name.removeprefix(block))
        if _is_stacked(name, tensor, sizes.at(path)):
            stacked.add(name)
            stacks[path] += 1
    for name, tensor in tensors.items():
        inner = name.removeprefix(block)
        path = _parent(inner)
        if _in_attention(inner):
            continue
        if stacks.get(path, 0) < 2 or not (name in stacked or "bias" in inner):
            member = _member(inner)
            if found := _named_expert(inner):
                path = found
            elif member is not None and member[0] in lists:
                path = f"{member[0]}.{member[1]}"
            else:
                continue
        kind: Kind = "shared" if _SHARED_NAME.search(path) else "routed"
        groups[kind, path][name] = tensor
    return groups


def _lists_of_experts(names: Iterable[str], choices: Container[int]) -> set[str]:
    """Numbered lists of modules of two matrices and more that are alike, as many as are chosen
    from, whatever they are called."""
    members: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if (member := _member(name)) is not None and name.endswith(".weight"):
            members[member[0]][int(member[1])].add(member[2])
    return {
        prefix
        for prefix, found in members.items()
        if len(found) > 1 and len(found) in choices and set(found) == set(range(len(found)))
        if len(found[0]) > 1 and all(inside == found[0] for inside in found.values())
    }


def _is_stacked(name: str, tensor: LazyTensor, sizes: set[int]) -> bool:
    """Whether it is a matrix for each expert: one of a single row is a vector, as RWKV has them."""
    sides = tensor.shape[1:]
    if len(sides) != 2 or sizes.isdisjoint(sides) or 1 in sides:
        return False
    return not (_ATTENTION.search(name) or _CONVOLUTION.search(name))


@lru_cache(maxsize=1 << 12)  # blocks have the same names inside
def _in_attention(inner: str) -> bool:
    return _ATTENTION.search(inner) is not None


@lru_cache(maxsize=1 << 12)
def _named_expert(inner: str) -> str | None:
    """The module of an expert, where the name of a tensor says that it is one's."""
    match = _NUMBERED.match(inner) or _SHARED.match(inner) or _FLAT.match(inner)
    return match.group(0) if match else None


@lru_cache(maxsize=1 << 12)
def _member(inner: str) -> tuple[str, str, str] | None:
    """The list of modules that a tensor is in, the number in it, and what follows."""
    match = _MEMBER.match(inner)
    return (match[1], match[2], inner[match.end() :]) if match else None


@lru_cache(maxsize=1 << 12)
def _parent(inner: str) -> str:
    """The module that holds a projection: of "experts.fc1.weight" and "experts.down_proj" alike."""
    return re.sub(r"\.(weight|bias)$", "", inner).rpartition(".")[0]


def _stacked(
    stack: str, block: int, group: Mapping[str, LazyTensor], hidden: int, interleaved: bool
) -> MLP | str:
    """The MLP whose matrices are (experts, out, in) or (experts, in, out)."""
    matrices = {name: tensor for name, tensor in group.items() if len(tensor.shape) == 3}
    downs = [name for name in matrices if DOWN.search(name.removesuffix(".weight"))]
    ups = [name for name in matrices if name not in downs]
    listed = ", ".join(sorted(matrices))
    if len(downs) != 1 or not ups:
        return f"can't tell which of {listed} is the down projection"
    counts = {tensor.shape[0] for tensor in matrices.values()}
    layouts = {
        (tensor.shape[1] == hidden) != (name in downs)
        for name, tensor in matrices.items()
        if tensor.shape[1] != tensor.shape[2]
    }
    if len(counts) != 1 or len(layouts) != 1:
        return f"can't tell whether {listed} are stored (out, in) or (in, out)"
    in_out, experts = layouts.pop(), counts.pop()
    width = matrices[downs[0]].shape[1 if in_out else 2]
    sizes = [matrices[name].shape[2 if in_out else 1] for name in ups]
    if not width or sizes not in ([width], [2 * width], [width, width]):
        return f"no up projection of width {width:,} goes with {downs[0]}"

    def projection(name: str, parts: int = 1) -> Projection:
        biases = (name.removesuffix("weight") + "bias", f"{name}_bias", f"{name}.bias")
        return Projection(
            name,
            next((b for b in biases if b != name and b in group), None),
            in_out,
            parts,
            interleaved=parts == 2 and (interleaved or bool(INTERLEAVED_NAME.search(name))),
            experts=experts,
        )

    made = tuple(projection(up, size // width) for up, size in zip(ups, sizes, strict=True))
    return MLP(stack, block, made, projection(downs[0]), width, hidden)


def _flat(
    stack: str, block: int, group: Mapping[str, LazyTensor], hidden: int, experts: int | None
) -> MLP | str:
    """DBRX: w1 (gate), v1 (up) and w2 (down), all (experts * width, hidden)."""
    shapes = {tensor.shape for tensor in group.values()}
    shape = shapes.pop()
    known = experts is not None and len(group) == 3 and not shapes and shape[1:] == (hidden,)
    if experts is None or not known or shape[0] % experts:
        return f"can't tell the experts in {', '.join(sorted(group))} apart"
    by_ending = {name.rpartition(".")[2]: name for name in group}
    gate, up, down = (
        Projection(by_ending[ending], in_out=ending == "w2", experts=experts, flat=True)
        for ending in ("w1", "v1", "w2")
    )
    return MLP(stack, block, (gate, up), down, shape[0] // experts, hidden)


def _count(config: Mapping[str, Any]) -> int | None:
    """The number of experts, of this config or of one nested in it."""
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    for part in (config, *nested):
        for key in _EXPERT_COUNTS:
            if type(count := part.get(key)) is int and count > 0:
                return count
    return None


def left_over(name: str, tensor: LazyTensor) -> bool:
    """Whether a tensor that is named after experts is a matrix of theirs, and not a gate."""
    return len(tensor.shape) >= 2 and not _GATE.search(name) and "bias" not in name
