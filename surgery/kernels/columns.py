"""Rearranged columns, for the layouts in which neurons are columns."""

from __future__ import annotations

import torch


def take_columns(weight: torch.Tensor, *, sources: torch.Tensor) -> torch.Tensor:
    """Column j is column sources[j] of `weight` (rows, p), or zero where that is -1."""
    out = weight.index_select(1, sources.clamp(min=0))
    if bool((padding := sources < 0).any()):
        out[:, padding] = 0
    return out
