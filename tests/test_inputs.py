"""What models are run on to compare them: their own kinds of inputs, and what those don't reach."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROOT, build, quiet, spread
from transformers import (
    BrosConfig,
    CLIPConfig,
    DecisionTransformerConfig,
    InstructBlipConfig,
    LlavaConfig,
    PatchTSTConfig,
    SamConfig,
    T5Config,
    TimeSeriesTransformerConfig,
    TimesformerConfig,
    ViTConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from surgery import ArgumentError, FormatError, UnsupportedError, grow, open_checkpoint, verify
from surgery.modeling.hollow import HollowModel, _shapes_only
from surgery.tensor import LazyTensor
from surgery.verification import compare_logits
from surgery.verification.inputs import make_inputs
from surgery.verification.outputs import are_logits, main_output

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 48, "patch_size": 16, "projection_dim": 32,
}  # fmt: skip
AUDIO = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 88,
         "vocab_size": 97, "num_mel_bins": 16, "max_source_positions": 20,
         "max_target_positions": 32, "pad_token_id": 0, "decoder_start_token_id": 1,
         "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None,
         "begin_suppress_tokens": None}  # fmt: skip
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", **VISION},
    "image_token_index": 96,
    "vision_feature_select_strategy": "default",
}

MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llava": ("LlavaForConditionalGeneration", LlavaConfig, LLAVA),
    "clip": ("CLIPModel", CLIPConfig, {"text_config": TEXT, "vision_config": VISION}),
    "vit": ("ViTForImageClassification", ViTConfig, {**VISION, "num_labels": 7}),
    "whisper": ("WhisperForConditionalGeneration", WhisperConfig, AUDIO),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        Wav2Vec2Config,
        TEXT | {"conv_dim": [8, 8], "conv_stride": [20, 16], "conv_kernel": [20, 16],
                "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        T5Config,
        {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 72, "num_layers": 3, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip

ASKING: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bros": ("BrosModel", BrosConfig, TEXT | {"hidden_size": 64, "dim_bbox": 8}),
    "decision": (
        "DecisionTransformerModel",
        DecisionTransformerConfig,
        {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 3, "n_head": 4,
         "n_inner": 72, "max_ep_len": 20},
    ),
    "wav2vec2-bert": (
        "Wav2Vec2BertForCTC",
        Wav2Vec2BertConfig,
        TEXT | {"feature_projection_input_dim": 40, "output_hidden_size": 32},
    ),
    "sam": (
        "SamModel",
        SamConfig,
        {"vision_config": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                           "image_size": 80, "patch_size": 16, "mlp_dim": 72,
                           "global_attn_indexes": [1], "window_size": 3},
         "prompt_encoder_config": {"image_size": 80, "patch_size": 16}},
    ),
    "timesformer": (
        "TimesformerModel", TimesformerConfig, {**VISION, "num_frames": 4}
    ),
    "patchtst": (
        "PatchTSTForPrediction",
        PatchTSTConfig,
        {"num_input_channels": 3, "context_length": 24, "patch_length": 4, "patch_stride": 4,
         "d_model": 32, "ffn_dim": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
         "prediction_length": 6},
    ),
    "series": (
        "TimeSeriesTransformerForPrediction",
    TimeSeriesTransformerConfig,
        {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 3],
         "num_time_features": 2, "num_static_categorical_features": 1, "cardinality": [4],
         "embedding_dimension": [3], "d_model": 32, "encoder_layers": 3, "decoder_layers": 3,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 72,
         "decoder_ffn_dim": 88},
    ),
}  # fmt: skip
"""Models whose arguments have to be found out: by name, or from what they refuse."""


@cache
def model(name: str) -> Path:
    class_name, config, options = (MODELS | ASKING)[name]
    folder = ROOT / f"inputs-{name}"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, class_name)(config(**options))
        spread(made)
        made.save_pretrained(folder)
    return folder


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    values = make_inputs(open_checkpoint(model(name))).values
    return {key: tuple(value.shape) for key, value in values.items()}


def test_a_vision_language_model_gets_a_placeholder_for_every_feature():
    """48 / 16 = 3 patches each way: 9 features, and the class token isn't one of them."""
    inputs = make_inputs(open_checkpoint(model("llava")))
    ids, pixels = inputs.values["input_ids"], inputs.values["pixel_values"]
    assert int((ids == 96).sum()) == 9
    assert (ids.shape, pixels.shape) == ((1, 64 + 9), (1, 3, 48, 48))
    assert inputs.what == "64 random tokens and 1 random image"
    assert inputs.unreached == frozenset()


def test_inputs_have_the_sizes_of_the_config():
    assert shapes("vit") == {"pixel_values": (2, 3, 48, 48)}
    assert shapes("whisper") == {"input_features": (2, 16, 40), "decoder_input_ids": (2, 16)}
    assert shapes("wav2vec2") == {"input_values": (2, 19_200)}
    assert shapes("t5") == {
        "input_ids": (2, 64), "attention_mask": (2, 64), "decoder_input_ids": (2, 64)
    }  # fmt: skip
    assert shapes("clip") == {
        "input_ids": (2, 16), "attention_mask": (2, 16), "pixel_values": (2, 3, 48, 48)
    }  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
