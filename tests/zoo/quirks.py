"""What a few model types need beyond the rules: values of their config, with the reason."""

from __future__ import annotations

from typing import Any

_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

QUIRKS: dict[str, dict[str, Any]] = {
    # the default config lacks what the model needs
    "autoformer": {"prediction_length": 8},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": _EXPERTS | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 24},
    "esm": {"vocab_size": 120, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "informer": {"prediction_length": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "time_series_transformer": {"prediction_length": 8},
    # sizes that have to agree: heads times their size is twice the hidden size
    "mamba2": {"num_heads": 8, "head_dim": 8},
    # a key whose name means the hidden size elsewhere is the MLP's width
    "distilbert": {"hidden_dim": 72},
}
