"""FP8 with scales: which tensor scales which, and the product as a lazy tensor in float32.

A weight of 8-bit floats is cut into blocks, and each block has one scale, by which its values are
multiplied: blocks of 128 x 128 (DeepSeek-V3's `weight_scale_inv`, which in spite of its name is a
factor and no divisor), of one row (`weight_scale` of FBGEMM and of compressed-tensors'
"channel"), of 32 in a row (MXFP8), or the whole matrix ("tensor", and ModelOpt's FP8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from surgery.dtypes import DTYPES
from surgery.quantization.schemes import FLOAT8, microscaled, quantization_config, weight_groups
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch

DEFAULT_BLOCK = (128, 128)
MICROSCALED = (1, 32)
ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale")
"""Scales of what goes into a quantized product: they are no part of the weight."""


@dataclass(frozen=True)
class Scaled:
    """A weight of 8-bit floats, the name of its scale, and the size of a block of it. `fixed` says
    that blocks have that size whatever the matrix's: else they run along it as far as it goes."""

    weight: str
    scale: str
    block: tuple[int, int]
    fixed: bool = True


@dataclass(frozen=True)
class Layout:
    """All weights that have scales, by name; the scales of activations; and what is wrong."""

    scaled: Mapping[str, Scaled]
    activations: Mapping[str, str]
    """The weight beside which each lies, by its name."""
    problems: tuple[str, ...]

    @property
    def weight_of(self) -> dict[str, str]:
        """The weight that a tensor belongs to, for every scale."""
        return {found.scale: name for name, found in self.scaled.items()} | dict(self.activations)


def find_layout(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Layout:
    """Which tensor scales which, from names, shapes and config."""
    given = quantization_config(config) or {}
    scaled: dict[str, Scaled] = {}
    problems = []
    for name, tensor in tensors.items():
        if tensor.dtype.name not in FLOAT8:
            continue
        found = _scaled(name, tensors, given)
        if isinstance(found, str):
            problems.append(found)
        else:
            scaled[name] = found
    stems = {n.removesuffix("weight") if n.endswith("weight") else f"{n}_": n for n in scaled}
    activations = {
        stem + word: stems[stem]
        for stem in sorted(stems)
        for word in ACTIVATIONS
        if stem + word in tensors
    }
    used = {one.scale for one in scaled.values()}
    problems += [
        f"{name} is {tensor.dtype} {list(tensor.shape)}, and there is no weight of 8-bit floats "
        f"that it would scale"
        for name, tensor in tensors.items()
        if name.endswith(("_scale_inv", ".weight_scale")) and name not in used and not problems
    ]
    return Layout(scaled, activations, tuple(problems))


def dequantized_tensor(tensors: Mapping[str, LazyTensor], found: Scaled) -> LazyTensor:
    """The weight's values in float32."""
    from surgery.kernels.dequantize import scale_columns

    weight = tensors[found.weight]
    rows, columns = weight.shape[-2:]
    across = -(-columns // found.block[1])
    leaf = _ScaleOfRows(tensors[found.scale], rows, found.block[0], across)
    scales = LazyTensor((*weight.shape[:-1], across), DTYPES["F32"], leaf=leaf)
    kernel = partial(scale_columns, columns=found.block[1])
    return LazyTensor(weight.shape, DTYPES["F32"], inputs=(weight, scales), kernel=kernel)


@dataclass(frozen=True)
class _ScaleOfRows:
    """A leaf: for every row of a weight the scales of the blocks that it runs through. The
    weight's matrices have `rows` rows each, a block has `height`, and `across` of them lie side by
    side."""

    scale: LazyTensor
    rows: int
    height: int
    across: int

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        import torch

        from surgery.kernels.dequantize import powers_of_two

        if start == stop or not self.across:
            return torch.empty((stop - start, self.across), dtype=torch.float32)
        at = torch.arange(start, stop)
        down = -(-self.rows // self.height)
        blocks = at // self.rows * down + at % self.rows // self.height
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        values = self.scale.read(first, last).reshape(last - first, self.across)
        if values.dtype == torch.uint8:
            values = powers_of_two(values)
        return values.to(torch.float32).index_select(0, blocks - first)


def _scaled(name: str, tensors: Mapping[str, LazyTensor], given: Mapping[str, Any]) -> Scaled | str:
    """The scale of a weight, or what is wrong."""
    weight = tensors[name]
    blocks_of = {f"{name}_scale_inv": _block_size(given), f"{name}_scale": _strategy_block(given)}
    scale = next((candidate for candidate in blocks_of if candidate in tensors), None)
    if scale is None:
        return (
            f"{name} is {weight.dtype}, and neither {name}_scale_inv nor {name}_scale is there: "
            f"its values can't be told"
        )
    if len(weight.shape) < 2:
        return f"{name} is {weight.dtype} {list(weight.shape)}, and only matrices have scales"
    if f"{name}_zero_point" in tensors:
        return (
            f"{name} has a zero point ({name}_zero_point), and 8-bit floats with one aren't known"
        )
    if reason := _bad_type(tensors[scale], given):
        return f"{scale} is {tensors[scale].dtype}: {reason}"
    *outer, rows, columns = weight.shape
    sizes = [(rows, columns)]
    if (block := blocks_of[scale]) is not None:
        sizes.insert(0, block)
    if scale.endswith("_scale"):
        sizes.append((1, columns))
    for height, width in sizes:
        grid = (*outer, -(-rows // max(1, height)), -(-columns // max(1, width)))
        if tensors[scale].shape in _ways_to_write(grid):
            return Scaled(name, scale, (height, width), fixed=(height, width) == block)
    return (
        f"{scale} is {list(tensors[scale].shape)}, and {name} is {list(weight.shape)}: that is no "
        f"scale for each {' or '.join(f'{height} x {width}' for height, width in sizes)} block"
    )


def _ways_to_write(grid: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes in which scales of a grid of blocks are stored: without ones at the end, too."""
    ways = {grid}
    if grid[-1] == 1:
        ways.add(grid[:-1])
        if grid[-2] == 1:
            ways.add(grid[:-2])
    return ways | ({(1,)} if prod(grid) == 1 else set())


def _block_size(given: Mapping[str, Any]) -> tuple[int, int]:
    """What the config says of blocks, or what DeepSeek-V3 has."""
    default = MICROSCALED if microscaled(given) else DEFAULT_BLOCK
    return _pair(given.get("weight_block_size")) or default


def _strategy_block(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """The blocks of compressed-tensors' strategy of that name, if it is used, or of MXFP8."""
    if microscaled(given):
        return MICROSCALED
    groups = weight_groups(given)
    return next((pair for group in groups if (pair := _pair(group.get("block_structure")))), None)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    return None


def _bad_type(scale: LazyTensor, given: Mapping[str, Any]) -> str | None:
    """Why numbers of that type are no scales."""
    if scale.dtype.name in ("F32", "BF16", "F16", "F8_E8M0"):
        return None
    if scale.dtype.name == "U8":
        if given.get("scale_fmt") == "ue8m0" or microscaled(given):
            return None
        return (
            "bytes are exponents of two where quantization_config has scale_fmt ue8m0, "
            "and it hasn't"
        )
    return "scales are floats"