def test_the_output_is_the_model_s_own_on_these_inputs(name: str):
    """By hand, with the stock loader: what two different models are apart by."""
    class_name = MODELS[name][0]
    base = open_checkpoint(model(name))
    inputs = make_inputs(base).values
    with quiet():
        mine = getattr(transformers, class_name).from_pretrained(model(name)).eval()
    with torch.no_grad():
        result = mine(**inputs)
    found = main_output(result)
    assert found is not None
    wanted = result.logits_per_image if name == "clip" else result.logits
    assert found[1] is wanted
    assert are_logits(*found, mine.config) == (name != "clip")
    same = compare_logits(base, base, device="cpu")
    assert (same.max_difference, same.tokens) == (
        0.0,
        wanted.reshape(-1, wanted.shape[-1]).shape[0],
    )


def test_what_a_model_asks_for_is_made():
    """15 = 12 + the longest lag; 40 and 5 and 3 features are what the first layers take, and the
    image has the size that the model says it must have."""
    assert shapes("bros") == {
        "input_ids": (2, 64), "attention_mask": (2, 64), "bbox": (2, 64, 4)
    }  # fmt: skip
    assert shapes("decision") == {
        "states": (2, 16, 5), "actions": (2, 16, 3), "returns_to_go": (2, 16, 1),
        "timesteps": (2, 16),
    }  # fmt: skip
    assert shapes("wav2vec2-bert")["input_features"][2] == 40
    assert shapes("sam")["pixel_values"][1:] == (3, 80, 80)
    assert shapes("patchtst")["past_values"] == (2, 24, 3)
    assert shapes("series") == {
        "past_values": (2, 15), "past_observed_mask": (2, 15), "past_time_features": (2, 15, 2),
        "future_values": (2, 6), "future_time_features": (2, 6, 2),
        "static_categorical_features": (2, 1),
    }  # fmt: skip
    said = make_inputs(open_checkpoint(model("bros"))).what
    assert said == "128 random tokens with random bbox"
    assert make_inputs(open_checkpoint(model("series"))).what == "2 random series"


@pytest.mark.parametrize("name", list(ASKING))
def test_a_growth_is_told_from_one_whose_split_was_forgotten(name: str):
    """The neurons are copied, and what leads out of them is twice as much as it should be."""
    base = open_checkpoint(model(name))
    grown = grow(base, factor=2, choose="random")
    downs = {mlp.down.weight for mlp in grown.anatomy.every_mlp}
    wrong = {
        key: LazyTensor(tensor.shape, tensor.dtype, inputs=(tensor,), kernel=lambda w: 2 * w)
        for key, tensor in grown.items()
        if key in downs
    }
    right = compare_logits(base, grown, device="cpu")
    assert right.same
    assert right.unreached == ()
    assert not compare_logits(
        base, replace(grown, tensors={**grown.tensors, **wrong}), device="cpu"
    ).same


def test_a_text_is_short_enough_for_its_placeholders(tmp_path: Path):
    """30 positions: 16 tokens and 9 features fit in, 64 don't."""
    config = json.loads((model("llava") / "config.json").read_text())
    config["text_config"] |= {"model_type": "opt", "max_position_embeddings": 30, "ffn_dim": 72,
                              "word_embed_proj_dim": 32}  # fmt: skip
    with quiet():
        made = transformers.LlavaForConditionalGeneration(LlavaConfig(**config))
        made.save_pretrained(tmp_path)
    inputs = make_inputs(open_checkpoint(tmp_path))
    assert inputs.values["input_ids"].shape == (1, 16 + 9)
    assert inputs.what == "16 random tokens and 1 random image"


def test_a_grown_vision_tower_is_run(tmp_path: Path):
    base = open_checkpoint(model("vit"))
    found = verify(base, grow(base, factor=1.5), device="cpu")
    assert found.passed
    assert found.logits is not None
    assert (found.logits.inputs, found.logits.unreached) == ("2 random images", ())
    assert found.logits.kl_mean is not None  # of 7 classes
    assert found.summary.startswith("the certificate holds")
    assert "logits of 2 random images in float32 on cpu" in found.summary


