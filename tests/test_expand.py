"""LLaMA Pro's expansion: new blocks that return their input, proved by the weights and by the
logits, in transformers' own models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_MODELS, bytes_of, save_raw
from surgery.commands.main import app
from typer.testing import CliRunner, Result

from surgery import (
    ArgumentError,
    Checkpoint,
    UnsupportedError,
    VerificationError,
    certify,
    expand,
    grow,
    open_checkpoint,
    verify,
    write,
)
from surgery.expansion import Expansion
from surgery.verification import compare_logits, find_expansion, find_relation

Make = Callable[..., Path]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"intermediate_size": 24, "head_dim": 4, "sliding_window": 4},
    "gemma3_text": {"intermediate_size": 24, "head_dim": 4, "sliding_window": 4},
    "gpt2": {"n_layer": 4},
    "gpt_neox": {"intermediate_size": 24},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4},
    "phi": {"intermediate_size": 24},
    "phi3": {"intermediate_size": 24, "pad_token_id": 0},
    "falcon": {},
    "bloom": {"n_layer": 4},
    "mpt": {"n_layers": 4, "n_heads": 4},
    "opt": {"ffn_dim": 24},
    "olmo2": {"intermediate_size": 24},
    "cohere": {"intermediate_size": 24, "pad_token_id": 0},
    "granite": {"intermediate_size": 24, "residual_multiplier": 0.5},
    "smollm3": {"intermediate_size": 24, "no_rope_layer_interval": 3, "pad_token_id": 0},
    "mamba": {"intermediate_size": 32},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 4, "pad_token_id": 0},
    "qwen3_moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 4,
        "decoder_sparse_step": 2,
    },
    "qwen3_next": {
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    },
}


def small(make: Make, kind: str, name: str = "model", **changes: Any) -> Path:
    four = {"num_hidden_layers": 4, "num_key_value_heads": 2}
    return make(kind, name, **{**four, **FAMILIES.get(kind, {}), **changes})


class Given:
    """A leaf that is a tensor in memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def read(self, tensor: Any, start: int, stop: int) -> torch.Tensor:
        return self.values.reshape(tensor.shape_of(tensor.rows))[start:stop].clone()


def with_tensor(checkpoint: Checkpoint, name: str, values: torch.Tensor) -> Checkpoint:
    lazy = replace(checkpoint[name], leaf=Given(values))
    return replace(checkpoint, tensors={**checkpoint.tensors, name: lazy})


# The function is kept


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_expanded_model_computes_what_its_base_does(
    kind: str, make_model: Make, tmp_path: Path
) -> None:
    base = open_checkpoint(small(make_model, kind))
    write(expand(base, after="0,2"), tmp_path / "out")
    expanded = open_checkpoint(tmp_path / "out")
    assert find_relation(base, expanded) == Expansion(
        next(iter(base.anatomy.stacks)), (0, 0, 1, 2, 2, 3), (1, 4)
    )
    found = verify(base, expanded, dtype="float64")
    assert found.certificate is not None
    assert found.logits is not None
    assert found.certificate.failures == ()
    assert found.certificate.new_blocks == 2
    assert found.certificate.tensors_compared == len(expanded)
    assert found.logits.max_difference == 0
    assert found.logits.first_departure is None
    assert found.logits.uninitialised == ()
    assert found.passed is True


