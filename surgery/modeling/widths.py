"""The modeling file of a model whose layers differ in MLP width.

A stock loader builds one width for all layers. `config.json` carries the width of each
(`mlp_widths`), and a small file beside the shards, made from `template.txt`, subclasses the
stock classes of this architecture and resizes the MLPs as the model is built, for
`from_pretrained(..., trust_remote_code=True)`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from surgery.anatomy import MLP
from surgery.anatomy.matrices import module_of
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.modeling.stock import auto_classes, block_path, model_class, path_of

MODULE = "modeling_mlp_widths"
MODELING_FILE = f"{MODULE}.py"


@dataclass(frozen=True)
class Layout:
    """Where the widths are: the path of the blocks inside the base model, and which modules of
    a block have the width as their output (`fused` times it) or as their input, with a * for the
    numbers of a list of layers in it. `followers` are parameters and buffers, each with the axis
    that has the width."""

    blocks: str
    up: tuple[str, ...]
    down: tuple[str, ...]
    fused: int
    followers: tuple[tuple[str, int], ...] = ()


def without_auto_map(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the `auto_map` that an earlier growth of ours put there."""
    auto_map = config.get("auto_map")
    ours = isinstance(auto_map, Mapping) and all(
        str(value).startswith(f"{MODULE}.") for value in auto_map.values()
    )
    return {key: value for key, value in config.items() if key != "auto_map" or not ours}


def modeling_file(base: Checkpoint, mlps: Sequence[MLP]) -> tuple[dict[str, str], bytes]:
    """`auto_map` for the config, and the text of the modeling file.

    Raises UnsupportedError for a model that brings code of its own, or whose modules aren't
    where the names of its tensors say.
    """
    if "auto_map" in without_auto_map(base.config):
        raise UnsupportedError(
            f"{base.source.reference} brings modeling code of its own, which can't be told about "
            f"layers of different widths: grow all layers alike, or pass --uniform"
        )
    layout = _layout(base, mlps)
    mapped, first_auto = stock_classes(base.config)
    classes = "\n\n\n".join(
        f'class {name}(_MLPWidths, {path_of(base.config, name)}):\n    _auto_class = "{auto}"'
        for name, auto in first_auto.items()
    )
    text = resources.files(__package__).joinpath("template.txt").read_text(encoding="utf-8")
    for key in ("blocks", "up", "down", "fused", "followers"):
        text = text.replace(f"@{key.upper()}@", repr(getattr(layout, key)))
    text = text.replace("@CLASSES@", classes)
    return {auto: f"{MODULE}.{name}" for auto, name in mapped.items()}, text.encode()


def stock_classes(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The stock class of each auto class that builds this config, and for each stock class the
    first of those."""
    mapped = auto_classes(config)
    own = model_class(config).__name__
    if own not in mapped.values():  # a class for a part of the model, which no auto class builds
        auto = "AutoModelForCausalLM" if own.endswith("ForCausalLM") else "AutoModel"
        mapped = {**mapped, auto: own}
    first: dict[str, str] = {}
    for auto, name in mapped.items():
        first.setdefault(name, auto)
    return mapped, first


def load_classes(source: bytes) -> types.ModuleType:
    """The classes of a modeling file that `modeling_file` made in this process."""
    module = types.ModuleType(f"surgery_{MODULE}")
    exec(compile(source, f"<{MODELING_FILE}>", "exec"), module.__dict__)  # noqa: S102  our own text
    return module


def _layout(base: Checkpoint, mlps: Sequence[MLP]) -> Layout:
    layouts = {_layout_of(base, mlp) for mlp in mlps}
    if len(layouts) != 1:
        raise UnsupportedError(
            f"{base.source.reference}: the MLPs of its layers aren't of one kind, so layers of "
            f"different widths can't be loaded: pass --uniform"
        )
    return layouts.pop()


def _layout_of(base: Checkpoint, mlp: MLP) -> Layout:
    """That of one MLP."""
    block = f"{mlp.stack}.{mlp.block}." if mlp.stack else f"{mlp.block}."
    listed = any(stack == mlp.stack for stack, _ in base.anatomy.several)
    own = module_of(block, mlp.tensors) if listed else block

    def inner(name: str) -> str:
        module = own.removeprefix(block)
        return re.sub(r"(?<![^.])\d+\.", "*.", module) + name.removeprefix(own)

    return Layout(
        block_path(base.config, mlp.stack),
        tuple(inner(up.weight).removesuffix(".weight") for up in mlp.ups),
        (inner(mlp.down.weight).removesuffix(".weight"),),
        mlp.ups[0].parts,
        tuple((inner(follower.name), follower.axis) for follower in mlp.followers),
    )
