"""Models of several parts: which of them an edit is of, and that all of it keeps its function."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROOT, apart, config_of, load, made, quiet, save, variant
from surgery.commands.main import app
from typer.testing import CliRunner

from surgery import (
    ArgumentError,
    Checkpoint,
    UnsupportedError,
    certify,
    diff,
    find_growths,
    grow,
    lines,
    merge,
    open_checkpoint,
    verify,
    write,
)
from surgery.anatomy.scopes import in_scope, part_of, side_of

LANGUAGE = "language_model.model.layers"
VISION = "vision_tower.encoder.layers"
IMAGE = 90
TEXT = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 72,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
SMALL = {
    "vocab_size": 97, "d_model": 32, "max_position_embeddings": 64, "encoder_layers": 2,
    "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 56, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


@cache
def llava() -> Path:
    """A language model with a tower for images and a projector between them."""
    options = {
        "text_config": TEXT,
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }
    name = "LlavaForConditionalGeneration"
    return save(ROOT / "llava", name, "LlavaConfig", options)


@cache
def bart() -> Path:
    return save(ROOT / "bart", "BartForConditionalGeneration", "BartConfig", SMALL)


def tuned(base: Path, seed: int = 1) -> Path:
    """After a made-up fine-tuning of every tensor."""
    folder = base.with_name(f"{base.name}-tuned-{seed}")
    if not folder.exists():
        generator = torch.Generator().manual_seed(seed)
        moved = {
            n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in load(base).items()
        }
        variant(folder, base, moved)
    return folder


def see(folder: Path) -> torch.Tensor:
    """What the model says of a text with an image in it."""
    with quiet():
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        ).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 80, (2, 12), generator=generator)
    ids[:, 2:6] = IMAGE
    pixels = torch.randn((2, 3, 8, 8), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def without_split(base: Checkpoint, grown: Checkpoint) -> dict[str, torch.Tensor]:
    """The control: outgoing weights copied whole."""
    tensors = {name: tensor.whole() for name, tensor in grown.items()}
    for growth in find_growths(base, grown):
        down = growth.mlp.down
        sources = torch.from_numpy(growth.sources())
        tensors[down.weight] = base[down.weight].whole().index_select(down.axis(down=True), sources)
    return tensors


@pytest.mark.parametrize(
    ("scope", "wide"),
    [
        (None, {LANGUAGE}),
        ("language", {LANGUAGE}),
        ("vision", {VISION}),
        ("all", {LANGUAGE, VISION}),
    ],
)
def test_what_is_meant_grows_and_the_model_sees_the_same(
    scope: str | None, wide: set[str], tmp_path: Path
) -> None:
    base = open_checkpoint(llava())
    grown = grow(base, factor=1.5, scope=scope, choose="random")
    before, after = base.anatomy.mlps, grown.anatomy.mlps
    assert {key[0] for key in before if after[key].width != before[key].width} == wide
    growths = find_growths(base, grown)
    assert {growth.mlp.stack for growth in growths} >= wide
    assert certify(base, grown, growths).holds
    write(grown, tmp_path / "grown")
    config = config_of(tmp_path / "grown")
    assert config["text_config"]["intermediate_size"] == (108 if LANGUAGE in wide else 72)
    assert config["vision_config"]["intermediate_size"] == (84 if VISION in wide else 56)
    expected = see(llava())
    assert apart(see(tmp_path / "grown"), expected) < 1e-6
    wrong = variant(tmp_path / "wrong", tmp_path / "grown", without_split(base, grown))
    assert apart(see(wrong), expected) > 1e-3


def test_a_pooling_head_that_shares_the_tower_s_key_grows_with_it(tmp_path: Path) -> None:
    base = open_checkpoint(llava())
    grown = grow(base, scope="vision")
    heads = {growth.mlp.stack for growth in find_growths(base, grown)} - {VISION}
    assert heads == {"vision_tower.head.mlp"}
    assert grown["vision_tower.head.mlp.fc1.weight"].shape == (112, 24)
    assert find_growths(base, replace(grown, history=()))  # found from the weights as well


def test_what_grows_is_said(tmp_path: Path) -> None:
    notes = grow(open_checkpoint(llava())).notes
    assert f"{VISION} isn't grown: --scope all grows every stack" in notes
    assert grow(open_checkpoint(llava()), scope="language").notes == ()


def test_an_encoder_and_a_decoder_grow_together_or_apart() -> None:
    base = open_checkpoint(bart())
    assert grow(base).config == {**base.config, "encoder_ffn_dim": 80, "decoder_ffn_dim": 112}
    assert grow(base, scope="encoder").config == {**base.config, "encoder_ffn_dim": 80}
    assert grow(base, scope="model.decoder").config == {**base.config, "decoder_ffn_dim": 112}


def test_stacks_that_share_a_key_grow_apart_with_a_modeling_file(tmp_path: Path) -> None:
    options = {
        "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2,
        "num_decoder_layers": 2, "num_heads": 4,
    }  # fmt: skip
    base = open_checkpoint(save(tmp_path / "t5", "T5ForConditionalGeneration", "T5Config", options))
    assert grow(base, scope="all").config == {**base.config, "d_ff": 80}
    with pytest.raises(UnsupportedError) as caught:
        grow(base, scope="encoder", uniform=True)
    assert (
        "d_ff would change decoder.block.0.layer.2.DenseReluDense.wi.weight too: grow all layers "
        "alike, or pass --uniform; --scope all grows stacks that share a key together"
    ) in str(caught.value)
    grown = grow(base, scope="encoder")
    assert grown.config["mlp_width_keys"] == {"encoder.block": [{"d_ff": 80}] * 2}
    assert grown.config["d_ff"] == 40
    verify(base, grown).require()
    assert {growth.mlp.stack for growth in find_growths(base, grown)} == {"encoder.block"}


def test_a_scope_that_there_is_not() -> None:
    for act in (
        lambda: grow(open_checkpoint(bart()), scope="vision"),
        lambda: diff(open_checkpoint(bart()), open_checkpoint(bart()), scope="vision"),
    ):
        with pytest.raises(ArgumentError) as caught:
            act()
        assert caught.value.problems == (
            (
                "scope is 'vision', and no stack is of that: there are model.decoder.layers "
                "(language), model.encoder.layers (language); give all, language, vision, audio, "
                "connector, encoder, decoder or the name of a stack"
            ),
        )


def scale_in_scope(name: str, alpha: float) -> float:
    """lambda of lines on the language model of `llava`, by the tensor's name alone."""
    if name.startswith(f"{LANGUAGE}."):
        block = int(name.removeprefix(f"{LANGUAGE}.").partition(".")[0])
        return alpha + (1 - alpha) * block / 2
    return alpha if name.startswith("language_model.") else 1.0


