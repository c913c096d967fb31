"""Models whose layers differ by keys of our own grow again: the config is what growing at once
would give, by the bytes, and transformers loads the result with the code beside the shards."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROOT, SAME, apart, config_of, quiet, save
from mixtures import build_mixture
from zoo.build import build
from zoo.kinds import kinds_of

from surgery import (
    UnsupportedError,
    certify,
    compose,
    expand,
    find_growths,
    grow,
    open_checkpoint,
    verify,
    write,
)
from surgery.verification.inputs import make_inputs

CODE = "modeling_mlp_widths.py"
T5 = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 4,
}  # fmt: skip


@cache
def model(name: str) -> Path:
    if name == "t5":
        return save(ROOT / "again-t5", "T5ForConditionalGeneration", "T5Config", T5)
    if name in ("bark", "vit_mae"):
        return build(kinds_of(name)[0], ROOT / f"again-{name}").folder
    return build_mixture(name)


GROWTHS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
    "mixtral": (
        {"layers": "-1", "factor": 1.5},
        {"layers": "-1", "factor": 2},
        {"layers": "-1", "factor": 3},
    ),
    "gpt_oss": (
        {"layers": "0,2", "factor": 2},
        {"layers": "1", "factor": 2},
        {"layers": "all", "factor": 2},
    ),
    "jamba": ({"experts": "routed", "factor": 1.5}, {"layers": "0", "factor": 3}, None),
    "qwen2_moe": (
        {"layers": "1", "factor": 1.5},
        {"layers": "2", "factor": 1.5},
        {"layers": "1,2", "factor": 1.5},
    ),
    "deepseek_v3": (
        {"layers": "1", "factor": 2},
        {"layers": "1", "factor": 1.5},
        {"layers": "1", "factor": 3},
    ),
    "t5": (
        {"scope": "encoder", "factor": 2},
        {"scope": "decoder", "factor": 2},
        {"scope": "all", "factor": 2},
    ),
    "vit_mae": (
        {"layers": "1", "factor": 1.5},
        {"layers": "1", "factor": 2},
        {"layers": "1", "factor": 3},
    ),
    "bark": ({"factor": 1.5}, {"factor": 2}, {"factor": 3}),
}
"""How each is grown, how again, and how at once, where there is a way."""


def loaded(folder: Path) -> Any:
    """By transformers, with the code beside the shards if there is any: every weight, no other."""
    kinds = {
        "vit_mae": "AutoModelForPreTraining",
        "t5": "AutoModelForSeq2SeqLM",
        "bark": "AutoModel",
    }
    auto = kinds.get(config_of(folder)["model_type"], "AutoModelForCausalLM")
    eager = {"experts_implementation": "eager"} if "experts" in str(config_of(folder)) else {}
    with quiet():
        made, info = getattr(transformers, auto).from_pretrained(
            folder,
            dtype=torch.float64,
            output_loading_info=True,
            trust_remote_code=(folder / CODE).is_file(),
            **eager,
        )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    return made.eval()


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in open_checkpoint(folder).items()}


@pytest.mark.parametrize("name", GROWTHS)
def test_growing_again_is_growing_at_once(name: str, tmp_path: Path) -> None:
    first, then, both = GROWTHS[name]
    base = open_checkpoint(model(name))
    write(grow(base, **first), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    assert (tmp_path / "once" / CODE).is_file()
    twice = grow(once, **then)
    assert certify(once, twice, find_growths(once, twice)).holds
    write(twice, tmp_path / "twice")
    for found in (twice, open_checkpoint(tmp_path / "twice")):  # the record tells the last growth
        assert certify(base, found, find_growths(base, found)).holds
    if both is not None:
        write(grow(base, **both), tmp_path / "both")
        assert shapes(tmp_path / "twice") == shapes(tmp_path / "both")
        for file in ("config.json", CODE):
            wanted, found = (tmp_path / where / file for where in ("both", "twice"))
            assert found.is_file() == wanted.is_file()
            assert not wanted.is_file() or found.read_bytes() == wanted.read_bytes()
    after = loaded(tmp_path / "twice")
    if name == "bark":  # it is run part by part
        return
    inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in make_inputs(base).values.items()
    }
    now, before = (_first(each, inputs) for each in (after, loaded(model(name))))
    assert apart(now, before) < SAME


def _first(made: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a masked autoencoder chooses what it sees
        result = made(**inputs)
    return result["logits"] if "logits" in result else result[0]


def test_the_order_does_not_matter_and_three_times_will_do(tmp_path: Path) -> None:
    configs = set()
    base = open_checkpoint(model("mixtral"))
    for order in (("0", "2", "1"), ("2", "1", "0")):
        now = base
        for layer in order:
            folder = tmp_path / f"{order[0]}-{layer}"
            write(grow(now, layers=layer, width=48 + 16 * int(layer)), folder)
            now = open_checkpoint(folder)
        configs.add((folder / "config.json").read_bytes())
        assert certify(base, now, find_growths(base, now)).holds
        verify(base, now, device="cpu").require()
    (config,) = configs
    assert json.loads(config)["mlp_width_keys"] == {
        "layers": [{"intermediate_size": width} for width in (48, 64, 80)]
    }


@pytest.mark.parametrize("name", ["mixtral", "t5", "vit_mae"])
def test_the_others_may_be_padded_so_that_any_loader_will_do(name: str, tmp_path: Path) -> None:
    """As where all is padded at once."""
    first, _, _ = GROWTHS[name]
    base = open_checkpoint(model(name))
    write(grow(base, **first), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    widest = max(mlp.width for mlp in once.anatomy.every_mlp)
    twice = grow(once, scope="all", width=2 * widest, uniform=True)
    assert twice.config == grow(base, scope="all", width=2 * widest, uniform=True).config
    assert not {"mlp_width_keys", "mlp_module_widths", "auto_map"} & twice.config.keys()
    assert CODE not in twice.companions
    write(twice, tmp_path / "twice")
    loaded(tmp_path / "twice")


def test_a_config_that_says_something_else_is_refused(tmp_path: Path) -> None:
    write(grow(open_checkpoint(model("mixtral")), layers="1", factor=2), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")

    def said(keys: object) -> str:
        with pytest.raises(UnsupportedError) as caught:
            grow(replace(once, config={**once.config, "mlp_width_keys": keys}))
        return str(caught.value)

    right = once.config["mlp_width_keys"]
    assert grow(replace(once, config={**once.config, "mlp_width_keys": right})).config
    for keys in (
        {"layers": [{}, {"intermediate_size": 96}, {}]},
        {"layers": [{}, {}, {}]},
        {"layers": [{"intermediate_size": 80}, {}, {}]},
    ):
        assert (
            f"{tmp_path / 'once'} was grown before so that its layers differ by mlp_width_keys in "
            f"config.json, and its tensors aren't those that this says: it can't be grown again"
        ) in said(keys)
    for strange in ({"layers": [{}]}, {"nowhere": []}, [], 3, {"layers": [{"x.y": 1}, {}, {}]}):
        assert "can't build a mixtral model" in said(strange)


def test_a_copy_that_is_wrong_is_found(tmp_path: Path) -> None:
    base = open_checkpoint(model("t5"))
    write(grow(base, scope="encoder", factor=2), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    twice = grow(once, layers="1", scope="all", factor=1.5)
    growths = find_growths(once, twice)
    assert certify(once, twice, growths).holds
    name = growths[0].mlp.down.weight
    other = grow(once, layers="1", scope="all", factor=1.5, choose="random")[name]
    wrong = replace(twice, tensors={**twice.tensors, name: other})
    assert not certify(once, wrong, growths).holds


BLOCKS = {
    "mixtral": ("2", "2", "2,3"),
    "gpt_oss": ("0", "0,2", "0,1"),
    "qwen2_moe": ("1", "1", "1,2"),
}
"""Which layers of a mixture are grown, behind which blocks copies are put, and where the grown
ones are then."""


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_added_to_them(name: str, tmp_path: Path) -> None:
    """Expanding what was grown has the config, and the shapes, of growing what was expanded."""
    layers, after, moved = BLOCKS[name]
    base = open_checkpoint(model(name))
    how: dict[str, Any] = {"factor": 1.5, "experts": "routed"}
    write(grow(base, layers=layers, **how), tmp_path / "grown")
    grown = open_checkpoint(tmp_path / "grown")
    assert "mlp_width_keys" in grown.config
    made = expand(grown, after=after)
    write(made, tmp_path / "made")
    write(grow(expand(base, after=after), layers=moved, **how), tmp_path / "other")
    for file in ("config.json", CODE):
        assert (tmp_path / "made" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert shapes(tmp_path / "made") == shapes(tmp_path / "other")
    verify(grown, open_checkpoint(tmp_path / "made"), device="cpu").require()
    inputs = make_inputs(base).values
    now, before = (_first(loaded(at), inputs) for at in (tmp_path / "made", model(name)))
    assert apart(now, before) < SAME


def test_blocks_of_two_models_are_put_together(tmp_path: Path) -> None:
    """One of which was grown; without its grown block no code is needed any more."""
    base = open_checkpoint(model("mixtral"))
    write(grow(base, layers="1", factor=2), tmp_path / "grown")
    grown = open_checkpoint(tmp_path / "grown")
    made = compose([(base, 0), (grown, 1), (base, 2), (grown, 1), (grown, 0)])
    keys = [{}, {"intermediate_size": 80}, {}, {"intermediate_size": 80}, {}]
    assert made.config["mlp_width_keys"] == {"layers": keys}
    assert made["model.layers.3.block_sparse_moe.experts.2.w1.weight"].shape == (80, 32)
    write(made, tmp_path / "made")
    loaded(tmp_path / "made")
    without = compose([(grown, 0), (grown, 2)])
    assert without.config == compose([(base, 0), (base, 2)]).config
    write(without, tmp_path / "without")
    assert not (tmp_path / "without" / CODE).exists()
    loaded(tmp_path / "without")
    same = compose([(grown, at) for at in range(3)])
    assert same.config == grown.config
