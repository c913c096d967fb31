"""8-bit floats times their scales."""

from __future__ import annotations

from surgery.on_demand import torch


def scale_columns(weight: torch.Tensor, scales: torch.Tensor, *, columns: int) -> torch.Tensor:
    """Rows of a weight in float32, each run of `columns` of them times its scale.

    `scales` has the same rows, with one number for each run; the last run may be shorter.
    DeepSeek-V3 (arXiv 2412.19437), section 3.3: a scale for each 128 x 128 block.
    """
    wide = weight.to(torch.float32)
    factors = scales.to(torch.float32)
    whole = wide.shape[1] // columns
    end = whole * columns
    wide[:, :end].view(len(wide), whole, columns).mul_(factors[:, :whole, None])
    if end < wide.shape[1]:
        wide[:, end:].mul_(factors[:, whole:])
    return wide


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (e - 127) for bytes e, as E8M0 has them; 255 is its NaN."""
    exact = torch.ldexp(torch.ones((), dtype=torch.float64), exponents.to(torch.float64) - 127)
    return torch.where(exponents == 255, torch.nan, exact).to(torch.float32)
