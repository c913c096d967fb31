"""The tensors that a model would be saved as. transformers packs experts and changes names as it
loads, and takes that back as it saves; of blocks that differ in nothing but their number, which
there can be a hundred of with 800 tensors each, only the first and the last are taken back."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from surgery.modeling.quiet import quiet

Shapes = dict[str, tuple[int, ...]]
State = Mapping[str, Any]
Key = tuple[str, int]
"""The first number of a name, and what comes before it."""

FEWER = 8
"""How many times fewer blocks there have to be to look at, for each is converted twice."""
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


def stored_tensors(model: Any) -> Shapes:
    """The shapes of the tensors that `save_pretrained` would write, by their names there."""
    state = model.state_dict()
    made = _by_forms(model, state)
    return _saved(model, state) if made is None else made


def _saved(model: Any, state: State) -> Shapes:
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"), quiet():
        tensors = revert_weight_conversion(model, dict(state))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _by_forms(model: Any, state: State) -> Shapes | None:
    """The same from a few blocks. None unless it shows that each is converted by itself, into
    tensors that have its number, and the last of a form as the first."""
    outside, blocks = _apart(state)
    forms: dict[object, list[Key]] = defaultdict(list)
    for key, block in blocks.items():
        inside = ((inner, tensor.shape, tensor.dtype) for inner, tensor in block.items())
        forms[key[0], tuple(inside)].append(key)
    kept = [key for keys in forms.values() for key in dict.fromkeys((keys[0], keys[-1]))]
    if FEWER * len(kept) > len(blocks):
        return None
    alone = {key: _saved(model, _named(key, blocks[key])) for key in kept}
    made = {key: _of_block(key, shapes) for key, shapes in alone.items()}
    if any(made[keys[0]] is None or made[keys[0]] != made[keys[-1]] for keys in forms.values()):
        return None
    together = dict(outside)
    for key in kept:
        together |= _named(key, blocks[key])
    found, parts = _saved(model, together), [_saved(model, outside), *alone.values()]
    if found != {name: shape for part in parts for name, shape in part.items()}:
        return None
    for keys in forms.values():
        for (prefix, inner), shape in (made[keys[0]] or {}).items():
            found |= {f"{prefix}{number}{inner}": shape for _, number in keys}
    return found


def _apart(state: State) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """What has no number in its name; and by its first number, what has, by what follows that."""
    outside: dict[str, Any] = {}
    blocks: dict[Key, dict[str, Any]] = defaultdict(dict)
    for name, tensor in state.items():
        if (match := _NUMBER.search(name)) is None:
            outside[name] = tensor
        else:
            blocks[name[: match.start()], int(match[0])][name[match.end() :]] = tensor
    return outside, blocks


def _named(key: Key, block: State) -> dict[str, Any]:
    return {f"{key[0]}{key[1]}{inner}": tensor for inner, tensor in block.items()}


def _of_block(key: Key, shapes: Shapes) -> dict[tuple[str, str], tuple[int, ...]] | None:
    """Shapes by what is before and after the number of the block in their names, which all have
    it as their first."""
    outside, found = _apart(shapes)
    if outside or any(number != key[1] for _, number in found):
        return None
    return {
        (prefix, inner): shape
        for (prefix, _), block in found.items()
        for inner, shape in block.items()
    }
