"""What spares time where there are 100,000 tensors gives what the long way would: one anatomy for
checkpoints that agree, one look at experts that are alike, a search for the holes of a tensor."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from conftest import save_raw
from families import build, build_tuned, config_of, load, variant
from hypothesis import given
from hypothesis import strategies as st

from surgery import Checkpoint, grow, lines, merge, open_checkpoint
from surgery.anatomy import MLPCorrection, infer
from surgery.anatomy.corrections import Corrections
from surgery.anatomy.experts import find_experts
from surgery.anatomy.mixtures import find_mixtures
from surgery.anatomy.places import find_places
from surgery.dtypes import DTYPES
from surgery.files import InputFile
from surgery.integrity.holes import _in_one, holes_in
from surgery.pages import PAGE, Zeros
from surgery.tensor import FileSpan, LazyTensor

BF16 = DTYPES["BF16"]


def inferred(model: Checkpoint) -> object:
    return infer(model.tensors, model.config, model.corrections)


def test_what_has_the_headers_of_its_input_has_its_anatomy() -> None:
    base, tuned = open_checkpoint(build("llama")), open_checkpoint(build_tuned("llama"))
    for made in (lines(base, tuned, alpha=0.4), merge([tuned], base=base, method="ties")):
        assert made.anatomy is base.anatomy is tuned.anatomy
        assert made.anatomy == inferred(made)


def test_what_became_wider_has_an_anatomy_of_its_own() -> None:
    base = open_checkpoint(build("llama"))
    grown = grow(base, factor=2)
    assert grown.anatomy is not base.anatomy
    assert grown.anatomy == inferred(grown) != base.anatomy


@pytest.mark.parametrize("what", ["config", "order", "corrections", "true for 1"])
def test_an_anatomy_isn_t_shared_where_it_may_be_another(what: str, tmp_path: Path) -> None:
    config, tensors = config_of(build("llama")), load(build("llama"))
    base = open_checkpoint(save_raw(tmp_path / "base", tensors, config=config | {"extra": 1}))
    changed = {"config": {"vocab_size": 5}, "true for 1": {"extra": True}}.get(what, {})
    other = open_checkpoint(
        save_raw(tmp_path / "other", tensors, config=config | {"extra": 1} | changed)
    )
    if what == "order":
        object.__setattr__(other, "tensors", dict(reversed(other.tensors.items())))
    if what == "corrections":
        said = MLPCorrection("model.layers", ("mlp.up_proj.weight",), "mlp.down_proj.weight")
        object.__setattr__(other, "corrections", Corrections(mlps=(said,)))
    made = lines(base, other, alpha=0.4)
    assert other.anatomy is not base.anatomy
    assert made.anatomy == other.anatomy == inferred(other)


def test_where_a_checkpoint_came_from_makes_no_difference(tmp_path: Path) -> None:
    model = open_checkpoint(build("llama"))
    origin = {"_name_or_path": "elsewhere", "transformers_version": "4.0.0"}
    other = open_checkpoint(variant(tmp_path / "model", build("llama"), **origin))
    lines(model, other, alpha=0.4)
    assert other.anatomy is model.anatomy


WIDTHS = st.lists(st.sampled_from([24, 40]), min_size=2, max_size=13)


@given(WIDTHS, st.booleans(), st.booleans())
def test_mixtures_of_all_blocks_are_found_together_as_alone(
    widths: list[int], gated: bool, odd: bool
) -> None:
    """A block has three experts of one of two widths; with `odd` one lacks its last expert."""
    every: dict[str, LazyTensor] = {}
    for block, width in enumerate(widths):
        for number in range(2 if odd and block == 1 else 3):
            module = f"model.layers.{block}.mlp.experts.{number}"
            every[f"{module}.down_proj.weight"] = LazyTensor((16, width), BF16)
            for up in ("up_proj", "gate_proj")[: 1 + gated]:
                every[f"{module}.{up}.weight"] = LazyTensor((width, 16), BF16)
    places, stacks = find_places(every, None)
    assert stacks == {"model.layers": len(widths)}
    blocks: dict[tuple[str, int], dict[str, LazyTensor]] = defaultdict(dict)
    for name, place in places.items():
        assert place.stack is not None
        assert place.block is not None
        blocks[place.stack, place.block][name] = every[name]
    hidden: dict[tuple[str, int], int | None] = dict.fromkeys(blocks, 16)
    given = places, hidden, {}, {}, {"model.layers": {False}}, {}
    together = find_mixtures(blocks, *given)
    alone = [find_mixtures({key: block}, *given) for key, block in blocks.items()]
    assert together == {key: experts for one in alone for key, experts in one.items()}
    assert {m.block for found in together.values() for m in found.mlps} == set(range(len(widths)))


@given(WIDTHS, st.sampled_from(["experts", "gate_w1.experts"]), st.booleans(), st.booleans())
def test_experts_are_found_together_as_alone(
    widths: list[int], path: str, gated: bool, odd: bool
) -> None:
    """One of two widths each; with `odd` one has a bias that no other has."""
    alone: dict[str, dict[str, LazyTensor]] = {}
    for number, width in enumerate(widths):
        module = f"model.layers.3.mlp.{path}.{number}"
        shapes: dict[str, tuple[int, ...]] = {f"{module}.down_proj.weight": (16, width)}
        for up in ("up_proj", "gate_proj")[: 1 + gated]:
            shapes[f"{module}.{up}.weight"] = (width, 16)
        if odd and number == 1:
            shapes[f"{module}.up_proj.bias"] = (width,)
        alone[module] = {name: LazyTensor(shape, BF16) for name, shape in shapes.items()}
    every = {name: tensor for group in alone.values() for name, tensor in group.items()}
    found = find_experts("model.layers", 3, every, 16, {})
    one_by_one = [find_experts("model.layers", 3, group, 16, {}) for group in alone.values()]
    assert found.mlps == [mlp for one in one_by_one for mlp in one.mlps]
    assert len(found.mlps) == len(widths)
    assert found.tensors == every.keys()
    assert [mlp.width for mlp in found.mlps] == widths


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=6), st.data())
def test_the_holes_of_a_tensor_are_those_that_it_overlaps(
    steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    holes, at = [], 0
    for gap, length in steps:
        holes.append(((at + gap) * PAGE, (at + gap + length) * PAGE))
        at += gap + length
    size = (at + 3) * PAGE
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - start)) // 2 * 2
    with NamedTemporaryFile() as file:  # all zeros
        os.truncate(file.name, size)
        span = FileSpan(InputFile(Path(file.name)), start, length)
        tensor = LazyTensor((length // 2,), BF16, leaf=span)
        found = [run for run, _ in holes_in(tensor, span, holes)]
        kinds = {
            kind for run, kind in holes_in(tensor, span, holes) if run == (start, start + length)
        }
    parts = [(max(a, start), min(b, start + length)) for a, b in holes]
    assert found == [part for part in parts if part[0] < part[1]]
    assert kinds <= {Zeros.WHOLE}
    assert _in_one(span, holes) == (found == [(start, start + length)])
