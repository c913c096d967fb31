"""Widths that no key of a config says: a modeling file beside the shards does, for all layers alike
too; and a key that sets more than the MLPs is left alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROOT, SAME, apart, config_of, quiet, spread, tokens

from surgery import UnsupportedError, grow, open_checkpoint, verify, write

SMALL = {"vocab_size": 97, "n_positions": 64}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_layers": 3, "n_heads": 4}),
    "gpt1": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4}),
    "xlm": ("XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 32, "n_layers": 3, "n_heads": 4}),
}


@cache
def model(name: str) -> Path:
    class_name, config, options = MODELS[name]
    folder = ROOT / f"fixed-{name}"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, class_name)(
            getattr(transformers, config)(**SMALL | options, bos_token_id=1, eos_token_id=2)
        )
        spread(made)
        made.save_pretrained(folder)
    return folder


def outputs(name: str, folder: Path, *, trust: bool) -> torch.Tensor:
    auto = transformers.AutoModelForCausalLM
    if name == "xlm":
        auto = transformers.AutoModelForMaskedLM
    with quiet():
        made, info = auto.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True, trust_remote_code=trust
        )
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    with torch.no_grad():
        return made.eval()(input_ids=tokens()).logits.double()


@pytest.mark.parametrize("factor", [2, 1.5])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_width_that_is_in_the_code_grows(name: str, factor: float, tmp_path: Path):
    base = open_checkpoint(model(name))
    write(grow(base, factor=factor), tmp_path / "grown")
    config = config_of(tmp_path / "grown")
    assert config.pop("mlp_widths") == [int(128 * factor)] * 3
    del config["auto_map"]
    assert config == config_of(model(name))
    assert verify(base, open_checkpoint(tmp_path / "grown"), device="cpu").passed
    off = apart(
        outputs(name, tmp_path / "grown", trust=True), outputs(name, model(name), trust=False)
    )
    assert off < SAME


def test_it_grows_again_and_only_in_some_layers(tmp_path: Path):
    write(grow(open_checkpoint(model("bloom"))), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    write(grow(once), tmp_path / "twice")
    assert config_of(tmp_path / "twice")["mlp_widths"] == [512] * 3
    write(grow(once, layers="1"), tmp_path / "some")
    assert config_of(tmp_path / "some")["mlp_widths"] == [256, 512, 256]
    for folder in ("twice", "some"):
        found = outputs("bloom", tmp_path / folder, trust=True)
        assert apart(found, outputs("bloom", model("bloom"), trust=False)) < SAME


def test_what_any_loader_is_to_read_can_t_have_such_a_file():
    with pytest.raises(UnsupportedError, match="no keys of config"):
        grow(open_checkpoint(model("bloom")), uniform=True)
