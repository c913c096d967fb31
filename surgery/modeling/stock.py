"""The stock classes of transformers for a config, without remote code, and where in a model the
stacks of a checkpoint are."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from surgery.errors import UnsupportedError
from surgery.modeling.limits import check_counts, counted
from surgery.modeling.quiet import quiet
from surgery.untrusted import brief

_REMOTE_KEYS = ("auto_map", "custom_pipelines")
_TUNING_KEYS = ("fusion_config", "attn_implementation", "experts_implementation")


def known(config: Mapping[str, Any]) -> bool:
    """Whether the installed transformers knows the model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def build_config(config: Mapping[str, Any]) -> Any:
    """The config object that AutoConfig would make of `config.json`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_counts(config)
    values = copy.deepcopy(dict(config))
    for key in (*_REMOTE_KEYS, *_TUNING_KEYS):
        values.pop(key, None)
    model_type = values.get("model_type")
    if model_type == "mistral" and "layer_types" in values:  # AutoConfig's own rule
        model_type = values["model_type"] = "ministral"
    if not known(values):
        raise UnsupportedError(
            f"the installed transformers doesn't know the model type {brief(model_type)}, so the "
            f"model can't be built"
        )
    try:
        with quiet():
            return CONFIG_MAPPING[model_type].from_dict(_with_infinities(values))
    except Exception as error:  # config classes check themselves, and raise errors of many types
        raise UnsupportedError(
            f"transformers can't make a config of the type {model_type} of this: {error}"
        ) from error


def empty_model(config: Mapping[str, Any], cls: Any = None) -> Any:
    """The model of this config without weights, on the meta device: the stock one, or a `cls`."""
    import torch

    with torch.device("meta"), quiet(), counted():
        return (cls or model_class(config))(build_config(config))


def _with_infinities(value: Any) -> Any:
    """The floats that JSON hasn't got, which config.json holds as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(item) for key, item in value.items()}
    return [_with_infinities(item) for item in value] if isinstance(value, list) else value


def model_class(config: Mapping[str, Any]) -> Any:
    """The stock class that `architectures` names, or the one for the model type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    built = build_config(config)
    named = built.architectures if isinstance(built.architectures, (list, tuple)) else ()
    for name in named:
        if not isinstance(name, str):
            continue
        found = getattr(transformers, name, None) or _beside(type(built), name)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            continue
        expected = getattr(found, "config_class", None)
        if expected is not None and isinstance(built, expected):
            return found
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        auto.MODEL_MAPPING,
    ):
        if (found := mapping.get(type(built), None)) is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    for name, mapping in vars(auto).items():
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING") and type(built) in mapping:
            found = mapping[type(built)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise UnsupportedError(f"transformers has no model class for {type(built).__name__}")


def _beside(config_class: type, name: str) -> Any:
    """A class that transformers doesn't export (a part of a larger model), from the modules beside
    that of its config's class."""
    package = config_class.__module__.rpartition(".")[0]
    if not package.startswith("transformers."):
        return None
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name.startswith("modeling_"):
            found = getattr(importlib.import_module(f"{package}.{module.name}"), name, None)
            if found is not None:
                return found
    return None


def path_of(config: Mapping[str, Any], name: str) -> str:
    """How a modeling file gets the stock class of this name, exported or not."""
    import transformers

    if hasattr(transformers, name):
        return f"transformers.{name}"
    found = _beside(type(build_config(config)), name)
    return f"{found.__module__}.{name}"


def auto_classes(config: Mapping[str, Any]) -> dict[str, str]:
    """Which stock class each of transformers' auto classes builds for this config:
    {"AutoModelForCausalLM": "LlamaForCausalLM", ...}."""
    from transformers.models.auto import modeling_auto as auto

    kind = type(build_config(config))
    found: dict[str, str] = {}
    for name, holder in vars(auto).items():
        mapping = getattr(holder, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and kind in mapping:
            try:
                stock = mapping[kind]
            except ValueError:  # transformers lists a class that it doesn't export
                continue
            found[name] = (stock[0] if isinstance(stock, (tuple, list)) else stock).__name__
    return found


def block_path(config: Mapping[str, Any], stack: str) -> str:
    """The path, inside the base model, of the list of blocks that is `stack` on disk."""
    model = empty_model(config)
    blocks = block_modules(model, stack)
    for name, module in model.base_model.named_modules():
        if module is blocks:
            return str(name)
    raise UnsupportedError(f"{stack} isn't part of the base model of {type(model).__name__}")


def block_modules(model: Any, stack: str) -> Any:
    """The ModuleList that `stack`, named as on disk, became in the model.

    Files of a base model lack the prefix that a model with a head has, and the other way round,
    so that the longest common ending decides where no list has the name: a part of a model has
    lists that are called like the model's own.
    """
    from torch import nn

    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    names = stack, _renamed(model, stack)
    for wanted in names:
        if wanted in lists:
            return lists[wanted]
    for wanted in names:
        found = [n for n in lists if n.endswith("." + wanted) or wanted.endswith("." + n)]
        longest = [n for n in found if len(n) == max(map(len, found))]
        if len(longest) == 1:
            return lists[longest[0]]
    raise UnsupportedError(
        f"{type(model).__name__} has no list of blocks that is {stack!r}, only {sorted(lists)}"
    )


def _renamed(model: Any, stack: str) -> str:
    """The stack's name after the renamings that the loader used, or would use."""
    return renamed(model, f"{stack}.0.").removesuffix(".0.")


def renamed(model: Any, name: str) -> str:
    """The name that a tensor of the files has in the model: after those renamings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # a model without weights
        conversions = get_model_conversion_mapping(model)
    used = [c for c in conversions if isinstance(c, WeightRenaming)]
    made: str = apply_renamings(name, used)
    return made
