"""Find the MLP of a block: which tensors widen with it, along which axis.

Shapes decide, names only break ties: the down projection is the one matrix that leads from the
width back to the hidden size, whatever it is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.tensor import LazyTensor


@dataclass(frozen=True)
class Projection:
    """A matrix of an MLP, by its name, with its bias if it has one.

    `in_out` is True for GPT-2's Conv1D, stored (in, out); torch's Linear is (out, in). `parts`
    is 2 where gate and up are stacked in one matrix, gate first.
    """

    weight: str
    bias: str | None = None
    in_out: bool = False
    parts: int = 1


@dataclass(frozen=True)
class MLP:
    """The MLP of one block: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    `ups` are the projections into the hidden activation (gate and up, or one), `width` is its
    size p, `hidden` the size of x.
    """

    stack: str
    block: int
    ups: tuple[Projection, ...]
    down: Projection
    width: int
    hidden: int

    @property
    def gated(self) -> bool:
        return len(self.ups) == 2 or self.ups[0].parts == 2

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that widen with the MLP (all but the bias of `down`)."""
        ups = [name for up in self.ups for name in (up.weight, up.bias) if name]
        return (*ups, self.down.weight)


_DOWN = re.compile(r"(^|[._])(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|wo|output|down)([._]|$)")


def find_mlp(
    stack: str,
    block: int,
    tensors: Mapping[str, LazyTensor],
    hidden: int,
    widths: set[int],
    in_out: bool,
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
    for name, tensor in matrices.items():
        rows, columns = reversed(tensor.shape) if by_bias.get(name, in_out) else tensor.shape
        named_down = bool(_DOWN.search(name.rpartition(".")[0]))
        if rows == columns:
            (downs if named_down else ups)[name] = columns
        elif rows == hidden:
            downs[name] = columns
        else:
            ups[name] = rows
    candidates = [name for name, width in downs.items() if width in widths] or list(downs)
    if len(candidates) != 1:
        return f"can't tell which of {', '.join(sorted(matrices))} is the down projection"
    down = candidates[0]
    width = downs[down]
    chosen = [name for name, rows in ups.items() if rows in (width, 2 * width)]
    fused = [name for name in chosen if ups[name] == 2 * width]
    if not 1 <= len(chosen) <= 2 or (fused and len(chosen) != 1):
        return f"no up projection of width {width:,} goes with {down}"

    def projection(name: str, parts: int = 1) -> Projection:
        bias = _bias_name(name)
        return Projection(name, bias if bias in tensors else None, by_bias.get(name, in_out), parts)

    return MLP(
        stack=stack,
        block=block,
        ups=tuple(projection(name, 2 if fused else 1) for name in _gate_first(chosen)),
        down=projection(down),
        width=width,
        hidden=hidden,
    )


def stores_in_out(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a bias among the tensors of a stack shows that its matrices are (in, out): GPT-2's
    Conv1D is used throughout, and has a bias everywhere."""
    return any(
        _layout_from_bias(name, tensor, tensors)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
    )


def follows_width(mlp: MLP, tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Other tensors of the block with an axis of the MLP's width: growing would break them."""
    known = set(mlp.tensors) | {mlp.down.bias}
    return [
        name
        for name, tensor in tensors.items()
        if name not in known and mlp.width in tensor.shape and mlp.width != mlp.hidden
    ]


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _layout_from_bias(
    name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor]
) -> bool | None:
    """True for (in, out), False for (out, in), None where the bias doesn't tell."""
    bias = tensors.get(_bias_name(name))
    rows, columns = tensor.shape
    if bias is None or len(bias.shape) != 1 or rows == columns:
        return None
    if bias.shape[0] == rows:
        return False
    return True if bias.shape[0] == columns else None


def _gate_first(names: list[str]) -> list[str]:
    """Growth treats gate and up alike; the order only serves who reads the anatomy."""
    return sorted(names, key=lambda name: (not re.search(r"gate|w1\.|wi_0|linear_1", name), name))
