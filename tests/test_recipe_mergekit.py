"""mergekit's configurations as recipes: what becomes of them, and what isn't supported is told by
name and line. The numbers are in test_recipe_against_mergekit.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery import MismatchError, NotFoundError, RecipeError
from surgery.recipe import Recipe, load_recipe
from surgery.recipe.chain import Work, build, open_inputs

Make = Callable[..., Path]


def load(folder: Path, text: str) -> Recipe:
    path = folder / "m.yml"
    path.write_text(text)
    return load_recipe(path)


def steps(recipe: Recipe) -> dict[str, Any]:
    return {step.name: step.arguments for step in recipe.steps}


def mistakes(folder: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load(folder, text)
    return [problem.replace(f"{folder}/", "") for problem in error.value.problems]


def test_whole_models(tmp_path: Path) -> None:
    recipe = load(tmp_path, """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: {model: {path: org/a, revision: v2}}
    parameters: {weight: 1}
  - {model: ./b, parameters: {weight: [0, 1], density: 0.5, lambda: 2}}
parameters: {normalize: true, int8_mask: true, t: 0.5}
dtype: bfloat16
out_dtype: float16
tokenizer_source: null
""")  # fmt: skip
    assert recipe.inputs == {n: n for n in ("org/base", "org/a@v2", "./b")}
    assert recipe.output == "merged"
    merge = steps(recipe)["merged"]
    assert (merge.base, merge.names, merge.method) == ("org/base", ["org/a@v2", "./b"], "ties")
    assert merge.dtype == "float16"
    assert recipe.notes == (
        "ties has no parameter t, and leaves it out as mergekit does",
        "lambda is one for all models of ties: beside a model it is left out, as mergekit does",
    )
    assert recipe.data["models"][1]["model"] == {"model": {"path": "org/a", "revision": "v2"}}


def test_slices_are_composed(tmp_path: Path) -> None:
    recipe = load(tmp_path, """
merge_method: slerp
base_model: b
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [4, 6]}]
  - sources: [{model: b, layer_range: [2, 3]}, {model: c, layer_range: [2, 3]}]
parameters: {t: 0.5}
""")  # fmt: skip
    made = steps(recipe)
    assert {*made} == {"merged:base", "merged:1", "merged"}
    assert [(b.model, b.layers) for b in made["merged:base"].blocks] == [("b", "4-5"), ("b", "2-2")]
    assert [(b.model, b.layers) for b in made["merged:1"].blocks] == [("a", "0-1"), ("c", "2-2")]
    assert made["merged"].base == "merged:base"
    assert recipe.steps[-1].spans == (2, 1)


def test_several_documents(tmp_path: Path) -> None:
    recipe = load(tmp_path, """
name: late
merge_method: linear
models: [{model: early}, {model: x}]
---
models: [{model: ./place}, {model: late}]
merge_method: linear
---
out_path: ./place
merge_method: linear
models: [{model: early}]
---
name: early
merge_method: linear
models: [{model: x}]
---
name: unused
merge_method: linear
models: [{model: early}]
""")  # fmt: skip
    assert recipe.inputs == {"x": "x"}
    names = [step.name for step in recipe.steps]
    assert set(names) == {"late", "merge-2", "merge-3", "early", "unused"}
    assert names.index("early") < names.index("late") < names.index("merge-2")
    assert recipe.output == "merge-2"
    assert recipe.notes == ("unused isn't needed for merge-2, and isn't written",)
    assert isinstance(recipe.data, list)
    assert len(recipe.data) == 5
    all_named = load(tmp_path, "name: a\nmerge_method: linear\nmodels: [{model: x}]\n---\n"
                     "name: b\nmerge_method: linear\nmodels: [{model: a}]")  # fmt: skip
    assert all_named.output == "b"


def test_a_model_that_is_called_as_a_step_is(make_model: Make, tmp_path: Path) -> None:
    """A directory `merged`, merged: not a step that refers to itself."""
    recipe = load(tmp_path, "merge_method: linear\nmodels: [{model: merged}, {model: 'merged:1'}]")
    assert recipe.inputs == {"merged (input)": "merged", "merged:1 (input)": "merged:1"}
    assert steps(recipe)["merged"].names == ["merged (input)", "merged:1 (input)"]


# A configuration, and how each of its problems begins, from the line number on.
MISTAKES: dict[str, tuple[str, str]] = {
    "keys": (
        """\
