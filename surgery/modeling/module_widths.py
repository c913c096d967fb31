"""The modeling file for MLPs whose widths no keys of the config set: in several stacks, several in
a block, or in code.

`config.json` carries the sizes of each projection by the name of its module (`mlp_module_widths`),
and a small file beside the shards, made from `template_modules.txt`, resizes those of the stock
model.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from surgery.anatomy.infer import MODULE_WIDTHS_KEY
from surgery.checkpoint import Checkpoint
from surgery.growth import Growth
from surgery.modeling.block_keys import gives
from surgery.modeling.stock import block_modules, empty_model, path_of, renamed
from surgery.modeling.widths import MODULE, load_classes, stock_classes


def widths_by_module(
    base: Checkpoint, config: Mapping[str, Any], growths: Sequence[Growth]
) -> tuple[dict[str, Any], bytes] | None:
    """The config and the modeling file with which every projection gets its size; None where one
    isn't a linear layer of its own in the stock model, or the model isn't what was wanted."""
    if "auto_map" in config:
        return None
    model = empty_model(config)
    names = {id(module): name for name, module in model.named_modules()}
    sizes: dict[str, list[int]] = {}
    for growth in growths:
        for weight, _, axis in growth.mlp.axes():
            if not weight.endswith(".weight"):
                continue  # a bias follows
            shape = growth.shape(base[weight].shape, axis)
            module = _module(base, model, growth, weight)
            if module is None:
                return None
            sizes[names[id(module)]] = list(shape if hasattr(module, "nf") else shape[::-1])
    auto_map, source = _modeling_file(config)
    made = {**config, MODULE_WIDTHS_KEY: sizes, "auto_map": auto_map}
    return (made, source) if gives(base, config, made, source, growths) else None


def _module(base: Checkpoint, model: Any, growth: Growth, weight: str) -> Any:
    """The linear layer of that weight; None if there is none, as where a module holds several."""
    from torch import nn

    if growth.mlp.block is None:
        return None
    block = block_modules(model, growth.mlp.stack)[growth.mlp.block]
    stack = f"{growth.mlp.stack}.{growth.mlp.block}."
    inner = base.anatomy.places[weight].inner
    called = {inner, renamed(model, weight).removeprefix(renamed(model, stack))}
    inside = dict(block.named_modules())
    for name in called:
        module = inside.get(name.removesuffix(".weight"))
        linear = isinstance(module, nn.Linear) or hasattr(module, "nf")
        if module is not None and linear and module.weight.shape == base[weight].shape:
            return module
    return None


def _modeling_file(config: Mapping[str, Any]) -> tuple[dict[str, str], bytes]:
    mapped, first_auto = stock_classes(config)
    classes = "\n\n\n".join(
        f'class {name}(_ModuleWidths, {path_of(config, name)}):\n    _auto_class = "{auto}"'
        for name, auto in first_auto.items()
    )
    template = resources.files(__package__).joinpath("template_modules.txt")
    text = template.read_text(encoding="utf-8").replace("@CLASSES@", classes)
    return {auto: f"{MODULE}.{name}" for auto, name in mapped.items()}, text.encode()


def classes_by_modules(config: Mapping[str, Any]) -> types.ModuleType:
    """The classes of the modeling file for such a config, made anew."""
    return load_classes(_modeling_file(config)[1])
