"""The same values in another type."""

from __future__ import annotations

from surgery.dtypes import DType
from surgery.on_demand import torch


def rounded(values: torch.Tensor, *, dtype: DType) -> torch.Tensor:
    """The values, rounded to `dtype`."""
    return values.to(dtype.torch)
