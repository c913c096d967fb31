"""Which of a model's outputs is compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOGITS = ("logits", "prediction_logits")
FIRST = (*LOGITS, "last_hidden_state")


def main_output(result: Any) -> tuple[str, torch.Tensor] | None:
    """The logits, or else the last hidden states, or else the first tensor of floats among what
    `forward` returned, in its order. None where there is none."""
    named = result if isinstance(result, Mapping) else {}
    for name in FIRST:
        if (value := named.get(name)) is not None and _compares(value):
            return name, value
    return next(_tensors("output", result), None)


def _tensors(name: str, value: Any) -> Any:
    if _compares(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(str(key), inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(name, inner)


def _compares(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0


def are_logits(name: str, output: torch.Tensor, config: Any) -> bool:
    """Whether the last axis is one of choices (tokens, classes), so that distributions over it
    can be compared. Maps of classes have them on another axis."""
    if name not in LOGITS or output.dim() > 3:
        return False
    labels = getattr(config, "num_labels", None) or 0
    sizes = {labels, labels + 1} | _vocabularies(config.to_dict())
    return output.shape[-1] > 1 and output.shape[-1] in sizes


def _vocabularies(config: Mapping[str, Any]) -> set[int]:
    found = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _vocabularies(value)
        elif "vocab" in str(key) and type(value) is int:
            found.add(value)
    return found
