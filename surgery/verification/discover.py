"""Find out from the weights alone which neurons a wider MLP is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from surgery.anatomy import MLP
from surgery.checkpoint import Checkpoint
from surgery.growth import Growth


def discover_growths(base: Checkpoint, other: Checkpoint) -> list[Growth]:
    """The growths that made `other` of `base`, for MLPs that keep the base's neurons in place
    and have copies or zeros behind them; nothing if one is wider in another way."""
    growths = []
    wider = {frozenset(mlp.tensors): mlp for mlp in other.anatomy.all_mlps}
    for mlp in base.anatomy.all_mlps:
        wide = wider.get(frozenset(mlp.tensors))
        if wide is None and mlp in base.anatomy.beside:
            continue  # the certificate looks at its tensors
        if wide is None or wide.width < mlp.width:
            return []
        if wide.width > mlp.width:
            growth = _discover(base, other, mlp, wide)
            if growth is None:
                return []
            growths.append(growth)
    return growths


def _discover(base: Checkpoint, other: Checkpoint, mlp: MLP, wide: MLP) -> Growth | None:
    """The growth of one MLP: each new neuron is looked up by the bytes of its up weights."""
    sources: dict[bytes, list[int]] = defaultdict(list)
    for number, neuron in enumerate(_neurons(base, mlp)):
        sources[neuron].append(number)
    copied: list[tuple[int, int]] = []
    padding = 0
    for number, neuron in enumerate(_neurons(other, wide)):
        if number < mlp.width:
            continue
        found = sources.get(neuron, [])
        if not found and not any(neuron):
            padding += 1
        elif not found or padding:
            return None
        elif copied and copied[-1][1] in found:  # goes on where the last copy was
            copied[-1] = (copied[-1][0], copied[-1][1] + 1)
        else:
            copied.append((found[0], found[0] + 1))
    return Growth(mlp, wide.width, tuple(copied), padding)


def _neurons(checkpoint: Checkpoint, mlp: MLP) -> Iterator[bytes]:
    """What leads into every hidden neuron, of all experts in one tensor, as bytes."""
    import numpy
    import torch

    columns = []
    for name, projection, axis in mlp.axes():
        if projection is mlp.down:
            continue
        lines = checkpoint[name].whole().movedim(axis, 0)
        order = projection.indices(numpy.arange(mlp.width), mlp.width, below=projection.flat)
        if projection.interleaved:
            order = order.reshape(mlp.width, projection.parts).T.reshape(-1)
        neurons = lines[torch.from_numpy(order)].reshape(-1, mlp.width, lines[0].numel())
        columns += [part.contiguous().view(torch.uint8) for part in neurons]
    rows = torch.cat(columns, dim=1).numpy()
    for row in rows:
        yield row.tobytes()
