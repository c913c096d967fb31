"""Tensors beside the projections that go by neuron: norms over the hidden activation, depthwise
convolutions. Copied along they keep the function; a norm allows whole factors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROOT, SAME, apart, config_of, load, made, quiet, save, spread, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery.commands.main import app
from test_fp8 import as_fp8
from transformers.models.kosmos2 import modeling_kosmos2
from typer.testing import CliRunner

from surgery import (
    Checkpoint,
    RecipeError,
    UnsupportedError,
    certify,
    expand,
    find_growths,
    grow,
    open_checkpoint,
    verify,
    write,
)
from surgery.anatomy import Corrections, MLPCorrection
from surgery.anatomy.stored import as_data, from_data
from surgery.growth import Growth
from surgery.modeling.build import build_model
from surgery.operations.neurons import grown_tensors
from surgery.operations.scales import neurons_in_a_block
from surgery.quantization.fp8 import Scaled
from surgery.recipe import anatomy_yaml, correct_anatomy
from surgery.values import held
from surgery.verification.logits import _permuted

TEXT = {
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
STAGES = {
    "num_encoder_blocks": 2,
    "hidden_sizes": [16, 24],
    "num_attention_heads": [2, 3],
    "depths": [1, 2],
    "sr_ratios": [2, 1],
    "drop_path_rate": 0.0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bitnet": (
        "BitNetForCausalLM",
        "BitNetConfig",
        TEXT
        | {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "kosmos": (
        "Kosmos2TextModel",
        "Kosmos2TextConfig",
        TEXT | {"embed_dim": 32, "ffn_dim": 72, "layers": 3, "attention_heads": 4},
    ),
    "segformer": (
        "SegformerModel",
        "SegformerConfig",
        STAGES
        | {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [4, 4]}
        | {"decoder_hidden_size": 16},
    ),
    "pvt": (
        "PvtV2Model",
        "PvtV2Config",
        STAGES
        | {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [4, 4]}
        | {"image_size": 64, "linear_attention": False},
    ),
}
NORMS = {
    "bitnet": ["mlp.ffn_sub_norm.weight"],
    "kosmos": ["ffn.ffn_layernorm.bias", "ffn.ffn_layernorm.weight"],
}
EXACT = dict.fromkeys(MODELS, torch.float64) | {"kosmos": torch.float32}  # its masks can't
KERNELS = {"segformer": "mlp.dwconv.dwconv", "pvt": "mlp.dwconv.dwconv"}


@cache
def model(name: str) -> Path:
    class_name, config, options = MODELS[name]
    folder = ROOT / f"followed-{name}"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = named(class_name)(named(config)(**options))
        spread(made)
        made.save_pretrained(folder)
    return folder


def named(name: str) -> Any:
    return getattr(transformers, name, None) or getattr(modeling_kosmos2, name)


def opened(name: str) -> Checkpoint:
    return open_checkpoint(model(name))


def run(name: str, built: Any) -> torch.Tensor:
    given: dict[str, torch.Tensor] = {"input_ids": tokens()}
    if name in KERNELS:
        generator = torch.Generator().manual_seed(5)
        given = {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator).to(EXACT[name])}
    with torch.no_grad():
        result = built.eval()(**given)
    return (result.logits if "logits" in result else result.last_hidden_state).double()


def loaded(name: str, folder: Path, *, trust: bool = False) -> torch.Tensor:
    """What the model that a user gets puts out; every weight is in the files, and fits."""
    cls = named(MODELS[name][0])
    if trust:
        cls = transformers.AutoModelForCausalLM
    with quiet():
        built, info = cls.from_pretrained(
            folder, dtype=EXACT[name], output_loading_info=True, trust_remote_code=trust
        )
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    return run(name, built)


def computed(name: str, checkpoint: Checkpoint) -> torch.Tensor:
    with quiet():
        return run(name, build_model(checkpoint, EXACT[name], "cpu").model)


def changed(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **{name: held(value) for name, value in tensors.items()}},
    )


def followers(checkpoint: Checkpoint) -> set[tuple[str, int, bool]]:
    return {
        (follower.name, follower.axis, follower.even)
        for mlp in checkpoint.anatomy.every_mlp
        for follower in mlp.followers
    }


# What they are


@pytest.mark.parametrize("name", list(NORMS))
def test_a_norm_over_the_neurons_is_found(name: str) -> None:
    base = opened(name)
    [stack] = base.anatomy.stacks
    wanted = {(f"{stack}.{n}.{inner}", 0, True) for n in range(3) for inner in NORMS[name]}
    assert followers(base) == wanted
    assert not base.anatomy.no_growth
    assert all(base.anatomy.places[each].role.value == "norm" for each, _, _ in wanted)


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_depthwise_convolution_is_found(name: str) -> None:
    base = opened(name)
    inner = f"{KERNELS[name]}."
    wanted = {(each, 0, False) for each in base if inner in each}
    assert len(wanted) == 2 * 3
    assert followers(base) == wanted


# By whole factors


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_whole_factor_keeps_the_function(name: str, factor: int, tmp_path: Path) -> None:
    base = opened(name)
    grown = grow(base, factor=factor, symmetry_break=0.1)
    write(grown, tmp_path / "grown")
    assert apart(loaded(name, tmp_path / "grown"), loaded(name, model(name))) < SAME
    before, after = load(model(name)), load(tmp_path / "grown")
    for follower, _, _ in followers(base):
        assert torch.equal(after[follower], torch.cat([before[follower]] * factor))
    found = verify(base, open_checkpoint(tmp_path / "grown"), device="cpu")
    assert found.passed
    assert found.certificate is not None
    assert found.certificate.grown_mlps == 3


@pytest.mark.parametrize("name", list(MODELS))
def test_a_follower_that_was_not_copied_is_told(name: str) -> None:
    """The control: the right shape, and the copies in another order than the neurons."""
    base = opened(name)
    grown = grow(base, factor=2)
    follower = min(each for each, _, _ in followers(base) if each.endswith(".weight"))
    values = grown[follower].whole()
    half = len(values) // 2
    values[half:] = values[half:].flip(0)
    wrong = changed(grown, {follower: values})
    certificate = certify(base, wrong, find_growths(base, grown))
    assert [failure.partition(":")[0] for failure in certificate.failures] == [follower]
    assert apart(computed(name, wrong), computed(name, base)) > 100 * SAME
    assert not verify(base, wrong, device="cpu").passed


def test_growth_is_found_without_a_record(tmp_path: Path) -> None:
    for name in MODELS:
        write(grow(opened(name), factor=2), tmp_path / name)
        (tmp_path / name / "surgery.json").unlink()
        growths = find_growths(opened(name), open_checkpoint(tmp_path / name))
        assert len(growths) == 3
        assert certify(opened(name), open_checkpoint(tmp_path / name), growths).holds


def test_it_grows_twice(tmp_path: Path) -> None:
    base = opened("bitnet")
    write(grow(grow(base, factor=2), factor=3), tmp_path / "grown")
    assert load(tmp_path / "grown")["model.layers.1.mlp.ffn_sub_norm.weight"].shape == (432,)
    assert apart(loaded("bitnet", tmp_path / "grown"), loaded("bitnet", model("bitnet"))) < SAME


def test_some_layers_grow_by_a_modeling_file(tmp_path: Path) -> None:
    base = opened("bitnet")
    write(grow(base, factor=2, layers="1"), tmp_path / "grown")
    assert config_of(tmp_path / "grown")["mlp_widths"] == [72, 144, 72]
    found = loaded("bitnet", tmp_path / "grown", trust=True)
    assert apart(found, loaded("bitnet", model("bitnet"))) < SAME
    grown = open_checkpoint(tmp_path / "grown")
    assert verify(base, grown, device="cpu").passed
    larger = expand(grown, copies=1)
    assert larger.config["mlp_widths"] == [72, 144, 72, 72]
    assert verify(grown, larger, device="cpu").passed


def test_the_record_says_which_parts_are_new(tmp_path: Path) -> None:
    write(grow(opened("bitnet"), factor=2), tmp_path / "grown")
    record = (tmp_path / "grown" / "surgery.json").read_text()
    assert '"role": "follower"' in record


# Fractions


def test_a_norm_refuses_a_fraction() -> None:
    name = "model.layers.{}.mlp.ffn_sub_norm.weight"
    with pytest.raises(UnsupportedError) as caught:
        grow(opened("bitnet"), factor=1.5, layers="0,2")
    assert list(caught.value.problems) == [
        f"model.layers.{block} can't be grown from 72 to 108: {name.format(block)} may be of a "
        f"norm over all its neurons, whose mean stays what it is only if each is copied as often: "
        f"a whole factor works, here a width of 144 or 216; or choose other layers (--layers)"
        for block in (0, 2)
    ]


def test_a_norm_refuses_zero_neurons() -> None:
    with pytest.raises(UnsupportedError, match="can't be padded with zero neurons to a") as caught:
        grow(opened("bitnet"), factor=2, layers="1", uniform=True)
    assert caught.value.problems[0].endswith(
        "as often: grow all layers by the same whole factor, or without uniform (--uniform)"
    )


@pytest.mark.parametrize("padding", [0, 36])
def test_a_fraction_forced_through_a_norm_changes_the_function(padding: int) -> None:
    """The control of the refusal: with the norm's gain copied, or padded, as carefully as ever."""
    base = opened("bitnet")
    growths = [
        Growth(mlp, 108, ((0, 36),) if not padding else (), padding)
        for mlp in base.anatomy.every_mlp
    ]
    tensors: dict[str, Any] = {}
    for growth in growths:
        tensors |= grown_tensors(base, growth, 0.0, 0)
    config = {**base.config, "intermediate_size": 108}
    forced = replace(base, tensors={**base.tensors, **tensors}, config=config)
    assert apart(computed("bitnet", forced), computed("bitnet", base)) > 1e-3
    failures = certify(base, forced, growths).failures
    assert failures == tuple(
        f"model.layers.{n}: model.layers.{n}.mlp.ffn_sub_norm.weight may be of a norm over all its "
        f"neurons, and these aren't all copied as often"
        for n in range(3)
    )


