"""The scales of a wider MLP of 8-bit floats: its weights are copied as they are, in whole blocks,
and what halves the outgoing ones is their scales.

Half of an 8-bit float has to be rounded, half of a scale hasn't. So neurons are copied in the
blocks that share a scale, and the scales of the down projection are split among the copies, by
the exact rule that splits weights (kernels/split.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from typing import TYPE_CHECKING

from surgery.anatomy import MLP, Projection
from surgery.checkpoint import Checkpoint
from surgery.errors import ArgumentError, UnsupportedError
from surgery.growth import Growth
from surgery.operations.neurons import copied_neurons, split_neurons
from surgery.quantization.fp8 import Scaled
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch

REMEDY = "`surgery dequantize` it first"
SPLITTABLE = ("F32", "BF16", "F16")


def neurons_in_a_block(base: Checkpoint, mlp: MLP, scaled: Mapping[str, Scaled]) -> int:
    """How many neurons share scales, and are copied together: 1 without scales.

    Raises UnsupportedError if the MLP can't be grown as it is stored.
    """
    unit = 1
    for follower in mlp.followers:
        if follower.name in scaled:
            raise UnsupportedError(f"{follower.name} is stored with scales: {REMEDY}")
    for name, projection, axis in _with_scales(mlp, scaled):
        size = _block(base, scaled[name], axis)
        if size is not None:
            unit = lcm(unit, size)
            if mlp.width % size:
                raise UnsupportedError(
                    f"its width of {mlp.width:,} isn't a multiple of {size}, and so many neurons "
                    f"share a scale and are copied together: {REMEDY}"
                )
        dtype = base[scaled[name].scale].dtype
        if projection is mlp.down and dtype.name not in SPLITTABLE:
            raise UnsupportedError(
                f"{scaled[name].scale} is {dtype}, which isn't split here: {REMEDY}"
            )
    return unit


def check_blocks(base: Checkpoint, growths: Sequence[Growth], scaled: Mapping[str, Scaled]) -> None:
    """Raise for growths that don't copy whole blocks, or that no scale can split."""
    wrong, impossible = [], []
    for growth in growths:
        mlp = growth.mlp
        unit = neurons_in_a_block(base, mlp, scaled)
        where = f"{mlp.stack}.{mlp.block}"
        if growth.width % unit:
            wrong.append(
                f"{where} would have a width of {growth.width:,}, and its 8-bit floats have a "
                f"scale for each {unit} neurons: give multiple_of={unit} (--multiple-of {unit}), "
                f"or {REMEDY}"
            )
        for name, projection, axis in _with_scales(mlp, scaled):
            times = growth.width // mlp.width
            if projection is not mlp.down or _block(base, scaled[name], axis) is not None:
                continue
            if growth.width != times * mlp.width or times & (times - 1) or growth.padding:
                impossible.append(
                    f"{where} can't be grown from {mlp.width:,} to {growth.width:,}: all columns "
                    f"of {name} share a scale, which halves them all or none, so that it can be "
                    f"2, 4, 8... times as wide; for more, {REMEDY}"
                )
    UnsupportedError.raise_if(dict.fromkeys(impossible))
    ArgumentError.raise_if(dict.fromkeys(wrong))


def grown_scales(
    base: Mapping[str, LazyTensor], growth: Growth, scaled: Mapping[str, Scaled]
) -> dict[str, LazyTensor]:
    """The scales of the MLP's weights after `growth`, in the place of those of that name."""
    tensors = {}
    for name, projection, axis in _with_scales(growth.mlp, scaled):
        found = scaled[name]
        scale = base[found.scale]
        size = _block(base, found, axis)
        down = projection is growth.mlp.down
        if size is not None:
            grid = _grid(base[name].shape, found.block)
            blocks = _in_blocks(growth, size)
            wide = blocks.shape(grid, axis)
            of_blocks = replace(projection, weight=found.scale, bias=None)
            make = split_neurons if down else copied_neurons
            made = make(_as(scale, grid), of_blocks, blocks, axis, wide)
            tensors[found.scale] = made if len(scale.shape) == len(grid) else _flat(made, scale)
        elif down:
            tensors[found.scale] = _divided(scale, growth.width // growth.mlp.width)
    return tensors


def _with_scales(mlp: MLP, scaled: Mapping[str, Scaled]) -> Iterator[tuple[str, Projection, int]]:
    return (each for each in (mlp.axes() if scaled else ()) if each[0] in scaled)


def _block(base: Mapping[str, LazyTensor], found: Scaled, axis: int) -> int | None:
    """How many neurons, along that axis, share a scale; None if all do, however many."""
    shape = base[found.weight].shape
    size = found.block[axis - (len(shape) - 2)]
    return None if size == shape[axis] and not found.fixed else size


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    *outer, rows, columns = shape
    return (*outer, -(-rows // block[0]), -(-columns // block[1]))


def _in_blocks(growth: Growth, size: int) -> Growth:
    """The same growth where `size` neurons are one."""
    return Growth(
        replace(growth.mlp, width=growth.mlp.width // size),
        growth.width // size,
        tuple((start // size, stop // size) for start, stop in growth.copied),
        growth.padding // size,
    )


def _as(scale: LazyTensor, grid: tuple[int, ...]) -> LazyTensor:
    """The scale in the shape of its grid, which may be stored without ones at the end."""
    if scale.shape == grid:
        return scale
    return LazyTensor(
        grid, scale.dtype, inputs=(scale,), kernel=partial(_reshaped, shape=grid), rowwise=False
    )


def _flat(made: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """A grown grid without the ones at its end, as the scale was stored."""
    shape = made.shape
    while len(shape) > len(scale.shape) and shape[-1] == 1:
        shape = shape[:-1]
    return _as(made, shape)


def _divided(scale: LazyTensor, times: int) -> LazyTensor:
    from surgery.kernels.split import divide

    kernel = partial(divide, times=times)
    return LazyTensor(scale.shape, scale.dtype, inputs=(scale,), kernel=kernel)


def _reshaped(values: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    return values.reshape(shape)
