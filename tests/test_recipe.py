"""Reading recipes: YAML that nobody trusts, and every mistake with its line."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import save_raw
from hypothesis import example, given
from hypothesis import strategies as st

from surgery import ArgumentError, NotFoundError, RecipeError, SurgeryError
from surgery.recipe import Recipe, load_recipe, run_recipe
from surgery.recipe.document import parse_documents, parse_value, read_documents


def read(text: str) -> Any:
    """The data of the one document in `text`."""
    [document] = parse_documents(text, "f")
    return document.data


def refused(text: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parse_documents(text, "f")
    return list(error.value.problems)


# YAML.


def test_plain_data() -> None:
    text = """
a: [1, -2, 0x10, 1_000, 1.5, 1e-5, 2E3, 1.e+2, .inf]
b: {c: yes, d: "yes", e: null, f: , g: 'it''s', h: 2001-02-03, i: 1:30}
"""
    assert read(text) == {
        "a": [1, -2, 16, 1000, 1.5, 1e-5, 2000.0, 100.0, float("inf")],
        "b": {"c": True, "d": "yes", "e": None, "f": None, "g": "it's", "h": "2001-02-03",
              "i": "1:30"},
    }  # fmt: skip
    assert all(isinstance(read(text), float) for text in ("1e5", "-3E-2", "+1.5e7"))


def test_keys_are_what_is_written() -> None:
    """YAML 1.1 reads `on` as true, and 1 isn't a name."""
    assert [*read("{no: 1, on: 2, yes: 3, ~: 4, 1: 5, 1.0: 6, 0x1: 7}")] == [
        "no", "on", "yes", "~", "1", "1.0", "0x1",
    ]  # fmt: skip


def test_lines_of_everything() -> None:
    text = "# a comment\na: 1\n\nb:\n  c:\n    - x\n    -\n      d: |\n        two\n        lines\ne: &m\n  f: 1\ng: *m\n"
    [document] = parse_documents(text, "f")
    assert document.lines == {
        (): 2, ("a",): 2, ("b",): 4, ("b", "c"): 5, ("b", "c", 0): 6, ("b", "c", 1): 8,
        ("b", "c", 1, "d"): 8, ("e",): 11, ("e", "f"): 12, ("g",): 13, ("g", "f"): 12,
    }  # fmt: skip
    assert document.where(("b", "c", 1, "not", "there")) == "f:8"
    assert document.problem(("b", "c", 1, "d"), "wrong") == "f:8: b.c[1].d: wrong"


def test_documents_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f.yml"
    path.write_bytes(b"\xef\xbb\xbf# a BOM\n---\na: 1\n---\n---\n- b\n...\n")
    assert [d.data for d in read_documents(path)] == [{"a": 1}, ["b"]]
    assert [d.lines[()] for d in read_documents(path)] == [3, 6]
    for empty in ("", "\n", "# nothing\n", "---\n", "---\n...\n"):
        path.write_text(empty)
        assert read_documents(path) == []
        with pytest.raises(RecipeError, match=r"f\.yml is empty"):
            load_recipe(path)
    assert parse_value("") is None
    assert parse_value("{a: [1e-1, x]}") == {"a": [0.1, "x"]}


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "f.yml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match=r"f\.yml isn't UTF-8 text: invalid start byte"):
        read_documents(path)
    path.write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(RecipeError, match="isn't UTF-8"):
        read_documents(path)
    path.write_bytes(b"a: " + b"x" * 2_000_000)
    with pytest.raises(RecipeError, match="has more than 1,000,000 bytes: no recipe is that long"):
        read_documents(path)
    with pytest.raises(NotFoundError, match="can't be read: No such file"):
        read_documents(tmp_path / "none.yml")
    with pytest.raises(NotFoundError, match="can't be read: Is a directory"):
        read_documents(tmp_path)


