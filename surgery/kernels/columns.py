"""Rearranged columns, for the layouts in which neurons are columns."""

from __future__ import annotations

from surgery.on_demand import torch


def take_columns(weight: torch.Tensor, *, sources: torch.Tensor) -> torch.Tensor:
    """Column j is column sources[j] of `weight` (rows, p), or zero where that is -1."""
    bits = weight.view(torch.uint8) if weight.element_size() == 1 else weight
    out = bits.index_select(1, sources.clamp(min=0))
    if bool((padding := sources < 0).any()):
        out[:, padding] = 0  # which torch has no kernel for in 8-bit floats
    return out.view(weight.dtype)
