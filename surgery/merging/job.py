"""One tensor of a merge, before a method has made anything of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.dtypes import DTYPES, DType
from surgery.merging.finite import checked_after, checked_in_measure
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch

    from surgery.kernels.merging import Rounding

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
    def wide(self) -> DType:
        """The type to compute in."""
        return DTYPES["F64" if any(t.dtype.name == "F64" for t in self.inputs) else "F32"]

    @property
    def compute(self) -> torch.dtype:
        return self.wide.torch

    @property
    def numel(self) -> int:
        return self.models[0].numel

    @property
    def rounding(self) -> Rounding:
        from surgery.kernels.merging import Rounding

        return Rounding(self.compute, self.dtype.torch, self.scale, self.bare)

    def tensor(
        self,
        kernel: Callable[..., torch.Tensor],
        inputs: Inputs | None = None,
        measure: Callable[[Inputs], Any] | None = None,
        rowwise: bool = True,
        spreads: bool = False,
        measures_all: bool = False,
    ) -> LazyTensor:
        """What `kernel` makes of `inputs`, by default all of them.

        What isn't finite is looked for in every input as it is read; once, in the result, if the
        kernel `spreads` it there; once, by `measure`, if that reads every input (`measures_all`).
        """
        inputs = self.inputs if inputs is None else inputs
        kernel = partial(kernel, rounding=self.rounding)
        if measures_all:
            assert measure is not None
            inputs, measure = checked_in_measure(inputs, measure)
        elif spreads:
            inputs, kernel, _ = checked_after(inputs, kernel)
        return LazyTensor(
            self.models[0].shape,
            self.wide if self.bare else self.dtype,
            inputs=inputs,
            kernel=kernel,
            rowwise=rowwise,
            measure=measure,
        )
