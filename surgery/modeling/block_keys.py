"""The modeling file of a model whose layers differ, where the config's own keys can set the widths
of a layer and not of it alone.

`config.json` carries the keys of each block (`mlp_width_keys`), and a small file beside the
shards, made from `template_keys.txt`, takes each block from a stock model with those keys. So it
serves whatever the stock class makes of a key: experts, shared experts, several keys together.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from surgery.anatomy.infer import WIDTH_KEYS_KEY
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.growth import Growth
from surgery.modeling.layers import shapes_of, stored_shapes
from surgery.modeling.stock import block_path, model_class, path_of
from surgery.modeling.width_keys import NotComparableError, Shapes, find_width_keys
from surgery.modeling.widths import MODULE, load_classes, stock_classes

_Layer = tuple[str, int]


def keys_by_block(
    base: Checkpoint, config: Mapping[str, Any], growths: Sequence[Growth]
) -> tuple[dict[str, Any], bytes] | None:
    """The config and the modeling file with which each block gets the widths of its own; None
    where no keys give a block its widths, or the model isn't what was wanted."""
    if "auto_map" in config or WIDTH_KEYS_KEY in config:
        return None
    of_block: dict[_Layer, list[Growth]] = defaultdict(list)
    for growth in growths:
        if growth.mlp.block is None:
            return None
        of_block[growth.mlp.stack, growth.mlp.block].append(growth)
    alike: dict[tuple[Any, ...], list[_Layer]] = defaultdict(list)
    for block, grown in of_block.items():
        widths = sorted({(g.mlp.kind, g.mlp.width, g.width) for g in grown})
        alike[(block[0], *widths)].append(block)
    stacks = sorted({stack for stack, _ in of_block})
    keys: dict[str, list[dict[str, Any]]] = {}
    paths = {stack: block_path(config, stack) for stack in stacks}
    for stack in stacks:
        keys[paths[stack]] = [{} for _ in range(base.anatomy.stacks[stack])]
    for blocks in alike.values():
        found = _keys(base, config, [g for block in blocks for g in of_block[block]], blocks)
        if not found:
            return None
        for stack, number in blocks:
            keys[paths[stack]][number] = {".".join(path): value for path, value in found.items()}
    auto_map, source = _modeling_file(config)
    made = {**config, WIDTH_KEYS_KEY: keys, "auto_map": auto_map}
    return (made, source) if gives(base, config, made, source, growths) else None


def _keys(
    base: Checkpoint,
    config: Mapping[str, Any],
    growths: Sequence[Growth],
    blocks: Sequence[_Layer],
) -> dict[tuple[str, ...], Any]:
    have = {name: tensor.shape for name, tensor in base.items()}
    wanted = grown_shapes(base, growths)[1]
    within = tuple(f"{stack}.{number}." if stack else f"{number}." for stack, number in blocks)
    widths = {(growth.mlp.width, growth.width) for growth in growths}
    try:
        return find_width_keys(config, have, wanted, widths, within=within).values
    except NotComparableError:
        return {}


def grown_shapes(base: Checkpoint, growths: Sequence[Growth]) -> tuple[Shapes, Shapes]:
    """The shapes of the tensors that widen, as they are and as they will be."""
    have, wanted = {}, {}
    for growth in growths:
        for name, _, axis in growth.mlp.axes():
            have[name] = base[name].shape
            wanted[name] = growth.shape(base[name].shape, axis)
    return have, wanted


def _modeling_file(config: Mapping[str, Any]) -> tuple[dict[str, str], bytes]:
    mapped, first_auto = stock_classes(config)
    classes = "\n\n\n".join(
        f"class {name}(_WidthKeys, {path_of(config, name)}):\n"
        f'    _auto_class = "{auto}"\n    _stock = {path_of(config, name)}'
        for name, auto in first_auto.items()
    )
    text = resources.files(__package__).joinpath("template_keys.txt").read_text(encoding="utf-8")
    text = text.replace("@CLASSES@", classes)
    return {auto: f"{MODULE}.{name}" for auto, name in mapped.items()}, text.encode()


def classes_by_keys(config: Mapping[str, Any]) -> types.ModuleType:
    """The classes of the modeling file for such a config, made anew."""
    return load_classes(_modeling_file(config)[1])


def gives(
    base: Checkpoint,
    config: Mapping[str, Any],
    made: Mapping[str, Any],
    source: bytes,
    growths: Sequence[Growth],
) -> bool:
    """Whether the model that will be loaded has the grown shapes, and no others."""
    cls = getattr(load_classes(source), model_class(config).__name__, None)
    if cls is None:
        return False
    try:
        now, then = stored_shapes(config), shapes_of(made, cls)
    except UnsupportedError:
        return False
    changed = [name for name, shape in then.items() if now.get(name) != shape]
    have, wanted = grown_shapes(base, growths)
    return (
        now.keys() == then.keys()
        and sorted(now[name] for name in changed) == sorted(have.values())
        and sorted(then[name] for name in changed) == sorted(wanted.values())
    )
