"""MLPs that a block hides: between the matrices of a bottleneck, in stages with sizes of their own,
with adapters added to gate and up, made of convolutions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROOT, SAME, apart, load, made, quiet, save

from surgery import (
    Checkpoint,
    UnsupportedError,
    certify,
    find_growths,
    grow,
    open_checkpoint,
    verify,
    write,
)
from surgery.anatomy import MLP
from surgery.measure import neuron_norms
from surgery.recipe import anatomy_yaml, correct_anatomy
from surgery.values import held

TEXT = {"vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MobileBertForMaskedLM": (
        "MobileBertConfig",  # hidden size and width are the same, as in the real ones
        TEXT
        | {"hidden_size": 64, "intermediate_size": 64, "intra_bottleneck_size": 16}
        | {"num_attention_heads": 2, "num_hidden_layers": 2, "embedding_size": 16}
        | {"num_feedforward_networks": 3},
    ),
    "Zamba2ForCausalLM": (
        "Zamba2Config",
        TEXT
        | {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 4}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "adapter_rank": 6}
        | {"mamba_d_state": 8, "mamba_expand": 2, "n_mamba_heads": 4, "mamba_ngroups": 1}
        | {"num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"] * 2},
    ),
    "MobileViTModel": (
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2}
        | {"neck_hidden_sizes": [4, 8, 8, 12, 12, 16, 24], "mlp_ratio": 2.0},
    ),
    "PoolFormerModel": (
        "PoolFormerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [16, 24]}
        | {"patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]}
        | {"mlp_ratio": 4.0, "drop_path_rate": 0.0},
    ),
    "SwiftFormerModel": (
        "SwiftFormerConfig",
        {"depths": [1, 2, 1, 1], "embed_dims": [8, 16, 24, 32], "image_size": 64}
        | {"mlp_ratio": 4, "down_pad": 1, "down_stride": 2, "drop_path_rate": 0.0},
    ),
    "MobileViTV2Model": (
        "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 2]}
        | {"base_attn_unit_dims": [64, 96, 128], "ffn_multiplier": 2},
    ),
    "VitsModel": (
        "VitsConfig",
        {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"ffn_dim": 40, "ffn_kernel_size": 3, "flow_size": 16, "spectrogram_bins": 9}
        | {"upsample_initial_channel": 32, "upsample_rates": [2, 2]}
        | {"upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3]}
        | {"resblock_dilation_sizes": [[1, 3]], "posterior_encoder_num_wavenet_layers": 2}
        | {"prior_encoder_num_wavenet_layers": 2, "prior_encoder_num_flows": 2}
        | {"use_stochastic_duration_prediction": False, "duration_predictor_filter_channels": 16}
        | {"speaking_rate": 1e3},  # every token is as short as can be: no length is rounded
    ),
}
WIDTHS = {
    "MobileBertForMaskedLM": [64] * 6,
    "Zamba2ForCausalLM": [72],
    "MobileViTModel": [32] * 2 + [48] * 4 + [64] * 3,
    "PoolFormerModel": [64] + [96] * 2,
    "SwiftFormerModel": [32] + [64] * 2 + [96] + [128],
    "MobileViTV2Model": [32, 48, 64, 64],
    "VitsModel": [40] * 2,
}


@cache
def model(name: str) -> Path:
    return save(ROOT / f"more-{name}", name, *MODELS[name])


def opened(name: str) -> Checkpoint:
    return open_checkpoint(model(name))


def run(name: str, folder: Path) -> torch.Tensor:
    """What the model that a user gets puts out; every weight is in the files, and fits."""
    with quiet():
        built, info = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    generator = torch.Generator().manual_seed(3)
    if built.main_input_name == "pixel_values":
        given = {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator).double()}
    else:
        given = {"input_ids": torch.randint(3, 97, (2, 24), generator=generator)}
    if name == "VitsModel":  # what comes after this draws durations at random
        given["padding_mask"] = torch.ones(2, 24, 1).double()
        built = built.text_encoder
    with torch.no_grad():
        result = built.eval()(**given)
    return (result.logits if "logits" in result else result.last_hidden_state).double()


def unsplit(base: Checkpoint, grown: Checkpoint, mlp: MLP) -> Checkpoint:
    """With the outgoing weights of one MLP copied as they are."""
    columns = base[mlp.down.weight].whole()
    wide = grown[mlp.down.weight].shape[1]
    wrong = torch.cat([columns, columns[:, : wide - mlp.width]], dim=1)
    return replace(grown, tensors={**grown.tensors, mlp.down.weight: held(wrong)})


@pytest.mark.parametrize("name", list(MODELS))
def test_the_mlps_are_found(name: str) -> None:
    anatomy = opened(name).anatomy
    assert [mlp.width for mlp in anatomy.every_mlp] == WIDTHS[name]
    assert not anatomy.no_growth


@pytest.mark.parametrize("factor", [1.5, 2])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "MobileViTV2Model"])
def test_growth_keeps_the_function(name: str, factor: float, tmp_path: Path) -> None:
    base = opened(name)
    write(grow(base, factor=factor), tmp_path / "grown")
    assert apart(run(name, tmp_path / "grown"), run(name, model(name))) < SAME
    grown = open_checkpoint(tmp_path / "grown")
    assert [mlp.width for mlp in grown.anatomy.every_mlp] == [factor * p for p in WIDTHS[name]]
    found = verify(base, grown, device="cpu")
    assert found.passed
    assert found.certificate is not None
    assert found.certificate.grown_mlps == len(WIDTHS[name])


@pytest.mark.parametrize("name", list(MODELS))
def test_a_split_that_was_forgotten_is_told(name: str, tmp_path: Path) -> None:
    """The control, for every MLP by itself: each reaches the output."""
    base = opened(name)
    grown = grow(base, factor=2)
    for mlp in base.anatomy.every_mlp:
        wrong = unsplit(base, grown, mlp)
        certificate = certify(base, wrong, find_growths(base, grown))
        assert [each.partition(":")[0] for each in certificate.failures] == [mlp.down.weight]
        assert not verify(base, wrong, device="cpu").passed
    write(wrong, tmp_path / "wrong")
    assert apart(run(name, tmp_path / "wrong"), run(name, model(name))) > 100 * SAME


def test_widths_that_are_rounded_grow_by_whole_factors(tmp_path: Path) -> None:
    """MobileViTV2's are multiples of 16."""
    test_growth_keeps_the_function("MobileViTV2Model", 2, tmp_path)
    with pytest.raises(UnsupportedError, match=r"no keys of config\.json give"):
        grow(opened("MobileViTV2Model"), factor=1.1)