def test_lines_scales_what_is_meant_and_keeps_the_rest_as_tuned() -> None:
    base, other = load(llava()), load(tuned(llava()))
    made = lines(
        open_checkpoint(llava()), open_checkpoint(tuned(llava())), alpha=0.25, scope="language"
    )
    assert set(made) == set(other)
    for name, tensor in made.items():
        scale = scale_in_scope(name, 0.25)
        if scale == 1.0 and not name.startswith("language_model."):
            assert torch.equal(tensor.whole(), other[name]), name
            continue
        wanted = base[name].double() + scale * (other[name].double() - base[name].double())
        assert (tensor.whole().double() - wanted).abs().max() < 1e-6, name
    details = made.history[-1].details
    assert list(details["scales"]) == [LANGUAGE]
    assert made.history[-1].parameters["scope"] == "language"


def test_merge_takes_the_rest_from_the_base() -> None:
    base = load(llava())
    others = [load(tuned(llava(), seed)) for seed in (1, 2)]
    models = [open_checkpoint(tuned(llava(), seed)) for seed in (1, 2)]
    made = merge(
        models, base=open_checkpoint(llava()), method="task_arithmetic", weight=0.5, scope="vision"
    )
    for name, tensor in made.items():
        if not name.startswith("vision_tower."):
            assert torch.equal(tensor.whole(), base[name]), name
            continue
        taus = sum(0.5 * (other[name].double() - base[name].double()) for other in others)
        assert (tensor.whole().double() - base[name].double() - taus).abs().max() < 1e-6, name


