"""A user's corrections of the anatomy: they win over the inference, survive edits, and are checked
against the checkpoint, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_raw
from safetensors.torch import load_file
from typer.testing import CliRunner

from surgery import (
    Checkpoint,
    NotFoundError,
    RecipeError,
    UnsupportedError,
    certify,
    expand,
    find_growths,
    grow,
    lines,
    merge,
    open_checkpoint,
    write,
)
from surgery.anatomy import Corrections, Role
from surgery.anatomy.stored import as_data
from surgery.recipe import correct_anatomy, load_recipe
from surgery.recipe.chain import open_inputs

Make = Callable[..., Path]
HIDDEN, WIDTH, SMALL = 8, 24, 6


def odd_model(folder: Path, seed: int = 0) -> Path:
    """Two blocks whose MLP can't be told from an adapter beside it: no config gives a width."""
    torch.manual_seed(seed)
    tensors = {"embed.weight": torch.randn(40, HIDDEN), "rescale": torch.randn(HIDDEN)}
    for block in range(2):
        inside = {
            "mix.q_proj.weight": torch.randn(HIDDEN, HIDDEN),
            "left.weight": torch.randn(WIDTH, HIDDEN),
            "right.weight": torch.randn(WIDTH, HIDDEN),
            "back.weight": torch.randn(HIDDEN, WIDTH),
            "back.bias": torch.randn(HIDDEN),
            "side_a.weight": torch.randn(SMALL, HIDDEN),
            "side_b.weight": torch.randn(HIDDEN, SMALL),
        }
        tensors |= {f"net.{block}.{name}": value for name, value in inside.items()}
    return save_raw(folder, tensors)


def file(folder: Path, text: str) -> Path:
    path = folder / "anatomy.yaml"
    path.write_text(text)
    return path


RIGHT = """
roles:
  rescale: norm
  "*.side_*": unknown
mlps:
  - stack: net
    ups: [left.weight, right.weight]
    down: back.weight
"""


def test_what_cannot_be_told_is_said(tmp_path: Path):
    plain = open_checkpoint(odd_model(tmp_path / "m"))
    with pytest.raises(UnsupportedError, match="can't tell which of"):
        grow(plain)
    given = correct_anatomy(plain, file(tmp_path, RIGHT))
    mlp = given.anatomy.mlps["net", 1]
    assert [up.weight for up in mlp.ups] == ["net.1.left.weight", "net.1.right.weight"]
    assert (mlp.down.weight, mlp.down.bias) == ("net.1.back.weight", "net.1.back.bias")
    assert (mlp.width, mlp.hidden, mlp.gated) == (WIDTH, HIDDEN, True)
    assert given.anatomy.places["net.0.left.weight"].role is Role.MLP
    assert given.anatomy.places["rescale"].role is Role.NORM
    assert not given.anatomy.no_growth
    assert given.notes == (
        *plain.notes,
        f"{tmp_path / 'm'}: its anatomy was corrected by {tmp_path / 'anatomy.yaml'}",
    )
    # what isn't mentioned stays inferred
    assert given.anatomy.places["net.0.mix.q_proj.weight"].role is Role.ATTENTION
    assert given.anatomy.stacks == plain.anatomy.stacks == {"net": 2}


