"""transformers models from a config and lazy tensors, without a file and without remote code.

The weights go through transformers' own loader (names converted, experts packed, heads tied), so
that what is verified is what a user will load.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.anatomy.infer import MODULE_WIDTHS_KEY, WIDTH_KEYS_KEY, WIDTHS_KEY
from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError, UnsupportedError
from surgery.modeling.block_keys import classes_by_keys
from surgery.modeling.limits import counted
from surgery.modeling.module_widths import classes_by_modules
from surgery.modeling.quiet import quiet
from surgery.modeling.stock import build_config, model_class
from surgery.modeling.widths import MODELING_FILE, load_classes, modeling_file
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch

KEPT_BUFFERS = 1 << 30
"""Bytes of memory that wait for the next weight while a model without its weights runs."""


@dataclass(frozen=True)
class Built:
    """A model in evaluation mode, and the parameters that no tensor was there for."""

    model: Any
    missing: tuple[str, ...]


def build_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Built:
    """The model with the checkpoint's weights, evaluated one tensor at a time.

    Raises UnsupportedError if the weights don't fit the architecture.
    """
    state = {name: _OnDemand(tensor) for name, tensor in checkpoint.items()}
    return _loaded(checkpoint, state, dtype, device)


def build_deferred(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Built:
    """The same model without its weights, which nothing has read yet: see `run_together`.

    Buffers, and parameters that the checkpoint lacks, are there. Raises UndeferrableError where
    the loader needs the values of a weight.
    """
    from surgery.modeling.deferred import recording

    state = {name: _Later(tensor) for name, tensor in checkpoint.items()}
    with recording():
        built = _loaded(checkpoint, state, dtype, "cpu")
    _settle(built.model, device)
    return built


def _loaded(
    checkpoint: Checkpoint, state: Mapping[str, Any], dtype: torch.dtype, device: str
) -> Built:
    import torch

    cls = class_to_build(checkpoint)
    options: dict[str, Any] = {"attn_implementation": "eager"}  # sdpa has no soft cap (Gemma 2)
    if cls._can_set_experts_implementation():
        options["experts_implementation"] = "eager"  # grouped_mm has no float64
    if device != "cpu":
        options["device_map"] = {"": device}
    config = build_config(checkpoint.settled_config)
    with (
        quiet() as messages,
        _one_at_a_time(),
        counted(checkpoint.numel),
        torch.random.fork_rng(devices=[]),
    ):
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
        except SurgeryError:
            raise
        except Exception as error:  # of any type: the config is a stranger's
            raise UnsupportedError(
                f"{checkpoint.source.reference}: transformers can't load the weights into "
                f"{cls.__name__}: " + "; ".join([*messages, str(error)])
            ) from error
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    return Built(model.eval(), tuple(sorted(info["missing_keys"])))


def _settle(model: Any, device: str) -> None:
    """Bring a model built of deferred tensors to `device`: what it holds besides weights is made,
    and the weights will be made there."""
    import torch

    from surgery.modeling.deferred import Deferred, values_of

    moved: dict[int, torch.Tensor] = {}
    target = torch.empty(0, device=device).device  # with its number, as tensors there have it

    def there(item: torch.Tensor) -> torch.Tensor:
        if id(item) in moved:  # tied
            return moved[id(item)]
        if isinstance(item, Deferred) and isinstance(item, torch.nn.Parameter):
            return torch.nn.Parameter(item.on(target), requires_grad=False)
        values: torch.Tensor = values_of(item).to(target)
        if isinstance(item, torch.nn.Parameter):
            return torch.nn.Parameter(values, requires_grad=False)
        return values

    kept = []  # so that no id is given twice
    for module in model.modules():
        for name, item in [*module._parameters.items(), *module._buffers.items()]:
            ready = item is None or isinstance(item, torch.nn.Parameter)
            if not (ready if device == "cpu" else item is None):
                kept.append(item)
                moved[id(item)] = there(item)
                setattr(module, name, moved[id(item)])


def class_to_build(checkpoint: Checkpoint) -> Any:
    """The stock class, or ours of the same name where layers differ in width. The modeling file
    is made anew: what lies beside the shards isn't run."""
    cls = model_class(checkpoint.config)
    if WIDTH_KEYS_KEY in checkpoint.config:
        return getattr(classes_by_keys(checkpoint.config), cls.__name__)
    if MODULE_WIDTHS_KEY in checkpoint.config:
        return getattr(classes_by_modules(checkpoint.config), cls.__name__)
    if WIDTHS_KEY not in checkpoint.config:
        return cls
    made = checkpoint.companions.get(MODELING_FILE)
    if not isinstance(made, bytes):
        _, made = modeling_file(checkpoint, checkpoint.anatomy.plain_mlps)
    return getattr(load_classes(made), cls.__name__)


class _OnDemand:
    """What the loader needs of a value of a state dict: `value[...]`, once."""

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is not Ellipsis:
            raise TypeError("this tensor is read whole")
        return self._tensor.whole()


class _Later(_OnDemand):
    """The same, read when the weight is used."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        from surgery.modeling.deferred import Deferred

        if index is not Ellipsis:
            raise TypeError("this tensor is read whole")
        return Deferred.of(self._tensor)


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
