"""The layers of a model by the names that transformers gives them, which PEFT goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.modeling.stock import empty_model


@dataclass(frozen=True)
class Layer:
    """A module that holds parameters itself, by their names in there. `linear` says that it is a
    matrix product, `in_out` that its weight is stored (in, out), `whole` that it has no modules
    inside."""

    parameters: tuple[str, ...]
    linear: bool = False
    in_out: bool = False
    whole: bool = True


def layers(config: Mapping[str, Any]) -> dict[str, Layer]:
    """The layers of the stock class for `config`, built without memory."""
    import torch
    from transformers.pytorch_utils import Conv1D

    model = empty_model(config)
    return {
        name: Layer(
            parameters=tuple(parameter for parameter, _ in module.named_parameters(recurse=False)),
            linear=isinstance(module, (torch.nn.Linear, Conv1D)),
            in_out=isinstance(module, Conv1D),
            whole=next(module.children(), None) is None,
        )
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    }
