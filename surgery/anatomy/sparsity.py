"""Activations that keep only the largest values of an MLP, by the mean and the deviation of all.

Gemma 3n has them in its first layers, as `activation_sparsity_pattern` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surgery.anatomy.mlp import MLP

KEY = "activation_sparsity_pattern"


def note_sparse_activations(
    mlps: dict[tuple[str, int], MLP], stacks: Mapping[str, int], config: Mapping[str, Any]
) -> None:
    """Note it of the MLPs that have one: mean and deviation stay what they are only if all neurons
    are copied as often. `config` is that of the language model, whose list has an
    entry for every layer, or one number for all."""
    given = config.get(KEY)
    for (stack, block), mlp in mlps.items():
        values = given if isinstance(given, list) else [given] * stacks[stack]
        if len(values) != stacks[stack]:
            continue
        value: object = values[block]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            mlps[stack, block] = replace(mlp, sparse=f"{KEY} has {value}")