def test_it_survives_edits_and_keeps_the_function(tmp_path: Path):
    given = correct_anatomy(open_checkpoint(odd_model(tmp_path / "m")), file(tmp_path, RIGHT))
    grown = grow(given, factor=2, layers="all", uniform=True)
    assert grown.anatomy.mlps["net", 0].width == 2 * WIDTH
    assert certify(given, grown, find_growths(given, grown)).holds
    again = grow(grown, width=60, uniform=True)
    assert again.anatomy.mlps["net", 1].width == 60
    tensors = {name: tensor.whole() for name, tensor in again.items()}
    x = torch.randn(5, HIDDEN, dtype=torch.float64)

    def compute(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        left, right, back = (
            weights[f"net.0.{n}.weight"].double() for n in ("left", "right", "back")
        )
        return (torch.tanh(x @ left.T) * (x @ right.T)) @ back.T

    stored = load_file(tmp_path / "m/model.safetensors")
    assert torch.allclose(compute(tensors), compute(stored), rtol=1e-12)
    assert torch.equal(tensors["net.0.side_b.weight"], stored["net.0.side_b.weight"])


@pytest.mark.parametrize("layout", ["stacked", "in, out"])
def test_other_layouts(layout: str, tmp_path: Path):
    turned = layout == "in, out"
    tensors = {"embed.weight": torch.randn(40, HIDDEN)}
    for block in range(2):
        up, down = torch.randn(2 * WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH)
        tensors |= {
            f"net.{block}.{name}": value
            for name, value in {
                "one.weight": up.T.contiguous() if turned else up,
                "two.weight": down.T.contiguous() if turned else down,
                "three.weight": torch.randn(HIDDEN, 4),
            }.items()
        }
    text = (
        "mlps: [{stack: net, blocks: 0-1, ups: [one.weight], down: two.weight, parts: 2, "
        f"in_out: {str(turned).lower()}}}]"
    )
    given = open_checkpoint(save_raw(tmp_path / "m", tensors))
    mlp = correct_anatomy(given, file(tmp_path, text)).anatomy.mlps["net", 0]
    assert (mlp.width, mlp.ups[0].parts, mlp.down.in_out) == (WIDTH, 2, turned)


def test_a_stack_of_one_and_the_scale_of_lines(tmp_path: Path):
    """A list of one block isn't taken for a stack without a config; by its depth it's the last."""

    def model(folder: Path, shift: float) -> Checkpoint:
        names = ("cells.0.attn.q_proj.weight", "cells.0.ffn.up.weight", "embed.weight", "scale")
        tensors = {name: torch.full((4, 4), 1.0 + shift) for name in names}
        return open_checkpoint(save_raw(folder, tensors))

    base, tuned = model(tmp_path / "a", 0.0), model(tmp_path / "b", 1.0)
    path = file(tmp_path, "stacks: {cells: 1}\nroles: {scale: norm}\n")
    plain = lines(base, tuned, alpha=0.25, outside="depth")
    right = lines(
        correct_anatomy(base, path), correct_anatomy(tuned, path), alpha=0.25, outside="depth"
    )
    assert plain.anatomy.stacks == {}
    assert "no blocks were recognised, so that every tensor has the factor 0.25" in plain.notes[0]
    assert not any("no blocks" in note for note in right.notes)
    assert right.anatomy.stacks == {"cells": 1}
    assert right.anatomy.places["cells.0.attn.q_proj.weight"].role is Role.ATTENTION
    name = "cells.0.ffn.up.weight"
    assert plain[name].whole()[0, 0] == 1.25
    assert right[name].whole()[0, 0] == 2
    assert right["scale"].whole()[0, 0] == 2
    assert right["embed.weight"].whole()[0, 0] == 1.25
    assert merge([tuned, tuned], base=correct_anatomy(base, path), method="ties").corrections.stacks


def test_blocks_that_are_added_have_it_too(make_model: Make, tmp_path: Path):
    text = (
        "mlps: [{stack: model.layers, ups: [mlp.gate_proj.weight, mlp.up_proj.weight], "
        "down: mlp.down_proj.weight}]"
    )
    given = correct_anatomy(open_checkpoint(make_model()), file(tmp_path, text))
    assert len(expand(given, copies=1).anatomy.mlps) == 3


def test_what_is_said_of_some_blocks_moves_with_them(make_model: Make, tmp_path: Path):
    text = """
roles: {model.layers.1.self_attn.q_proj.weight: unknown}
mlps:
  - stack: model.layers
    blocks: 1
    ups: [mlp.up_proj.weight]
    down: mlp.down_proj.weight
"""
    given = correct_anatomy(open_checkpoint(make_model()), file(tmp_path, text))
    expanded = expand(given, after="0,1").anatomy
    gated = {block: mlp.gated for (_, block), mlp in expanded.mlps.items()}
    assert gated == {0: True, 1: True, 2: False, 3: False}
    roles = [expanded.places[f"model.layers.{n}.self_attn.q_proj.weight"].role for n in range(4)]
    assert roles == [Role.ATTENTION, Role.ATTENTION, Role.UNKNOWN, Role.UNKNOWN]


# What can't be meant


def problems(given: Checkpoint, folder: Path, text: str) -> list[str]:
    path = file(folder, text)
    with pytest.raises(RecipeError) as caught:
        correct_anatomy(given, path)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def test_everything_that_is_wrong_at_once(tmp_path: Path):
    given = open_checkpoint(odd_model(tmp_path / "m"))
    text = """
stacks: {net: 3, nott: 2, embed: many}
rolls: {}
roles:
  rescale: nrom
  net.0.left.wait: mlp
  "*.nowhere.*": norm
mlps:
  - {stack: net, ups: [left.weight, rihgt.weight], down: back.weight}
  - {stack: net, blocks: 0, ups: [side_a.weight], down: back.weight}
  - {stack: net, blocks: 1-5, ups: [left.weight], down: back.weight}
  - {stack: nett, ups: [left.weight], down: back.weight}
  - {stack: net, ups: [left.weight, right.weight], down: back.weight, parts: 2}
  - {stack: net, ups: [left.weight], donw: back.weight}
  - {stack: net, ups: [left.weight], down: back.bias, blocks: 1}
"""
    assert problems(given, tmp_path, text) == [
        "3: rolls: there is no key 'rolls': did you mean roles?",
        "2: stacks.net: 3 blocks are 0 to 2, and there are 0, 1",
        "2: stacks.nott: 2 blocks are 0 to 1, and there are none",
        "2: stacks.embed: 'many' is no number of blocks",
        "5: roles.rescale: there is no role 'nrom': did you mean norm?",
        (
            "6: roles.net.0.left.wait: there is no tensor 'net.0.left.wait': did you mean "
            "net.0.left.weight?"
        ),
        f"7: roles.*.nowhere.*: no tensor of {tmp_path / 'm'} has a name like that",
        "9: mlps[0]: there is no net.0.rihgt.weight",
        "9: mlps[0]: there is no net.1.rihgt.weight",
        (
            "10: mlps[1]: net.0.side_a.weight is [6, 8], and beside net.0.back.weight, which is "
            "[8, 24], it would be [24, 8]"
        ),
        "11: mlps[2].blocks: layers: 1-5 isn't among the 2 layers, which are 0 to 1",
        "12: mlps[3].stack: there is no stack 'nett': did you mean net?",
        "13: mlps[4].parts: 2 is for gate and up in one matrix, and ups has two",
        "14: mlps[5]: down is missing",
        "14: mlps[5].donw: there is no key 'donw': did you mean down?",
        "15: mlps[6]: net.1.back.bias is [8], and no matrix",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "isn't one YAML table with stacks, roles, mlps"),
        ("", "isn't one YAML table"),
        ("roles: [a]", "1: roles: this is a table"),
        ("mlps: {}", "1: mlps: this is a list of tables"),
        ("roles: {a: norm, a: head}", "a is given a second time"),
        ("roles: !!python/object:os.system {}", "isn't allowed"),
    ],
)
def test_files_of_another_kind(text: str, said: str, tmp_path: Path):
    found = problems(open_checkpoint(odd_model(tmp_path / "m")), tmp_path, text)
    assert said in "\n".join(found)
    with pytest.raises(NotFoundError):
        correct_anatomy(open_checkpoint(tmp_path / "m"), tmp_path / "nowhere.yaml")


