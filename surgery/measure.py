"""Statistics over whole tensors: streaming passes that return small eager values.

Sums are taken over blocks of a fixed size and added exactly (`math.fsum`), so that they don't
depend on threads or on how the writer cuts its work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.anatomy import MLP
from surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: 1 MB in float32, which stays in the cache of a core."""


def neuron_norms(checkpoint: Checkpoint, mlp: MLP) -> torch.Tensor:
    """||incoming|| * ||outgoing|| of every hidden neuron, float64 of shape (p,).

    Incoming is the neuron's row of the up projection (of gate and up together in a gated MLP),
    outgoing its column of the down projection.
    """
    import torch

    incoming = torch.zeros(mlp.width, dtype=torch.float64)
    for up in mlp.ups:
        squares = _squares(checkpoint, up.weight, axis=int(up.in_out))
        incoming += squares.reshape(up.parts, mlp.width).sum(0)
    outgoing = _squares(checkpoint, mlp.down.weight, axis=int(not mlp.down.in_out))
    return (incoming * outgoing).sqrt_()


def _squares(checkpoint: Checkpoint, name: str, axis: int) -> torch.Tensor:
    """The sum of squares of every row (axis 0) or column (axis 1) of a matrix, in float64."""
    import torch

    tensor = checkpoint[name]
    total = torch.zeros(tensor.shape[axis], dtype=torch.float64)
    for start, stop in tensor.blocks(BLOCK_ELEMENTS):
        squares = tensor.read(start, stop).to(torch.float64).square_()
        if axis == 0:
            total[start:stop] = squares.sum(1)
        else:
            total += squares.sum(0)
    return total
