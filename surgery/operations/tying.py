"""Tied heads: make the config say what the files hold, so that a loader reads it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.checkpoint import Checkpoint


def settled_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config, with `tie_word_embeddings` true where it was false and no head is stored: a
    loader would make up a random head."""
    config = dict(checkpoint.config)
    anatomy = checkpoint.anatomy
    if not anatomy.tied or anatomy.head is not None:
        return config
    key, nested = "tie_word_embeddings", config.get("text_config")
    if config.get(key) is False:
        config[key] = True
    if isinstance(nested, Mapping) and nested.get(key) is False:
        config["text_config"] = {**nested, key: True}
    return config