# The commands


def surgery(*args: object) -> Any:
    from surgery.commands.main import app

    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_every_verb_takes_the_file(tmp_path: Path):
    base, tuned = odd_model(tmp_path / "base"), odd_model(tmp_path / "tuned", seed=1)
    path = file(tmp_path, RIGHT)
    report = json.loads(surgery("inspect", base, "--anatomy", path, "--json").stdout)
    assert report["blocks"][0]["mlp"]["width"] == WIDTH
    out = tmp_path / "out"
    with_it = ("--anatomy", path)
    runs = {
        "lines": ("lines", base, tuned, "--alpha", 0.5, "-o", out / "lines"),
        "merge": ("merge", base, tuned, "--method", "ties", "-o", out / "merge"),
        "diff": ("diff", base, tuned),
        "task-vector": ("task-vector", base, tuned, "-o", out / "vector"),
        "apply": ("apply", base, out / "vector", "-o", out / "applied"),
        "lora": ("lora", base, tuned, "--rank", 2, "-o", out / "lora"),
        "verify": ("verify", base, out / "grown", "--no-logits"),
        "grow": ("grow", base, "--uniform", "--no-logits", "-o", out / "grow"),
    }
    write(grow(correct_anatomy(open_checkpoint(base), path), uniform=True), out / "grown")
    (out / "grown/surgery.json").unlink()
    for verb, args in runs.items():
        result = surgery(*args, *with_it)
        assert result.exit_code == 0, (verb, result.output)
        if verb == "verify":
            assert "certificate" in result.stdout
    assert load_file(out / "grow/model.safetensors")["net.0.left.weight"].shape == (48, 8)
    record = json.loads((out / "grow/surgery.json").read_text())
    assert f"its anatomy was corrected by {path}" in record["notes"][0]
    wrong = surgery("expand", base, "--copies", 1, "-o", out / "x", "--anatomy", tmp_path / "no")
    assert wrong.exit_code == 3