@pytest.mark.parametrize("choose", ["first", "random", "norm"])
@pytest.mark.parametrize("name", list(KERNELS))
def test_a_depthwise_convolution_allows_any_factor(name: str, choose: Any, tmp_path: Path) -> None:
    base = opened(name)
    grown = grow(base, factor=1.5, choose=choose)
    write(grown, tmp_path / "grown")
    assert apart(loaded(name, tmp_path / "grown"), loaded(name, model(name))) < SAME
    before, after = load(model(name)), load(tmp_path / "grown")
    for growth in find_growths(base, grown):
        taken = [*range(growth.mlp.width)]
        for start, stop in growth.copied:
            taken += range(start, stop)
        for follower in growth.mlp.followers:
            assert torch.equal(after[follower.name], before[follower.name][taken])
    assert verify(base, open_checkpoint(tmp_path / "grown"), device="cpu").passed


def test_a_depthwise_convolution_allows_zero_neurons(tmp_path: Path) -> None:
    width, hidden = 24, 8
    tensors = {}
    for block in (0, 1):
        at = f"layers.{block}.mlp"
        tensors |= {
            f"layers.{block}.norm.weight": torch.ones(hidden),
            f"{at}.fc1.weight": torch.randn(width, hidden),
            f"{at}.fc1.bias": torch.randn(width),
            f"{at}.conv.weight": torch.randn(width, 1, 3, 3),
            f"{at}.conv.bias": torch.randn(width),
            f"{at}.fc2.weight": torch.randn(hidden, width),
        }
    base = open_checkpoint(made(tmp_path / "base", tensors))
    grown = grow(base, factor=1.5, layers="0", uniform=True)
    kernel = grown["layers.1.mlp.conv.weight"].whole()
    assert kernel.shape == (36, 1, 3, 3)
    assert torch.equal(kernel[:24], tensors["layers.1.mlp.conv.weight"])
    assert not kernel[24:].any()
    growths = find_growths(base, grown)
    assert sorted(growth.padding for growth in growths) == [0, 12]
    assert certify(base, grown, growths).holds
    kernel[30, 0, 1, 1] = 1
    wrong = changed(grown, {"layers.1.mlp.conv.weight": kernel})
    [failure] = certify(base, wrong, growths).failures
    assert "are padding, and aren't zero" in failure