def test_the_matrices_of_a_bottleneck_stay_as_they_are() -> None:
    base = opened("MobileBertForMaskedLM")
    grown = grow(base)
    changed = {name for name, tensor in base.items() if grown[name].shape != tensor.shape}
    assert changed == {name for mlp in base.anatomy.every_mlp for name in mlp.tensors}
    assert not any("bottleneck" in name for name in changed)


def test_an_adapter_is_added_to_the_copies_as_to_their_neurons(tmp_path: Path) -> None:
    """Its numbers are for gate, then for up; so in the wider one, each behind its copies."""
    name = "Zamba2ForCausalLM"
    base = opened(name)
    [mlp] = base.anatomy.every_mlp
    assert len(mlp.followers) == 2
    grown = grow(base, factor=2)
    for follower in mlp.followers:
        gate, up = base[follower.name].whole().chunk(2)
        assert torch.equal(grown[follower.name].whole(), torch.cat([gate, gate, up, up]))
    first = mlp.followers[0].name
    values = grown[first].whole()
    values[72:216] = values[72:216].flip(0)
    wrong = replace(grown, tensors={**grown.tensors, first: held(values)})
    certificate = certify(base, wrong, find_growths(base, grown))
    assert [each.partition(":")[0] for each in certificate.failures] == [first]
    write(wrong, tmp_path / "wrong")
    assert apart(run(name, tmp_path / "wrong"), run(name, model(name))) > 100 * SAME


