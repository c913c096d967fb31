"""Tied heads: make the config say what the files hold, so that a loader reads it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.anatomy.infer import Anatomy


def settled_config(config: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """The config, with `tie_word_embeddings` true where it was false and no head is stored: a
    loader would make up a random head."""
    settled = dict(config)
    if not anatomy.tied or anatomy.head is not None:
        return settled
    key, nested = "tie_word_embeddings", settled.get("text_config")
    if settled.get(key) is False:
        settled[key] = True
    if isinstance(nested, Mapping) and nested.get(key) is False:
        settled["text_config"] = {**nested, key: True}
    return settled


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose head has become another matrix than its embedding."""
    key, nested = "tie_word_embeddings", config.get("text_config")
    untied = {**config, key: False}
    if isinstance(nested, Mapping) and key in nested:
        untied["text_config"] = {**nested, key: False}
    return untied
