"""What is recognised in a checkpoint, from names, shapes and the config; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    COMMON,
    EVERY,
    FAMILIES,
    SAME,
    Family,
    apart,
    build,
    config_of,
    load,
    made,
    outputs,
    save,
    variant,
)

from surgery import ArgumentError, UnsupportedError, grow, lines, open_checkpoint, write
from surgery.anatomy import Role
from surgery.operations.layers import as_ranges, parse_layers


@pytest.mark.parametrize("name", EVERY)
def test_every_mlp_is_found(name: str):
    family = FAMILIES[name]
    anatomy = open_checkpoint(build(name)).anatomy
    assert anatomy.stacks == {family.stack: 3}
    assert sorted(anatomy.mlps) == [(family.stack, block) for block in range(3)]
    assert anatomy.no_growth == {}
    assert anatomy.tied is family.tied
    assert anatomy.notes == ()
    for (_, block), mlp in anatomy.mlps.items():
        assert (mlp.width, mlp.hidden) == (family.width, family.hidden)
        assert mlp.gated is (len(family.up) == 2 or family.parts == 2)
        assert [up.weight for up in mlp.ups] == [family.name(block, up) for up in family.up]
        assert mlp.down.weight == family.name(block, family.down)
        biases = [family.name(block, bias) for bias in family.up_biases] or [None] * len(family.up)
        assert [up.bias for up in mlp.ups] == biases
        assert (mlp.down.bias is not None) is family.biases
        assert {p.in_out for p in (*mlp.ups, mlp.down)} == {family.in_out}
        assert {up.parts for up in mlp.ups} == {family.parts}
        assert mlp.down.parts == 1


@pytest.mark.parametrize("name", EVERY)
def test_every_tensor_has_its_role(name: str):
    family = FAMILIES[name]
    anatomy = open_checkpoint(build(name)).anatomy
    assert anatomy.unrecognised == []
    inner = {*family.up, *family.up_biases, family.down}
    inner |= {family.down.replace(".weight", ".bias")} if family.biases else set()
    for key, place in anatomy.places.items():
        if key.startswith(f"{family.stack}."):
            number, _, rest = key.removeprefix(f"{family.stack}.").partition(".")
            assert (place.stack, place.block, place.inner) == (family.stack, int(number), rest)
            is_norm = "norm" in rest.lower() or rest.startswith("ln_")
            wanted = Role.MLP if rest in inner else Role.NORM if is_norm else Role.ATTENTION
        else:
            assert (place.stack, place.block, place.inner) == (None, None, key)
            is_norm = key.rsplit(".", 1)[0].endswith(("norm", "ln_f"))
            wanted = Role.EMBEDDING
            if key in family.late:
                wanted = Role.NORM if is_norm else Role.HEAD
        assert place.role is wanted, key


def test_head_and_embedding():
    found = {
        name: open_checkpoint(build(name)).anatomy for name in ("llama", "gpt_neox", "opt", "bert")
    }
    assert {name: (a.embedding, a.head) for name, a in found.items()} == {
        "llama": ("model.embed_tokens.weight", "lm_head.weight"),
        "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
        "opt": ("model.decoder.embed_tokens.weight", None),
        "bert": ("embeddings.word_embeddings.weight", None),
    }


def test_a_head_that_is_stored_beside_a_flag_that_ties_it_is_noted(tmp_path: Path):
    base = variant(tmp_path / "base", build("llama"), tie_word_embeddings=True)
    anatomy = open_checkpoint(base).anatomy
    assert anatomy.tied
    assert anatomy.notes == (
        "tie_word_embeddings is true, and lm_head.weight is stored all the same",
    )


def test_the_numbers_of_a_sequential_are_no_blocks(tmp_path: Path):
    tensors = load(build("llama"))
    for number in (0, 2):  # 1 is an activation
        tensors[f"projector.{number}.weight"] = torch.zeros(32, 32)
        tensors[f"projector.{number}.bias"] = torch.zeros(32)
    for number, size in enumerate((32, 32, 40)):
        tensors[f"classifier.{number}.weight"] = torch.zeros(size)
        tensors[f"classifier.{number}.bias"] = torch.zeros(size)
    for part in ("weight", "bias", "scale"):  # alike, and with a gap; without, and unlike
        for name in ("gaps.0.", "gaps.2.", "unlike.0.", "unlike.1.other_"):
            tensors[name + part] = torch.zeros(8)
    tensors["model.layers.1.gater.0.weight"] = torch.zeros(3)
    tensors["model.layers.1.gater.2.weight"] = torch.zeros(3)
    anatomy = open_checkpoint(variant(tmp_path / "base", build("llama"), tensors)).anatomy
    assert anatomy.stacks == {"model.layers": 3}
    place = anatomy.places["model.layers.1.gater.2.weight"]
    assert (place.block, place.inner) == (1, "gater.2.weight")
    assert anatomy.places["projector.2.weight"].block is None
    assert anatomy.places["classifier.0.weight"].role is Role.HEAD


def test_what_isn_t_known_is_reported_and_copied(tmp_path: Path):
    more = {
        "model.layers.0.mystery": torch.randn(5, 7),
        "mtp.projection": torch.randn(3, 3),
        "odd.flags": torch.tensor([True, False]),
    }
    base = variant(tmp_path / "base", build("llama"), load(build("llama")) | more)
    checkpoint = open_checkpoint(base)
    assert sorted(checkpoint.anatomy.unrecognised) == ["model.layers.0.mystery", "mtp.projection"]
    assert checkpoint.anatomy.places["odd.flags"].role is Role.BUFFER
    write(grow(checkpoint), tmp_path / "grown")
    found = load(tmp_path / "grown")
    assert {key: value.tolist() for key, value in found.items() if key in more} == {
        key: value.tolist() for key, value in more.items()
    }


# Mixtures of experts

MOE = COMMON | {
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MIXTRAL = ("MixtralForCausalLM", "MixtralConfig", MOE | {"num_local_experts": 4})
QWEN = (
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    MOE | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 1},
)


@pytest.mark.parametrize("model", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def test_every_expert_is_an_mlp(model: tuple[str, str, dict[str, Any]], tmp_path: Path):
    anatomy = open_checkpoint(save(tmp_path / "base", *model)).anatomy
    assert anatomy.mlps == {}
    assert anatomy.no_growth == {}
    assert {key: len(mlps) for key, mlps in anatomy.experts.items()} == {
        ("model.layers", block): 4 for block in range(3)
    }
    assert {mlp.kind for mlp in anatomy.every_mlp} == {"routed"}
    roles = [place.role for name, place in anatomy.places.items() if ".experts." in name]
    assert len(roles) == 3 * 4 * 3
    assert set(roles) == {Role.EXPERT}


@pytest.mark.parametrize("model", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def test_routers_are_recognised(model: tuple[str, str, dict[str, Any]], tmp_path: Path):
    anatomy = open_checkpoint(save(tmp_path / "base", *model)).anatomy
    assert anatomy.unrecognised == []
    routers = [name for name, place in anatomy.places.items() if place.role is Role.ROUTER]
    assert len(routers) == 3


def test_a_dense_layer_of_a_mixture_grows(tmp_path: Path):
    model, config, options = QWEN
    base = save(tmp_path / "base", model, config, options | {"mlp_only_layers": [0]})
    write(grow(open_checkpoint(base), layers="0"), tmp_path / "grown")
    assert config_of(tmp_path / "grown")["intermediate_size"] == 80
    assert config_of(tmp_path / "grown")["moe_intermediate_size"] == 24
    assert apart(outputs(tmp_path / "grown"), outputs(base)) < SAME


def test_one_of_two_dense_layers_of_a_mixture_grows_or_is_refused(tmp_path: Path):
    model, config, options = QWEN
    base = save(tmp_path / "base", model, config, options | {"mlp_only_layers": [0, 2]})
    try:
        result = grow(open_checkpoint(base), layers="0")
    except UnsupportedError:
        return
    write(result, tmp_path / "grown")
    assert apart(outputs(tmp_path / "grown", trust=True), outputs(base)) < SAME


# What growing would break


def test_a_norm_over_the_hidden_activation_refuses_a_fraction(tmp_path: Path):
    tensors = load(build("llama"))
    for block in (0, 1, 2):
        tensors[f"model.layers.{block}.mlp.ffn_sub_norm.weight"] = torch.ones(88)
    base = open_checkpoint(variant(tmp_path / "base", build("llama"), tensors))
    with pytest.raises(UnsupportedError) as caught:
        grow(base, layers="0,2", factor=1.5)
    assert [problem.partition(" may be")[0] for problem in caught.value.problems] == [
        f"model.layers.{block} can't be grown from 88 to 132: "
        f"model.layers.{block}.mlp.ffn_sub_norm.weight"
        for block in (0, 2)
    ]


def test_a_norm_over_the_hidden_activation_is_refused_where_that_is_the_hidden_size(tmp_path: Path):
    family = FAMILIES["llama"]
    narrow = save(
        tmp_path / "narrow", family.model, family.config, family.options | {"intermediate_size": 32}
    )
    name = "model.layers.1.mlp.ffn_sub_norm.weight"
    base = variant(tmp_path / "base", narrow, load(narrow) | {name: torch.ones(32)})
    with pytest.raises(UnsupportedError) as caught:
        grow(open_checkpoint(base))
    assert caught.value.problems == (
        f"model.layers.1 can't be grown: {name} follows the MLP's width of 32",
    )


def test_matrices_that_can_t_be_told_apart_are_named(tmp_path: Path):
    tensors = load(build("llama"))
    for block in range(3):
        for name in ("gate", "up", "down"):
            kind = tensors.pop(f"model.layers.{block}.mlp.{name}_proj.weight")
            tensors[f"model.layers.{block}.mlp.{name[0]}.weight"] = kind
        tensors[f"model.layers.{block}.mlp.e.weight"] = torch.zeros(32, 88)
    base = open_checkpoint(variant(tmp_path / "base", build("llama"), tensors))
    prefix = "model.layers.1.mlp"
    with pytest.raises(UnsupportedError) as caught:
        grow(base, layers="1")
    assert caught.value.problems == (
        (
            f"model.layers.1 can't be grown: can't tell which of {prefix}.d.weight, "
            f"{prefix}.e.weight, {prefix}.g.weight, {prefix}.u.weight is the down projection"
        ),
    )


def test_a_matrix_of_the_same_width_beside_the_mlp_s_own_is_named(tmp_path: Path):
    tensors = load(build("llama"))
    for block in range(3):
        tensors[f"model.layers.{block}.mlp.side.weight"] = torch.zeros(32, 88)
    base = open_checkpoint(variant(tmp_path / "base", build("llama"), tensors))
    with pytest.raises(UnsupportedError) as caught:
        grow(base, layers="1")
    assert caught.value.problems == (
        "model.layers.1 can't be grown: model.layers.1.mlp.side.weight follows the MLP's width of 88",
    )


def test_without_any_mlp_there_is_nothing_to_grow(tmp_path: Path):
    tensors = {k: v for k, v in load(build("llama")).items() if ".mlp." not in k}
    base = made(tmp_path / "base", tensors, config_of(build("llama")))
    with pytest.raises(UnsupportedError) as caught:
        grow(open_checkpoint(base))
    assert caught.value.problems == (
        f"{base} has no MLP that was recognised: `surgery inspect` shows what was found",
    )


# Encoder and decoder


def test_an_encoder_and_a_decoder_have_their_own_depth(tmp_path: Path):
    options = {
        "vocab_size": 97,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
    }
    base = save(tmp_path / "base", "T5ForConditionalGeneration", "T5Config", options)
    checkpoint = open_checkpoint(base)
    assert checkpoint.anatomy.stacks == {"encoder.block": 2, "decoder.block": 3}
    assert checkpoint.anatomy.unrecognised == []
    assert len(checkpoint.anatomy.mlps) == 5
    scales = lines(checkpoint, checkpoint, alpha=0.2, beta=0.8).history[-1].details["scales"]
    assert scales == {
        "encoder.block": [pytest.approx(0.2), pytest.approx(1.0)],
        "decoder.block": [pytest.approx(0.2), pytest.approx(0.6), pytest.approx(1.0)],
    }
    grown = grow(checkpoint)
    assert {mlp.width for mlp in grown.anatomy.mlps.values()} == {80}
    assert grown.config == {**checkpoint.config, "d_ff": 80}


def test_layouts_are_told_by_shape_and_not_by_name(tmp_path: Path):
    """Names that mean the opposite elsewhere: Mixtral's w1 is the gate, LLaMA's own w2 is down."""
    renamed = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors = {}
    for key, value in load(build("llama")).items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        tensors[key] = value
    anatomy = open_checkpoint(made(tmp_path / "base", tensors, config_of(build("llama")))).anatomy
    mlp = anatomy.mlps["model.layers", 2]
    assert [up.weight for up in mlp.ups] == [
        "model.layers.2.mlp.w1.weight",
        "model.layers.2.mlp.w3.weight",
    ]
    assert mlp.down.weight == "model.layers.2.mlp.w2.weight"
    assert isinstance(FAMILIES["llama"], Family)


# Which layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", range(16)),
        (" all ", range(16)),
        ("0", [0]),
        ("8-15", range(8, 16)),
        ("-4", [12]),
        ("-4--1", [12, 13, 14, 15]),
        ("12--2", [12, 13, 14]),
        ("-16-3", [0, 1, 2, 3]),
        ("5,1,3", [1, 3, 5]),
        ("1-3,2-4,-1", [1, 2, 3, 4, 15]),
        (" 1 - 3 , 7 ", [1, 2, 3, 7]),
        ("7-7", [7]),
    ],
)
def test_layers_that_can_be_meant(text: str, layers: Any):
    assert parse_layers(text, 16) == list(layers)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("16", "layers: 16 isn't among the 16 layers, which are 0 to 15"),
        ("-17", "layers: -17 isn't among the 16 layers, which are 0 to 15"),
        ("3-1", "layers: 3-1 isn't among the 16 layers, which are 0 to 15"),
        ("8-16", "layers: 8-16 isn't among the 16 layers, which are 0 to 15"),
        ("0,,1", "layers: '' is neither a number nor a range such as 8-15"),
        ("", "layers: '' is neither a number nor a range such as 8-15"),
        ("last", "layers: 'last' is neither a number nor a range such as 8-15"),
        ("1-2-3", "layers: '1-2-3' is neither a number nor a range such as 8-15"),
        ("1.5", "layers: '1.5' is neither a number nor a range such as 8-15"),
        ("--1", "layers: '--1' is neither a number nor a range such as 8-15"),
        ("4-", "layers: '4-' is neither a number nor a range such as 8-15"),
    ],
)
def test_layers_that_can_t_be_meant(text: str, problem: str):
    with pytest.raises(ArgumentError) as caught:
        parse_layers(text, 16)
    assert caught.value.problems == (problem,)


def test_ranges():
    assert as_ranges([]) == ()
    assert as_ranges([0, 1, 2, 7]) == ((0, 3), (7, 8))
    assert as_ranges([4]) == ((4, 5),)