merge_method: ties
base_model: b
modles: []
models:
  - {model: a, weight: 1}
  - {modle: a}
  - a
modules: {}
chat_template: auto
residual_weight: 1
""",
        """\
3: modles: there is no key 'modles': did you mean models?
8: modules: modules isn't supported: models made of several modules aren't
9: chat_template: chat_template isn't supported: put the template into
10: residual_weight: there is no key 'residual_weight'
5: models[0].weight: there is no key 'weight': there are model, parameters
6: models[1]: give the model: - model: org/name
7: models[2]: give the model: - model: org/name
""",
    ),
    "method": (
        """\
merge_method: tise
models: [{model: a}]
""",
        """\
1: merge_method: there is no merge method 'tise': did you mean ties?
""",
    ),
    "a method that isn't there": (
        """\
models: [{model: a}]
densty: 1
""",
        """\
2: densty: there is no key 'densty'
1: merge_method is missing
""",
    ),
    "mergekit-moe": (
        """\
base_model: a
gate_mode: hidden
dtype: bfloat16
experts: [{source_model: a, positive_prompts: [x]}]
""",
        """\
2: gate_mode: this is a file for mergekit-moe, and mixtures of experts aren't made here
""",
    ),
    "mergekit-evolve": (
        """\
genome:
  models: [a, b]
  merge_method: linear
tasks: [{name: x}]
""",
        """\
1: genome: this is a file for mergekit-evolve, and parameters aren't searched for here
""",
    ),
    "a base without a weight": (
        """\
merge_method: linear
base_model: ./base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {weight: {filter: mlp, value: 1}}
""",
        """\
2: base_model: linear merges ./base too, and it has no weight: give it one under models, or leave
""",
    ),
    "a base to pass through": (
        """\
merge_method: passthrough
base_model: ./base
models: [{model: a}]
""",
        """\
2: base_model: passthrough has no base, and would take ./base too: leave it out
""",
    ),
    "two to pass through": (
        """\
merge_method: passthrough
models: [{model: a}, {model: b}]
""",
        """\
2: models: passthrough takes 1 model, and there are 2 (a, b): blocks of several are put one after
""",
    ),
    "a base that is missing": (
        """\
models: [{model: a}, {model: b}]
merge_method: ties
""",
        """\
2: merge_method: ties needs the base that the models were fine-tuned from: add base_model: with it
""",
    ),
    "a base of two": (
        """\
models: [{model: a}, {model: b}]
merge_method: slerp
parameters: {t: 0.5}
""",
        """\
2: merge_method: slerp needs the base that the models were fine-tuned from: add base_model: with one
""",
    ),
    "too many": (
        """\
merge_method: slerp
base_model: c
models: [{model: a}, {model: b}]
parameters: {t: 0.5}
""",
        """\
3: models: slerp takes 1 model beside the base c, and there are 2 (a, b)
""",
    ),
    "too few": (
        """\
merge_method: model_stock
base_model: c
slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: c, layer_range: [0, 1]}]}]
""",
        """\
3: slices: model_stock takes at least 2 models beside the base c, and there is 1 (a)
""",
    ),
    "no t": (
        """\
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
""",
        """\
1: merge_method: slerp has no t: give it under parameters; 0 is the base, 1 the model
""",
    ),
    "out of range": (
        """\
merge_method: della
base_model: c
models:
  - model: a
    parameters:
      density: 1.5
      epsilon: [{filter: mlp, value: [0.1, 2]}, {value: 0.1}]
""",
        """\
6: models[0].parameters.density: density is 1.5, and has to be in (0, 1]
7: models[0].parameters.epsilon: epsilon is 2.0, and has to be in [0, 1]
""",
    ),
    "weights that are nothing together": (
        """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: -1}}
""",
        """\
2: models: the weights add up to 0, and an average divides by their sum
""",
    ),
    "a parameter that another method has": (
        """\
merge_method: linear
models: [{model: a, parameters: {densty: 1}}]
""",
        """\
2: models[0].parameters.densty: there is no parameter of linear 'densty': there are weight, norma
""",
    ),
    "a seed": (
        """\
merge_method: dare_ties
base_model: c
random_seed: true
models: [{model: a}]
""",
        """\
3: random_seed: True isn't a whole number
""",
    ),
    "no method": (
        """\
merge_method: [ties]
models: [{model: a}]
""",
        """\
