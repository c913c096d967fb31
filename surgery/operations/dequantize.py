"""Dequantize: weights of 8-bit floats with scales become what they stand for.

Other packed weights are refused by name: see quantization/schemes.py for what is told apart, and
quantization/fp8.py for what is turned back.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from surgery.anatomy.infer import text_config
from surgery.checkpoint import Checkpoint, Edit
from surgery.dtypes import DTYPES, DType
from surgery.errors import ArgumentError, UnsupportedError
from surgery.operations.dtype import KEYS, with_dtype
from surgery.operations.pairs import refusal
from surgery.quantization.fp8 import Layout, Scaled, dequantized_tensor
from surgery.quantization.schemes import without_quantization
from surgery.tensor import LazyTensor

STORED = {"bfloat16": DTYPES["BF16"], "float32": DTYPES["F32"]}
DESCRIPTIONS = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")
"""Files that tell a loader how the weights are packed."""


def dequantize(
    model: Checkpoint, *, dtype: Literal["bfloat16", "float32"] = "bfloat16"
) -> Checkpoint:
    """The checkpoint with its 8-bit floats times their scales, computed in float32 and rounded
    once to `dtype`.

    The scales, which are part of the weights now, are gone, and so is what the config says of
    quantization. Tensors that weren't quantized stay as they are. What goes on computing with the
    result (`lines`, `merge`, ...) takes the float32 values, so that it rounds once, too; that is
    also what they do with such a model as it is.

    Raises UnsupportedError if the weights aren't of that kind, before any tensor is read.
    """
    if dtype not in STORED:
        raise ArgumentError(f"dtype is {dtype!r}, and has to be 'bfloat16' or 'float32'")
    if model.quantization is None:
        raise UnsupportedError(
            f"{model.source.reference} isn't quantized: there is nothing to dequantize"
        )
    layouts, problems = _layouts({"model": model})
    UnsupportedError.raise_if(problems)
    return _dequantized(model, layouts["model"], STORED[dtype])


def computable(**models: Checkpoint) -> list[Checkpoint]:
    """The models, those of 8-bit floats with scales dequantized. Raises UnsupportedError with all
    that are packed in another way."""
    layouts, problems = _layouts(models)
    UnsupportedError.raise_if(problems)
    return [
        _dequantized(model, layouts[role], STORED["bfloat16"]) if role in layouts else model
        for role, model in models.items()
    ]


def values(model: Checkpoint, names: Container[str] | None = None) -> Checkpoint:
    """The model with what those of its 8-bit floats (all unless given) stand for, in float32, and
    without their scales; the rest as it is stored. Raises UnsupportedError for what is packed in
    another way."""
    chosen = [s for n, s in scaled_weights(model).items() if names is None or n in names]
    made = {found.weight: dequantized_tensor(model, found) for found in chosen}
    gone = {found.scale for found in chosen}
    tensors = {name: made.get(name, tensor) for name, tensor in model.items() if name not in gone}
    return replace(model, tensors=tensors)


def scaled_weights(base: Checkpoint) -> Mapping[str, Scaled]:
    """The weights of a base that have scales; none if it isn't quantized. Raises UnsupportedError
    for what is packed in another way."""
    layouts, problems = _layouts({"base": base})
    UnsupportedError.raise_if(problems)
    return layouts["base"].scaled if layouts else {}


def _layouts(models: Mapping[str, Checkpoint]) -> tuple[dict[str, Layout], list[str]]:
    """How the weights of those that are quantized are scaled, by role; and what is wrong."""
    layouts: dict[str, Layout] = {}
    problems: list[str] = []
    for role, model in models.items():
        if (found := model.quantization) is None:
            continue
        if (layout := model.scales) is None:
            problems.append(refusal(model, role, found))
            continue
        layouts[role] = layout
        where = f"{model.source.reference} ({role})"
        problems += [f"{where}: {problem}" for problem in layout.problems]
        if not layout.scaled and not layout.problems:
            problems.append(
                f"{where} is quantized: {found}; and yet no tensor is of 8-bit floats: if its "
                f"weights are what they seem, take quantization_config out of its config.json"
            )
    return layouts, problems


def _dequantized(model: Checkpoint, layout: Layout, dtype: DType) -> Checkpoint:
    made = {
        name: _rounded(dequantized_tensor(model, s), dtype) for name, s in layout.scaled.items()
    }
    gone = layout.weight_of.keys()
    described = [name for name in DESCRIPTIONS if name in model.companions]
    kept = replace(
        model,
        tensors={name: tensor for name, tensor in model.items() if name not in gone},
        left_behind=(*model.left_behind, *described),
    )
    companions = {n: file for n, file in model.companions.items() if n not in described}
    config = without_quantization(model.config)
    if config and not any(key in part for part in (config, text_config(config)) for key in KEYS):
        config["torch_dtype"] = dtype.torch_name
    edit = Edit(
        "dequantize",
        {"dtype": dtype.torch_name},
        {"model": model.source},
        {"tensors": len(made), "activation_scales": sorted(layout.activations)},
    )
    notes = _notes(model, layout, dtype)
    return kept.edited(edit, made, with_dtype(config, dtype), companions, notes)


def _notes(model: Checkpoint, layout: Layout, dtype: DType) -> tuple[str, ...]:
    first = (
        f"{model.source.reference} holds 8-bit floats: {len(layout.scaled):,} tensors were "
        f"multiplied by their scales in float32, and became {dtype.torch_name}"
    )
    notes = [first]
    if layout.activations:
        notes.append(
            f"{len(layout.activations):,} scales of activations ({min(layout.activations)}, ...) "
            f"were left out: they belong to products of 8-bit floats"
        )
    return tuple(notes)


def _rounded(values: LazyTensor, dtype: DType) -> LazyTensor:
    if values.dtype == dtype:
        return values
    from surgery.kernels.rounding import rounded

    kernel = partial(rounded, dtype=dtype)
    return LazyTensor(values.shape, dtype, inputs=(values,), kernel=kernel, exact=values)
