"""transformers models from a config and lazy tensors, without a file and without remote code.

The weights go through transformers' own loader (names converted, experts packed, heads tied), so
that what is verified is what a user will load.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.modeling import MODELING_FILE, load_classes, without_auto_map
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch

_REMOTE_KEYS = ("auto_map", "custom_pipelines")
_TUNING_KEYS = ("fusion_config", "attn_implementation", "experts_implementation")


@dataclass(frozen=True)
class Built:
    """A model in evaluation mode, and the parameters that no tensor was there for."""

    model: Any
    missing: tuple[str, ...]


def build_config(config: Mapping[str, Any]) -> Any:
    """The config object that AutoConfig would make of `config.json`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = copy.deepcopy(dict(config))
    for key in (*_REMOTE_KEYS, *_TUNING_KEYS):
        values.pop(key, None)
    model_type = values.get("model_type")
    if model_type == "mistral" and "layer_types" in values:  # AutoConfig's own rule
        model_type = values["model_type"] = "ministral"
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"the installed transformers doesn't know the model type {model_type!r}, so the "
            f"model can't be built"
        )
    return CONFIG_MAPPING[model_type].from_dict(values)


def model_class(config: Mapping[str, Any]) -> Any:
    """The stock class that `architectures` names, or the one for the model type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    built = build_config(config)
    for name in built.architectures or ():
        found = getattr(transformers, name, None)
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
    raise UnsupportedError(f"transformers has no model class for {type(built).__name__}")


def auto_classes(config: Mapping[str, Any]) -> dict[str, str]:
    """Which stock class each of transformers' auto classes builds for this config:
    {"AutoModelForCausalLM": "LlamaForCausalLM", ...}."""
    from transformers.models.auto import modeling_auto as auto

    kind = type(build_config(config))
    found: dict[str, str] = {}
    for name, holder in vars(auto).items():
        mapping = getattr(holder, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and kind in mapping:
            stock = mapping[kind]
            found[name] = (stock[0] if isinstance(stock, (tuple, list)) else stock).__name__
    return found


def build_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Built:
    """The model with the checkpoint's weights, evaluated one tensor at a time.

    Raises UnsupportedError if the weights don't fit the architecture.
    """
    import torch

    cls = _class_to_build(checkpoint)
    state = {name: _OnDemand(tensor) for name, tensor in checkpoint.items()}
    options: dict[str, Any] = {"attn_implementation": "eager"}  # sdpa has no soft cap (Gemma 2)
    if cls._can_set_experts_implementation():
        options["experts_implementation"] = "eager"  # grouped_mm has no float64
    if device != "cpu":
        options["device_map"] = {"": device}
    config = build_config(checkpoint.config)
    with _quiet() as messages, _one_at_a_time(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # parameters that the checkpoint lacks are alike on both sides
        try:
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                output_loading_info=True,
                **options,
            )
        except (RuntimeError, ValueError) as error:
            raise UnsupportedError(
                f"{checkpoint.source.reference}: transformers can't load the weights into "
                f"{cls.__name__}: " + "; ".join([*messages, str(error)])
            ) from error
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    return Built(model.eval(), tuple(sorted(info["missing_keys"])))


def _class_to_build(checkpoint: Checkpoint) -> Any:
    """The stock class, or ours of the same name where layers differ in width. The modeling file
    is made anew: what lies beside the shards isn't run."""
    cls = model_class(checkpoint.config)
    if "mlp_widths" not in checkpoint.config:
        return cls
    from surgery.modeling import modeling_file

    stock = {k: v for k, v in checkpoint.config.items() if k != "auto_map"}
    if "auto_map" in without_auto_map(checkpoint.config):
        raise UnsupportedError(f"{checkpoint.source.reference} brings modeling code of its own")
    made = checkpoint.companions.get(MODELING_FILE)
    if not isinstance(made, bytes):
        _, made = modeling_file(checkpoint, list(checkpoint.anatomy.mlps.values()))
    return getattr(load_classes(made), model_class(stock).__name__)


def block_path(config: Mapping[str, Any], stack: str) -> str:
    """The path, inside the base model, of the list of blocks that is `stack` on disk."""
    import torch

    with torch.device("meta"), _quiet():
        model = model_class(config)(build_config(config))
    blocks = block_modules(model, stack)
    for name, module in model.base_model.named_modules():
        if module is blocks:
            return str(name)
    raise UnsupportedError(f"{stack} isn't part of the base model of {type(model).__name__}")


def block_modules(model: Any, stack: str) -> Any:
    """The ModuleList that `stack`, named as on disk, became in the model.

    Files of a base model lack the prefix that a model with a head has, and the other way round,
    so that the longest common ending decides.
    """
    from torch import nn

    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for wanted in (stack, _renamed(model, stack)):
        if wanted in lists:
            return lists[wanted]
        found = [n for n in lists if n.endswith("." + wanted) or wanted.endswith("." + n)]
        longest = [n for n in found if len(n) == max(map(len, found))]
        if len(longest) == 1:
            return lists[longest[0]]
    raise UnsupportedError(
        f"{type(model).__name__} has no list of blocks that is {stack!r}, only {sorted(lists)}"
    )


def _renamed(model: Any, stack: str) -> str:
    """The stack's name after the renamings that the loader used."""
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    conversions = getattr(model, "_weight_conversions", None) or ()
    used = [c for c in conversions if isinstance(c, WeightRenaming)]
    renamed: str = apply_renamings(f"{stack}.0.", used)
    return renamed.removesuffix(".0.")


class _OnDemand:
    """What the loader needs of a value of a state dict: `value[...]`, once."""

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is not Ellipsis:
            raise TypeError("this tensor is read whole")
        return self._tensor.whole()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Have transformers load tensors in this thread, so that one is in memory at a time."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Collect(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """No progress bar and nothing printed; what transformers would have logged is collected."""
    from transformers.utils import logging as hf_logging

    messages: list[str] = []
    root = logging.getLogger("transformers")
    hf_logging.get_verbosity()  # installs transformers' own handler, which is put back below
    handlers, propagate = root.handlers[:], root.propagate
    hook = hf_logging.set_tqdm_hook(lambda _, args, kwargs: hf_logging.EmptyTqdm(*args, **kwargs))
    root.handlers, root.propagate = [_Collect(messages)], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        root.handlers, root.propagate = handlers, propagate
        hf_logging.set_tqdm_hook(hook)