@pytest.mark.parametrize("name", list(MODELS))
def test_the_noise_floor_s_permutation_is_the_same_function(name: str) -> None:
    base = opened(name)
    permuted = _permuted(base, 0)
    assert apart(computed(name, permuted), computed(name, base)) < SAME
    back = {each: base[each].whole() for each, _, _ in followers(base)}
    assert apart(computed(name, changed(permuted, back)), computed(name, base)) > 100 * SAME


def test_blocks_with_a_norm_over_the_neurons_expand() -> None:
    base = opened("bitnet")
    larger = expand(base, copies=3)
    assert verify(base, larger, device="cpu").passed


# What else there may be


Shapes = dict[str, tuple[int, ...]]
HIDDEN, WIDTH = 8, 24


def plain(folder: Path, more: Shapes) -> Checkpoint:
    """Two blocks with an MLP in a module of its own, and `more` in each."""
    torch.manual_seed(0)
    shapes: Shapes = {}
    for block in range(2):
        inside = {
            "norm.weight": (HIDDEN,),
            "mlp.fc1.weight": (WIDTH, HIDDEN),
            "mlp.fc1.bias": (WIDTH,),
            "mlp.fc2.weight": (HIDDEN, WIDTH),
            "mlp.fc2.bias": (HIDDEN,),
        }
        shapes |= {f"layers.{block}.{name}": shape for name, shape in (inside | more).items()}
    return open_checkpoint(made(folder, {n: torch.randn(shape) for n, shape in shapes.items()}))


BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize(
    ("more", "axis", "even"),
    [
        ({"mlp.scale": (WIDTH,)}, 0, True),
        ({"mlp.norm.weight": (WIDTH,), "mlp.norm.bias": (WIDTH,)}, 0, True),
        ({"mlp.grn.weight": (1, 1, 1, WIDTH)}, 3, True),
        ({"mlp.grn.weight": (WIDTH, 1, 1)}, 0, True),
        ({"mlp.conv.weight": (WIDTH, 1, 3, 1), "mlp.conv.bias": (WIDTH,)}, 0, False),
        ({f"mlp.fc1_bn.{name}": (WIDTH,) for name in BATCH_NORM}, 0, False),
        ({f"mlp.bn.{name}": (WIDTH,) for name in BATCH_NORM[:3]}, 0, True),
    ],
)
def test_what_goes_by_neuron(more: Shapes, axis: int, even: bool, tmp_path: Path) -> None:
    base = plain(tmp_path / "m", more)
    assert followers(base) == {(f"layers.{n}.{name}", axis, even) for n in (0, 1) for name in more}
    grown = grow(base, factor=2)
    for name in more:
        old, new = (one[f"layers.1.{name}"].whole() for one in (base, grown))
        assert torch.equal(new, torch.cat([old, old], dim=axis))
    assert certify(base, grown, find_growths(base, grown)).holds
    if even:
        with pytest.raises(UnsupportedError, match="a whole factor works, here a width of 48 or"):
            grow(base, factor=1.5)
    else:
        wider = grow(base, factor=1.5)
        assert certify(base, wider, find_growths(base, wider)).holds


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"mlp.mid.weight": (WIDTH, WIDTH)}, "mlp.mid.weight"),
        ({"mlp.score.weight": (1, WIDTH)}, "mlp.score.weight"),
        ({"mlp.conv.weight": (WIDTH, WIDTH, 3, 3)}, "mlp.conv.weight"),
        ({"mlp.conv.weight": (WIDTH, 2, 3, 3)}, "mlp.conv.weight"),
        ({"mlp.out.weight": (1, WIDTH, 1, 1)}, "mlp.out.weight"),
        ({"mlp.conv.weight": (WIDTH, 1, 3, 3), "mlp.conv.bias": (1,)}, "mlp.conv.weight"),
        ({"mlp.fc1.weight_u": (WIDTH,)}, "mlp.fc1.weight_u"),
        ({"mlp.side.a.weight": (5, 7), "mlp.side.norm.weight": (WIDTH,)}, "mlp.side.norm.weight"),
        ({"ffn_norm.weight": (WIDTH,)}, None),
    ],
)
def test_what_may_be_anything_is_refused(more: Shapes, named: str | None, tmp_path: Path) -> None:
    base = plain(tmp_path / "m", more)
    assert not followers(base)
    if named is None:  # outside the MLP's module
        assert not base.anatomy.no_growth
        return
    with pytest.raises(UnsupportedError) as caught:
        grow(base, factor=2)
    assert caught.value.problems == tuple(
        f"layers.{n} can't be grown: layers.{n}.{named} follows the MLP's width of 24"
        for n in (0, 1)
    )


def test_a_norm_that_may_be_of_either_of_two_mlps_is_refused(tmp_path: Path) -> None:
    shapes: Shapes = {}
    for block in range(2):
        for kind in ("lang", "visn"):
            at = f"layers.{block}.ffn.{kind}"
            shapes |= {
                f"{at}_inter.dense.weight": (WIDTH, HIDDEN),
                f"{at}_inter.dense.bias": (WIDTH,),
            }
            shapes |= {f"{at}_output.dense.weight": (HIDDEN, WIDTH)}
            shapes |= {f"{at}_output.LayerNorm.weight": (HIDDEN,)}
        shapes[f"layers.{block}.ffn.norm.weight"] = (WIDTH,)
    base = open_checkpoint(made(tmp_path / "m", {n: torch.randn(s) for n, s in shapes.items()}))
    with pytest.raises(UnsupportedError) as caught:
        grow(base)
    assert "layers.0.ffn.norm.weight belongs to isn't known" in caught.value.problems[0]