def test_merge_refuses_a_scope_with_a_type() -> None:
    model = open_checkpoint(tuned(llava()))
    with pytest.raises(ArgumentError, match="give scope or dtype"):
        merge([model, model], method="linear", weight=0.5, scope="vision", dtype="bfloat16")


def test_diff_looks_at_what_is_meant() -> None:
    found = diff(open_checkpoint(llava()), open_checkpoint(tuned(llava())), scope="vision")
    assert {stack for stack, _, _ in found.modules} == {VISION}
    assert {change.name for change in found.changes} == {
        name for name in load(llava()) if name.startswith("vision_tower.")
    }


@pytest.mark.parametrize(
    ("stack", "part", "side"),
    [
        ("model.layers", "language", None),
        ("model.language_model.layers", "language", None),
        ("model.visual.blocks", "vision", None),
        ("vision_model.encoder.layers", "vision", "encoder"),
        ("model.image_encoder.layers", "vision", "encoder"),
        ("audio_tower.layers", "audio", None),
        ("text_decoder.bert.encoder.layer", "language", "decoder"),
        ("decoder.block", "language", "decoder"),
        ("qformer.encoder.layer", "connector", "encoder"),
        ("multi_modal_projector.layers", "connector", None),
    ],
)
def test_parts_are_told_by_words(stack: str, part: str, side: str | None) -> None:
    assert (part_of(stack), side_of(stack)) == (part, side)
    for scope in filter(None, (part, side, stack, stack.partition(".")[0])):
        assert in_scope(["other", stack], scope)[-1] == stack


def test_the_command_line(tmp_path: Path) -> None:
    def surgery(*args: object) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    shown = surgery("inspect", llava(), "--scope", "vision", "--json")
    assert {(block["stack"], block["part"]) for block in shown["blocks"]} == {(VISION, "vision")}
    out = tmp_path / "lines"
    written = surgery(
        *("lines", llava(), tuned(llava()), "-o", out),
        *("--alpha", 0.5, "--scope", "language", "--json"),
    )
    assert list(written["norms"]["blocks"]) == [LANGUAGE]
    kept = "vision_tower.post_layernorm.weight"
    assert torch.equal(load(out)[kept], load(tuned(llava()))[kept])
    grown = surgery("grow", llava(), "-o", tmp_path / "grown", "--scope", "all", "--json")
    stacks = {mlp["stack"] for mlp in grown["edits"][-1]["details"]["mlps"]}
    assert stacks == {LANGUAGE, VISION, "vision_tower.head.mlp"}


def test_a_recipe_takes_it(tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    inputs = {"base": str(llava()), "tuned": str(tuned(llava()))}
    steps = {
        "scaled": {"lines": {"base": "base", "tuned": "tuned", "alpha": 0.5, "scope": "language"}},
        "grown": {"grow": {"model": "scaled", "scope": "vision", "verify": False}},
    }
    path.write_text(json.dumps({"inputs": inputs, "steps": steps, "output": "grown"}))
    result = CliRunner().invoke(app, ["run", str(path), "-o", str(out)])
    assert result.exit_code == 0, result.output
    models = [open_checkpoint(folder) for folder in (llava(), tuned(llava()))]
    wanted = grow(lines(*models, alpha=0.5, scope="language"), scope="vision")
    tensors = load(out)
    assert all(torch.equal(tensors[name], tensor.whole()) for name, tensor in wanted.items())


def test_without_a_config_the_same_parts_are_told(tmp_path: Path) -> None:
    bare = open_checkpoint(made(tmp_path / "bare", load(llava())))
    grown = grow(bare)
    assert grown[f"{LANGUAGE}.0.mlp.up_proj.weight"].shape == (144, 32)
    assert grown[f"{VISION}.0.mlp.fc1.weight"].shape == (56, 24)
