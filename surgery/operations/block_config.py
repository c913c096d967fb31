"""The config of a checkpoint made of blocks: the number of layers, and all that goes by layer.

Lists by layer follow the blocks. Where a class derives such a list from a pattern (every sixth
layer is global), the list itself is written if the pattern no longer gives it. Then the model is
built without weights, and a block that came out other than its source was is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.anatomy.infer import DEPTH_KEYS, WIDTH_KEYS, WIDTHS_KEY, first, text_config
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.modeling.widths import without_auto_map

Block = tuple[Checkpoint, int]

BY_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern"),
    *("no_rope_layers", "layer_rope_theta", "sliding_windows", "attention_layers"),
    *("moe_layer_freq", "layers_num_experts", "intermediate_size", "indexer_types"),
    *("num_attention_heads_per_layer", "num_key_value_heads_per_layer"),
    *("activation_sparsity_pattern", "swiglu_limits", "swiglu_limits_shared"),
)
"""Keys that hold, as a list (or a string), something for every layer."""
NUMBERS_OF_LAYERS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"),
    *("cross_attention_layers", "rope_scaling_layers"),
)
"""Keys that hold a list of layers, by their numbers."""
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
"""Keys that say how many layers at the start are of another kind."""
PATTERNS = (
    *FIRST_LAYERS,
    *("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval"),
    *("max_window_layers", "num_kv_shared_layers", "decoder_sparse_step", "moe_layer_freq"),
    *("interleave_moe_layer_step", "global_attn_every_n_layers", "scale_attn_by_inverse_layer_idx"),
    *("attn_layer_period", "expert_layer_period", "block_types", "attention_types"),
)
"""Keys by which a class works out what a layer is from its number."""
_MODEL_WIDE = re.compile(r"rope|rotary|alibi|softcap|multiplier|scal|position_embedding|norm_eps")
"""Keys that change what all blocks compute, and of which a model has one."""


def composed_config(
    before: Checkpoint, after: Checkpoint, blocks: Sequence[Block], stack: str
) -> dict[str, Any]:
    """The config of `before`, made right for these blocks; without the widths of MLPs.

    Raises UnsupportedError with all that can't be expressed.
    """
    config = _plain(before)
    if not config:
        return config  # tensors alone: there is no loader to tell
    models = list({id(m): m for m in (before, *(m for m, _ in blocks), after)}.values())
    unchanged = [at for _, at in blocks] == list(range(before.anatomy.stacks[stack]))
    if unchanged and len(models) == 1:
        return config
    from surgery.modeling.layers import derived
    from surgery.modeling.stock import known

    stock = known(config)
    values = {id(model): _values(model) for model in models}
    part = dict(text_config(config))
    depth_keys = [key for key in DEPTH_KEYS if type(part.get(key)) is int]
    part |= dict.fromkeys(depth_keys or DEPTH_KEYS[:1], len(blocks))
    wanted = _by_layer(blocks, values, stack) | _numbers(blocks, values)
    wanted |= _counts(part, blocks, values)
    part |= {key: wanted[key] for key in part if key in wanted}
    if "attention_types" in part and "attention_layers" in wanted:
        part["attention_types"] = [[wanted["attention_layers"], 1]]
    UnsupportedError.raise_if(_left_as_they_were(before, part, wanted, stack))
    if not stock:
        UnsupportedError.raise_if(_unknown_patterns(before, part, blocks))
        return _with_part(config, part)
    UnsupportedError.raise_if(_fed_by_tower(before, config, blocks))
    now = derived(_with_part(config, part))
    part |= {key: value for key, value in wanted.items() if now.get(key) != value}
    made = _with_part(config, part)
    UnsupportedError.raise_if(_changed(before, made, blocks, stack))
    return made


def unchecked(config: Mapping[str, Any]) -> list[str]:
    """A note, where transformers doesn't know the model type."""
    from surgery.modeling.stock import known

    if not config or known(config):
        return []
    return [
        (
            f"transformers doesn't know the model type {config.get('model_type')!r}: whether a "
            f"block is what it was, under another number, wasn't checked"
        )
    ]


