"""A model that was grown so that its layers differ by keys of our own, seen as the stock model that
its other keys still describe: growing it again is growing that by as much at once.

Only shapes are needed, and those of the stock model are known, so that no earlier checkpoint is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.anatomy import MLP, Anatomy
from surgery.anatomy.infer import MODULE_WIDTHS_KEY, WIDTH_KEYS_KEY
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.growth import Growth
from surgery.modeling.block_keys import classes_by_keys
from surgery.modeling.layers import shapes_of, stored_shapes
from surgery.modeling.module_widths import classes_by_modules
from surgery.modeling.stock import known, model_class
from surgery.modeling.width_keys import as_stored, find_prefixes
from surgery.modeling.widths import MODELING_FILE, without_auto_map
from surgery.values import zeros

KEYS = (WIDTH_KEYS_KEY, MODULE_WIDTHS_KEY)
Shapes = Mapping[str, tuple[int, ...]]


def grown_at_once(base: Checkpoint, growths: Sequence[Growth]) -> tuple[Checkpoint, list[Growth]]:
    """The stock model as a checkpoint of its shapes, and what makes it as wide as `base` will be
    after `growths`.

    Raises UnsupportedError where the files aren't what the config says.
    """
    config = {k: v for k, v in without_auto_map(base.settled_config).items() if k not in KEYS}
    stock = _stock_shapes(base, config)
    before = {mlp: replace(mlp, width=_stock_width(base, mlp, stock)) for mlp in _mlps(base)}
    shapes = {name: stock[name] for mlp in before for name in mlp.tensors if name in stock}
    tensors = {
        name: zeros(shapes[name], tensor.dtype) if name in shapes else tensor
        for name, tensor in base.items()
    }
    companions = {k: v for k, v in base.companions.items() if k != MODELING_FILE}
    made = replace(base, tensors=tensors, config=config, companions=companions)
    vars(made)["anatomy"] = _with_mlps(base.anatomy, before)
    after = {growth.mlp: growth.width for growth in growths}
    widths = {mlp: after.get(mlp, mlp.width) for mlp in before}
    return made, [
        Growth(old, width, (), padding=width - old.width)
        for mlp, width in widths.items()
        if (old := before[mlp]).width != width
    ]


def _mlps(base: Checkpoint) -> list[MLP]:
    return base.anatomy.all_mlps


def _stock_shapes(base: Checkpoint, config: Mapping[str, Any]) -> Shapes:
    """The shapes that the tensors of all MLPs have in the stock model, by their names in the
    files. Our class for the config has to have those that are there."""
    have = {name: tensor.shape for name, tensor in base.items()}
    theirs = {name: have[name] for mlp in _mlps(base) for name in mlp.tensors}
    key = next(key for key in KEYS if key in base.config)
    if known(config):
        classes = classes_by_keys if key == WIDTH_KEYS_KEY else classes_by_modules
        ours = getattr(classes(config), model_class(config).__name__)
        now, stock = shapes_of(base.config, ours), stored_shapes(config)
        prefixes = find_prefixes(now, have, theirs)
        if prefixes is not None:
            found = {name: stock.get(as_stored(name, prefixes)) for name in theirs}
            if shapes := {name: shape for name, shape in found.items() if shape is not None}:
                return shapes
    raise UnsupportedError(
        f"{base.source.reference} was grown before so that its layers differ by {key} in "
        f"config.json, and its tensors aren't those that this says: it can't be grown again, grow "
        f"what it was made of"
    )


def _stock_width(base: Checkpoint, mlp: MLP, stock: Shapes) -> int:
    """How wide an MLP is in the stock model, by all of its tensors; as it is, if the stock model
    ignores it."""
    if stock.keys().isdisjoint(mlp.tensors):
        return mlp.width
    widths = {_width(base[name].shape, stock.get(name), mlp, axis) for name, _, axis in mlp.axes()}
    if len(widths) != 1 or (width := widths.pop()) is None:
        raise UnsupportedError(
            f"{base.source.reference} was grown before so that its layers differ, and how wide the "
            f"MLP of {mlp.down.weight} was isn't told by its config: it can't be grown again, grow "
            f"what it was made of"
        )
    return width


def _width(
    shape: tuple[int, ...], stock: tuple[int, ...] | None, mlp: MLP, axis: int
) -> int | None:
    """The width of which a tensor of the stock model is, if it differs in nothing else."""
    if stock is None or len(stock) != len(shape):
        return None
    width, rest = divmod(stock[axis], shape[axis] // mlp.width)
    alike = all(a == b for at, (a, b) in enumerate(zip(shape, stock, strict=True)) if at != axis)
    return width if alike and not rest and width <= mlp.width else None


def _with_mlps(anatomy: Anatomy, now: Mapping[MLP, MLP]) -> Anatomy:
    """The anatomy with other MLPs in their places."""

    def swap(mlps: Sequence[MLP]) -> tuple[MLP, ...]:
        return tuple(now[mlp] for mlp in mlps)

    return replace(
        anatomy,
        mlps={key: now[mlp] for key, mlp in anatomy.mlps.items()},
        experts={key: swap(mlps) for key, mlps in anatomy.experts.items()},
        several={key: swap(mlps) for key, mlps in anatomy.several.items()},
        beside=swap(anatomy.beside),
    )