NOT_ALLOWED = {
    "an object": ("a: 1\nb: !!python/object/apply:os.system [ls]", "tag:yaml.org,2002:python/"),
    "a name": ("a: !!python/name:os.system x", "tag:yaml.org,2002:python/name:os.system isn't"),
    "binary": ("a: !!binary aaa=", "tag:yaml.org,2002:binary isn't allowed"),
    "a set": ("a: !!set {b, c}", "tag:yaml.org,2002:set isn't allowed"),
    "pairs": ("a: !!omap [b: 1]", "tag:yaml.org,2002:omap isn't allowed"),
    "our own": ("a: !mine b", "the tag !mine isn't allowed"),
    "a tag on a key": ("!mine a: b", "the tag !mine isn't allowed"),
    "a wrong one": ("a: !!map [1]", "tag:yaml.org,2002:map isn't allowed"),
    "a prefix": ("%TAG ! tag:x,2000:\n---\na: !b c", "f:3: the tag tag:x,2000:b isn't allowed"),
    "no int": ("a: !!int ''", "'' is no int"),
    "no float": ("a: !!float ''", "'' is no float"),
    "no bool": ("a: !!bool maybe", "'maybe' is no bool"),
    "a huge int": ("a: " + "9" * 5000, f"'{'9' * 40}' is no int"),
    "a merge key": ("a: &a {b: 1}\nc:\n  <<: *a", "f:3: merge keys (<<) aren't supported"),
    "a key twice": ("a:\n  b: 1\n  b: 2", "f:3: b is given a second time"),
    "a list as a key": ("? [a]\n: b", "f:1: a key has to be a word"),
    "no colon": ("a: 1\nb", "f:2: this isn't YAML: could not find expected ':'"),
    "a tab": ("a:\n\tb: 1", "f:2: this isn't YAML: found character '\\t'"),
    "an open quote": ("a: 'b\nc", "this isn't YAML: found unexpected end of stream"),
    "no such alias": ("a: *b", "f:1: this isn't YAML: found undefined alias 'b'"),
    "a control character": ("a: 1\nb: \x07", "f:2: this isn't YAML: the character '\\x07' isn't"),
    "a null byte": ("a\x00: 1", "f:1: this isn't YAML: the character '\\x00' isn't"),
    "one escaped": ('a: "\\0"', "f:1: the character '\\x00' isn't allowed in text"),
    "half a pair": ('a: "\\ud800"', "f:1: the character '\\ud800' isn't allowed in text"),
    "no character": ('a: "\\U00110000"', "f: this can't be read as YAML: chr() arg not in range"),
    "an alias of itself": ("a: &a [*a]", "nested too deeply"),
    "a table of itself": ("&a {b: *a}", "nested too deeply"),
    "depth": ("[" * 1000, "f:1: this has too many values, or they are nested too deeply"),
    "depth by lines": ("".join(" " * n + "a:\n" for n in range(99)), "f:50: this has too many"),
    "many": ("- 1\n" * 30_000, "f:20000: this has too many values"),
    "laughs": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)),
        "this has too many values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_ALLOWED)
def test_what_isnt_allowed(case: str) -> None:
    text, said = NOT_ALLOWED[case]
    [problem] = refused(text)
    assert said in problem
    assert problem.startswith("f:")


def test_all_that_isnt_allowed_at_once() -> None:
    assert refused("a: !x 1\nb: {c: 1, c: 2}\n<<: {}\n? [d]\n: 1") == [
        "f:1: the tag !x isn't allowed",
        "f:2: c is given a second time",
        "f:3: merge keys (<<) aren't supported",
        "f:4: a key has to be a word",
    ]


YAML_LIKE = st.text(
    st.sampled_from([*"abc019 \n\t:-,[]{}&*!|>'\"%@`#?~.=<\\\ufeff\x85\u2028\x00\ud7ff", "é"]),
    max_size=80,
)


@given(text=st.one_of(YAML_LIKE, st.text(max_size=60)))
@example(text="!!timestamp x")
@example(text="!!null x")
@example(text="1:1:1")
@example(text="? &a\n: *a")
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        documents = parse_documents(text, "f")
    except RecipeError:
        return
    for document in documents:
        yaml.safe_dump(document.data)  # nothing but plain data
        assert () in document.lines


