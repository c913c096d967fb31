"""One tensor of a merge, before a method has made anything of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from surgery.dtypes import DTYPES, DType
from surgery.merging.finite import checked_after, checked_in_measure
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy
    import torch


Inputs = tuple[LazyTensor, ...]


@dataclass(frozen=True)
class Job:
    """One tensor to merge. `parameters` has a value for every parameter of the method; `scale`
    is the factor on the merged update. With `bare` the update alone is wanted, unscaled."""

    name: str
    base: LazyTensor | None
    models: tuple[LazyTensor, ...]
    parameters: Mapping[str, Any]
    dtype: DType
    seed: int = 0
    matrix: bool = False
    """Whether this is a weight matrix inside a block."""
    scale: float = 1.0
    bare: bool = False

    @property
    def inputs(self) -> Inputs:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def compute(self) -> DType:
        """The type to compute in."""
        types = [tensor.dtype for tensor in self.inputs]
        return DTYPES["F64" if DTYPES["F64"] in types else "F32"]

    @property
    def numel(self) -> int:
        return self.models[0].numel

    def tensor(
        self,
        kernel: Callable[..., torch.Tensor],
        inputs: Inputs | None = None,
        measure: Callable[[Inputs], Any] | None = None,
        rowwise: bool = True,
        spreads: bool = False,
        measures_all: bool = False,
        direct: Callable[..., numpy.ndarray | None] | None = None,
    ) -> LazyTensor:
        """What `kernel` makes of `inputs`, by default all of them.

        What isn't finite is looked for in every input as it is read; once, in the result, if the
        kernel `spreads` it there; once, by `measure`, if that reads every input (`measures_all`).
        `direct`, told `scale`, does what `kernel` does with bytes of bfloat16, and is left out
        where something else is asked.
        """
        from surgery.kernels import compiled

        inputs = self.inputs if inputs is None else inputs
        kernel = _ending(kernel, self.compute, self.dtype, self.scale, self.bare)
        plain = kernel.keywords["rounding"].plain and compiled.takes(self.inputs)
        if measures_all:
            assert measure is not None
            inputs, measure = checked_in_measure(inputs, measure)
        elif spreads:
            inputs, kernel, _ = checked_after(inputs, kernel)
        return LazyTensor(
            self.models[0].shape,
            self.compute if self.bare else self.dtype,
            inputs=inputs,
            kernel=kernel,
            rowwise=rowwise,
            measure=measure,
            direct=partial(direct, scale=self.scale) if direct is not None and plain else None,
        )


@lru_cache(maxsize=1 << 12)  # most tensors have the same one
def _ending(
    kernel: Callable[..., torch.Tensor], compute: DType, dtype: DType, scale: float, bare: bool
) -> partial[torch.Tensor]:
    """A kernel that is told how to end."""
    from surgery.kernels.merging import Rounding

    return partial(kernel, rounding=Rounding(compute, dtype, scale, bare))
