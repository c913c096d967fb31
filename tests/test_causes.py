"""Two models that don't belong together: the cause is said first, and what it explains isn't said
of every tensor again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_raw
from safetensors.torch import load_file

from surgery import MismatchError, expand, grow, lines, merge, open_checkpoint, write
from surgery.checkpoint import Checkpoint

Make = Callable[..., Path]
EXPANDED = (
    "give models of one shape; if one was expanded from the other, give its own base, or expand "
    "the other in the same way first"
)
GROWN = (
    "give models of one shape; if one was grown from the other, give its own base, or grow the "
    "other in the same way first"
)
PARTS = "give models that have the same parts, under the same names"
STRANGERS = "give models that were made from one base"


def problems(base: Checkpoint, other: Checkpoint) -> list[str]:
    """Of `lines`, which are those of a merge too, but for vocabularies; paths are their names."""
    with pytest.raises(MismatchError) as scaled:
        lines(base, other, alpha=0.5)
    with pytest.raises(MismatchError) as merged:
        merge([base, other], base=base, method="ties")
    found = [text for text in scaled.value.problems if "the vocabularies differ" not in text]
    assert found == [t for t in merged.value.problems if "the vocabularies differ" not in t]
    folder = f"{base.source.path.parent}/"
    return [text.replace(folder, "") for text in scaled.value.problems]


def test_more_blocks(make_model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(make_model(name="base"))
    write(expand(base, copies=2), tmp_path / "exp")
    exp = open_checkpoint(tmp_path / "exp")
    counts = f"exp has 4 blocks of model.layers, base has 2: {EXPANDED}"
    first = "model.layers.2.input_layernorm.weight first"
    lacking = f"18 tensors are in exp and not in base, {first}"
    assert problems(base, exp) == [counts, lacking]
    assert problems(exp, base) == [counts, lacking]


def test_wider_mlps(make_model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(make_model(name="base"))
    write(grow(base, factor=1.5), tmp_path / "grown")
    grown = open_checkpoint(tmp_path / "grown")
    shapes = "[16, 24] in base and [16, 36] in grown"
    assert problems(base, grown) == [
        f"grown has MLPs of 36, base of 24: {GROWN}",
        f"6 tensors differ in shape, model.layers.0.mlp.down_proj.weight first: {shapes}",
    ]


def test_some_wider_mlps_and_one_more_block(make_model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(make_model(name="base"))
    write(grow(base, factor=1.5, layers="1"), tmp_path / "grown")
    write(expand(open_checkpoint(tmp_path / "grown"), copies=1), tmp_path / "both")
    both = open_checkpoint(tmp_path / "both")
    found = problems(base, both)
    assert found[:2] == [
        f"both has 3 blocks of model.layers, base has 2: {EXPANDED}",
        f"both has MLPs of 36, base of 24 (1 of 2 MLPs): {GROWN}",
    ]
    assert len(found) == 4
    assert found[2].startswith("9 tensors are in both and not in base, ")
    assert found[3].startswith("3 tensors differ in shape, ")


def test_experts_of_another_width(make_model: Make) -> None:
    base = open_checkpoint(make_model("mixtral", "base", intermediate_size=24))
    other = open_checkpoint(make_model("mixtral", "other", intermediate_size=40))
    found = problems(base, other)
    assert found[0] == f"other has MLPs of 40, base of 24: {GROWN}"
    assert len(found) == 2


def test_what_has_another_reason_keeps_its_line(make_model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(make_model(name="base"))
    write(grow(base, factor=1.5), tmp_path / "grown")
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(17)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.1.extra"] = torch.zeros(2)
    found = problems(base, open_checkpoint(save_raw(tmp_path / "odd", tensors, config=base.config)))
    assert found[0] == f"odd has MLPs of 36, base of 24: {GROWN}"
    assert found[1:3] == [
        "model.layers.1.self_attn.q_proj.weight is in base and not in odd",
        "model.layers.1.extra is in odd and not in base",
    ]
    assert found[3].startswith("6 tensors differ in shape, ")
    assert found[4:] == ["model.norm.weight is [16] in base and [17] in odd"]


def test_another_hidden_size_and_vocabulary(make_model: Make) -> None:
    base = open_checkpoint(make_model(name="base"))
    other = open_checkpoint(
        make_model(name="other", hidden_size=32, vocab_size=80, num_hidden_layers=3)
    )
    found = problems(base, other)
    assert found[:3] == [
        f"other has a hidden size of 32, base of 16: {STRANGERS}",
        "other has a vocabulary of 80 rows, base of 64",
        "other has 3 blocks of model.layers, base has 2",
    ]
    assert found[3].startswith("9 tensors are in other and not in base, ")
    assert found[4].startswith("21 tensors differ in shape, ")
    assert len(found) == 5


def test_the_same_hidden_size_and_another_vocabulary(make_model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(make_model(name="base"))
    other = open_checkpoint(make_model(name="other", vocab_size=80))
    write(expand(other, copies=1), tmp_path / "exp")
    found = problems(base, open_checkpoint(tmp_path / "exp"))
    assert found[0] == f"exp has 3 blocks of model.layers, base has 2: {EXPANDED}"
    for text, name in zip(found[1:3], ("lm_head", "model.embed_tokens"), strict=True):
        assert text.startswith(f"{name}.weight is [64, 16] in base and [80, 16] in exp; the vocab")
    assert len(found) == 4


def test_another_architecture(make_model: Make) -> None:
    base = open_checkpoint(make_model(name="base"))
    other = open_checkpoint(make_model("gpt2", "other", vocab_size=80))
    found = problems(base, other)
    assert found[:4] == [
        "base (base) and other (tuned) are different architectures: model_type is llama and gpt2",
        "other has a vocabulary of 80 rows, base of 64",
        "base has 2 blocks of model.layers, other has none of that name",
        "other has 2 blocks of transformer.h, base has none of that name",
    ]
    assert len(found) == 7
    assert "has a head of its own, and other (tuned) ties it" in found[4]
    assert found[5].startswith("21 tensors are in base and not in other, ")
    assert found[6].startswith("28 tensors are in other and not in base, ")


def test_other_names(make_model: Make, tmp_path: Path) -> None:
    """A model that was saved without its head has no "model." in its names."""
    base = open_checkpoint(make_model(name="base"))
    tensors = {name.removeprefix("model."): base[name].whole() for name in base}
    found = problems(
        base, open_checkpoint(save_raw(tmp_path / "bare", tensors, config=base.config))
    )
    assert found[:2] == [
        f"base has 2 blocks of model.layers, bare has none of that name: {PARTS}",
        f"bare has 2 blocks of layers, base has none of that name: {PARTS}",
    ]
    assert found[2].startswith("18 tensors are in base and not in bare, ")
    assert found[5].startswith("18 tensors are in bare and not in base, ")
    assert len(found) == 8


def test_a_part_of_another_size(tmp_path: Path) -> None:
    """Parts that differ are named where the language model is of one size."""

    def model(name: str, size: int) -> Checkpoint:
        tensors = {"embed_tokens.weight": torch.zeros(50, 8)}
        for stack, width in (("model.layers", 8), ("vision.blocks", size)):
            for block in range(2):
                inner = f"{stack}.{block}"
                tensors[f"{inner}.norm.weight"] = torch.zeros(width)
                tensors[f"{inner}.mlp.up_proj.weight"] = torch.zeros(20, width)
                tensors[f"{inner}.mlp.down_proj.weight"] = torch.zeros(width, 20)
        return open_checkpoint(save_raw(tmp_path / name, tensors, config={"hidden_size": 8}))

    found = problems(model("base", 12), model("other", 16))
    shapes = "[12, 20] in base and [16, 20] in other"
    assert found == [
        f"other has a hidden size of 16, base of 12 (in vision.blocks): {STRANGERS}",
        f"6 tensors differ in shape, vision.blocks.0.mlp.down_proj.weight first: {shapes}",
    ]
