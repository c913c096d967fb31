"""A tiny config for any architecture, made from the default one by what its keys are called.

Sizes become small and different from each other where they may be (hidden 32, width 72), lists
that follow the layers are cut so that every kind of layer stays. Rules are in groups, since what
one architecture derives from another key has to stay: `kinds.py` tries without each in turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

HIDDEN, HEADS, HEAD_DIM, VOCABULARY, DEPTH = 32, 4, 8, 120, 3
APART = 48
"""The hidden size of the vision and audio parts of a model of several."""
GROUPS = ("apart", "head_dim", "lists", "heads", "experts", "vocabulary", "sizes", "layers")
"""What can be left as it is, in the order in which it is tried."""

_DEPTH = re.compile(
    r"(num_hidden_layers|num_layers|n_layers?|layers|depth|l_layers|r_layers|x_layers"
    r"|\w*(encoder|decoder|_hidden|spatial|temporal|attention|resampler)_?(num_)?(hidden_)?layers"
    r"|num_(en|de)coder_(layers|blocks)|num_layers_per_stack|num_blocks|aligner_num_add_layers"
    r"|num_(global|timestamp_prediction|resampler)_layers|num_self_attends_per_block"
    r"|(global|folding_trunk)\w*_layers|resampler_depth|num_hidden_layers_\w+)"
)
_NO_DEPTH = re.compile(r"num_(adapter|conv|feat_extract|kv_shared)_layers|\w*(dense|sparse)_layers")
_PER_LAYER = re.compile(r"depths|num_block_repeats|stage_num_blocks|blocks_per_stage|block_sizes")
_INDICES = re.compile(
    r"\w*(ind(ex)?e?s|indices|idxs|hook_ids|_layers|layer_ids|blocks|vision_layer)"
)
_FIRST_FEW = re.compile(
    r"first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_start_index"
)
_PERIOD = re.compile(
    r"\w*(period|every_n_layers|layer_group_size|layer_interval|sliding_window_pattern|sparse_step)"
)
_VOCABULARY = re.compile(r"\w*vocab_size\w*|num_embeddings|num_embeds")
_TOKEN = re.compile(r"\w*(token_id|token_index|_token|_index|_id)")
_EXPERTS = re.compile(r"(num|n|moe_num)_(local_|routed_)?experts|encoder_hash_byte_group_vocab")
_CHOSEN = re.compile(r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k|num_selected_experts")
_HEAD_DIM = re.compile(
    r"\w*(head_dim|head_size|d_head|dim_head|head_width|headdim)|d_kv|kv_channels|rotary_dim"
)
_KV_HEADS = re.compile(r"\w*(num_key_value(_attention)?_heads(_per_layer)?|num_kv_heads)")
_HEADS = re.compile(r"\w*(heads|n_head|num_heads)(_per_layer)?")
_HIDDEN = re.compile(
    r"(\w+_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size|embed_proj_dim|emb_dim"
    r"|projection_dim|embedding_dim|model_dim|adapter_dim|width|lru_width|output_dim|dim)"
    r"|out_hidden_size|pooler_output_size|projection_size|output_hidden_size|input_embedding_size"
    r"|output_embedding_size|project_dim|proj_codevector_dim|codevector_dim|d_latents"
)
_OWN = re.compile(r"hidden_size|d_model|embed_dim|hidden_dim|dim")
_WIDTH = re.compile(
    r"\w*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|dim_feedforward|feedforward_dim"
    r"|n_inner|d_inner|dim_ff|dff|feed_forward_size|linear_units|intermediate_dim|ffn_embed_dim"
    r"|intermediate_size_mlp|mlp_hidden_size|feed_forward_hidden_size|expert_dim)"
)
_IMAGE = re.compile(
    r"image_size|img_size|crop_size|input_size|\w*feature_sizes|image_grid_pinpoints"
)
_FRAMES = re.compile(r"num_frames|frames_per_clip|video_num_frames")
_SIDE, _FEW_FRAMES = 64, 4
_NUMBERS = {
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "kv_lora_rank": 16, "q_lora_rank": 24, "o_lora_rank": 16, "qk_head_dim": 16,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_d_ssm": 64,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_dt_rank": 4, "time_step_rank": 4,
    "codebook_size": 128, "context_size": 16, "sliding_window": 16, "attention_window_size": 16,
    "hidden_size_per_layer_input": 8, "index_n_heads": 2, "index_topk": 4, "index_head_dim": 16,
}  # fmt: skip


def shrink(
    values: Mapping[str, Any], keep: Collection[str] = (), part: str = "", nested: bool = True
) -> dict[str, Any]:
    """The keys of a config with small values. `keep` names groups of rules that aren't applied,
    `part` the sub-config that this is."""
    depth = 0 if "layers" in keep else _depth(values)
    chosen = _layers_to_keep(values, depth)
    small = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            if key == "per_layer_config" and value:  # by the layer's number
                places = {str(layer): at for at, layer in enumerate(chosen)}
                small[key] = {
                    str(places[str(layer)]): shrink(own, keep, part)
                    for layer, own in value.items()
                    if str(layer) in places
                }
            elif key in ("rope_parameters", "rope_scaling"):
                small[key] = _rope(value)
            elif nested and "model_type" in value:
                small[key] = shrink(value, keep, f"{part} {key}".strip())
            else:
                small[key] = value
        elif isinstance(value, (list, tuple)) and value:
            small[key] = _list(key, list(value), depth, chosen, keep, part)
        elif type(value) is int:
            small[key] = _number(key, value, values, len(chosen), keep, part)
        elif type(value) is float and key in ("mlp_ratio", "mlp_expansion_ratio"):
            small[key] = 2.25
        else:
            small[key] = value
    return small


def _depth(values: Mapping[str, Any]) -> int:
    """The layers that the lists of this config follow."""
    for key in (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "depth",
        "encoder_layers",
    ):
        if type(values.get(key)) is int:
            return int(values[key])
    return 0


def _layers_to_keep(values: Mapping[str, Any], depth: int) -> list[int]:
    """Which layers stay, so that every value of every per-layer list does; three at least."""
    if not depth:
        return list(range(DEPTH))
    lists = [
        list(map(str, value))
        for value in values.values()
        if isinstance(value, (list, tuple)) and len(value) == depth and depth > 1
    ]
    chosen: list[int] = []
    seen: set[tuple[int, str]] = set()
    for layer in range(depth):
        here = {(at, value[layer]) for at, value in enumerate(lists) if len(set(value)) <= 4}
        if here - seen:
            chosen.append(layer)
            seen |= here
    indices = [
        len(value)
        for key, value in values.items()
        if _INDICES.fullmatch(key) and _are_indices(value, depth) and len(value) != depth
    ]
    wanted = max(DEPTH, len(chosen), min(6, 1 + max(indices, default=0)))
    chosen += [layer for layer in range(depth) if layer not in chosen][: wanted - len(chosen)]
    while len(chosen) < wanted:  # a default of one or two layers
        chosen.append(len(chosen))
    return sorted(chosen)


def _are_indices(value: Any, depth: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(type(v) is int and -depth <= v <= depth for v in value)
    )


def _list(
    key: str, value: list[Any], depth: int, chosen: list[int], keep: Collection[str], part: str
) -> list[Any]:
    if _PER_LAYER.fullmatch(key):
        return [min(v, 2) if type(v) is int else v for v in value]
    if depth and _INDICES.fullmatch(key) and len(value) != depth and _are_indices(value, depth):
        new = len(chosen)
        some = min(len(value), new - 1)  # not all: the others are of another kind
        return sorted({max(0, round((n + 1) * new / (some + 1)) - 1) for n in range(some)})
    if depth > 1 and len(value) == depth:
        if _INDICES.fullmatch(key) and value == list(range(depth)):
            return list(range(len(chosen)))
        value = [value[layer] if layer < depth else value[-1] for layer in chosen]
    elif (
        "lists" not in keep
        and all(type(v) is int for v in value)
        and (max(value) >= 64 or (max(value) >= 32 and "channels" in key))
    ):
        if re.search(r"size|dim|channel|filter", key) and not re.search(r"image|window|patch", key):
            return [v // 4 if v >= 32 else v for v in value]
        return value
    return [_number(key, v, {}, len(chosen), keep, part) if type(v) is int else v for v in value]


def _number(
    key: str, value: int, values: Mapping[str, Any], depth: int, keep: Collection[str], part: str
) -> int:
    if "layers" not in keep:
        if _FIRST_FEW.fullmatch(key):
            return min(value, 1)
        if key == "num_kv_shared_layers":
            return min(value, 1)
        if _DEPTH.fullmatch(key) and not _NO_DEPTH.fullmatch(key):
            return depth if value > 1 or key == "num_hidden_layers" else value
        if _PERIOD.fullmatch(key) and value > 2:
            return 2
        if key.endswith("_layer_offset"):
            return 1
    if _TOKEN.fullmatch(key) and value >= VOCABULARY and "vocabulary" not in keep:
        return VOCABULARY - 1 - sum(map(ord, key)) % 40
    if _VOCABULARY.fullmatch(key) and "vocabulary" not in keep:
        return min(value, VOCABULARY)
    if "experts" not in keep:
        if _EXPERTS.fullmatch(key):
            return min(value, 4)
        if _CHOSEN.fullmatch(key):
            return min(value, 2)
        if key == "n_group":
            return min(value, 2)
        if key == "topk_group":
            return 1
    if key in _NUMBERS:
        return min(value, _NUMBERS[key]) if value > 0 else value
    if _HEAD_DIM.fullmatch(key):
        return value if "head_dim" in keep else min(value, HEAD_DIM)
    if "heads" not in keep:
        if _KV_HEADS.fullmatch(key):
            others = (v for k, v in values.items() if k != key and _HEADS.fullmatch(k))
            return min(value, HEADS if value in others else 2)
        if _HEADS.fullmatch(key):
            if key.startswith("linear_num_key"):
                return 2
            return min(value, HEADS)
    if "sizes" not in keep and not isinstance(values.get("num_heads"), (list, tuple)):
        if _WIDTH.fullmatch(key):
            return _width(key, value, part)
        if "apart" not in keep and re.search(r"vision|audio", part) and _OWN.fullmatch(key):
            return min(value, APART)
        if _HIDDEN.fullmatch(key):
            return min(value, HIDDEN) if value > 0 else value
    elif key == "embed_dim" and "sizes" not in keep:  # doubled at each stage, as the heads are
        return value // 4
    return value


def _width(key: str, value: int, part: str) -> int:
    """Multiples of 8 and not of 32, different by what they are for."""
    where = f"{part} {key}"
    if "shared" in key:
        wanted = 40
    elif re.search(r"moe|expert", key):
        wanted = 24
    elif re.search(r"vision|image|audio|speech", where):
        wanted = 56
    else:
        wanted = 88 if "decoder" in where else 72
    return min(value, wanted) if value > 0 else value


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a head are as long together as half of it."""
    small = {k: _rope(v) if isinstance(v, Mapping) else v for k, v in value.items()}
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = 32
    if "mrope_section" in small:
        half = HEAD_DIM // 2 * float(value.get("partial_rotary_factor") or 1)
        few = [2, 1, 1] if half >= 4 else [1, 1, 0]
        small["mrope_section"] = few[: len(small["mrope_section"])]
    return small


def with_small_images(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same config for images of 64 to 128 pixels a side: all that is counted in pixels, or in
    the cells of a map of them, divided by the same power of two; and for a few frames."""
    sides = [side for side in _sides(values) if side >= 2 * _SIDE]
    by = 1
    while sides and max(sides) % (2 * by) == 0 and max(sides) // (2 * by) >= _SIDE:
        by *= 2
    return _divided(values, by)


def _sides(values: Mapping[str, Any]) -> list[int]:
    found: list[int] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _sides(value)
        elif _IMAGE.fullmatch(str(key)) and not str(key).endswith(("sizes", "pinpoints")):
            found += [v for v in (value if isinstance(value, list) else [value]) if type(v) is int]
    return found


def _divided(value: Any, by: int, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _divided(inner, by, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)) and _IMAGE.fullmatch(key):
        return [_divided(inner, by, key) for inner in value]
    if type(value) is int and _IMAGE.fullmatch(key) and value % by == 0:
        return value // by
    if type(value) is int and _FRAMES.fullmatch(key):
        return min(value, _FEW_FRAMES)
    return value