def test_what_the_inputs_don_t_run_is_named(tmp_path: Path):
    """An image token that the embedding has no row for: the model runs on text, and its vision tower doesn't."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((model("llava") / "config.json").read_text())
    config["image_token_id"] = config["image_token_index"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(model("llava") / "model.safetensors", folder)
    base = open_checkpoint(folder)
    inputs = make_inputs(base)
    assert inputs.what == "128 random tokens"
    assert inputs.unreached is not None
    stacks = {stack for stack, _, _ in inputs.unreached}
    assert len(inputs.unreached) == 3
    assert all("vision" in stack for stack in stacks)
    said = compare_logits(base, base, device="cpu").unreached
    assert [name.rpartition(".")[2] for name in said] == ["0", "1", "2"]


def test_a_model_without_weights_takes_no_memory(tmp_path: Path):
    """70 billion parameters, and what it says of inputs: too many positions are an error."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 8192, "n_layer": 80, "n_head": 64,
                    "vocab_size": 50_000, "n_positions": 32})
    )  # fmt: skip
    shutil.copy(build("gpt2") / "model.safetensors", tmp_path)
    hollow = HollowModel(open_checkpoint(tmp_path))
    assert sum(p.numel() for p in hollow.model.parameters()) > 60e9
    result, called = hollow.run({"input_ids": torch.zeros(1, 32, dtype=torch.int64)})
    assert result.logits.shape == (1, 32, 50_000)
    assert "transformer.h.79.mlp.c_proj" in called
    with pytest.raises(IndexError, match="there are 32 rows"):
        hollow.run({"input_ids": torch.zeros(1, 33, dtype=torch.int64)})


def test_features_that_need_more_than_the_image_are_found(tmp_path: Path):
    """InstructBLIP's query tokens read a text of their own: `get_image_features` asks for it."""
    small = {key: TEXT[key] for key in TEXT if key != "max_position_embeddings"}
    config = InstructBlipConfig(
        vision_config=VISION, qformer_config={**small, "encoder_hidden_size": 48},
        text_config={"model_type": "llama", **TEXT}, num_query_tokens=5, image_token_id=96,
    )  # fmt: skip
    with quiet():
        made = transformers.InstructBlipForConditionalGeneration(config)
        made.save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    inputs = make_inputs(base)
    assert int((inputs.values["input_ids"] == 96).sum()) == 5
    assert inputs.unreached == frozenset()
    assert compare_logits(base, grow(base, factor=1.5), device="cpu").same


def test_a_mask_keeps_its_values_beside_what_has_none():
    """Models count their placeholders so."""
    mask = torch.tensor([[True, False]])
    with _shapes_only():
        spread = mask[..., None].expand_as(torch.empty(1, 2, 3, device="meta"))
    assert spread.tolist() == [[[True] * 3, [False] * 3]]


def test_a_model_of_videos_gets_no_image_that_has_as_many_patches():
    """4 frames of 3 x 3 patches each: one image of 6 x 6 would have as many."""
    assert shapes("timesformer") == {"pixel_values": (2, 4, 3, 48, 48)}


def test_a_text_is_tokenized_by_the_model_s_own_tokenizer(tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(build("llama") / name, folder)
    words = {"[UNK]": 0, "the": 10, "cat": 11, "sat": 12, "on": 13}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the cat sat on the dog")
    base = open_checkpoint(folder)
    inputs = make_inputs(base, text=tmp_path / "text.txt")
    assert inputs.values["input_ids"].tolist() == [[10, 11, 12, 13, 10, 0]]
    assert inputs.what == "6 tokens of the text"
    found = verify(base, grow(base), device="cpu", text=tmp_path / "text.txt")
    assert found.passed
    assert found.logits is not None
    assert found.logits.tokens == 6
    (tmp_path / "long.txt").write_text("the cat " * 1000)
    long = make_inputs(base, text=tmp_path / "long.txt").values["input_ids"]
    assert long.shape == (1, 64)  # as many as the model has positions
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FormatError, match=r"empty\.txt is empty"):
        make_inputs(base, text=tmp_path / "empty.txt")
    with pytest.raises(FormatError, match=r"no\.txt can't be read: No such file or directory$"):
        make_inputs(base, text=str(tmp_path / "no.txt"))


def test_models_that_take_different_inputs_say_so():
    words, images = open_checkpoint(build("llama")), open_checkpoint(model("vit"))
    for base, other, name in ((words, images, "input_ids"), (images, words, "pixel_values")):
        with pytest.raises(UnsupportedError, match=f"takes no {name}, which is what the other"):
            verify(base, other, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device is 'gpu', and has to be 'auto', 'cpu', 'cuda' or 'mps'"),
        ({"device": "cuda:1"}, "device is 'cuda:1', and has to be 'auto', 'cpu', 'cuda' or 'mps'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', and has to be 'float32' or 'float64'"),
    ],
)
def test_where_and_how_to_run_is_checked(options: dict[str, Any], message: str):
    base = open_checkpoint(build("llama"))
    with pytest.raises(ArgumentError, match=message):
        verify(base, base, **options)


def test_a_text_needs_a_tokenizer_and_a_model_that_takes_it(tmp_path: Path):
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(UnsupportedError, match="its tokenizer can't be loaded"):
        make_inputs(open_checkpoint(build("llama")), text=tmp_path / "text.txt")
    with pytest.raises(UnsupportedError):
        make_inputs(open_checkpoint(model("vit")), text=tmp_path / "text.txt")
