"""Widths that the keys of a config can't say, several in a block or in several stacks: a modeling
file beside the shards resizes each projection by its name."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from families import ROOT, SAME, apart, config_of, quiet
from zoo.build import build
from zoo.examine import outputs
from zoo.kinds import kinds_of

from surgery import (
    certify,
    compose,
    find_growths,
    grow,
    open_checkpoint,
    write,
)
from surgery.modeling.build import build_model
from surgery.modeling.stock import block_modules, empty_model
from surgery.verification.inputs import make_inputs


@cache
def model(name: str) -> Path:
    return build(kinds_of(name)[0], ROOT / f"modules-{name}").folder


def loaded(folder: Path, auto: Any = transformers.AutoModel) -> Any:
    """By transformers, with the code beside the shards: all weights, and nothing else."""
    with quiet():
        made, info = auto.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True, trust_remote_code=True
        )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return made.eval()


def test_the_blocks_of_a_part_aren_t_those_of_the_model_that_are_called_alike():
    """Grounding DINO's backbone is called otherwise in files, and the detector has such a list."""
    config = {"model_type": "grounding-dino", "architectures": ["GroundingDinoModel"]}
    model = empty_model(config)
    inner, outer = "backbone.conv_encoder.model.encoder.layers", "encoder.layers"
    kinds = [type(block_modules(model, name)[0]).__name__ for name in (inner, outer)]
    assert kinds[0].startswith("Swin")
    assert kinds[1].startswith("GroundingDino")


def test_three_language_models_in_one():
    """Bark is run part by part."""
    base = open_checkpoint(model("bark"))
    grown = grow(base, factor=1.5)
    assert {mlp.width for mlp in grown.anatomy.every_mlp} == {192}
    parts = [build_model(each, torch.float64, "cpu").model for each in (base, grown)]
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    for name in ("semantic", "coarse_acoustics"):
        with torch.no_grad():
            before, after = (getattr(part, name)(input_ids=ids).logits for part in parts)
        assert apart(after, before) < SAME
    codes = ids[..., None].repeat(1, 1, parts[0].config.fine_acoustics_config.n_codes_total)
    with torch.no_grad():
        before, after = (part.fine_acoustics(2, input_ids=codes).logits for part in parts)
    assert apart(after, before) < SAME


def test_some_layers_of_an_encoder_and_a_decoder_beside_it(tmp_path: Path):
    """The encoder alone, which has another prefix and no decoder, is loaded too."""
    base = open_checkpoint(model("vit_mae"))
    grown = grow(base, factor=1.5, layers="1")
    assert certify(base, grown, find_growths(base, grown)).holds
    write(grown, tmp_path / "grown")
    config = config_of(tmp_path / "grown")
    sizes = config.pop("mlp_module_widths")
    del config["auto_map"]
    assert config == config_of(model("vit_mae"))
    wider = [tensor for name, tensor in grown.items() if tensor.shape != base[name].shape]
    weights = [[*tensor.shape[::-1]] for tensor in wider if len(tensor.shape) == 2]
    assert sorted(sizes.values()) == sorted(weights)
    assert {name.partition("layers.")[2] for name in sizes} == {"1.mlp.fc1", "1.mlp.fc2"}
    assert {name.partition(".")[0] for name in sizes} == {"vit", "decoder"}
    inputs = make_inputs(base).values
    assert apart(outputs(open_checkpoint(tmp_path / "grown"), inputs), outputs(base, inputs)) < SAME
    layers = loaded(tmp_path / "grown").layers
    assert [layer.mlp.fc1.out_features for layer in layers] == [72, 108, 72]


def test_new_weights_have_values(tmp_path: Path):
    write(grow(open_checkpoint(model("vit_mae")), factor=1.5, layers="1"), tmp_path / "grown")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "grown", trust_remote_code=True)
    made = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert all(bool(value.isfinite().all()) for value in made.parameters())
    assert max(float(value.detach().abs().max()) for value in made.parameters()) < 10


def test_its_blocks_are_taken_with_their_widths(tmp_path: Path):
    base = open_checkpoint(model("gemma4_audio"))
    write(grow(base, factor=2), tmp_path / "grown")
    write(compose([(open_checkpoint(tmp_path / "grown"), 0)]), tmp_path / "first")
    write(grow(compose([(base, 0)]), factor=2), tmp_path / "other")
    for file in ("config.json", "modeling_mlp_widths.py"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    loaded(tmp_path / "first")
