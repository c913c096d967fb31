"""Tiny mixtures of experts of many families, made with transformers itself.

Routed experts, shared ones and plain layers have widths of their own where the family lets them,
and those aren't the hidden size or a multiple of each other but where the family makes them so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from families import COMMON, ROOT, quiet, spread

MOE = COMMON | {"num_key_value_heads": 2}
TOP2 = {"num_experts_per_tok": 2}
GROUPED = TOP2 | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
DBRX = {
    "vocab_size": 97,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Mixture:
    """A model type with its config, the widths of each kind of MLP by block, and the keys that
    set them."""

    options: Mapping[str, Any]
    routed: Mapping[int, int]
    keys: Mapping[str, int]
    shared: Mapping[int, int] | None = None
    dense: Mapping[int, int] | None = None
    stacked: bool = False


def _mixture(
    routed: int | dict[int, int],
    keys: dict[str, int],
    *,
    shared: int | dict[int, int] = 0,
    dense: dict[int, int] | None = None,
    stacked: bool = False,
    common: Mapping[str, Any] = MOE | TOP2,
    **options: Any,
) -> Mixture:
    by_block = routed if isinstance(routed, dict) else dict.fromkeys(range(3), routed)
    if not isinstance(shared, dict):
        shared = dict.fromkeys(by_block, shared) if shared else {}
    set_ = {k: v for k, v in keys.items() if "." not in k}
    return Mixture({**common, **set_, **options}, by_block, keys, shared, dense or {}, stacked)


_INTER = {"intermediate_size": 40}
_MOE_INTER = {"moe_intermediate_size": 24}
_BOTH = {"intermediate_size": 56, "moe_intermediate_size": 24}
_LATE = {1: 24, 2: 24}
_FIRST = {0: 56}

MIXTURES: dict[str, Mixture] = {
    "mixtral": _mixture(40, _INTER, num_local_experts=4),
    "qwen2_moe": _mixture(
        _LATE,
        _BOTH | {"shared_expert_intermediate_size": 40},
        shared=40,
        dense=_FIRST,
        num_experts=4,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": _mixture(24, _MOE_INTER, num_experts=4, head_dim=8),
    "qwen3_next": _mixture(
        24,
        _MOE_INTER | {"shared_expert_intermediate_size": 40},
        shared=40,
        num_experts=4,
        head_dim=8,
        **LINEAR,
    ),
    "olmoe": _mixture(40, _INTER, num_experts=4),
    "phimoe": _mixture(40, _INTER, num_local_experts=4),
    "deepseek_v2": _mixture(
        _LATE, _BOTH, shared=48, dense=_FIRST, n_routed_experts=4, n_shared_experts=2,
        **MLA, common=MOE | GROUPED,
    ),
    "deepseek_v3": _mixture(
        _LATE, _BOTH, shared=48, dense=_FIRST, n_routed_experts=4, n_shared_experts=2,
        **MLA, common=MOE | GROUPED,
    ),
    "glm4_moe": _mixture(
        _LATE, _BOTH, shared=24, dense=_FIRST, n_routed_experts=4, n_shared_experts=1,
        head_dim=8, common=MOE | GROUPED,
    ),
    "ernie4_5_moe": _mixture(
        _LATE, _BOTH, shared=48, dense=_FIRST, moe_num_experts=4, moe_num_shared_experts=2,
        moe_k=2, moe_layer_start_index=1, common=MOE,
    ),
    "lfm2_moe": _mixture(
        _LATE, _BOTH, dense=_FIRST, num_experts=4, num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "jamba": _mixture({1: 40}, _INTER, dense={0: 40, 2: 40}, num_experts=4, **MAMBA),
    "hunyuan_v1_moe": _mixture(
        40, _INTER, shared=40, num_experts=4, moe_topk=2, head_dim=8, common=MOE
    ),
    "gpt_oss": _mixture(
        40, _INTER, stacked=True, num_local_experts=4, head_dim=8, sliding_window=8
    ),
    "llama4_text": _mixture(
        {1: 40}, _INTER | {"intermediate_size_mlp": 56}, shared=40, dense={0: 56, 2: 56},
        stacked=True, num_local_experts=4, interleave_moe_layer_step=2, head_dim=8,
        num_experts_per_tok=1,
    ),
    "granitemoe": _mixture(40, _INTER, stacked=True, num_local_experts=4),
    "granitemoeshared": _mixture(
        40, _INTER | {"shared_intermediate_size": 24}, shared=24, stacked=True, num_local_experts=4
    ),
    "jetmoe": _mixture(40, _INTER, stacked=True, num_local_experts=4, kv_channels=8),
    "aria_text": _mixture(
        40, _INTER, shared=80, stacked=True, moe_num_experts=4, moe_topk=2,
        moe_num_shared_experts=2, head_dim=8, common=MOE,
    ),
    "gemma4_text": _mixture(
        24, _BOTH, dense={0: 56, 1: 56, 2: 56}, stacked=True, enable_moe_block=True, num_experts=4,
        top_k_experts=2, head_dim=8, global_head_dim=8, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=97, common=MOE,
    ),
    "dbrx": _mixture(40, {"ffn_config.ffn_hidden_size": 40}, stacked=True, common=DBRX),
}  # fmt: skip
EVERY_MIXTURE = sorted(MIXTURES)


def save_mixture(name: str, folder: Path, dtype: str = "float32", **options: Any) -> Path:
    """A model of this type with spread weights, saved by transformers."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **{**MIXTURES[name].options, **options})
        model = transformers.AutoModelForCausalLM.from_config(config)
        spread(model)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@cache
def build_mixture(name: str) -> Path:
    """The directory of a mixture's checkpoint, shared by all tests: read it, never change it."""
    return save_mixture(name, ROOT / f"mixture-{name}")
