"""The MLP among the matrices of a block.

Shapes decide, names only break ties: the down projection is the one matrix that leads from the
width back to the hidden size, whatever it is called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import takewhile

from surgery.anatomy.mlp import MLP, Kind, Projection
from surgery.tensor import LazyTensor

INTERLEAVED_NAME = re.compile(r"(^|[._])w13_(weight|dn)")
"""Inkling's fused matrices, which have gate and up neuron by neuron."""

DOWN = re.compile(r"(^|[._])(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|wo|output|down)([._]|$)")


def find_mlp(
    stack: str,
    block: int | None,
    tensors: Mapping[str, LazyTensor],
    hidden: int,
    widths: set[int],
    in_out: bool,
    kind: Kind = "dense",
) -> MLP | str | None:
    """The MLP among the tensors of one block that are neither attention nor norm.

    `hidden` is the model's hidden size, `widths` what the config gives as MLP width, `in_out`
    whether the stack stores its matrices (in, out) where no bias tells. Returns
    None if the block has no two matrices that could belong to one, or a sentence that says why the
    matrices there are can't be told apart.
    """
    matrices = {n: t for n, t in tensors.items() if len(t.shape) == 2 and hidden in t.shape}
    if len(matrices) < 2:
        return None
    by_bias = {
        name: layout
        for name, tensor in matrices.items()
        if (layout := _layout_from_bias(name, tensor, tensors)) is not None
    }
    downs: dict[str, int] = {}
    ups: dict[str, int] = {}
    last = second_of_two(list(matrices))
    for name, tensor in matrices.items():
        rows, columns = reversed(tensor.shape) if by_bias.get(name, in_out) else tensor.shape
        named_down = name == last or bool(DOWN.search(name.rpartition(".")[0]))
        if rows == columns:
            (downs if named_down else ups)[name] = columns
        elif rows == hidden:
            downs[name] = columns
        else:
            ups[name] = rows
    candidates = [name for name, width in downs.items() if width in widths] or list(downs)
    named = [name for name in candidates if DOWN.search(name.rpartition(".")[0])]
    if len(named) == 1 and _apart(named[0], candidates, downs, ups):
        candidates = named  # the others are in other modules: a Mamba's output of that width
    if len(candidates) != 1:
        return f"can't tell which of {', '.join(sorted(matrices))} is the down projection"
    down = candidates[0]
    width = downs[down]
    chosen = _ups_of(down, [name for name, rows in ups.items() if rows in (width, 2 * width)])
    fused = [name for name in chosen if ups[name] == 2 * width]
    if not 1 <= len(chosen) <= 2 or (fused and len(chosen) != 1):
        return f"no up projection of width {width:,} goes with {down}"

    def projection(name: str, parts: int = 1) -> Projection:
        bias = bias_name(name)
        return Projection(
            name,
            bias if bias in tensors else None,
            by_bias.get(name, in_out),
            parts,
            interleaved=parts == 2 and bool(INTERLEAVED_NAME.search(name)),
        )

    return MLP(
        stack=stack,
        block=block,
        ups=tuple(projection(name, 2 if fused else 1) for name in _gate_first(chosen)),
        down=projection(down),
        width=width,
        hidden=hidden,
        kind=kind,
    )


def stores_in_out(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a bias among the tensors of a stack shows that its matrices are (in, out): GPT-2's
    Conv1D is used throughout, and has a bias everywhere."""
    return any(
        _layout_from_bias(name, tensor, tensors)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
    )


def follows_width(
    mlp: MLP, tensors: Mapping[str, LazyTensor], hidden: int | None = None
) -> list[str]:
    """Other tensors with an axis of the MLP's width, in the MLP's own module (in the block, where
    it has none): growing without them would break them. Where the width is the hidden size too, or
    `hidden`, that of the block, matrices say nothing, and vectors outside that module neither."""
    known = set(mlp.tensors) | {mlp.down.bias}
    block = "" if mlp.block is None else f"{mlp.stack}.{mlp.block}."
    own = module_of(block, mlp.tensors)
    fused = mlp.ups[0].parts * mlp.width  # what is added to gate and up together, as in Zamba2
    sizes = {mlp.width, fused} if own and fused != mlp.hidden else {mlp.width}
    return [
        name
        for name, tensor in tensors.items()
        if name not in known and not sizes.isdisjoint(tensor.shape) and name.startswith(own)
        if tensor.dtype.kind != "integer"  # an index, which counts something else
        if mlp.width not in (mlp.hidden, hidden) or (own and len(tensor.shape) == 1)
    ]


def module_of(block: str, names: Iterable[str]) -> str:
    """The module that these tensors of a block have in common, with a dot behind it; "" for the
    block itself."""
    shared = takewhile(
        lambda parts: len(set(parts)) == 1, zip(*(n.split(".") for n in names), strict=False)
    )
    module = "".join(f"{parts[0]}." for parts in shared)
    return module if len(module) > len(block) else ""


def second_of_two(names: list[str]) -> str | None:
    """The higher of two names that differ in a number alone: "dense1" and "dense2", but not the
    same matrix of two blocks in a list."""
    if len(names) != 2 or len({re.sub(r"\d+", "", name) for name in names}) != 1:
        return None
    paths = [parent(name).split(".") for name in names]
    if any(a != b and a.isdigit() for a, b in zip(*paths, strict=False)):
        return None
    return max(names, key=lambda name: list(map(int, re.findall(r"\d+", name))))


def _ups_of(down: str, candidates: list[str]) -> list[str]:
    """Those of the candidates that are in the module of the down projection, if any is."""
    return [name for name in candidates if name.startswith(parent(down))] or candidates


def _apart(
    down: str, candidates: Iterable[str], downs: Mapping[str, int], ups: Mapping[str, int]
) -> bool:
    """Whether the other candidates for a down projection are in other modules: neither in its own
    nor around it. Around one that holds what leads to it too there may be an adapter: two matrices
    of a size of their own, there and back."""
    own = parent(down)
    held = any(name.startswith(own) for name in ups)
    sizes = Counter((*downs.values(), *ups.values()))
    around = [name for name in candidates if name != down and down.startswith(parent(name))]
    return all(
        held and parent(name) != own and sizes[downs[name]] == 2 and downs[name] in ups.values()
        for name in around
    )


def parent(weight: str) -> str:
    """The module that a projection is in, with a dot behind it."""
    return weight.removesuffix(".weight").rpartition(".")[0] + "."


def bias_name(weight: str) -> str:
    """What the bias beside a weight is called."""
    return weight.removesuffix("weight") + "bias"


def _layout_from_bias(
    name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor]
) -> bool | None:
    """True for (in, out), False for (out, in), None where the bias doesn't tell."""
    bias = tensors.get(bias_name(name))
    rows, columns = tensor.shape
    if bias is None or len(bias.shape) != 1 or rows == columns:
        return None
    if bias.shape[0] == rows:
        return False
    return True if bias.shape[0] == columns else None


def _gate_first(names: list[str]) -> list[str]:
    """Growth treats gate and up alike; the order only serves who reads the anatomy."""
    return sorted(names, key=lambda name: (not re.search(r"gate|w1\.|wi_0|linear_1", name), name))
