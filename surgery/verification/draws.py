"""Tensors that inputs are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Values = dict[str, "torch.Tensor"]


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal numbers."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(shape: tuple[int, ...]) -> torch.Tensor:
    """A mask that leaves nothing out."""
    import torch

    return torch.ones(shape, dtype=torch.int64)


def table(rows: list[Any]) -> torch.Tensor:
    """Whole numbers that are known."""
    import torch

    return torch.tensor(rows, dtype=torch.int64)


def whole(shape: tuple[int, ...], below: int, seed: int) -> torch.Tensor:
    """Whole numbers from 0 to `below`, without it."""
    import torch

    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))