@pytest.mark.parametrize("piece", ["- a\n", "a: |\n x\n", "--- a\n", "[", "{a: ", "&a ", "? ", "1:1",
                                   "a\n\n", '"\\x41', "%A b\n", "a: &a [*a, ", "#\n", "''"])  # fmt: skip
def test_long_texts(piece: str) -> None:
    """Some of these could take minutes, or all of the stack."""
    with suppress(RecipeError):
        parse_documents(piece * (990_000 // len(piece)), "f")


# What a recipe says.


def load(folder: Path, text: str, *changes: str) -> Recipe:
    path = folder / "r.yml"
    path.write_text(text)
    return load_recipe(path, changes=changes)


def mistakes(folder: Path, text: str, *changes: str) -> list[str]:
    """The problems, without the folder."""
    with pytest.raises(RecipeError) as error:
        load(folder, text, *changes)
    return [problem.replace(f"{folder}/", "") for problem in error.value.problems]


EVERYTHING = """\
description: all that there is
inputs: {base: org/base@v1, a: ./a, "1": b.safetensors}
steps:
  z: {apply: {base: y, vectors: [v], scale: [0.5]}}
  m:
    merge:
      models: [a, {model: "1", weight: [0, 1], density: {mlp: 0.5, "*norm*": [1, 0.5], default: 0.2}}]
      base: base
      method: ties
      normalize: true
      lambda: 2
      lines: auto
      seed: 3
      dtype: bfloat16
  y: {lines: {base: base, tuned: m, alpha: 0, beta: 1, outside: depth}}
  g: {grow: {model: z, factor: 2, layers: -1, multiple_of: 8, choose: norm, seed: 1, uniform: true}}
  e: {expand: {model: g, after: 0, verify: false}, write: out/e}
  v: {task_vector: {base: y, tuned: a, dtype: tuned}}
  c: {compose: {blocks: [{model: e, layers: 0-1}, {model: e}], before: a, after: base}}
output: e
require:
  - same: [z, g]
  - {compare: [base, m], at_most: {kl_mean: 1, kl_max: 2, relative: 3}, at_least: {top1: 0.5}}
"""


def test_everything_at_once(tmp_path: Path) -> None:
    recipe = load(tmp_path, EVERYTHING)
    assert recipe.inputs == {"base": "org/base@v1", "a": "./a", "1": "b.safetensors"}
    names = [step.name for step in recipe.steps]
    assert sorted(names) == sorted("zmygevc")
    for step in recipe.steps:
        needed = {name for _, name in step.arguments.references()} - set(recipe.inputs)
        assert needed <= set(names[: names.index(step.name)])
    assert recipe.output == "e"
    assert {s.name: s.write for s in recipe.steps if s.write} == {"e": "out/e"}
    assert [r.pair for r, _ in recipe.requirements] == [["z", "g"], ["base", "m"]]
    assert recipe.data["steps"]["m"]["merge"]["lines"] == "auto"
    assert load(tmp_path, EVERYTHING, "output=c").output == "c"
    assert load(tmp_path, EVERYTHING.replace("output: e\n", "")).output == "c"


# A recipe, and how each of its problems begins, from the line number on.
MISTAKES: dict[str, tuple[str, str]] = {
    "text": (
        """\
hello
""",
        """\
1: a recipe is a table with inputs and steps
""",
    ),
    "a list": (
        """\

- a
""",
        """\
2: a recipe is a table with inputs and steps
""",
    ),
    "two": (
        """\
a: 1
---
b: 1
""",
        """\
r.yml holds 2 documents, and a recipe is one: its steps can refer to each other
""",
    ),
    "no steps": (
        """\
inputs: {a: x}
""",
        """\
1: steps: a recipe has at least one step: name: {merge: {...}}
""",
    ),
    "a key at the top": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: {model: a}}
ouput: s
""",
        """\
4: ouput: there is no key 'ouput': did you mean output?
""",
    ),
    "inputs": (
        """\
steps: {s: {grow: {model: a}}}
inputs: {a: 5, b: [x], 'c d': x, e: }
""",
        """\
2: inputs.a: 5 is no directory, file or Hub id: write it as text
2: inputs.b: ['x'] is no directory, file or Hub id: write it as text
2: inputs.c d: 'c d' is no name: use letters, digits, _ and -
2: inputs.e: None is no directory, file or Hub id: write it as text
""",
    ),
    "no operation": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {write: x}
""",
        """\
3: steps.s: a step has one of merge, lines, grow, expand,
""",
    ),
    "two operations": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: {model: a}, lines: {}}
