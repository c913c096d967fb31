"""What the stock classes make of a config, block by block: lists that they derive by layer, and
what sets one block apart from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import UnsupportedError
from surgery.modeling.stock import block_modules, build_config, empty_model, model_class
from surgery.modeling.stored import stored_tensors

_NUMBERING = ("layer_idx", "layer_id", "layer_number", "block_idx", "training")
"""Attributes that say which block a module is in: those change, and nothing is made of them
alone."""

Settings = Mapping[str, Any]
"""What one block was built with, by the path of the attribute: "self_attn.sliding_window"."""


@dataclass(frozen=True)
class Built:
    """The settings of every block, and the shapes of the parameters outside the blocks."""

    blocks: tuple[Settings, ...]
    outside: Mapping[str, tuple[int, ...]]


def derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the language model's config as its class completes them."""
    values = _or_refuse(config, lambda: build_config(config).get_text_config())
    return {**values.to_dict(), **_plain_lists(values)}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as its class completes it, with that of every part."""
    made: dict[str, Any] = _or_refuse(config, lambda: build_config(config)).to_dict()
    return made


def built_blocks(config: Mapping[str, Any], stack: str) -> Built:
    """The model of this config, built without weights."""
    model = _or_refuse(config, lambda: empty_model(config))
    blocks = block_modules(model, stack)
    inside = {id(parameter) for parameter in blocks.parameters()}
    return Built(
        tuple(_settings(block) for block in blocks),
        {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if id(parameter) not in inside
        },
    )


def stored_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `save_pretrained` would write for this config, by the names
    that it would give them."""
    return shapes_of(config, _or_refuse(config, lambda: model_class(config)))


def shapes_of(config: Mapping[str, Any], cls: Any) -> dict[str, tuple[int, ...]]:
    """The same for a class that is given."""
    found: dict[str, tuple[int, ...]] = _or_refuse(
        config, lambda: stored_tensors(empty_model(config, cls))
    )
    return found


def head_name(config: Mapping[str, Any]) -> str | None:
    """The name of the head that the stock class ties to the embedding, if it has one."""
    tied = getattr(model_class(config), "_tied_weights_keys", None) or {}
    names = [name for name in tied if name.endswith(".weight")]
    return names[0] if len(names) == 1 else None


def _or_refuse(config: Mapping[str, Any], build: Any) -> Any:
    """What `build` makes. Config classes check themselves, and raise errors of many types."""
    try:
        return build()
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"transformers can't build a {config.get('model_type')} model of this config: {error}"
        ) from error


def _plain_lists(values: Any) -> dict[str, Any]:
    """Lists that a config class keeps as attributes and leaves out of `to_dict`."""
    return {
        key: list(value)
        for key, value in vars(values).items()
        if isinstance(value, (list, tuple)) and not key.startswith("_")
    }


def _settings(block: Any) -> Settings:
    """The plain attributes of all modules in a block, and the shapes of its parameters."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        dot = f"{path}." if path else ""
        found[f"{dot}class"] = type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _NUMBERING and _is_plain(value):
                found[dot + key] = list(value) if isinstance(value, tuple) else value
        for key, parameter in module.named_parameters(recurse=False):
            found[f"{dot}{key}.shape"] = list(parameter.shape)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
