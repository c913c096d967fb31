"""The model types of the installed transformers: which class stands for each, and of what kind."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAPPINGS = (
    ("causal", "CAUSAL_LM"),
    ("masked", "MASKED_LM"),
    ("encoder-decoder", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("vision-language", "IMAGE_TEXT_TO_TEXT"),
    ("vision-language", "MULTIMODAL_LM"),
    ("speech to text", "SPEECH_SEQ_2_SEQ"),
)
INPUTS = {"input_ids": "text", "pixel_values": "vision", "pixel_values_videos": "vision"}
INPUTS |= dict.fromkeys(("input_values", "input_features", "audio_values"), "audio")


@dataclass(frozen=True)
class Kind:
    """A class to build for a model type. `kind` is what it is; `tokens` whether its input is one
    sequence of tokens, so that its outputs can be compared."""

    model_type: str
    kind: str
    model_class: Any

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.kind})"

    @property
    def tokens(self) -> bool:
        return self.kind in ("causal", "masked")


def model_types() -> list[str]:
    """All of them, in order."""
    return sorted(CONFIG_MAPPING.keys())


def kinds_of(model_type: str) -> list[Kind]:
    """The classes for a model type: one for each kind of head, or else the bare model, or that
    of a part of a model. None where transformers has no class for it."""
    config_class = CONFIG_MAPPING[model_type]
    found: dict[str, str] = {}
    classes: dict[str, Any] = {}
    for kind, name in MAPPINGS:
        for one in _classes(getattr(auto, f"MODEL_FOR_{name}_MAPPING"), config_class):
            if kind not in found.values():
                found.setdefault(one.__name__, kind)
                classes[one.__name__] = one
    if not found:
        one = _bare(config_class)
        if one is not None:
            found[one.__name__] = _input(one)
            classes[one.__name__] = one
    return [Kind(model_type, kind, classes[name]) for name, kind in found.items()]


def _input(model_class: Any) -> str:
    try:
        return INPUTS.get(str(getattr(model_class, "main_input_name", "")), "other")
    except ImportError:  # a class that needs a library that isn't there
        return "other"


def _classes(mapping: Any, config_class: Any) -> list[Any]:
    if config_class not in mapping:
        return []
    try:
        one = mapping[config_class]
    except (ImportError, ValueError):  # a class that isn't there, or lacks a library
        return []
    while isinstance(one, (tuple, list)):
        one = one[0]
    return [one]


def _bare(config_class: Any) -> Any:
    """The class of a type that has none of those heads."""
    names = [n for n in sorted(vars(auto)) if n.startswith("MODEL_FOR") and n.endswith("_MAPPING")]
    for name in ("MODEL_FOR_PRETRAINING_MAPPING", "MODEL_MAPPING", *names):
        if classes := _classes(getattr(auto, name), config_class):
            return classes[0]
    return _part(config_class)


def _part(config_class: Any) -> Any:
    """The largest class of the same package that takes this config: the first defined last."""
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("modeling_"):
            continue
        for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(value, type) and getattr(value, "config_class", None) is config_class:
                own = value.__module__.startswith(package.__name__)
                if own and not value.__name__.endswith("PreTrainedModel"):
                    found.append(value)
    return max(found, key=lambda cls: cls.__name__.endswith("Model"), default=None)
