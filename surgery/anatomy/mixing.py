"""What mixes tokens in each block: attention, a state space, a recurrence, a convolution.

Told by names and shapes, as far as those tell; the config's list of layer types says which
attention is a linear one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from surgery.anatomy.places import Place, Role
from surgery.tensor import LazyTensor

Mixing = Literal[
    "attention", "cross-attention", "linear attention", "mamba", "recurrence", "convolution"
]
ORDER: tuple[Mixing, ...] = (
    "attention",
    "cross-attention",
    "linear attention",
    "mamba",
    "recurrence",
    "convolution",
)
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")

_RECURRENCE = re.compile(r"(^|[._])(time_decay|recurrent_\w+|rg_lru|[if]gate_preact)([._]|$)")
_DECAY = re.compile(r"(^|[._])(A_log|dt_bias|slope_rate|\w*_decay)$")
_STATE_SPACE = re.compile(r"(^|\.)(D|x_proj\w*|dt_proj\w*)(\.|$)")
_CROSS = re.compile(r"cross_?att|encoder_att|encdecatt|(^|\.)multihead_attn\.", re.IGNORECASE)
_IN_A_MIXER = re.compile(r"(^|[._])(in_proj\w*|out_proj|[qkv]_proj|[qkv]_conv1d)([._]|$)")


def find_mixing(
    tensors: Mapping[str, LazyTensor], places: Mapping[str, Place], config: Mapping[str, Any]
) -> dict[tuple[str, int], tuple[Mixing, ...]]:
    """All that mixes tokens in a block, for every (stack, block); nothing for one that is only an
    MLP. `config` is that of the language model."""
    blocks: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, place in places.items():
        if place.stack is not None and place.block is not None:
            blocks[place.stack, place.block].append(name)
    depths = Counter(stack for stack, _ in blocks)
    found = {}
    for (stack, block), names in blocks.items():
        kinds = set(_of_names(names, tensors, places))
        if "attention" in kinds and _is_linear(config, depths[stack], block):
            kinds = kinds - {"attention"} | {"linear attention"}
        found[stack, block] = tuple(kind for kind in ORDER if kind in kinds)
    return found


def _of_names(
    names: Iterable[str], tensors: Mapping[str, LazyTensor], places: Mapping[str, Place]
) -> Iterable[Mixing]:
    by_role: dict[Role, list[str]] = defaultdict(list)
    for name in names:
        by_role[places[name].role].append(places[name].inner)
        if _is_convolution(name, tensors[name], places[name].role):
            yield "convolution"
    mixer, attention = by_role[Role.MIXER], by_role[Role.ATTENTION]
    if any(map(_RECURRENCE.search, mixer)):
        yield "recurrence"
    elif any(map(_DECAY.search, mixer)):
        yield "mamba" if any(map(_STATE_SPACE.search, mixer)) else "linear attention"
    elif mixer:
        yield "convolution"
    if any(map(_CROSS.search, attention)):
        yield "cross-attention"
    if own := [inner for inner in attention if not _CROSS.search(inner)]:
        yield "linear attention" if any(map(_DECAY.search, own)) else "attention"


def _is_convolution(name: str, tensor: LazyTensor, role: Role) -> bool:
    """Whether a tensor is a convolution over the neighbours of a token (or of a patch), outside
    the modules that have one on their way in."""
    if role not in (Role.UNKNOWN, Role.MLP) or _IN_A_MIXER.search(name):
        return False
    over = tensor.shape[2:]
    return (len(over) == 2 or (len(over) == 1 and "conv" in name.lower())) and max(over) > 1


def _is_linear(config: Mapping[str, Any], depth: int, block: int) -> bool:
    """Whether the config calls the attention of that block linear, in a list as long as its stack
    is deep."""
    lists = [config.get(key) for key in LAYER_LISTS]
    kinds = next((kind for kind in lists if isinstance(kind, list) and len(kind) == depth), None)
    return kinds is not None and kinds[block] == "linear_attention"
