"""Rows that several models have, made into one."""

from __future__ import annotations

from surgery.dtypes import DType
from surgery.on_demand import torch


def average(*rows: torch.Tensor, compute: DType, dtype: DType) -> torch.Tensor:
    """The mean of the models' rows, in `compute`, rounded once to `dtype`; of one model alone
    that is a change of type."""
    if len(rows) == 1:
        return rows[0].to(dtype.torch)
    total = rows[0].to(compute.torch, copy=True)
    for row in rows[1:]:
        total.add_(row.to(compute.torch))
    return total.div_(len(rows)).to(dtype.torch)
