"""The element type of a model as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.dtypes import DType

KEYS = ("dtype", "torch_dtype")


def main_dtype(model: Checkpoint) -> DType | None:
    """The float type that most of the weights have: those of another have it on purpose (a
    router's bias, a state-space model's A_log)."""
    sizes: Counter[DType] = Counter()
    for tensor in model.values():
        if tensor.dtype.kind == "float":
            sizes[tensor.dtype] += tensor.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def with_dtype(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """The config, with `dtype` where it names the type of the weights, nested or not."""
    return {
        key: dtype.torch_name
        if key in KEYS and isinstance(value, str)
        else with_dtype(value, dtype)
        if isinstance(value, Mapping) and key.endswith("_config")
        else value
        for key, value in config.items()
    }