""",
        """\
3: steps.s: a step has one of merge, lines, grow, expand,
""",
    ),
    "another operation": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grwo: {model: a}, wriet: x}
""",
        """\
3: steps.s.grwo: there is no operation 'grwo': did you mean grow?
3: steps.s.wriet: there is no operation 'wriet': did you mean write?
""",
    ),
    "a place that is none": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: {model: a}, write: [x]}
""",
        """\
3: steps.s.write: ['x'] is no directory
""",
    ),
    "no place": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: {model: a}, write: ''}
""",
        """\
3: steps.s.write: '' is no directory
""",
    ),
    "no arguments": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: a}
""",
        """\
3: steps.s.grow: 'a' isn't a table
""",
    ),
    "a key of a step": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: 
    grow:
      model: a
      factro: 2
""",
        """\
6: steps.s.grow.factro: there is no key 'factro': did you mean factor?
""",
    ),
    "missing": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {lines: {base: a}}
""",
        """\
3: steps.s.lines: tuned is missing
3: steps.s.lines: alpha is missing
""",
    ),
    "types": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: {model: 1, factor: x, width: 1.5, uniform: 1, choose: best, layers: [1]}}
""",
        """\
3: steps.s.grow.model: 1 isn't text
3: steps.s.grow.factor: 'x' isn't a number
3: steps.s.grow.width: 1.5 isn't a whole number
3: steps.s.grow.layers: [1] isn't text or a whole number
3: steps.s.grow.choose: 'best' isn't 'first', 'random' or 'norm'
3: steps.s.grow.uniform: 1 isn't true or false
""",
    ),
    "names": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {apply: {base: bsae, vectors: [s, t]}}
require:
  - same: [u, 5]
output: other
""",
        """\
5: require[0].same[1]: 5 isn't text
6: output: there is no step 'other': there are s
3: steps.s.apply.base: there is no input or step 'bsae': did you mean base?
3: steps.s.apply.vectors[1]: there is no input or step 't': there are base, a, b, s
5: require[0].same[0]: there is no input or step 'u': there are base, a, b, s
3: steps.s: steps refer to each other in a circle: s -> s
""",
    ),
    "a name twice": (
        """\
inputs: {s: x}
steps:
  s: {grow: {model: s}}
""",
        """\
3: steps.s: s is an input already
3: steps.s: steps refer to each other in a circle: s -> s
""",
    ),
    "a circle": (
        """\
steps:
  a: {grow: {model: b}}
  b: {grow: {model: c}}
  c: {grow: {model: b}}
""",
        """\
3: steps.b: steps refer to each other in a circle: b -> c -> b
""",
    ),
    "no such method": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {merge: {models: [a], method: tyes, densty: 1}}
""",
        """\
3: steps.s.merge.method: there is no merge method 'tyes': did you mean ties?
""",
    ),
    "parameters": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {merge: {models: [a, {model: b, wieght: 1, t: 2, normalize: true}], base: base, method: ties, lamda: 1, weight: {mpl: 1}, density: 'x'}}
""",
        """\