def test_what_was_said_goes_with_the_result(tmp_path: Path):
    """It lies in the record, and is taken from there when the result is opened."""
    base = odd_model(tmp_path / "base")
    given = correct_anatomy(open_checkpoint(base), file(tmp_path, RIGHT))
    write(grow(given, factor=2, uniform=True), tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert again.corrections == given.corrections
    assert again.anatomy.mlps["net", 1].width == 2 * WIDTH
    assert again.notes == (
        f"{tmp_path / 'out'}: its anatomy is corrected as surgery.json beside it says",
    )
    assert grow(again, factor=2).anatomy.mlps["net", 1].width == 4 * WIDTH
    assert "anatomy" not in json.loads(written_plainly(base, tmp_path / "plain"))
    # what is given now comes first
    other = file(tmp_path, "stacks: {net: 2}")
    assert correct_anatomy(again, other).corrections.roles == ()
    assert correct_anatomy(again, other).notes == (
        f"{tmp_path / 'out'}: its anatomy was corrected by {other}",
    )


def written_plainly(model: Path, target: Path) -> str:
    """The record of a model that nobody corrected."""
    write(merge([open_checkpoint(model)], method="passthrough"), target)
    return (target / "surgery.json").read_text()


STORED: dict[str, Any] = {
    "stacks": ["net"],
    "roles": [["*.side.*", "unknown"]],
    "mlps": [
        {
            "stack": "net",
            "ups": ["left.weight"],
            "down": "back.weight",
            "parts": 1,
            "in_out": False,
            "interleaved": False,
            "blocks": [0],
        }
    ],
}


def test_what_is_stored_is_read(tmp_path: Path):
    model = odd_model(tmp_path / "m")
    (model / "surgery.json").write_text(json.dumps({"anatomy": STORED}))
    given = open_checkpoint(model)
    assert as_data(given.corrections) == STORED
    assert given.anatomy.mlps["net", 0].width == WIDTH


MLP_ENTRY = STORED["mlps"][0]


@pytest.mark.parametrize(
    "spoilt",
    [
        *(["stacks"], {}, None, "all"),
        {**STORED, "more": 1},
        {**STORED, "stacks": [1]},
        {**STORED, "stacks": ["x" * 501]},
        {**STORED, "stacks": ["x"] * 20_001},
        {**STORED, "roles": [["a", "nothing"]]},
        {**STORED, "roles": [["a", "norm", "b"]]},
        {**STORED, "roles": {"a": "norm"}},
        {**STORED, "mlps": [{**MLP_ENTRY, "parts": True}]},
        {**STORED, "mlps": [{**MLP_ENTRY, "parts": 3}]},
        {**STORED, "mlps": [{**MLP_ENTRY, "ups": []}]},
        {**STORED, "mlps": [{**MLP_ENTRY, "ups": ["a", "b"], "parts": 2}]},
        {**STORED, "mlps": [{**MLP_ENTRY, "in_out": 1}]},
        {**STORED, "mlps": [{**MLP_ENTRY, "interleaved": True}]},
        {**STORED, "mlps": [{**MLP_ENTRY, "blocks": [-1]}]},
        {**STORED, "mlps": [{**MLP_ENTRY, "down": None}]},
        {**STORED, "mlps": [{"stack": "net"}]},
    ],
)
def test_what_strangers_store_is_not_believed(spoilt: Any, tmp_path: Path):
    model = odd_model(tmp_path / "m")
    (model / "surgery.json").write_text(json.dumps({"anatomy": spoilt}))
    given = open_checkpoint(model)
    assert given.corrections == Corrections()
    assert "surgery.json: what it says of the anatomy can't be meant, and isn't" in given.notes[0]


def test_stored_corrections_that_fit_nothing_do_nothing(tmp_path: Path):
    model = odd_model(tmp_path / "m")
    plain = open_checkpoint(model).anatomy
    wrong = {**MLP_ENTRY, "down": "mix.q_proj.weight"}
    stored = {"stacks": ["nett"], "roles": [["*.nowhere.*", "norm"]], "mlps": [wrong]}
    (model / "surgery.json").write_text(json.dumps({"anatomy": stored}))
    assert open_checkpoint(model).anatomy == plain
    for broken in ("{", "[]", "{}", '{"edits": 1}'):
        (model / "surgery.json").write_text(broken)
        assert open_checkpoint(model).notes == ()


# Recipes


def recipe(tmp_path: Path, anatomy: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"inputs: {{base: {tmp_path / 'base'}, tuned: {tmp_path / 'tuned'}}}\n{anatomy}\n"
        "steps:\n"
        "  merged: {merge: {models: [tuned], base: base, method: task_arithmetic, weight: 0.5}}\n"
        "  wide: {grow: {model: merged, uniform: true}}\n"
    )
    return path


INLINE = "{mlps: [{stack: net, ups: [left.weight, right.weight], down: back.weight}]}"


@pytest.mark.parametrize("way", ["a file", "here", "by input", "an option"])
def test_recipes_have_it_for_all_steps(way: str, tmp_path: Path):
    for seed, name in enumerate(("base", "tuned")):
        odd_model(tmp_path / name, seed)
    written = file(tmp_path, RIGHT)
    given = {
        "a file": f"anatomy: {written}",
        "here": f"anatomy: {INLINE}",
        "by input": f"anatomy: {{base: {written}, tuned: {INLINE}}}",
        "an option": "",
    }[way]
    option = ("--anatomy", written) if way == "an option" else ()
    out = tmp_path / "out"
    result = surgery("run", recipe(tmp_path, given), "-o", out, "--no-logits", *option)
    assert result.exit_code == 0, result.output
    assert load_file(out / "model.safetensors")["net.1.left.weight"].shape == (2 * WIDTH, HIDDEN)
    assert open_checkpoint(out).corrections.mlps
    assert surgery("run", recipe(tmp_path, ""), "-o", tmp_path / "x").exit_code != 0


def test_what_a_recipe_says_wrongly(tmp_path: Path):
    for seed, name in enumerate(("base", "tuned")):
        odd_model(tmp_path / name, seed)

    def said(anatomy: str) -> str:
        with pytest.raises(RecipeError) as caught:
            open_inputs(load_recipe(recipe(tmp_path, f"anatomy: {anatomy}")))
        return str(caught.value)

    path = tmp_path / "recipe.yaml"
    assert f"{path}:2: anatomy.basee: there is no input 'basee': did you mean base?" in said(
        "{basee: {}}"
    )
    assert f"{path}:2: anatomy: this is a file, or a table" in said("3")
    assert f"{path}:2: anatomy.tuned: this is a file, or a table with stacks" in said("{tuned: []}")
    assert f"{path}:2: anatomy.base.roles.wte: there is no tensor" in said(
        "{base: {roles: {wte: head}}}"
    )
    assert f"{path}:2: anatomy.mlps[0]: there is no net.0.nothing" in said(
        "{mlps: [{stack: net, ups: [nothing], down: back.weight}]}"
    )


def test_inspect_prints_what_to_start_from(make_model: Make, tmp_path: Path):
    model = make_model()
    printed = surgery("inspect", model, "--as-anatomy")
    assert printed.exit_code == 0
    path = file(tmp_path, printed.stdout)
    assert surgery("inspect", model, "--anatomy", path).exit_code == 0
    write(correct_anatomy(open_checkpoint(model), path), tmp_path / "same")
    assert "model.layers.*.mlp.down_proj.weight: mlp" in printed.stdout