def _plain(model: Checkpoint) -> dict[str, Any]:
    """The config without what an earlier growth of ours put there for layers that differ."""
    config = without_auto_map(model.settled_config)
    config.pop(WIDTHS_KEY, None)
    return config


def _with_part(config: Mapping[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    nested = isinstance(config.get("text_config"), Mapping)
    return {**config, "text_config": part} if nested else part


def _values(model: Checkpoint) -> Mapping[str, Any]:
    """The language model's config, completed by its class where transformers knows it."""
    from surgery.modeling.layers import derived
    from surgery.modeling.stock import known

    config = _plain(model)
    return derived(config) if known(config) else text_config(config)


def unlike_settings(models: Sequence[Checkpoint]) -> list[str]:
    """Settings of the whole model in which those differ whose blocks are to be in one."""
    if len(models) == 1:
        return []
    own, *others = (_values(model) for model in models)
    first = models[0].source.reference
    return [
        f"{key} is {own.get(key)} in {first} and {other.get(key)} in {model.source.reference}, "
        f"and a model has one: if the blocks are to share it, set it alike in both config.json"
        for model, other in zip(models[1:], others, strict=True)
        for key in sorted(set(own) | set(other))
        if _MODEL_WIDE.search(key) and key not in (*BY_LAYER, *NUMBERS_OF_LAYERS)
        if own.get(key) != other.get(key)
    ]


def _by_layer(
    blocks: Sequence[Block], values: Mapping[int, Mapping[str, Any]], stack: str
) -> dict[str, Any]:
    """Every list by layer that all sources have, with the entry of each block's source."""
    wanted: dict[str, Any] = {}
    for key in BY_LAYER:
        entries = [
            value[at]
            for model, at in blocks
            if isinstance(value := values[id(model)].get(key), (list, str))
            and len(value) == model.anatomy.stacks[stack]
        ]
        if len(entries) == len(blocks):
            text = isinstance(values[id(blocks[0][0])][key], str)
            wanted[key] = "".join(entries) if text else entries
    return wanted


def _numbers(
    blocks: Sequence[Block], values: Mapping[int, Mapping[str, Any]]
) -> dict[str, list[int]]:
    """Every list of numbers of layers, with the numbers that those layers have now."""
    return {
        key: [new for new, (model, at) in enumerate(blocks) if at in values[id(model)][key]]
        for key in NUMBERS_OF_LAYERS
        if all(isinstance(values[id(model)].get(key), list) for model, _ in blocks)
    }


def _counts(
    part: Mapping[str, Any], blocks: Sequence[Block], values: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """What can be said of layers at the start, and of every n-th layer, in numbers of layers."""
    found: dict[str, Any] = {}
    for key in FIRST_LAYERS:
        counts = _whole(key, blocks, values)
        if key in part and counts:
            inside = [at < count for (_, at), count in zip(blocks, counts, strict=True)]
            if inside == sorted(inside, reverse=True):
                found[key] = sum(inside)
    steps = _whole("decoder_sparse_step", blocks, values)
    if "mlp_only_layers" in part and steps and min(steps) > 0:
        dense = [
            at in (values[id(model)].get("mlp_only_layers") or ()) or (at + 1) % step != 0
            for (model, at), step in zip(blocks, steps, strict=True)
        ]
        step = part.get("decoder_sparse_step", 1)
        if any((at + 1) % step and not is_dense for at, is_dense in enumerate(dense)):
            found["decoder_sparse_step"] = step = 1
        found["mlp_only_layers"] = [
            at for at, is_dense in enumerate(dense) if is_dense and (at + 1) % step == 0
        ]
    return found


def _whole(key: str, blocks: Sequence[Block], values: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """What each block's source has for `key`, if all have a whole number there; else nothing."""
    found = [values[id(model)].get(key) for model, _ in blocks]
    whole = [value for value in found if type(value) is int]
    return whole if len(whole) == len(found) else []


def _left_as_they_were(
    before: Checkpoint, part: Mapping[str, Any], wanted: Mapping[str, Any], stack: str
) -> list[str]:
    """Lists by layer of `before` that not all sources have."""
    depth = before.anatomy.stacks[stack]
    return [
        f"{before.source.reference} has {key}, with something for every layer, and the source of "
        f"another block hasn't: give it to both config.json files"
        for key in (*BY_LAYER, *NUMBERS_OF_LAYERS)
        if isinstance(value := part.get(key), (list, str)) and key not in wanted
        if key in NUMBERS_OF_LAYERS or len(value) == depth
    ]


def _unknown_patterns(
    before: Checkpoint, part: Mapping[str, Any], blocks: Sequence[Block]
) -> list[str]:
    """For a model type that can't be built: the patterns that might tell a block by its number."""
    if all(new == at for new, (_, at) in enumerate(blocks)):
        return []
    return [
        f"{before.source.reference}: {key} is {part[key]}, by which a layer's number decides what "
        f"it is, and transformers doesn't know the model type {part.get('model_type')!r}, so that "
        f"what a moved block would become can't be told"
        for key in PATTERNS
        if part.get(key) not in (None, False, 0, 1) and not isinstance(part.get(key), (list, str))
    ]


def _fed_by_tower(
    before: Checkpoint, config: Mapping[str, Any], blocks: Sequence[Block]
) -> list[str]:
    """Models whose vision tower feeds the first layers, one after the other (deepstack)."""
    tower = config.get("vision_config")
    problems = []
    for key, value in tower.items() if isinstance(tower, Mapping) else ():
        fed = len(value) if "deepstack" in key and isinstance(value, list) else 0
        if [(id(model), at) for model, at in blocks[:fed]] != [
            (id(before), at) for at in range(fed)
        ]:
            problems.append(
                f"{before.source.reference}: the vision tower feeds the first {fed} layers ({key} "
                f"has {fed}), so these have to stay its own, in their places"
            )
    return problems


def _changed(
    before: Checkpoint, config: Mapping[str, Any], blocks: Sequence[Block], stack: str
) -> list[str]:
    """What the model of `config` makes of a block that its source's config doesn't."""
    from surgery.modeling.layers import Built, built_blocks

    made = built_blocks(config, stack)
    sources: dict[int, Built] = {}
    problems: dict[str, str] = {}
    for new, (model, at) in enumerate(blocks):
        if id(model) not in sources:
            sources[id(model)] = built_blocks(_alike_in_width(_plain(model), config), stack)
        old, now = sources[id(model)].blocks[at], made.blocks[new]
        depths = len(sources[id(model)].blocks), len(made.blocks)
        off = [key for key in {**old, **now} if _differ(old.get(key), now.get(key), depths)]
        if off:
            key = min(off, key=lambda key: (key.count("."), key))
            problems.setdefault(
                key,
                f"block {at} of {model.source.reference} has {key} = {old.get(key)}, and as block "
                f"{new} it would have {now.get(key)}: the config can't say otherwise"
                + _blame(config),
            )
    own = sources.get(id(before)) or built_blocks(_plain(before), stack)
    outside = [
        f"{name} is {list(shape)} in {before.source.reference}, and with {len(blocks)} blocks it "
        f"would have to be {list(made.outside.get(name, ()))}: it follows the number of layers"
        for name, shape in own.outside.items()
        if made.outside.get(name) != shape
    ]
    return [*problems.values(), *outside]


def _differ(old: Any, now: Any, depths: tuple[int, int]) -> bool:
    """Whether a setting changed. A list of something for every layer, which some modules keep
    whole, is no setting of one block."""
    if isinstance(old, list) and isinstance(now, list) and (len(old), len(now)) == depths:
        return False
    return bool(old != now)


def _alike_in_width(config: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the MLP widths of another: which width a block has is settled elsewhere."""
    part, other = text_config(config), text_config(made)
    widths = {
        key: other[key]
        for key in WIDTH_KEYS
        if type(part.get(key)) is int and type(other.get(key)) is int
    }
    return _with_part(config, {**part, **widths})


def _blame(config: Mapping[str, Any]) -> str:
    """The patterns in the config that may be the reason."""
    part = text_config(config)
    found = [f"{key} = {part[key]}" for key in PATTERNS if part.get(key) not in (None, False)]
    return f" ({', '.join(found)})" if found else ""


def depth_in_config(model: Checkpoint) -> int | None:
    """The number of layers that the config gives."""
    return first(text_config(model.config), DEPTH_KEYS)
