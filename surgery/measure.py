"""Statistics over whole tensors: streaming passes that return small eager values.

Sums are taken over blocks of a fixed size and added exactly (`math.fsum`), so that they don't
depend on threads or on how the writer cuts its work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.anatomy import MLP, Projection
from surgery.checkpoint import Checkpoint
from surgery.values import held

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: 1 MB in float32, which stays in the cache of a core."""


def neuron_norms(checkpoint: Checkpoint, mlp: MLP) -> torch.Tensor:
    """||incoming|| * ||outgoing|| of every hidden neuron, float64 of shape (p,).

    Incoming is the neuron's row of the up projection (of gate and up together in a gated MLP),
    outgoing its column of the down projection. Of experts in one tensor it is the root of the
    sum of squares over the experts.
    """
    import torch

    experts = mlp.down.experts or 1
    incoming = torch.zeros(experts, mlp.width, dtype=torch.float64)
    for up in mlp.ups:
        squares = _squares(checkpoint, up, rows=not up.in_out)
        if up.interleaved:
            incoming += squares.reshape(experts, mlp.width, up.parts).sum(2)
        else:
            incoming += squares.reshape(experts, up.parts, mlp.width).sum(1)
    outgoing = _squares(checkpoint, mlp.down, rows=mlp.down.in_out)
    return (incoming * outgoing).sum(0).sqrt_()


def _squares(checkpoint: Checkpoint, projection: Projection, *, rows: bool) -> torch.Tensor:
    """The sum of squares of every row, or of every column, of each expert's matrix, float64 of
    shape (experts, rows or columns)."""
    import torch

    tensor = checkpoint[projection.weight]
    experts = projection.experts or 1
    if experts == 1 and len(tensor.shape) > 2:  # the kernel of a convolution, which is small
        tensor = held(tensor.whole().movedim(int(not rows), 0).flatten(1).contiguous())
        rows = True
    height = tensor.rows // experts
    total = torch.zeros(experts, height if rows else tensor.width, dtype=torch.float64)
    step = max(1, BLOCK_ELEMENTS // max(1, tensor.width)) if tensor.streams else height
    for expert in range(experts):
        for start in range(0, height, step):
            stop = min(start + step, height)
            block = tensor.read(expert * height + start, expert * height + stop)
            squares = block.to(torch.float64).square_()
            if rows:
                total[expert, start:stop] = squares.sum(1)
            else:
                total[expert] += squares.sum(0)
    return total