3: steps.s.merge.lamda: there is no parameter of ties 'lamda': did you mean lambda?
3: steps.s.merge.weight: there is no role 'mpl': did you mean mlp?; a pattern of names has a
3: steps.s.merge.density: 'x' is neither a finite number, nor a list of them over depth, nor
3: steps.s.merge.models[1].wieght: there is no parameter of ties 'wieght': did you mean weig
3: steps.s.merge.models[1].t: there is no parameter of ties 't': there are weight, density,
3: steps.s.merge.models[1].normalize: normalize is one for all models: give it beside them
""",
    ),
    "counts": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {merge: {models: [a, {model: b, density: 1}], base: base, method: ties, density: 1, weight: [1, 2, 3], lines: [1]}}
""",
        """\
3: steps.s.merge.lines: lines is auto, or alpha and beta: [0.3, 0.7]
3: steps.s.merge.weight: this has 3 values, and there are 2 models: give one for each, which
3: steps.s.merge.models[1].density: density is given for all models as well
""",
    ),
    "values": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {merge: {models: [a], method: passthrough, scale: [.inf]}}
  t: {merge: {models: [a], method: passthrough, scale: .nan}}
  u: {merge: {models: [a], method: passthrough, scale: []}}
  v: {merge: {models: [a], method: passthrough, scale: {}}}
  w: {merge: {models: [a], method: passthrough, scale: {mlp: {mlp: 1}}}}
  x: {merge: {models: [a], method: passthrough, scale: {mlp: , norm: [true]}}}
""",
        """\
3: steps.s.merge.scale: [inf] isn't a list of finite numbers, from the first block to the la
4: steps.t.merge.scale: nan is neither a finite number, nor a list of them over depth, nor r
5: steps.u.merge.scale: [] isn't a list of finite numbers, from the first block to the last
6: steps.v.merge.scale: there is no rule
7: steps.w.merge.scale: the rule for mlp has rules in it
8: steps.x.merge.scale: None is neither a finite number, nor a list of them over depth, nor
""",
    ),
    "models of a merge": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {merge: {models: [], method: linear}}
  t: {merge: {models: [{modle: a}, 5, {model: [a]}], method: linear}}
  u: {merge: {models: a, lines: maybe, dtype: int8}}
""",
        """\
3: steps.s.merge.models: this is a list of one or more
4: steps.t.merge.models[0]: model is missing
4: steps.t.merge.models[1]: 5 isn't text or a table
4: steps.t.merge.models[2].model: ['a'] isn't text
4: steps.t.merge.models[0].modle: there is no parameter of linear 'modle': did you mean mode
5: steps.u.merge.models: 'a' isn't a list
5: steps.u.merge: method is missing
5: steps.u.merge.lines: 'maybe' isn't 'auto' or a list
5: steps.u.merge.dtype: 'int8' isn't 'float32', 'float64', 'float16' or 'bfloat16'
""",
    ),
    "blocks": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {compose: {blocks: [{modle: a, layers: 0}, {model: q}], befor: a}}
""",
        """\
3: steps.s.compose.blocks[0]: model is missing
3: steps.s.compose.blocks[0].modle: there is no key 'modle': did you mean model?
3: steps.s.compose.befor: there is no key 'befor': did you mean before?
3: steps.s.compose.blocks[1].model: there is no input or step 'q': there are base, a, b, s
""",
    ),
    "requirements": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: {model: a}}
require:
  - same: [a, s]
    at_most: {kl_mean: 1}
  - compare: [a, s]
  - compare: [a, s]
    at_most: {kl: 1}
  - compare: [a, s]
    at_least: {top1: high}
  - same: [a]
  - {same: [a, s], compare: [a, s]}
  - saem: [a, s]
  - same
""",
        """\
5: require[0]: same has no thresholds: use compare
7: require[1]: compare needs at_most or at_least, of max_difference, relative, kl_mean, kl_m
8: require[2]: there is no measure 'kl': did you mean kl_max?
11: require[3].at_least.top1: 'high' isn't a number
12: require[4]: give either same or compare, with two names: same: [base, grown]
13: require[5]: give either same or compare, with two names: same: [base, grown]
14: require[6].saem: there is no key 'saem': did you mean same?
15: require[7]: 'same' isn't a table
""",
    ),
    "one requirement": (
        """\
inputs: {base: x, a: x, b: x}
steps:
  s: {grow: {model: a}}
require: {same: [a, s]}
""",
        """\
4: require: this is a list of what has to hold: - same: [base, grown]
""",
    ),
    "what is wrong isn't told of those that refer to it": (
        """\
inputs: {a: x, b: 7}
steps:
  s: {grow: {modl: a}}
  t: {lines: {base: s, tuned: b, alpha: 1}}
require: [{same: [a, s]}]
output: s
""",
        """\
1: inputs.b: 7 is no directory, file or Hub id: write it as text
3: steps.s.grow: model is missing
3: steps.s.grow.modl: there is no key 'modl': did you mean model?
""",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, tmp_path: Path) -> None:
    text, said = MISTAKES[case]
    found = [problem.removeprefix("r.yml:") for problem in mistakes(tmp_path, text)]
    assert [f[: len(w)] for f, w in zip(found, said.splitlines(), strict=True)] == said.splitlines()


