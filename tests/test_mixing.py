"""What mixes tokens in each block: told apart for hybrids of every kind, with a config and
without."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_raw
from surgery.commands.main import app
from typer.testing import CliRunner
from zoo.build import build
from zoo.kinds import kinds_of

from surgery import open_checkpoint
from surgery.anatomy.mixing import find_mixing

HYBRIDS: dict[str, tuple[str, dict[int, str]]] = {
    "jamba": ("model.layers", {0: "mamba", 1: "attention", 2: "mamba"}),
    "bamba": ("model.layers", {0: "mamba", 1: "attention", 2: "mamba"}),
    "falcon_h1": ("model.layers", dict.fromkeys(range(3), "attention + mamba")),
    "granitemoehybrid": ("model.layers", dict.fromkeys(range(3), "mamba")),
    "lfm2_moe": ("model.layers", {0: "convolution", 1: "attention", 2: "convolution"}),
    "qwen3_next": ("model.layers", {0: "linear attention", 1: "linear attention", 2: "attention"}),
    "olmo_hybrid": ("model.layers", {0: "linear attention", 1: "linear attention", 2: "attention"}),
    "nemotron_h": ("backbone.layers", {0: "mamba", 1: "", 2: "attention", 3: ""}),
    "recurrent_gemma": ("model.layers", {0: "recurrence", 1: "recurrence", 2: "attention"}),
    "zamba": ("model.layers", {0: "mamba", 2: "attention + mamba", 7: "mamba"}),
    "minimax": ("model.layers", {0: "attention", 1: "linear attention", 2: "attention"}),
    "mamba2": ("backbone.layers", dict.fromkeys(range(3), "mamba")),
    "rwkv": ("rwkv.blocks", dict.fromkeys(range(3), "recurrence")),
    "xlstm": ("backbone.blocks", dict.fromkeys(range(3), "recurrence")),
}
"""The stack, and what mixes tokens in some of its blocks, as the tiny model of the zoo has it."""


@pytest.mark.parametrize("model_type", HYBRIDS)
@pytest.mark.parametrize("with_config", [True, False])
def test_hybrids(model_type: str, with_config: bool, tmp_path: Path):
    causal = next(kind for kind in kinds_of(model_type) if kind.kind == "causal")
    model = open_checkpoint(build(causal, tmp_path / "m").folder)
    config = model.config if with_config else {}
    found = find_mixing(model.tensors, model.anatomy.places, config)
    stack, blocks = HYBRIDS[model_type]
    assert {block: " + ".join(found[stack, block]) for block in blocks} == blocks


def test_a_router_by_another_name(tmp_path: Path):
    """Nemotron-H's is called mixer.gate; a row for each expert tells it."""
    causal = next(kind for kind in kinds_of("nemotron_h") if kind.kind == "causal")
    model = open_checkpoint(build(causal, tmp_path / "m").folder)
    assert model.anatomy.places["backbone.layers.1.mixer.gate.weight"].role.value == "router"
    assert not model.anatomy.unrecognised


def raw(tmp_path: Path, blocks: Mapping[int, Mapping[str, tuple[int, ...]]], **how: Any) -> Path:
    tensors = {
        f"layers.{block}.{name}": torch.randn(shape)
        for block, inner in blocks.items()
        for name, shape in {**inner, "norm.weight": (16,)}.items()
    }
    return save_raw(tmp_path / "raw", {"embed.weight": torch.randn(50, 16), **tensors}, **how)


ATTENTION = {f"attn.{letter}_proj.weight": (16, 16) for letter in "qkvo"}
MLP = {"ffn.up_proj.weight": (40, 16), "ffn.down_proj.weight": (16, 40)}


def mixing_of(path: Path) -> list[str]:
    blocks = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout)["blocks"]
    return [" + ".join(block["mixing"]) for block in blocks]


def test_a_config_tells_which_attention_is_linear(tmp_path: Path):
    blocks = {block: {**ATTENTION, **MLP} for block in range(2)}
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    assert mixing_of(raw(tmp_path, blocks, config=kinds)) == ["linear attention", "attention"]


def test_cross_attention_and_convolutions(tmp_path: Path):
    cross = {name.replace("attn", "encoder_attn"): shape for name, shape in ATTENTION.items()}
    blocks: dict[int, dict[str, tuple[int, ...]]] = {
        0: {**ATTENTION, **cross, **MLP},
        1: {"dwconv.weight": (16, 1, 7, 7), **MLP},
        2: MLP,
    }
    assert mixing_of(raw(tmp_path, blocks)) == ["attention + cross-attention", "convolution", ""]


def test_the_table(tmp_path: Path):
    path = raw(tmp_path, {0: {**ATTENTION, **MLP}, 1: ATTENTION, 2: MLP})
    said = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "80"}).stdout
    rows = [line.split() for line in said.splitlines() if line.strip().startswith("layers")]
    assert [row[1] for row in rows] == ["0", "1", "2"]
    assert [row[3:] for row in rows] == [
        ["attention", "40", "plain", "yes"],
        ["attention", "no", "MLP"],
        ["none", "40", "plain", "yes"],
    ]


def test_gates_of_a_channel_mix_are_no_experts(make_model: Callable[..., Path]):
    """RWKV's vectors are (1, 1, hidden)."""
    model = open_checkpoint(make_model("rwkv", attention_hidden_size=16, intermediate_size=24))
    assert not model.anatomy.experts
    assert not model.anatomy.no_growth
    assert {mlp.width for mlp in model.anatomy.mlps.values()} == {24}


def test_reasons_stand_below_the_table(tmp_path: Path):
    odd = {**ATTENTION, "ffn.a.weight": (40, 16), "ffn.b.weight": (16, 40), "ffn.c.weight": (16, 8)}
    path = raw(tmp_path, {0: odd, 1: odd, 2: {**ATTENTION, **MLP}})
    said = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "80"}).stdout
    table, _, below = said.partition("Can't be grown\n")
    rows = [line.split() for line in table.splitlines() if line.strip().startswith("layers")]
    assert [row[1] for row in rows] == ["0-1", "2"]
    assert rows[0][-3:] == ["not", "recognised", "no"]
    assert "layers 0-1: can't tell which of ffn.a.weight, " in " ".join(below.split())
