"""What a few model types need beyond the rules: values of their config, with the reason."""

from __future__ import annotations

from typing import Any

_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_OCR = {
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}  # fmt: skip
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_FOUR = {"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}}
_SAM = {  # code that has 256 in it
    "vision_config": {"output_channels": 256},
    "prompt_encoder_config": {"hidden_size": 256},
    "mask_decoder_config": {"hidden_size": 256},
}
_ADAPTERS = {
    "vision_config": {"adapter_in_dim": 48, "adapter_out_dim": 32},
    "audio_config": {"adapter_input_size": 48, "adapter_out_dim": 32},
}

_TWO_LAYERS = {"mask_decoder_config": {"num_hidden_layers": 2}}

_FAST_SPEECH: dict[str, Any] = {
    "speaking_speed": 1e-6,  # or thousands of frames for each token
    "hidden_size": 24,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_linear_units": 72,
    "decoder_linear_units": 72,
    "duration_predictor_channels": 16,
    "energy_predictor_channels": 16,
    "pitch_predictor_channels": 16,
    "speech_decoder_postnet_units": 16,
}
QUIRKS: dict[str, dict[str, Any]] = {
    # the default config lacks what the model needs
    "autoformer": {"prediction_length": 16},
    "blip-2": {"image_token_id": 100},
    "instructblip": {"image_token_id": 100},
    "instructblipvideo": {"image_token_id": 100, "video_token_id": 100},
    "paddleocr_vl": {"text_config": _SECTIONS},
    "paddleocr_vl_text": _SECTIONS,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 101},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 101},
    "shieldgemma2": {"yes_token_index": 100, "no_token_index": 101},
    "step3p5": {"sliding_window": 16},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_ocr2": {"text_config": _OCR},
    "deepseek_ocr2_text": _OCR,
    "dots1": _EXPERTS | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 24},
    "esm": {"vocab_size": 120, "pad_token_id": 1, "mask_token_id": 32},
    "ernie4_5_vl_moe": {"text_config": _MROPE},
    "ernie4_5_vl_moe_text": _MROPE,
    "gemma4_unified_assistant": {
        "text_config": {
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        }
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "informer": {"prediction_length": 8},
    "hunyuan_vl": {"text_config": _FOUR},
    "hunyuan_vl_text": _FOUR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "time_series_transformer": {"prediction_length": 8},
    # sizes that have to agree: what the vision tower ends with, and what the text takes
    "sam": _SAM,
    "lilt": {"hidden_size": 48},  # six sixths of it
    "colqwen2": {"vlm_config": {"vision_config": {"hidden_size": 32}}},
    "qwen2_vl": {"vision_config": {"hidden_size": 32}},
    # sizes that have to agree: heads times their size is twice the hidden size
    "dots3_note": {"text_config": {"head_dim": 16}, **_ADAPTERS},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {"head_dim": 16},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "glm5_next_text": {"index_topk": 16},
    # of 256 experts that return their input and 4 others, tokens find the others too seldom
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    # as many matrices as the decoder has layers, which are two: a third is one in the middle
    "edgetam_video": _TWO_LAYERS,
    "sam2": _TWO_LAYERS,
    "sam2_video": _TWO_LAYERS,
    "sam3_tracker": _TWO_LAYERS,
    "sam3_tracker_video": _TWO_LAYERS,
    "sam3_video": {"tracker_config": _TWO_LAYERS},
    # durations are rounded up to whole frames: with the shortest, rounding decides nothing
    "vits": {"speaking_rate": 1000.0, "upsample_initial_channel": 32},
    "fastspeech2_conformer": _FAST_SPEECH,
    "fastspeech2_conformer_with_hifigan": {
        "model_config": _FAST_SPEECH,
        "vocoder_config": {"upsample_initial_channel": 32},
    },
    # 256 depths for every pixel
    "chmv2": {"number_output_channels": 32, "backbone_config": {"image_size": 64}},
    # a key whose name means the hidden size elsewhere is the MLP's width
    "distilbert": {"hidden_dim": 72},
}