def test_a_chain_that_is_too_long(tmp_path: Path) -> None:
    def chain(length: int) -> list[str]:
        names = ["a", *(f"s{n}" for n in range(length))]
        pairs = pairwise(names)
        return [f"  {name}: {{grow: {{model: {before}}}}}\n" for before, name in pairs]

    for steps in (chain(50), chain(50)[::-1]):
        assert len(load(tmp_path, "inputs: {a: x}\nsteps:\n" + "".join(steps)).steps) == 50
    for steps in (chain(3000), chain(3000)[::-1]):
        found = mistakes(tmp_path, "inputs: {a: x}\nsteps:\n" + "".join(steps))
        assert all("takes a chain of more than 50 steps" in text for text in found)


def test_changes(tmp_path: Path) -> None:
    text = "inputs: {a: x}\nsteps:\n  s: {merge: {models: [a], method: linear}}"
    recipe = load(tmp_path, text, "inputs.b=./y", "steps.s.merge.models=[a, b]",
                  "steps.s.merge.weight={default: [0, 1e-1]}", "steps.t={grow: {model: s}}")  # fmt: skip
    assert recipe.inputs == {"a": "x", "b": "./y"}
    assert recipe.steps[0].arguments.names == ["a", "b"]  # type: ignore[attr-defined]
    assert recipe.output == "t"
    for changes, said in (
        (["ouput=s"], "r.yml:1: ouput: there is no key 'ouput': did you mean output?"),
        (["inputs.a.b=y"], "--set inputs.a.b=y: there is no key 'b': there are none"),
        (["steps.t.x=y"], "--set steps.t.x=y: there is no key 't': there are s"),
        (["inputs.-1=y", "steps.-1.x=y"], "--set steps.-1.x=y: there is no key '-1': there are s"),
        (["steps.s.merge.method={x: 1}"], "r.yml:3: steps.s.merge.method: {'x': 1} isn't text"),
        (["inputs.a=a: b: c"], "--set:1: this isn't YAML: mapping values are not allowed here"),
        (["inputs.aa=y"], "--set inputs.aa=y: there is no input 'aa': did you mean a?"),
        (["steps.s.merge.seed=1.5"], "r.yml:3: steps.s.merge.seed: 1.5 isn't a whole number"),
    ):  # fmt: skip
        assert mistakes(tmp_path, text, *changes) == [said]
    with pytest.raises(ArgumentError, match=r"--set inputs\.a: give it as NAME=VALUE"):
        load(tmp_path, text, "inputs.a")


def test_an_input_that_nothing_uses_is_noted(tmp_path: Path) -> None:
    text = """\
inputs:
  a: x
  b: y
  c: z
steps:
  s: {merge: {models: [a], method: linear}}
require:
  - {compare: [b, s], at_most: {kl_mean: 1}}
"""
    recipe = load(tmp_path, text)
    assert recipe.notes == (f"{tmp_path}/r.yml:4: inputs.c: nothing in the recipe uses this input",)


