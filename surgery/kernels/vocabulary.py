"""Rows that several models have, made into one."""

from __future__ import annotations

import torch


def average(*rows: torch.Tensor, compute: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """The mean of the models' rows, in `compute`, rounded once to `dtype`; of one model alone
    that is a change of type."""
    if len(rows) == 1:
        return rows[0].to(dtype)
    total = rows[0].to(compute, copy=True)
    for row in rows[1:]:
        total.add_(row.to(compute))
    return total.div_(len(rows)).to(dtype)
