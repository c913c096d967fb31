"""The tensors of a model that have a row for each token, and the config that says how many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery.anatomy import Role
from surgery.checkpoint import Checkpoint

_TOKENS = re.compile(r"(^|[._])(embed_tokens\w*|wte|word_embeddings?|lm_head|embed_out)\.weight$")
"""Names that are a matrix of tokens wherever they stand."""
_KNOWN_ELSE = re.compile(r"pos|wpe|type|inv_freq|masked_bias|num_batches_tracked")
"""Tables of positions and types, and buffers: a size that is the vocabulary's is chance."""
_OTHER_TOWERS = ("vision_config", "audio_config", "vision_tower", "audio_tower")


def token_tensors(model: Checkpoint) -> dict[str, int]:
    """The axis along which a tensor has a row for each token, by name: embeddings, heads and the
    biases of heads."""
    embedding = model.anatomy.embedding
    if embedding is None:
        return {}
    shape = model[embedding].shape
    found = {}
    for name, tensor in model.items():
        role = model.anatomy.places[name].role
        outer = role in (Role.EMBEDDING, Role.HEAD) and not _KNOWN_ELSE.search(name)
        bias = role is Role.HEAD and name.endswith("bias")
        if (outer and tensor.shape == shape) or (bias and tensor.shape == shape[:1]):
            found[name] = 0
        elif name.endswith("final_logits_bias") and tensor.shape == (1, shape[0]):
            found[name] = 1
    return found


def unknown_token_tensors(model: Checkpoint, known: Mapping[str, int]) -> list[str]:
    """A problem for each tensor that may have a row for each token, and isn't known to."""
    embedding = model.anatomy.embedding
    if embedding is None:
        where = model.source.reference
        return [f"{where} has no token embedding that was recognised: see `surgery inspect`"]
    count = model[embedding].shape[0]
    problems = []
    for name, tensor in model.items():
        if name in known or _KNOWN_ELSE.search(name):
            continue
        role = model.anatomy.places[name].role
        if _TOKENS.search(name):
            problems.append(
                f"{name} is {list(tensor.shape)} in {model.source.reference}, and {embedding} "
                f"has {count:,} rows: which of them are which tokens isn't known"
            )
        elif count in tensor.shape and role in (
            Role.UNKNOWN,
            Role.EMBEDDING,
            Role.HEAD,
            Role.BUFFER,
        ):
            problems.append(
                f"{name} is {list(tensor.shape)} in {model.source.reference}, which has "
                f"{count:,} tokens, and whether its rows follow them isn't known"
            )
    return problems


def resized_config(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """The config with `vocab_size`, nested too, following the rows of the embedding."""
    if before == after or not config:
        return dict(config)
    resized, found = _resized(config, before, after)
    if found:
        return resized
    nested = config.get("text_config")  # it holds what isn't the default of its class
    if isinstance(nested, Mapping):
        return {**config, "text_config": {**nested, "vocab_size": after}}
    return {**config, "vocab_size": after}


def _resized(table: Mapping[str, Any], before: int, after: int) -> tuple[dict[str, Any], bool]:
    made, found = dict(table), False
    for key, value in table.items():
        if key == "vocab_size" and value == before and type(value) is int:
            made[key], found = after, True
        elif isinstance(value, Mapping) and key not in _OTHER_TOWERS:
            made[key], inside = _resized(value, before, after)
            found = found or inside
    return made, found
