"""Gemma 3n keeps the largest of an MLP's values by their mean and deviation, in some layers: those
grow where each neuron is copied as often. Its AltUp routes, and not to experts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ROOT, SAME, apart, tokens
from surgery.commands.main import app
from typer.testing import CliRunner
from zoo.build import build
from zoo.kinds import kinds_of

from surgery import (
    Checkpoint,
    UnsupportedError,
    certify,
    find_growths,
    grow,
    open_checkpoint,
)
from surgery.anatomy import Role
from surgery.modeling.build import build_model

SPARSE, ALL = [0, 1], range(3)


@cache
def gemma3n() -> Path:
    """Three layers, of which the first two have a sparsity of 0.95."""
    folder = ROOT / "gemma3n-sparse"
    [kind] = kinds_of("gemma3n_text")
    assert build(kind, folder).runs
    assert json.loads((folder / "config.json").read_text())["activation_sparsity_pattern"] == [
        0.95,
        0.95,
        0.0,
    ]
    return folder


def logits(model: Checkpoint) -> torch.Tensor:
    built = build_model(model, torch.float64, "cpu")
    assert not built.missing
    with torch.no_grad():
        return built.model(input_ids=tokens()).logits.double()


def with_pattern(model: Checkpoint, pattern: Any) -> Checkpoint:
    return replace(model, config={**model.config, "activation_sparsity_pattern": pattern})


def test_which_layers_have_to_be_copied_evenly():
    base = open_checkpoint(gemma3n())
    mlps = base.anatomy.mlps
    assert {block for _, block in mlps} == set(ALL)
    assert base.anatomy.no_growth == {}
    assert [block for (_, block), mlp in mlps.items() if mlp.sparse] == SPARSE
    assert mlps["model.layers", 0].even_because == (
        "its activation goes by all its neurons (activation_sparsity_pattern has 0.95)"
    )
    for pattern, wanted in ((0.5, [*ALL]), (None, []), ([0.5], []), ([True, "", 0.1], [2])):
        changed = with_pattern(base, pattern).anatomy.mlps
        assert [block for (_, block), mlp in changed.items() if mlp.sparse] == wanted


@pytest.mark.parametrize(
    "options",
    [{"factor": 2}, {"factor": 3, "symmetry_break": 0.1}, {"factor": 1.5, "layers": "2"}],
    ids=str,
)
def test_even_copies_keep_the_function(options: dict[str, Any]):
    base = open_checkpoint(gemma3n())
    grown = grow(base, **options)
    assert certify(base, grown, find_growths(base, grown)).holds
    assert apart(logits(grown), logits(base)) < SAME


@pytest.mark.parametrize(
    "options", [{"factor": 1.5}, {"factor": 2, "layers": "2", "uniform": True}], ids=str
)
def test_uneven_copies_are_refused(options: dict[str, Any]):
    base = open_checkpoint(gemma3n())
    wide = int(72 * options["factor"])
    with pytest.raises(UnsupportedError) as caught:
        grow(base, **options)
    done = "padded with zero neurons to a width of" if "uniform" in options else "grown from 72 to"
    remedy = (
        "grow all layers by the same whole factor, or without uniform (--uniform)"
        if "uniform" in options
        else "a whole factor works, here a width of 144 or 216; or choose other layers (--layers)"
    )
    assert caught.value.problems == tuple(
        f"model.layers.{block} can't be {done} {wide}: its activation goes by all its neurons "
        f"(activation_sparsity_pattern has 0.95), whose mean stays what it is only if each is "
        f"copied as often: {remedy}"
        for block in SPARSE
    )


def test_uneven_copies_change_the_function_and_have_no_certificate():
    """Made as if no layer were sparse."""
    base = open_checkpoint(gemma3n())
    grown = grow(with_pattern(base, [0.0] * 3), factor=1.5)
    growths = find_growths(with_pattern(base, [0.0] * 3), grown)
    assert certify(with_pattern(base, [0.0] * 3), grown, growths).holds
    sparse = with_pattern(grown, base.config["activation_sparsity_pattern"])
    assert apart(logits(sparse), logits(base)) > 1000 * SAME
    found = certify(base, sparse, find_growths(base, sparse))
    assert [text[:14] for text in found.failures] == [f"model.layers.{block}" for block in SPARSE]


def test_the_table_says_it():
    said = CliRunner().invoke(app, ["inspect", str(gemma3n())], env={"COLUMNS": "100"}).stdout
    rows = [line.split() for line in said.splitlines() if line.strip().startswith("model.layers ")]
    assert [row[1] for row in rows] == ["0-1", "2"]
    assert [row[-3:] for row in rows] == [["by", "whole", "factors"], ["72", "gated", "yes"]]


def test_what_altup_routes_are_no_experts():
    """Unless the config has experts, as many as it routes to."""
    base = open_checkpoint(gemma3n())
    places = base.anatomy.places
    assert places["model.layers.0.altup.modality_router.weight"].role is Role.ROUTER
    mixture = replace(base, config={**base.config, "num_experts": 4})
    with pytest.raises(
        UnsupportedError, match=r"altup\.modality_router\.weight may choose between"
    ):
        grow(mixture)