1: merge_method: there is no merge method "['ties']"
""",
    ),
    "both": (
        """\
merge_method: linear
models: [{model: a}]
slices: []
""",
        """\
1: give either models or slices
""",
    ),
    "neither": (
        """\
merge_method: linear
""",
        """\
1: give either models or slices
""",
    ),
    "types": (
        """\
merge_method: linear
models: a
parameters: 5
dtype: int8
out_dtype: bf16
""",
        """\
3: parameters: this is a table of parameters
2: models: this is a list of models
5: out_dtype: there is no type 'bf16'
""",
    ),
    "output types": (
        """\
merge_method: linear
models: [{model: a}]
dtype: int8
""",
        """\
3: dtype: there is no type 'int8': there are float32, float16, bfloat16, float64
""",
    ),
    "parameters": (
        """\
merge_method: ties
base_model: b
models:
  - model: a
    parameters:
      wieght: 1
      density: {pattern: mlp, value: 1}
      weight: [{filter: mlp}, {value: {value: 1}}]
parameters:
  normalize: maybe
  lambda: []
  filter_wise: true
  weight: [1, {value: 1}]
  density: .inf
""",
        """\
10: parameters.normalize: 'maybe' is neither a finite number, nor a list
11: parameters.lambda: [] is neither a finite number, nor a list of them, nor cond
12: parameters.filter_wise: filter_wise: True isn't supported: model_stock is per
13: parameters.weight: [1, {'value': 1}] is neither a finite number, nor a list
14: parameters.density: inf is neither a finite number
6: models[0].parameters.wieght: there is no parameter of ties 'wieght': did you mean
7: models[0].parameters.density: there is no key 'pattern': there are filter, value
8: models[0].parameters.weight: a condition has a value
""",
    ),
    "a condition in a condition": (
        """\
merge_method: passthrough
models:
  - model: a
    parameters: {scale: {filter: mlp, value: [{value: 1}]}}
""",
        """\
4: models[0].parameters.scale: the value of a condition is a number, or a list of them
""",
    ),
    "models": (
        """\
merge_method: linear
models:
  - model: 5
  - model: {path: a, commit: b}
  - model: ''
""",
        """\
3: models[0].model: 5 is no model that is supported: give a path or a Hub id
4: models[1].model: {'path': 'a', 'commit': 'b'} is no model that is supported
5: models[2].model: '' is no model that is supported
""",
    ),
    "slices": (
        """\
merge_method: ties
base_model: b
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]
    base_model: c
  - sources:
      - {model: b, layer_range: [2, 2]}
      - {model: a, layer_range: [-1, 1]}
      - {model: a, layer_range: 3}
      - {model: a}
  - {}
  - sources: []
""",
        """\
5: slices[0].base_model: there is no key 'base_model': there are sources, parameters
4: slices[0]: its sources have [2, 3] blocks, and need as many
7: slices[1].sources[0].layer_range: [2, 2] isn't [first, one past the last]
8: slices[1].sources[1].layer_range: [-1, 1] isn't [first, one past the last]
9: slices[1].sources[2].layer_range: 3 isn't [first, one past the last]
10: slices[1].sources[3].layer_range: None isn't [first, one past the last]
11: slices[2]: a slice has sources
12: slices[3]: a slice has sources
""",
    ),
    "a slice without the base": (
        """\
