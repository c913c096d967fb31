"""Lazy tensors of an adapter: its update of one weight, and the transpose of a factor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.dtypes import DTYPES, DType
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch


def low_rank(left: LazyTensor, right: LazyTensor, scale: float, dtype: DType) -> LazyTensor:
    """scale * left @ right in `dtype`, float32 or float64: (rows, r) by (r, columns)."""
    return LazyTensor((left.rows, right.width), dtype, leaf=_LowRank(left, right, scale))


def transposed(matrix: LazyTensor) -> LazyTensor:
    """The transpose of a matrix that lies in a file, as flat and wide as a factor is."""
    assert len(matrix.shape) == 2
    return LazyTensor((matrix.shape[1], matrix.shape[0]), matrix.dtype, leaf=_Transposed(matrix))


def wide(*tensors: LazyTensor) -> DType:
    """The type to compute in: float64 if one of the tensors is, else float32."""
    return DTYPES["F64" if any(tensor.dtype.name == "F64" for tensor in tensors) else "F32"]


@dataclass(frozen=True, eq=False)
class _LowRank:
    """`right` is read anew for every block: that costs little beside r multiplications and
    additions of every row, and no adapter stays in memory."""

    left: LazyTensor
    right: LazyTensor
    scale: float

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        from surgery.kernels.low_rank import product

        left = self.left.read(start, stop)
        return product(left, self.right.read(), scale=self.scale, compute=tensor.dtype)


@dataclass(frozen=True, eq=False)
class _Transposed:
    """A column is a run in each row: read alone, so that a row of the transpose costs no more
    than itself."""

    matrix: LazyTensor

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        import torch

        rows, width = self.matrix.shape
        flat = replace(self.matrix, shape=(rows * width,))
        runs = [flat.read(row * width + start, row * width + stop) for row in range(rows)]
        return torch.stack(runs, dim=1)