# The law


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["rms", "layer", "grn"]),
    width=st.integers(3, 12),
    factor=st.integers(2, 5),
    seed=st.integers(0, 99),
    even=st.booleans(),
)
def test_copies_keep_norms_where_there_are_as_many_of_each(
    kind: str, width: int, factor: int, seed: int, even: bool
) -> None:
    """Formulas of the norms in float64: a whole factor leaves what comes out as it was; one more
    copy of a single neuron doesn't."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, width, generator=generator, dtype=torch.float64)
    gain, bias, down = torch.randn(3, width, generator=generator, dtype=torch.float64)

    def out(sources: list[int]) -> torch.Tensor:
        h, g, b = hidden[:, sources], gain[sources], bias[sources]
        if kind == "rms":
            normed = g * h / (h.square().mean(1, keepdim=True) + 1e-6).sqrt()
        elif kind == "layer":
            centred = h - h.mean(1, keepdim=True)
            normed = g * centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() + b
        else:
            over_space = h.square().sum(0, keepdim=True).sqrt()
            normed = g * (h * (over_space / (over_space.mean(1, keepdim=True) + 1e-6))) + b + h
        copies = torch.tensor([sources.count(s) for s in sources])
        return normed @ (down[sources] / copies)

    sources = [*range(width)] * factor + ([] if even else [0])
    same = torch.allclose(out(sources), out([*range(width)]), rtol=1e-9, atol=1e-12)
    assert same is even


def test_the_copies_of_a_growth_are_counted(tmp_path: Path) -> None:
    [mlp, *_] = plain(tmp_path / "m", {}).anatomy.every_mlp
    for copied, padding, even in (
        (((0, 24),), 0, True),
        (((0, 24), (0, 24)), 0, True),
        (((12, 24), (0, 12)), 0, True),
        (((0, 12), (0, 12)), 0, False),
        (((0, 24),), 1, False),
        ((), 3, False),
    ):
        wide = 24 + sum(stop - start for start, stop in copied) + padding
        assert Growth(mlp, wide, copied, padding).even is even


# What a user says


def bare(folder: Path) -> Checkpoint:
    """Two blocks without a module for the MLP, so that nothing tells what a vector is of."""
    torch.manual_seed(0)
    shapes: Shapes = {}
    for block in range(2):
        inside = {
            "norm.weight": (HIDDEN,),
            "fc1.weight": (WIDTH, HIDDEN),
            "fc1.bias": (WIDTH,),
            "mid.weight": (1, WIDTH),
            "fc2.weight": (HIDDEN, WIDTH),
        }
        shapes |= {f"layers.{block}.{name}": shape for name, shape in inside.items()}
    return open_checkpoint(made(folder, {n: torch.randn(shape) for n, shape in shapes.items()}))


def corrected(base: Checkpoint, folder: Path, told: str) -> Checkpoint:
    text = f"mlps:\n  - {{stack: layers, ups: [fc1.weight], down: fc2.weight, followers: {told}}}"
    (folder / "anatomy.yaml").write_text(text)
    return correct_anatomy(base, folder / "anatomy.yaml")


def test_a_user_can_say_what_a_follower_is(tmp_path: Path) -> None:
    base = bare(tmp_path / "m")
    with pytest.raises(UnsupportedError, match="follows the MLP's width of 24"):
        grow(base)
    told = corrected(base, tmp_path, "{mid.weight: all}")
    assert followers(told) == {(f"layers.{n}.mid.weight", 1, True) for n in (0, 1)}
    with pytest.raises(UnsupportedError, match="a whole factor works"):
        grow(told, factor=1.5)
    write(grow(told, factor=2), tmp_path / "grown")
    again = open_checkpoint(tmp_path / "grown")  # the record has the correction
    assert followers(again) == followers(told)
    assert again["layers.1.mid.weight"].shape == (1, 48)
    assert certify(told, again, find_growths(told, again)).holds
    assert grow(corrected(base, tmp_path, "{mid.weight: each}"), factor=1.5)["layers.0.mid.weight"]


def test_what_is_found_is_written_as_it_is_read(tmp_path: Path) -> None:
    for base in (
        opened("bitnet"),
        opened("kosmos"),
        corrected(bare(tmp_path / "m"), tmp_path, "{mid.weight: each}"),
    ):
        (tmp_path / "found.yaml").write_text(anatomy_yaml(base.anatomy))
        again = correct_anatomy(base, tmp_path / "found.yaml")
        assert again.anatomy == base.anatomy
        assert from_data(as_data(again.corrections)) == again.corrections


def test_what_can_t_be_a_follower_is_said(tmp_path: Path) -> None:
    base = bare(tmp_path / "m")
    for told, why in (
        ("{none.weight: all}", "there is no layers.0.none.weight"),
        (
            "{norm.weight: all}",
            r"norm.weight is \[8\], and has to have 24 once, as its first size behind ones or",
        ),
        ("{mid.weight: some}", "followers"),
    ):
        with pytest.raises(RecipeError, match=why):
            corrected(base, tmp_path, told)


def test_records_from_before_there_were_followers_are_read() -> None:
    mlp = MLPCorrection("layers", ("a",), "b", followers=(("c", True),))
    data = as_data(Corrections(mlps=(mlp,)))
    assert from_data(data).mlps == (mlp,)
    del data["mlps"][0]["followers"]
    assert from_data(data).mlps == (replace(mlp, followers=()),)
    for wrong in ([["c"]], [["c", 1]], [[1, True]], "c"):
        with pytest.raises(ValueError, match=r"wanted|follower"):
            from_data({**data, "mlps": [{**data["mlps"][0], "followers": wrong}]})


def test_inspect_says_what_follows() -> None:
    result = CliRunner().invoke(app, ["inspect", str(model("bitnet")), "--json"])
    [block, *_] = json.loads(result.stdout)["blocks"]
    name = "model.layers.0.mlp.ffn_sub_norm.weight"
    assert block["mlp"]["followers"] == [{"tensor": name, "axis": 0, "even": True}]
    shown = CliRunner().invoke(app, ["inspect", str(model("bitnet"))], env={"COLUMNS": "160"})
    assert "by whole factors" in shown.stdout
    shown = CliRunner().invoke(app, ["inspect", str(model("pvt"))], env={"COLUMNS": "160"})
    assert "by whole factors" not in shown.stdout


# 8-bit floats


def test_a_norm_over_the_neurons_of_8_bit_floats(tmp_path: Path) -> None:
    """Whole blocks of neurons are copied with it, and their scales split, as ever."""
    class_name, config, options = MODELS["bitnet"]
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    full = save(tmp_path / "full", class_name, config, options | sizes, "bfloat16")
    base = open_checkpoint(as_fp8(full, tmp_path / "fp8"))
    assert base.scales is not None
    name = "model.layers.1.mlp.ffn_sub_norm.weight"
    assert (name, 0, True) in followers(base)
    write(grow(base, factor=2), tmp_path / "grown")
    grown = open_checkpoint(tmp_path / "grown")
    assert torch.equal(grown[name].whole(), torch.cat([base[name].whole()] * 2))
    assert verify(base, grown, device="cpu").passed
    with pytest.raises(UnsupportedError, match="a whole factor works, here a width of 768 or"):
        grow(base, width=512)


def test_a_follower_with_scales_is_refused(tmp_path: Path) -> None:
    base = plain(tmp_path / "m", {"mlp.conv.weight": (WIDTH, 1, 3, 3)})
    mlp = base.anatomy.mlps["layers", 1]
    name = "layers.1.mlp.conv.weight"
    scaled = {name: Scaled(name, f"{name}_scale", (1, 1))}
    with pytest.raises(UnsupportedError, match="is stored with scales: `surgery dequantize` it"):
        neurons_in_a_block(base, mlp, scaled)


def test_a_norm_behind_an_mlp_beside_the_blocks_is_no_follower(tmp_path: Path) -> None:
    """A projector's norm may be of the size that it leads to, which can be its width."""
    shapes: Shapes = {
        "projector.0.weight": (16, 12),
        "projector.0.bias": (16,),
        "projector.2.weight": (16, 16),
        "projector.3.weight": (16,),
    }
    base = plain(tmp_path / "m", {})
    tensors = {name: tensor.whole() for name, tensor in base.items()}
    tensors |= {name: torch.randn(shape) for name, shape in shapes.items()}
    base = open_checkpoint(made(tmp_path / "more", tensors))
    assert not base.anatomy.beside
    del tensors["projector.3.weight"]
    [mlp] = open_checkpoint(made(tmp_path / "less", tensors)).anatomy.beside
    assert (mlp.width, mlp.followers) == (16, ())