merge_method: ties
base_model: b
slices:
  - sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
  - sources: [{model: c, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
""",
        """\
5: slices[1]: the base b has to be one of the slice's sources
""",
    ),
    "slices of several sizes": (
        """\
merge_method: linear
slices:
  - sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
  - sources: [{model: c, layer_range: [0, 1]}]
""",
        """\
2: slices: the slices have [1, 2] models to merge, and every slice needs as many
""",
    ),
    "nothing but the base": (
        """\
merge_method: ties
base_model: b
models: [{model: b}]
""",
        """\
2: base_model: there is nothing to merge with the base
""",
    ),
    "documents": (
        """\
name: one
merge_method: linear
models: [{model: two}]
---
name: two
merge_method: linear
models: [{model: one}]
---
name: two
merge_method: linear
models: [{model: x}]
---
merge_method: linear
models: [{model: x}]
---
merge_method: linear
models: [{model: x}]
---
name: [x]
out_path: 5
merge_method: linear
models: [{model: x, parameters: {wieght: 1}}]
---
- a list
""",
        """\
9: name: another document is called two as well
16: this has no name, and neither has m.yml:13
19: name: ['x'] isn't text
20: out_path: 5 isn't text
22: models[0].parameters.wieght: there is no parameter of linear 'wieght'
24: a configuration is a table
""",
    ),
    "a circle": (
        """\
name: x
merge_method: linear
models: [{model: y}]
---
name: one
merge_method: linear
models: [{model: two}]
---
name: two
merge_method: linear
models: [{model: one}]
""",
        """\
5: one: steps refer to each other in a circle: one -> two -> one
""",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_isnt_supported_is_told(case: str, tmp_path: Path) -> None:
    text, said = MISTAKES[case]
    found = [problem.removeprefix("m.yml:") for problem in mistakes(tmp_path, text)]
    for wanted in said.splitlines():
        assert sum(problem.startswith(wanted) for problem in found) == 1, (wanted, found)
    assert len(found) == len(said.splitlines()), found


def test_lines_of_later_documents(make_model: Make, tmp_path: Path) -> None:
    """What is wrong with a step names its own document's line, not the first's."""
    text = f"""\
name: soup
merge_method: linear
models:
  - model: {make_model(name="x", num_hidden_layers=3)}
---
name: tall
merge_method: passthrough
slices:
  - sources: [{{model: soup, layer_range: [0, 3]}}]
  - sources:
      - model: soup
        layer_range: [1, 4]
---
merge_method: ties
base_model: soup
models: [{{model: {make_model(name="y", vocab_size=32, num_hidden_layers=3)}}}]
"""
    recipe = load(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        build(recipe, open_inputs(recipe), Work(measure=False))
    found = [problem.replace(str(tmp_path), "") for problem in error.value.problems]
    assert len(found) == 3
    assert found[0] == (
        "/m.yml:9: tall.slices[0].sources[0]: layers: 1-3 isn't among the 3 layers, which are 0 to 2"
    )
    assert all(text.startswith("/m.yml:14: merge-3: ") for text in found[1:])


def test_models_that_arent_there(tmp_path: Path) -> None:
    recipe = load(tmp_path, "merge_method: linear\nmodels:\n  - model: ./x\n  - model: ./y\n")
    with pytest.raises(NotFoundError) as error:
        open_inputs(recipe)
    assert [text.replace(str(tmp_path), "").split(" there")[0] for text in error.value.problems] == [
        "/m.yml:3: inputs../x: './x':", "/m.yml:4: inputs../y: './y':",
    ]  # fmt: skip


def test_a_mergekit_file_is_run(make_model: Make, tmp_path: Path) -> None:
    """From the command line, where to is said by -o; the record has the file."""
    from surgery.commands.main import app
    from typer.testing import CliRunner

    for at, name in enumerate(("base", "a")):
        make_model(name=name, seed=at)
    (tmp_path / "m.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\n"
        f"models: [{{model: {tmp_path}/a, parameters: {{weight: 0.5, t: 1}}}}]\ndtype: float16\n"
    )
    result = CliRunner().invoke(
        app, ["run", f"{tmp_path}/m.yml", "-o", f"{tmp_path}/out", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipe"]["merge_method"] == "task_arithmetic"
    assert "note: task_arithmetic has no parameter t" in result.stderr
    base, a, made = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "a", "out")
    )
    for name, found in made.items():
        assert found.dtype == torch.float16
        wanted = base[name] + 0.5 * (a[name] - base[name])
        torch.testing.assert_close(found, wanted.half(), rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_a_base_of_a_method_without_one_is_merged_first(tmp_path: Path) -> None:
    """Its config and its tokenizer are those of the result, and it has a weight as any other."""
    recipe = load(tmp_path, """
merge_method: linear
base_model: c
models: [{model: a, parameters: {weight: 1}}, {model: c, parameters: {weight: 2}}]
tokenizer_source: base
""")  # fmt: skip
    merge = steps(recipe)["merged"]
    assert (merge.names, merge.base, merge.tokenizer) == (["c", "a"], None, "c")
    assert recipe.notes == ()
    text = "merge_method: karcher\nbase_model: c\nmodels: [{model: a}, {model: b}]"
    recipe = load(tmp_path, text)
    assert steps(recipe)["merged"].names == ["c", "a", "b"]
    note = f"{tmp_path}/m.yml:2: base_model: karcher merges c too, as mergekit does"
    assert recipe.notes == (note,)


def test_the_tokenizer_of_a_base_that_isnt_merged(tmp_path: Path) -> None:
    recipe = load(tmp_path, """
merge_method: linear
base_model: c
slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]
tokenizer_source: base
""")  # fmt: skip
    merge = steps(recipe)["merged"]
    assert (merge.names, merge.base, merge.tokenizer) == (["merged:1", "merged:2"], None, "c")


def test_the_seed_is_that_of_the_file(tmp_path: Path) -> None:
    text = "merge_method: dare_ties\nbase_model: c\nmodels: [{model: a}]\n"
    assert steps(load(tmp_path, text))["merged"].seed == 0
    assert steps(load(tmp_path, text + "random_seed: 7"))["merged"].seed == 7


def test_a_condition_that_is_never_reached_is_noted(tmp_path: Path) -> None:
    recipe = load(tmp_path, """
merge_method: linear
models:
  - model: a
    parameters: {weight: [{value: 1}, {filter: mlp, value: 2}]}
""")  # fmt: skip
    where = f"{tmp_path}/m.yml:5: models[0].parameters.weight: "
    assert recipe.notes == (f"{where}conditions after the one without a filter are never reached",)


def built(folder: Path, text: str) -> list[str]:
    """What is noted of a configuration whose models are there; raises what is wrong."""
    recipe, told = load(folder, text), list[str]()
    build(recipe, open_inputs(recipe), Work(measure=False, tell=told.append))
    return [text.replace(f"{folder}/", "") for text in told]


def test_every_tensor_has_a_t(make_model: Make, tmp_path: Path) -> None:
    """Conditions have to fit them all, as in mergekit; one without a filter isn't needed."""
    base, tuned = make_model(name="base"), make_model(name="a", seed=1)
    text = f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {base}}}, {{model: {tuned}}}]\n"
    text += "parameters:\n  t: [{filter: mlp, value: 0.3}, {filter: norm, value: 0.1}"
    with pytest.raises(RecipeError) as error:
        built(tmp_path, text + "]")
    (said,) = error.value.problems
    assert said.startswith(f"{tmp_path}/m.yml:5: parameters.t: t has no value for ")
    assert " and 9 more: end its conditions with one that has a value and no filter" in said
    whole = (
        ", {filter: self_attn, value: 1}, {filter: embed, value: 0}, {filter: lm_head, value: 1}]"
    )
    assert built(tmp_path, text + whole) == []
    assert built(tmp_path, text + ", {value: 0}]") == []


