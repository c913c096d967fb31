"""Models of several parts, of layers of several kinds, and files without a config: what is told
apart by names and shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build, config_of, load, made, variant

from surgery import Checkpoint, lines, open_checkpoint
from surgery.anatomy import Role


def opened(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None
) -> Checkpoint:
    return open_checkpoint(made(folder, tensors, config))


def vit_block(prefix: str, hidden: int, width: int) -> dict[str, torch.Tensor]:
    """A block of an encoder, with biases."""
    shapes = {
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.fc1": (width, hidden),
        "mlp.fc2": (hidden, width),
    }
    tensors = {f"{prefix}.{norm}.weight": torch.ones(hidden) for norm in ("norm1", "norm2")}
    for name, (rows, columns) in shapes.items():
        tensors[f"{prefix}.{name}.weight"] = torch.randn(rows, columns)
        tensors[f"{prefix}.{name}.bias"] = torch.randn(rows)
    return tensors


def test_a_tower_has_a_hidden_size_of_its_own(tmp_path: Path) -> None:
    """Its MLP is as wide as the language model's hidden size, which doesn't mislead."""
    tensors = load(build("llama"))
    for block in range(4):
        tensors |= vit_block(f"visual.blocks.{block}", hidden=24, width=32)
    tensors["visual.merger.mlp.0.weight"] = torch.randn(32, 24)
    anatomy = open_checkpoint(variant(tmp_path / "model", build("llama"), tensors)).anatomy
    assert anatomy.stacks == {"model.layers": 3, "visual.blocks": 4}
    found = {(mlp.stack, mlp.hidden, mlp.width) for mlp in anatomy.mlps.values()}
    assert found == {("model.layers", 32, 88), ("visual.blocks", 24, 32)}


def test_files_without_a_config_have_the_same_blocks(tmp_path: Path) -> None:
    tensors = load(build("llama"))
    with_config = open_checkpoint(build("llama")).anatomy
    bare = opened(tmp_path / "bare", tensors).anatomy
    assert bare.stacks == with_config.stacks
    assert bare.places == with_config.places
    assert bare.mlps == with_config.mlps


def test_a_tower_alone_needs_neither_config_nor_embedding(tmp_path: Path) -> None:
    tensors = {}
    for block in range(3):
        tensors |= vit_block(f"blocks.{block}", hidden=24, width=40)
    anatomy = opened(tmp_path / "bare", tensors).anatomy
    assert anatomy.stacks == {"blocks": 3}
    assert anatomy.embedding is None
    assert {(mlp.hidden, mlp.width) for mlp in anatomy.mlps.values()} == {(24, 40)}
    assert anatomy.no_growth == {}


def test_the_outermost_list_makes_the_blocks(tmp_path: Path) -> None:
    """A list in a block isn't a stack, and one in a list of one is."""
    tensors = {}
    for stage in range(2):
        for block in range(3):
            tensors |= vit_block(f"stages.{stage}.blocks.{block}", hidden=24, width=40)
    for block in range(3):
        tensors |= vit_block(f"towers.0.blocks.{block}", hidden=24, width=40)
    anatomy = opened(tmp_path / "model", tensors).anatomy
    assert anatomy.stacks == {"stages": 2, "towers.0.blocks": 3}
    place = anatomy.places["stages.1.blocks.2.mlp.fc1.weight"]
    assert (place.stack, place.block, place.inner) == ("stages", 1, "blocks.2.mlp.fc1.weight")
    place = anatomy.places["towers.0.blocks.2.mlp.fc1.weight"]
    assert (place.stack, place.block, place.inner) == ("towers.0.blocks", 2, "mlp.fc1.weight")


def test_recurrent_layers_are_told_from_attention_and_have_no_mlp(tmp_path: Path) -> None:
    tensors = {"embed.weight": torch.randn(50, 16)}
    for block in range(3):
        at = f"layers.{block}"
        tensors[f"{at}.norm.weight"] = torch.ones(16)
        if block == 1:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                tensors[f"{at}.self_attn.{name}.weight"] = torch.randn(16, 16)
            tensors[f"{at}.self_attn.conv1d.weight"] = torch.randn(16, 1, 4)
            tensors[f"{at}.mlp.up_proj.weight"] = torch.randn(40, 16)
            tensors[f"{at}.mlp.down_proj.weight"] = torch.randn(16, 40)
            continue
        mixer = "mixer" if block == 0 else "linear_attn"
        tensors[f"{at}.{mixer}.in_proj.weight"] = torch.randn(40, 16)
        tensors[f"{at}.{mixer}.out_proj.weight"] = torch.randn(16, 40)
        tensors[f"{at}.{mixer}.A_log"] = torch.randn(40)
        tensors[f"{at}.{mixer}.norm.weight"] = torch.ones(40)
    anatomy = opened(tmp_path / "model", tensors, {"hidden_size": 16}).anatomy
    roles = {
        name: anatomy.places[name].role
        for name in (
            "layers.0.mixer.in_proj.weight",
            "layers.0.mixer.A_log",
            "layers.2.linear_attn.out_proj.weight",
            "layers.1.self_attn.conv1d.weight",
            "layers.1.self_attn.q_proj.weight",
            "layers.0.mixer.norm.weight",
        )
    }
    assert list(roles.values()) == [Role.MIXER] * 3 + [Role.ATTENTION] * 2 + [Role.NORM]
    assert anatomy.unrecognised == []
    assert list(anatomy.mlps) == [("layers", 1)]
    assert anatomy.no_growth == {}


def test_an_embedding_that_is_called_otherwise_has_a_row_for_every_token(tmp_path: Path) -> None:
    renamed = {
        name.replace("embed_tokens", "w"): value
        for name, value in load(build("llama_tied")).items()
    }
    config = config_of(build("llama_tied"))
    anatomy = opened(tmp_path / "model", renamed, config).anatomy
    assert anatomy.embedding == "model.w.weight"
    assert anatomy.places["model.w.weight"].role is Role.EMBEDDING


@pytest.mark.parametrize("name", ["input_min", "input_max", "output_min", "output_max"])
def test_limits_of_activations_are_buffers(name: str, tmp_path: Path) -> None:
    """Those that were never calibrated are infinite, and nothing is computed of them."""
    key = f"model.layers.1.mlp.up_proj.{name}"
    tensors = load(build("llama")) | {key: torch.tensor(float("inf"))}
    base = open_checkpoint(variant(tmp_path / "model", build("llama"), tensors))
    assert base.anatomy.places[key].role is Role.BUFFER
    assert lines(base, base, alpha=0.5)[key].whole().item() == float("inf")