def test_rules_that_are_never_reached_are_noted(tmp_path: Path) -> None:
    """The first that fits holds, in the order in which they are written."""
    text = """\
inputs: {a: x, b: y}
steps:
  s:
    merge:
      models: [a, b]
      method: linear
      weight: {default: 1, attention: 2}
  t:
    merge:
      method: linear
      models: [a, {model: b, weight: {attention: 2, default: 1}}]
"""
    recipe = load(tmp_path, text)
    said = "steps.s.merge.weight: rules after default are never reached: put it last"
    assert recipe.notes == (f"{tmp_path}/r.yml:7: {said}",)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(),
    st.sampled_from(["a", "b", "s", "ties", "linear", "auto", "all", "0-1", "norm", "mlp", "", "*"]),
    st.text(max_size=5),
)  # fmt: skip
KEYS = st.sampled_from([
    "inputs", "steps", "output", "require", "merge", "lines", "grow", "expand", "task_vector",
    "apply", "compose", "write", "models", "model", "base", "method", "weight", "density", "lambda",
    "blocks", "layers", "vectors", "same", "compare", "at_most", "kl_mean", "seed", "dtype", "s",
    "merge_method", "slices", "sources", "layer_range", "parameters", "filter", "value", "name",
    "base_model", "out_path", "tokenizer", "tokenizer_source", "source", "t", "default", "a b", "",
])  # fmt: skip
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
MERGES = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["linear", "ties", "slerp", "passthrough", "x"])},
    optional=dict.fromkeys(("models", "slices", "base_model", "parameters", "dtype", "tokenizer", "tokenizer_source", "name", "out_path"), PLAIN),
)  # fmt: skip
STEPS = st.dictionaries(
    st.sampled_from(["s", "t"]),
    st.one_of(*(
        st.fixed_dictionaries({operation: st.dictionaries(KEYS, PLAIN, max_size=5)})
        for operation in ("merge", "lines", "grow", "expand", "task_vector", "apply", "compose")
    )),
    max_size=2,
)  # fmt: skip
RECIPES = st.fixed_dictionaries(
    {"inputs": st.just({"a": "x"}), "steps": STEPS}, optional={"require": PLAIN, "output": PLAIN}
)


@given(data=st.one_of(PLAIN, RECIPES, MERGES))
def test_any_data_is_a_recipe_or_refused(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    with suppress(RecipeError):
        recipe = load_recipe(path)
        assert recipe.output in {step.name for step in recipe.steps}


def blocks(depth: int, stack: str = "model.layers", seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"self_attn.q_proj": (4, 4), "mlp.up_proj": (8, 4), "mlp.gate_proj": (8, 4),
              "mlp.down_proj": (4, 8), "input_layernorm": (4,)}  # fmt: skip
    return {
        f"{stack}.{at}.{name}.weight": torch.randn(shape)
        for at in range(depth)
        for name, shape in shapes.items()
    }


NUMBERS = st.one_of(st.integers(-2, 3), st.floats(-1, 2), st.sampled_from([1e100, 10**60, -1]))


@given(
    operation=st.sampled_from(["grow", "expand", "lines", "merge", "apply", "compose"]),
    number=NUMBERS, other=NUMBERS, text=st.sampled_from(["all", "0", "-1", "0,1", "", "1-", "x"]),
)  # fmt: skip
def test_any_numbers_are_worked_with_or_refused(
    operation: str, number: Any, other: Any, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is well-formed and has values out of all bounds ends in an error of ours."""
    folder = tmp_path_factory.mktemp("n")
    for at, name in enumerate("ab"):
        save_raw(folder / name, blocks(2, seed=at), config={"model_type": "toy"})
    given = {
        "grow": {"model": "a", "factor": number, "multiple_of": other, "layers": text},
        "expand": {"model": "a", "copies": number},
        "lines": {"base": "a", "tuned": "b", "alpha": number, "beta": other},
        "merge": {"models": ["b"], "base": "a", "method": "dare_ties", "density": number,
                  "lambda": other, "seed": number},
        "apply": {"base": "a", "vectors": ["v"], "scale": number},
        "compose": {"blocks": [{"model": "a", "layers": text}, {"model": "b", "layers": number}]},
    }[operation]  # fmt: skip
    data = {
        "inputs": {"a": str(folder / "a"), "b": str(folder / "b")},
        "steps": {"v": {"task_vector": {"base": "a", "tuned": "b"}}, "s": {operation: given}},
    }
    (folder / "r.yml").write_text(yaml.safe_dump(data))
    with suppress(SurgeryError):
        run_recipe(load_recipe(folder / "r.yml"), folder / "out", verify=False)
