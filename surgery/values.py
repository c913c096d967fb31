"""Leaves that lie in no file: zeros, small tables, values that were computed, and seeded noise.

Noise is a function of (seed, tensor name, position) and of nothing else, so that it is the same
whichever thread asks for it, in whatever blocks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.dtypes import DTYPES, DType
from surgery.tensor import BytesLeaf, LazyTensor

if TYPE_CHECKING:
    import numpy
    import torch


def zeros(shape: tuple[int, ...], dtype: DType) -> LazyTensor:
    """A tensor of zeros."""
    return LazyTensor(shape, dtype, leaf=_Zeros())


def table(values: numpy.ndarray) -> LazyTensor:
    """A vector of int64 values that an operation has worked out, to go with rows."""
    return LazyTensor(values.shape, DTYPES["I64"], leaf=_Table(values))


def held(values: torch.Tensor) -> LazyTensor:
    """A tensor of floats that is in memory."""
    dtype = next(d for d in DTYPES.values() if d.kind == "float" and d.torch == values.dtype)
    return LazyTensor(tuple(values.shape), dtype, leaf=_Held(values))


def noise(shape: tuple[int, ...], seed: int, name: str) -> LazyTensor:
    """Float32 noise, uniform in [-1, 1), for the tensor `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return LazyTensor(shape, DTYPES["F32"], leaf=_Noise(int.from_bytes(digest[:16], "little")))


@dataclass(frozen=True)
class _Zeros:
    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.zeros(tensor.shape_of(stop - start), dtype=tensor.dtype.torch)


@dataclass(frozen=True, eq=False)
class _Table:
    values: numpy.ndarray

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.values[start:stop].copy())


@dataclass(frozen=True, eq=False)
class _Held:
    values: torch.Tensor

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        return self.values.reshape(tensor.shape_of(tensor.rows))[start:stop].clone()


@dataclass(frozen=True)
class _Noise(BytesLeaf):
    """The generator PCG64 (O'Neill 2014, its DXSM variant), which can be moved to any position
    without the ones before it. A step gives 64 bits, and an element takes half of them."""

    key: int

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        import numpy
        import torch

        values = self.read_bytes(tensor, start, stop).view(numpy.float32)
        return torch.from_numpy(values).reshape(tensor.shape_of(stop - start))

    def read_bytes(self, tensor: LazyTensor, start: int, stop: int) -> numpy.ndarray:
        import numpy

        from surgery.kernels import compiled

        first, last = start * tensor.width, stop * tensor.width
        generator = numpy.random.PCG64DXSM(self.key)
        generator.advance(first // 2)
        if compiled.library() is not None:
            return compiled.noise(last - first, first, generator)
        words = generator.random_raw((last + 1) // 2 - first // 2).astype("<u8", copy=False)
        halves = words.view("<u4")[first % 2 :][: last - first]
        values = (halves >> numpy.uint32(8)).astype(numpy.float32)  # 24 bits: exact
        values *= numpy.float32(2**-23)
        values -= numpy.float32(1)
        return values.view(numpy.uint8)
