"""Stages of blocks whose widths are in the code: a modeling file beside the shards resizes every MLP
of a stage, and what follows its width."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROOT, SAME, apart, config_of, load, quiet, save
from safetensors.torch import save_file
from torch import nn

from surgery import (
    UnsupportedError,
    certify,
    compose,
    find_growths,
    grow,
    open_checkpoint,
    verify,
    write,
)
from surgery.modeling.widths import load_classes, modeling_file

SIZES = {"hidden_sizes": [8, 12, 16], "depths": [1, 3, 2], "num_stages": 3}
MODELS = {
    "convnext": ("ConvNextModel", "ConvNextConfig"),
    "v2": ("ConvNextV2Model", "ConvNextV2Config"),
}


@cache
def model(name: str) -> Path:
    return save(ROOT / f"stages-{name}", *MODELS[name], SIZES)


def outputs(folder: Path, *, trust: bool = True) -> torch.Tensor:
    with quiet():
        made, info = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True, trust_remote_code=trust
        )
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    return run(made)


def run(made: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return made.double().eval()(pixel_values=images).last_hidden_state


@pytest.mark.parametrize(
    ("name", "factor"), [("convnext", 2), ("convnext", 1.5), ("v2", 2), ("v2", 3)]
)
def test_all_layers_of_all_stages_grow(name: str, factor: float, tmp_path: Path) -> None:
    base = open_checkpoint(model(name))
    write(grow(base, factor=factor, symmetry_break=0.1), tmp_path / "grown")
    widths = [int(4 * size * factor) for size in SIZES["hidden_sizes"]]
    assert config_of(tmp_path / "grown")["mlp_widths"] == widths
    grown = open_checkpoint(tmp_path / "grown")
    assert [mlp.width for mlp in grown.anatomy.every_mlp] == [
        width for width, depth in zip(widths, SIZES["depths"], strict=True) for _ in range(depth)
    ]
    assert apart(outputs(tmp_path / "grown"), outputs(model(name), trust=False)) < SAME
    found = verify(base, grown, device="cpu")
    assert found.passed
    assert found.certificate is not None
    assert found.certificate.grown_mlps == 6
    again = open_checkpoint(tmp_path / "grown")
    assert certify(base, again, find_growths(base, again)).holds


def test_the_gain_of_a_response_norm_is_copied(tmp_path: Path) -> None:
    """And the control: with other copies of it, other outputs."""
    write(grow(open_checkpoint(model("v2")), factor=2), tmp_path / "grown")
    before, after = load(model("v2")), load(tmp_path / "grown")
    name = "encoder.stages.1.layers.2.grn.weight"
    assert before[name].shape == (1, 1, 1, 48)
    assert torch.equal(after[name], torch.cat([before[name]] * 2, dim=3))
    grown = open_checkpoint(tmp_path / "grown")
    growths = find_growths(open_checkpoint(model("v2")), grown)
    after[name][..., 48:] = before[name].flip(3)
    path = tmp_path / "grown" / "model.safetensors"
    save_file(after, path, metadata={"format": "pt"})
    assert apart(outputs(tmp_path / "grown"), outputs(model("v2"), trust=False)) > 100 * SAME
    wrong = open_checkpoint(tmp_path / "grown")
    [failure] = certify(open_checkpoint(model("v2")), wrong, growths).failures
    assert failure.startswith(f"{name}: columns aren't those they are copies of")


def test_one_stage_grows_and_then_all(tmp_path: Path) -> None:
    base = open_checkpoint(model("v2"))
    write(grow(base, factor=2, layers="1"), tmp_path / "one")
    assert config_of(tmp_path / "one")["mlp_widths"] == [32, 96, 64]
    assert apart(outputs(tmp_path / "one"), outputs(model("v2"), trust=False)) < SAME
    write(grow(open_checkpoint(tmp_path / "one"), factor=3), tmp_path / "all")
    assert config_of(tmp_path / "all")["mlp_widths"] == [96, 288, 192]
    assert apart(outputs(tmp_path / "all"), outputs(model("v2"), trust=False)) < SAME
    assert verify(base, open_checkpoint(tmp_path / "all"), device="cpu", logits=False).passed


def test_it_is_saved_and_made_from_its_config(tmp_path: Path) -> None:
    write(grow(open_checkpoint(model("v2")), factor=2), tmp_path / "grown")
    with quiet():
        made = transformers.AutoModel.from_pretrained(tmp_path / "grown", trust_remote_code=True)
        made.save_pretrained(tmp_path / "saved")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "grown", trust_remote_code=True)
        fresh = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert apart(outputs(tmp_path / "saved"), outputs(tmp_path / "grown")) == 0
    shapes = {name: value.shape for name, value in load(tmp_path / "grown").items()}
    assert {name: value.shape for name, value in fresh.state_dict().items()} == shapes
    assert bool(run(fresh).isfinite().all())


def test_padding_and_fractions_stay_refused() -> None:
    base = open_checkpoint(model("v2"))
    with pytest.raises(UnsupportedError, match="a whole factor works, here a width of 64 or 96"):
        grow(base, factor=1.5)
    with pytest.raises(UnsupportedError, match="--uniform"):
        grow(base, factor=2, layers="0", uniform=True)


def test_stages_of_other_widths_can_t_be_put_together(tmp_path: Path) -> None:
    write(grow(open_checkpoint(model("convnext")), factor=2), tmp_path / "grown")
    grown = open_checkpoint(tmp_path / "grown")
    with pytest.raises(UnsupportedError, match="can't be put together yet"):
        compose([(grown, 0), (grown, 1), (grown, 2)])


def test_the_modeling_file_resizes_what_follows() -> None:
    """Modules of torch that have something for every neuron, with the numbers that they keep."""
    base = open_checkpoint(model("convnext"))
    _, source = modeling_file(base, base.anatomy.plain_mlps)
    resize = load_classes(source)._resize_follower
    kernel, layer, batch = nn.Conv2d(6, 6, 3, groups=6), nn.LayerNorm(6), nn.BatchNorm2d(6)
    for module, names in (
        (kernel, ("weight", "bias")),
        (layer, ("weight", "bias")),
        (batch, ("weight", "bias", "running_mean", "running_var")),
    ):
        for name in names:
            resize(module, name, 0, 10)
            assert getattr(module, name).shape[0] == 10
    kernel(torch.zeros(1, 10, 5, 5))
    layer(torch.zeros(2, 10))
    batch.eval()(torch.zeros(1, 10, 5, 5))
    assert set(batch.state_dict()) >= {"running_mean", "running_var"}
    assert (kernel.groups, kernel.kernel_size, layer.normalized_shape) == (10, (3, 3), (10,))


def test_numbers_inside_an_mlp_stay_what_they_are() -> None:
    """The * stands for the number of a layer in its stage."""
    base = open_checkpoint(model("v2"))
    auto_map, source = modeling_file(base, base.anatomy.plain_mlps)
    made = load_classes(source)
    assert made.UP == ("layers.*.pwconv1",)
    assert made.DOWN == ("layers.*.pwconv2",)
    assert sorted(made.FOLLOWERS) == [("layers.*.grn.bias", 3), ("layers.*.grn.weight", 3)]
    assert json.dumps(auto_map)