def test_the_loaded_model_agrees_and_its_new_blocks_can_learn(
    make_model: Make, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = small(make_model, "llama")
    write(expand(open_checkpoint(folder), copies=2), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(folder)
    expanded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 64, (2, 16))
    assert torch.equal(base(tokens).logits, expanded(tokens).logits)
    same = base.generate(tokens[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(same, expanded.generate(tokens[:1], max_new_tokens=8, do_sample=False))
    expanded(tokens, labels=tokens).loss.backward()
    details = json.loads((tmp_path / "out/surgery.json").read_text())["edits"][-1]["details"]
    parameters = dict(expanded.named_parameters())
    assert [entry["block"] for entry in details["new"]] == [2, 5]
    for entry in details["new"]:
        assert len(entry["zero"]) == 2
        for name in entry["zero"]:
            assert not parameters[name].any()
            assert parameters[name].grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mixtral", "bloom"])
def test_new_blocks_are_copies_but_for_what_they_add(
    kind: str, make_model: Make, tmp_path: Path
) -> None:
    """Counted by hand: the tensors of a block that are zero."""
    zero = {
        "llama": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
        "gpt2": {
            "attn.c_proj.weight",
            "attn.c_proj.bias",
            "mlp.c_proj.weight",
            "mlp.c_proj.bias",
        },
        "gpt_neox": {
            "attention.dense.weight",
            "attention.dense.bias",
            "mlp.dense_4h_to_h.weight",
            "mlp.dense_4h_to_h.bias",
        },
        "mixtral": {
            "self_attn.o_proj.weight",
            *(f"block_sparse_moe.experts.{expert}.w2.weight" for expert in range(4)),
        },
        "bloom": {
            "self_attention.dense.weight",
            "self_attention.dense.bias",
            "mlp.dense_4h_to_h.weight",
            "mlp.dense_4h_to_h.bias",
        },
    }[kind]
    base = open_checkpoint(small(make_model, kind))
    made = expand(base, after="1")
    stack = next(iter(base.anatomy.stacks))
    for name, tensor in made.items():
        place = made.anatomy.places[name]
        if place.block is None:
            assert tensor is base[name]
        elif place.block == 2 and place.inner in zero:
            assert not tensor.whole().any()
        else:
            old = {0: 0, 1: 1, 2: 1, 3: 2, 4: 3}[place.block]
            assert tensor is base[f"{stack}.{old}.{place.inner}"]
    new = made.history[-1].details["new"]
    assert new == [
        {"block": 2, "source": 1, "zero": new[0]["zero"]},
    ]
    assert {name.removeprefix(f"{stack}.2.") for name in new[0]["zero"]} == zero


@pytest.mark.parametrize(
    ("depth", "copies", "after"),
    [
        (32, 8, [3, 7, 11, 15, 19, 23, 27, 31]),
        (4, 4, [0, 1, 2, 3]),
        (4, 1, [3]),
        (5, 2, [1, 4]),
        (7, 3, [1, 3, 6]),
    ],
)
def test_copies_are_spread_evenly(
    depth: int, copies: int, after: list[int], make_model: Make
) -> None:
    base = open_checkpoint(small(make_model, "llama", num_hidden_layers=depth))
    details = expand(base, copies=copies).history[-1].details
    assert [entry["source"] for entry in details["new"]] == after
    same = expand(base, after=",".join(map(str, after))).history[-1].details
    assert same == details


def test_a_widened_model_is_expanded(make_model: Make, tmp_path: Path) -> None:
    write(grow(open_checkpoint(small(make_model, "llama")), layers="1"), tmp_path / "grown")
    base = open_checkpoint(tmp_path / "grown")
    made = expand(base, after="1,3")
    assert made.config["mlp_widths"] == [24, 48, 48, 24, 24, 24]
    write(made, tmp_path / "out")
    found = verify(base, open_checkpoint(tmp_path / "out"), dtype="float64")
    assert found.passed is True
    assert found.logits is not None
    assert found.logits.max_difference == 0


def test_an_expanded_model_is_expanded_and_grown(make_model: Make, tmp_path: Path) -> None:
    write(expand(open_checkpoint(small(make_model, "llama")), copies=2), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    for name, twice in (("e", expand(once, after="0")), ("g", grow(once, layers="2"))):
        write(twice, tmp_path / name)
        assert verify(once, open_checkpoint(tmp_path / name)).passed is True


# What must fail


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3_moe", "falcon"])
def test_one_projection_that_is_not_zero_fails_both_proofs(kind: str, make_model: Make) -> None:
    base = open_checkpoint(small(make_model, kind))
    good = expand(base, after="1")
    for name in good.history[-1].details["new"][0]["zero"]:
        if "experts" in name:
            continue  # no token may be routed to it
        bad = with_tensor(good, name, 0.1 * torch.randn(good[name].shape))
        relation = find_relation(base, bad)
        assert certify(base, bad, relation).failures == (
            f"{name}: it belongs to a new block and writes to the residual stream, and isn't zero",
        )
        found = verify(base, bad, dtype="float64")
        assert found.logits is not None
        assert not found.logits.same
        stack = next(iter(base.anatomy.stacks))
        assert found.logits.first_departure == f"{stack}.2"  # of the base: 3 of the other
        assert found.passed is False
        with pytest.raises(VerificationError) as failed:
            found.require()
        assert len(failed.value.problems) == 2


def test_every_flipped_bit_is_found(make_model: Make) -> None:
    base = open_checkpoint(small(make_model, "llama"))
    good = expand(base, copies=1)
    for name, tensor in good.items():
        values = tensor.whole()
        values.view(-1).view(torch.int32)[-1] ^= 1
        failures = certify(
            base, with_tensor(good, name, values), find_relation(base, good)
        ).failures
        assert len(failures) == 1
        assert failures[0].startswith(f"{name}: ")


def test_tensors_that_are_missing_or_more_are_found(make_model: Make) -> None:
    base = open_checkpoint(small(make_model, "llama"))
    good = expand(base, copies=1)
    tensors = dict(good.tensors)
    tensors["model.extra"] = tensors.pop("model.layers.4.mlp.up_proj.weight")
    tensors["model.norm.weight"] = good["model.embed_tokens.weight"]
    found = certify(base, replace(good, tensors=tensors), find_relation(base, good))
    assert found.failures == (
        "model.layers.4.mlp.up_proj.weight is missing in the expanded checkpoint",
        "model.extra has no source in the base",
        "model.norm.weight is F32 [64, 16], and should be F32 [16]",
    )


def test_a_record_that_lies_proves_nothing(make_model: Make, tmp_path: Path) -> None:
    """What is zero is worked out and not taken from the record; a lie about blocks shows in the
    weights."""
    base = open_checkpoint(small(make_model, "llama"))
    write(expand(base, after="1"), tmp_path / "out")
    record = json.loads((tmp_path / "out/surgery.json").read_text())
    details = record["edits"][-1]["details"]

    def told(name: str, **changes: Any) -> Checkpoint:
        folder = shutil.copytree(tmp_path / "out", tmp_path / name)
        record["edits"][-1]["details"] = {**details, **changes}
        (folder / "surgery.json").write_text(json.dumps(record))
        return open_checkpoint(folder)

    nothing = told("nothing", new=[{"block": 2, "source": 1, "zero": []}])
    assert verify(base, nothing, logits=False).passed is True
    other = told("other", blocks=[0, 0, 1, 2, 3], new=[{"block": 1, "source": 0, "zero": []}])
    assert verify(base, other, logits=False).passed is False
    for at, nonsense in enumerate(
        (
            {"blocks": [0, 1, 2, 3]},
            {"blocks": [0, 1, 9, 2, 3]},
            {"blocks": "x"},
            {"stack": "h"},
            {"new": []},
            {"new": [{"block": 7}]},
        )
    ):
        assert find_expansion(base, told(f"nonsense{at}", **nonsense)) is None


# What is refused


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bert", {"is_decoder": True}, "comes out of output.LayerNorm, behind the addition"),
        ("openai-gpt", {"n_layer": 4}, "comes out of ln_2, behind the addition"),
        ("opt", {"ffn_dim": 24, "do_layer_norm_before": False}, "comes out of final_layer_norm"),
        (
            "bloom",
            {"n_layer": 4, "apply_residual_connection_post_layernorm": True},
            "isn't its input",
        ),
        (
            "minimax",
            {"num_local_experts": 2, "head_dim": 4, "num_key_value_heads": 2},
            "isn't its input",
        ),
        ("rwkv", {"attention_hidden_size": 16}, "(none was recognised)"),
    ],
)
def test_blocks_that_would_not_return_their_input(
    kind: str, changes: dict[str, Any], message: str, make_model: Make
) -> None:
    base = open_checkpoint(make_model(kind, **{"num_hidden_layers": 4, **changes}))
    with pytest.raises(UnsupportedError) as refused:
        expand(base, after="1,3")
    assert message in str(refused.value)
    assert "a copy of block 1, 3 of" in str(refused.value)


def test_what_can_not_be_followed_is_refused(make_model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(small(make_model, "llama"))
    with pytest.raises(UnsupportedError, match=r"has no config.json"):
        expand(replace(base, config={}), copies=1)
    with pytest.raises(UnsupportedError, match="doesn't know the model type 'nobody'"):
        expand(replace(base, config={**base.config, "model_type": "nobody"}), copies=1)
    raw = save_raw(tmp_path / "raw", {"w": torch.ones(2)}, config={"model_type": "llama"})
    with pytest.raises(UnsupportedError, match="no stack of blocks"):
        expand(open_checkpoint(raw), copies=1)
    block = {f"encoder.vision.layers.{at}.{n}": torch.ones(2, 2) for at in range(2) for n in "abc"}
    tower = save_raw(tmp_path / "tower", block, config={"model_type": "vit"})
    with pytest.raises(UnsupportedError, match=r"those that read images or sounds \(encoder.vis"):
        expand(open_checkpoint(tower), copies=1)
    quantized = {**base.config, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(UnsupportedError, match="quantized"):
        expand(replace(base, config=quantized), copies=1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "give either copies or after"),
        ({"copies": 2, "after": "1"}, "give either copies or after"),
        ({"copies": 0}, "copies is 0, and has to be 1 to 4"),
        ({"copies": 5}, "copies is 5, and has to be 1 to 4"),
        ({"after": "4"}, "4 isn't among the 4 layers"),
        ({"after": "x"}, "'x' is neither a number nor a range"),
    ],
)
def test_arguments_that_can_not_be_meant(
    how: dict[str, Any], message: str, make_model: Make
) -> None:
    with pytest.raises(ArgumentError, match=message):
        expand(open_checkpoint(small(make_model, "llama")), **how)


# The command


def surgery(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_proves_writes_and_verify_agrees(make_model: Make, tmp_path: Path) -> None:
    base, out = small(make_model, "llama"), tmp_path / "out"
    result = surgery("expand", base, "-o", out, "--copies", "2", "--json")
    assert result.exit_code == 0, result.output
    verification = json.loads(result.stdout)["verification"]
    assert verification["passed"] is True
    assert verification["certificate"]["new_blocks"] == 2
    assert verification["logits"]["max_difference"] == 0
    again = surgery("verify", base, out)
    assert again.exit_code == 0
    assert "2 new blocks" in again.stdout
    shown = surgery("expand", base, "-o", tmp_path / "b", "--after", "-1", "--no-logits")
    assert shown.exit_code == 0
    for text in ("1 new block,", "model.layers", "became", "train the new blocks alone"):
        assert text in shown.stdout
    card = (out / "README.md").read_text()
    assert "LLaMA Pro trains those alone" in card
    dry = surgery("expand", base, "-o", tmp_path / "c", "--after", "all", "--dry-run", "--json")
    assert dry.exit_code == 0
    computed = json.loads(dry.stdout)["tensors"]["computed"]
    assert {name.rsplit(".", 2)[1] for name in computed} == {"o_proj", "down_proj"}  # zeros
    assert not (tmp_path / "c").exists()


def test_a_failed_proof_writes_nothing(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.operations import expand as module

    def noise(shape: Any, dtype: Any) -> Any:
        return replace(zeros(shape, dtype), leaf=Given(torch.full(shape, 0.1)))

    zeros = module.zeros
    monkeypatch.setattr(module, "zeros", noise)
    result = surgery("expand", small(make_model, "llama"), "-o", tmp_path / "out", "--copies", "1")
    assert result.exit_code == 6
    assert "model.layers.4.self_attn.o_proj.weight: it belongs to a new block" in result.stderr
    assert "logits differ by" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_logits_fail_by_themselves(make_model: Make) -> None:
    """Without the certificate: a wrong block shows in the outputs, and none does not."""
    base = open_checkpoint(small(make_model, "mixtral"))
    good = expand(base, after="0")
    anatomy = replace(base.anatomy, mlps={}, experts={})
    base.__dict__["anatomy"] = anatomy  # no yardstick: nothing at all may differ
    assert compare_logits(base, good).noise_floor is None
    assert compare_logits(base, good).same
    name = "model.layers.1.self_attn.o_proj.weight"
    bad = with_tensor(good, name, torch.full((16, 16), 1e-3))
    assert not compare_logits(base, bad).same


def test_base_and_zeros_keep_their_types(make_model: Make) -> None:
    base = open_checkpoint(small(make_model, "llama", dtype=torch.bfloat16))
    made = expand(base, copies=4)
    assert {tensor.dtype.name for tensor in made.values()} == {"BF16"}
    name = "model.layers.1.mlp.down_proj.weight"
    assert bytes_of(made[name].whole()) == bytes(16 * 24 * 2)
    assert SMALL_MODELS["llama"]["intermediate_size"] == 24


# Models with a tower beside


def with_tower(kind: str, folder: Path) -> Path:
    import transformers

    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 14}
    if kind == "Llava":
        tower = {**vision, "model_type": "clip_vision_model", "num_hidden_layers": 2}
        tower |= {"num_attention_heads": 2, "image_size": 28, "projection_dim": 16}
        config = transformers.LlavaConfig(
            text_config={**text, "model_type": "llama"}, vision_config=tower, image_token_index=60
        )
    else:
        tower = {**vision, "depth": 3, "num_heads": 2, "out_hidden_size": 16}
        tower |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = transformers.Qwen3VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config=tower,
            **{name: 60 + at for at, name in enumerate(ids)},
        )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Llava", "Qwen3VL"])
def test_the_language_model_beside_a_tower_is_expanded(kind: str, tmp_path: Path) -> None:
    base = open_checkpoint(with_tower(kind, tmp_path / "base"))
    made = expand(base, after="2")
    assert made.config["text_config"]["num_hidden_layers"] == 5
    assert made.config["vision_config"] == base.config["vision_config"]
    tower = [name for name in base if "vision_tower" in name or "visual" in name]
    assert len(tower) > 20
    assert all(made[name] is base[name] for name in tower)
    found = verify(base, made, dtype="float64")
    assert found.passed is True
    assert found.logits is not None
    assert found.logits.max_difference == 0


def test_layers_that_a_tower_feeds_stay_in_their_places(tmp_path: Path) -> None:
    base = open_checkpoint(with_tower("Qwen3VL", tmp_path / "base"))
    assert expand(base, after="1").history[-1].details["blocks"] == [0, 1, 1, 2, 3]
    with pytest.raises(UnsupportedError, match="the vision tower feeds the first 2 layers"):
        expand(base, after="0")