def test_filters_that_fit_nothing_are_noted(make_model: Make, tmp_path: Path) -> None:
    text = f"""\
merge_method: linear
models:
  - model: {make_model(name="a")}
    parameters:
      weight:
        - {{filter: mpl, value: 3}}
        - {{filter: mlp, value: 2}}
        - {{value: 1}}
"""
    assert built(tmp_path, text) == ["note: m.yml:6: weight: no tensor fits 'mpl'"]
    both = f"name: x\n{text}---\nmerge_method: linear\nmodels: [{{model: x}}]\n"
    assert built(tmp_path, both) == ["note: m.yml:7: weight: no tensor fits 'mpl'"]


def test_what_to_do_about_vocabularies_is_said_for_mergekits_files(
    make_model: Make, tmp_path: Path
) -> None:
    a, b = make_model(name="a"), make_model(name="b", vocab_size=32)
    with pytest.raises(MismatchError) as error:
        built(tmp_path, f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]")
    for problem in error.value.problems:
        assert problem.startswith(f"{tmp_path}/m.yml:1: ")
        assert "add tokenizer_source: union (or base, or a model) to have rows matched" in problem
    with pytest.raises(MismatchError, match="tokenizer_source isn't there for slices that are put"):
        built(tmp_path, f"""
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 1]}}]
  - sources: [{{model: {b}, layer_range: [1, 2]}}]
tokenizer_source: union
""")  # fmt: skip
    recipe = load(tmp_path, f"""
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 1]}}]
  - sources: [{{model: {b}, layer_range: [1, 2]}}]
tokenizer: {{pad_to_multiple_of: 8}}
""")  # fmt: skip
    assert steps(recipe)["merged"].tokenizer == "union"
    assert "tokenizer_source isn't there for slices that are put one after" in recipe.notes[0]