@pytest.mark.parametrize("name", list(MODELS))
def test_what_a_user_names_is_what_is_found(name: str, tmp_path: Path) -> None:
    """Kernels as matrices, several MLPs of a block, what follows each, an adapter beside one."""
    base = opened(name)
    (tmp_path / "found.yaml").write_text(anatomy_yaml(base.anatomy))
    named = correct_anatomy(base, tmp_path / "found.yaml").anatomy
    assert list(named.every_mlp) == list(base.anatomy.every_mlp)
    assert named.no_growth == {}


def test_one_matrix_that_leads_to_gate_and_up_is_no_adapter(tmp_path: Path) -> None:
    """Nothing says what goes into it."""
    base = opened("Zamba2ForCausalLM")
    lost = "shared_transformer.feed_forward.gate_up_proj_adapter_list.0.0.weight"
    left = {name: tensor for name, tensor in base.tensors.items() if not name.endswith(lost)}
    assert len(left) == len(load(model("Zamba2ForCausalLM"))) - 1
    [reason] = replace(base, tensors=left).anatomy.no_growth.values()
    assert reason.endswith("gate_up_proj_adapter_list.0.1.weight follows the MLP's width of 72")


@pytest.mark.parametrize("factor", [2, 3.5])
@pytest.mark.parametrize("name", ["PoolFormerModel", "VitsModel"])
def test_channels_are_copied_and_their_outgoing_kernels_split(name: str, factor: float) -> None:
    """The definition: channel j of the wide kernel is channel s(j), and those with one source sum
    to its kernel."""
    base = opened(name)
    grown = grow(base, factor=factor, symmetry_break=0.1, choose="norm")
    for growth in find_growths(base, grown):
        sources = torch.from_numpy(growth.sources())
        [up], down = growth.mlp.ups, growth.mlp.down
        for each in (up.weight, up.bias):
            assert each is not None
            assert torch.equal(grown[each].whole(), base[each].whole()[sources])
        before, after = (c[down.weight].whole().double() for c in (base, grown))
        assert torch.equal(torch.zeros_like(before).index_add_(1, sources, after), before)


def test_the_norm_of_a_channel_is_that_of_its_kernels() -> None:
    base = opened("VitsModel")
    for mlp in base.anatomy.every_mlp:
        up, down = (base[each.weight].whole().double() for each in (*mlp.ups, mlp.down))
        wanted = up.pow(2).sum((1, 2)).sqrt() * down.pow(2).sum((0, 2)).sqrt()
        assert torch.allclose(neuron_norms(base, mlp), wanted, rtol=1e-12)


def test_channels_of_zeros_are_added_where_layers_have_to_be_alike() -> None:
    base = opened("VitsModel")
    padded = grow(base, factor=2, layers="1", uniform=True)
    growths = find_growths(base, padded)
    assert any(growth.padding for growth in growths)
    assert certify(base, padded, growths).holds


def test_convolutions_that_are_no_mlp_s_are_left(tmp_path: Path) -> None:
    """A bottleneck of a residual network is narrower inside, and a flow has more in its module."""
    kernels: dict[str, torch.Tensor] = {}
    for n in range(2):
        at = f"layers.{n}"
        kernels |= {
            f"{at}.norm.weight": torch.ones(16),
            f"{at}.narrow.conv1.weight": torch.randn(8, 16, 1, 1),
            f"{at}.narrow.conv2.weight": torch.randn(16, 8, 1, 1),
            f"{at}.flow.conv1.weight": torch.randn(40, 16, 3),
            f"{at}.flow.conv2.weight": torch.randn(16, 40, 3),
            f"{at}.flow.net.weight": torch.randn(40, 40, 3),
        }
    anatomy = open_checkpoint(made(tmp_path / "model", kernels)).anatomy
    assert not anatomy.every_mlp
    assert not anatomy.no_growth
