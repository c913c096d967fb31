"""Running recipes: the same bytes as the commands one after another, what is checked before
anything is read or written, proofs, the report, the record, and the command line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import bytes_of, files_in, save_raw
from safetensors import safe_open
from safetensors.torch import load_file
from surgery.commands.main import app
from typer.testing import CliRunner, Result

from surgery import files, open_checkpoint, task_vector, write

Make = Callable[..., Path]
QUICK = {"num_hidden_layers": 4, "dtype": torch.bfloat16}


def surgery(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def done(*args: object) -> Result:
    result = surgery(*args)
    assert result.exit_code == 0, result.output
    return result


def problems(result: Result) -> list[str]:
    """What was printed as errors, without the folder of the recipe."""
    lines = result.stderr.splitlines()
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def recipe(folder: Path, text: str, **inputs: object) -> Path:
    """A recipe in `folder` with these inputs."""
    path = folder / "recipe.yml"
    table = "".join(f"  {name}: {place}\n" for name, place in inputs.items())
    path.write_text(f"inputs:\n{table}{text.lstrip()}")
    return path


def weights(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Type and bytes of every tensor in a directory."""
    return {
        name: (tensor.dtype, bytes_of(tensor))
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def others(folder: Path) -> dict[str, bytes]:
    """The other files, but for those that tell how the output was made."""
    return {
        name: content
        for name, content in files_in(folder).items()
        if not name.endswith((".safetensors", "surgery.json", ".md", "index.json"))
    }


def same(made: Path, wanted: Path) -> None:
    found, expected = weights(made), weights(wanted)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert others(made) == others(wanted)


def test_what_only_our_code_loads_is_said(make_model: Make, tmp_path: Path) -> None:
    steps = "steps: {g: {grow: {model: base, factor: 2, layers: '0', verify: false}}}"
    path = recipe(tmp_path, steps, base=make_model())
    told = "note: g: layers differ in MLP width: load it with trust_remote_code=True"
    assert told in done("run", path, "-o", tmp_path / "out").stderr.splitlines()
    as_json = done("run", path, "-o", tmp_path / "again", "--json").stdout
    assert json.loads(as_json)["notes"] == [told.removeprefix("note: g: ")]


@pytest.fixture
def family(make_model: Make, tmp_path: Path) -> dict[str, Path]:
    """A base and two fine-tunes, in bfloat16, with a file that travels."""
    made = {
        name: make_model(name=name, seed=seed, **QUICK)
        for seed, name in enumerate(("base", "a", "b"))
    }
    for name, path in made.items():
        (path / "tokenizer_config.json").write_text(json.dumps({"of": name}))
    return made


# The law: a recipe is its commands. Each case: the recipe's steps, and the commands, in which
# {base}, {a}, {b} are models, and {1}, {2}, ... are what earlier commands have written.
LAW: dict[str, tuple[str, list[str]]] = {
    "merge, lines, grow": (
        """
steps:
  merged: {merge: {models: [a, b], base: base, method: dare_ties, density: [0.4, 0.7], seed: 5}}
  softer: {lines: {base: base, tuned: merged, alpha: 0.3, beta: 0.6}}
  grown:
    grow: {model: softer, factor: 1.5, layers: "1,-1", choose: random, seed: 2,
           break_symmetry: 0.01, verify: false}
""",
        [
            "merge {base} {a} {b} --method dare_ties --density 0.4,0.7 --seed 5",
            "lines {base} {1} --alpha 0.3 --beta 0.6",
            (
                "grow {2} --factor 1.5 --layers 1,-1 --choose random --seed 2 "
                "--break-symmetry 0.01 --no-verify"
            ),
        ],
    ),
    "automatic lines in the middle": (
        """
steps:
  first: {lines: {base: base, tuned: a, alpha: 0.5, outside: depth}}
  merged:
    merge: {models: [first, b], base: base, method: ties, lines: auto, lambda: 0.8}
  last: {merge: {models: [merged], base: b, method: slerp, t: 0.25}}
""",
        [
            "lines {base} {a} --alpha 0.5 --outside depth",
            "merge {base} {1} {b} --method ties --lines auto --param lambda=0.8",
            "merge {b} {2} --method slerp --param t=0.25",
        ],
    ),
    "task vectors": (
        """
steps:
  vector: {task_vector: {base: base, tuned: a, dtype: tuned}}
  other: {task_vector: {base: base, tuned: b}}
  made: {apply: {base: base, vectors: [vector, other], scale: [0.7, -0.25]}}
""",
        [
            "task-vector {base} {a} --dtype tuned",
            "task-vector {base} {b}",
            "apply {base} {1} {2} --scale 0.7,-0.25",
        ],
    ),
    "expand what was merged": (
        """
steps:
  merged: {merge: {models: [a, b], method: linear, weight: [0.3, 0.5]}}
  deeper: {expand: {model: merged, copies: 2, verify: false}}
  deepest: {expand: {model: deeper, after: 0, verify: false}}
""",
        [
            "merge {a} {b} --no-base --method linear --weight 0.3,0.5",
            "expand {1} --copies 2 --no-verify",
            "expand {2} --after 0 --no-verify",
        ],
    ),
    "steps in any order, used twice": (
        """
output: made
steps:
  made: {merge: {models: [x, y], base: x, method: task_arithmetic, weight: 0.5}}
  y: {lines: {base: x, tuned: b, alpha: 0.2}}
  x: {merge: {models: [a], base: base, method: wise_ft, alpha: 0.5}}
""",
        [
            "merge {base} {a} --method wise_ft --param alpha=0.5",
            "lines {1} {b} --alpha 0.2",
            "merge {1} {1} {2} --method task_arithmetic --weight 0.5",
        ],
    ),
}


@pytest.mark.parametrize("case", LAW)
def test_a_recipe_is_its_commands(case: str, family: dict[str, Path], tmp_path: Path) -> None:
    steps, commands = LAW[case]
    names: dict[str, Path] = dict(family)
    for number, command in enumerate(commands, 1):
        # the last is what is compared; a field of a format has to be a word
        words = command.replace("{", "{n").format(**{f"n{k}": v for k, v in names.items()})
        names[str(number)] = tmp_path / f"by-hand-{number}"
        done(*words.split(), "-o", names[str(number)])
    path = recipe(tmp_path, steps, **family)
    before = set(tmp_path.iterdir())
    for threads in (1, 3):
        out = tmp_path / f"out-{threads}"
        done("run", path, "-o", out, "--threads", threads, "--no-verify")
        same(out, names[str(len(commands))])
    assert {p.name for p in set(tmp_path.iterdir()) - before} == {"out-1", "out-3"}


def test_compose_in_a_chain(family: dict[str, Path], tmp_path: Path) -> None:
    """compose has no command: its operation, with what it takes written."""
    from surgery import compose

    done("lines", family["base"], family["a"], "--alpha", 0.4, "-o", tmp_path / "soft")
    opened = {name: open_checkpoint(path) for name, path in family.items()}
    soft = open_checkpoint(tmp_path / "soft")
    blocks = [(soft, 0), (soft, 1), (opened["b"], 3), (opened["b"], 2), (soft, 1), (soft, 2)]
    write(compose(blocks, after=opened["a"]), tmp_path / "frank")
    done("lines", tmp_path / "frank", tmp_path / "frank", "--alpha", 0.5, "-o", tmp_path / "last")
    steps = """
steps:
  soft: {lines: {base: base, tuned: a, alpha: 0.4}}
  frank:
    compose:
      blocks: [{model: soft, layers: 0-1}, {model: b, layers: "-1,2"}, {model: soft, layers: 1-2}]
      after: a
  last: {lines: {base: frank, tuned: frank, alpha: 0.5}}
"""
    done("run", recipe(tmp_path, steps, **family), "-o", tmp_path / "out")
    same(tmp_path / "out", tmp_path / "last")


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_tied_heads_in_a_chain(kind: str, make_model: Make, tmp_path: Path) -> None:
    more = {"head_dim": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    how = {"dtype": torch.float16, **(more if kind == "gemma2" else {})}
    models = {name: make_model(kind, name, seed=i, **how) for i, name in enumerate(("base", "a"))}
    done("merge", *models.values(), "--method", "ties", "-o", tmp_path / "1")
    done("grow", tmp_path / "1", "--factor", 2, "--no-verify", "-o", tmp_path / "2")
    steps = """
steps:
  m: {merge: {models: [a], base: base, method: ties}}
  g: {grow: {model: m, factor: 2, verify: false}}
"""
    done("run", recipe(tmp_path, steps, **models), "-o", tmp_path / "out")
    same(tmp_path / "out", tmp_path / "2")


def test_what_has_a_place_is_written_and_nothing_else(
    family: dict[str, Path], tmp_path: Path
) -> None:
    steps = f"""
steps:
  merged: {{merge: {{models: [a, b], base: base, method: ties}}, write: {tmp_path}/kept}}
  vector: {{task_vector: {{base: base, tuned: merged}}, write: {tmp_path}/vector}}
  soft: {{lines: {{base: base, tuned: merged, alpha: 0.5}}}}
  last: {{lines: {{base: base, tuned: soft, alpha: 0.5}}, write: {tmp_path}/last}}
"""
    path = recipe(tmp_path, steps, **family)
    before = {p.name for p in tmp_path.iterdir()}
    result = done("run", path, "--json")
    assert {p.name for p in tmp_path.iterdir()} - before == {"kept", "vector", "last"}
    told = json.loads(result.stdout)
    assert told["out"] == str(tmp_path / "last")
    assert {name: one["out"] for name, one in told["steps"].items()} == {
        "merged": str(tmp_path / "kept"),
        "vector": str(tmp_path / "vector"),
    }
    done("apply", family["base"], tmp_path / "vector", "-o", tmp_path / "applied")
    same(tmp_path / "applied", tmp_path / "kept")
    done("run", path, "-o", tmp_path / "elsewhere", "--set", f"steps.merged.write={tmp_path}/k2",
         "--set", f"steps.vector.write={tmp_path}/v2")  # fmt: skip
    same(tmp_path / "elsewhere", tmp_path / "last")
    assert (tmp_path / "k2").is_dir()


def test_a_stored_task_vector_as_an_input(family: dict[str, Path], tmp_path: Path) -> None:
    base, a = (open_checkpoint(family[name]) for name in ("base", "a"))
    write(task_vector(base, a), tmp_path / "tau")
    steps = "steps: {made: {apply: {base: base, vectors: [tau], scale: -1}}}"
    done("run", recipe(tmp_path, steps, base=family["base"], tau=tmp_path / "tau"), "-o",
         tmp_path / "out")  # fmt: skip
    done("apply", family["base"], tmp_path / "tau", "--scale", "-1", "-o", tmp_path / "wanted")
    same(tmp_path / "out", tmp_path / "wanted")
    result = surgery(
        "run", recipe(tmp_path, steps, base=family["b"], tau=tmp_path / "tau"), "-o", tmp_path / "x"
    )
    assert result.exit_code == 3
    [problem] = problems(result)
    assert f"{tmp_path}/recipe.yml:4: steps.made.apply: the task vector belongs to" in problem
    assert not (tmp_path / "x").exists()


def test_settings_reach_the_merge(family: dict[str, Path], tmp_path: Path) -> None:
    """A gradient and rules, against the equation, tensor by tensor."""
    steps = """
steps:
  merged:
    merge:
      models: [{model: a, weight: [0.1, 0.7]}, {model: b, weight: {mlp: 0.5, default: -0.25}}]
      base: base
      method: task_arithmetic
      lambda: {"*.o_proj.*": 2, default: [1, 0, 1]}
      dtype: float32
"""
    done("run", recipe(tmp_path, steps, **family), "-o", tmp_path / "out")
    base, a, b = (load_file(path / "model.safetensors") for path in family.values())
    for name, found in load_file(tmp_path / "out" / "model.safetensors").items():
        inside = name.startswith("model.layers.")
        late = name in ("model.norm.weight", "lm_head.weight")
        depth = int(name.split(".")[2]) / 3 if inside else float(late)
        first = 0.1 + 0.6 * depth
        second = 0.5 if ".mlp." in name else -0.25
        factor = 2 if "o_proj" in name else abs(1 - 2 * depth)
        start = base[name].double()
        wanted = start + factor * (
            first * (a[name].double() - start) + second * (b[name].double() - start)
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_type_to_write(tmp_path: Path) -> None:
    """One rounding, the config follows, and what is float32 on purpose stays it."""
    torch.manual_seed(0)
    config = {"model_type": "toy", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    models = {}
    for name in ("base", "a"):
        values = {
            "w": torch.randn(9, 7).bfloat16(),
            "bias": torch.randn(7),
            "ids": torch.arange(3),
        }
        models[name] = save_raw(tmp_path / name, values, config=config)
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        steps = f"""
steps:
  made:
    merge: {{models: [a], base: base, method: task_arithmetic, lambda: 0.3, dtype: {dtype}}}
"""
        done("run", recipe(tmp_path, steps, **models), "-o", tmp_path / dtype)
        found = load_file(tmp_path / dtype / "model.safetensors")
        base, a = (load_file(path / "model.safetensors") for path in models.values())
        tau = a["w"].float() - base["w"].float()
        wanted = (base["w"].float() + torch.tensor(0.3) * tau).to(getattr(torch, dtype))
        assert found["w"].dtype == wanted.dtype
        exact = base["w"].double() + 0.3 * (a["w"].double() - base["w"].double())
        eps = max(torch.finfo(wanted.dtype).eps, torch.finfo(torch.float32).eps)
        assert ((found["w"].double() - exact).abs() <= eps * (exact.abs() + 1)).all()
        if dtype != "float64":
            assert torch.equal(found["w"], wanted)
        assert found["bias"].dtype == torch.float32
        assert found["ids"].equal(torch.arange(3))
        told = json.loads((tmp_path / dtype / "config.json").read_text())
        assert told == {**config, "torch_dtype": dtype, "text_config": {"dtype": dtype}}


# What is wrong is told at once, and before anything is read or written.


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(files.InputFile, "read_into", refuse)


def test_inputs_are_all_looked_at(family: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    steps = "steps: {m: {merge: {models: [a, b, c], method: linear}}}"
    path = recipe(tmp_path, steps, a="./nowhere", b=tmp_path / "broken", c=family["a"],
                  d="./" + "x" * 5000)  # fmt: skip
    result = surgery("run", path, "-o", tmp_path / "out")
    assert result.exit_code == 3
    first, second, third = problems(result)
    assert first.startswith(f"{path}:2: inputs.a: './nowhere': there is no such directory")
    assert second.startswith(f"{path}:3: inputs.b: {tmp_path}/broken has no safetensors file")
    assert third.startswith(f"{path}:5: inputs.d: './xxx")


@pytest.mark.usefixtures("nothing_read")
def test_steps_are_all_looked_at(family: dict[str, Path], make_model: Make, tmp_path: Path) -> None:
    family["small"] = make_model(name="small", vocab_size=32, **QUICK)
    steps = """
steps:
  one: {lines: {base: base, tuned: small, alpha: 0.5}}
  two: {grow: {model: base, width: 7, layers: 3-9}}
  three: {lines: {base: one, tuned: two, alpha: 0.5}}
  four: {merge: {models: [a, b], base: base, method: ties, density: [0.5, 2]}}
  five: {grow: {model: vector, factor: 2}}
  vector: {task_vector: {base: base, tuned: a}}
  six: {apply: {base: base, vectors: [vector, a]}}
  seven: {compose: {blocks: [{model: a, layers: 0-4}]}}
  eight: {merge: {models: [a, b], base: base, method: slerp, t: [0, 2]}}
  nine: {merge: {models: [a], base: base, method: dare_ties}}
"""
    path = recipe(tmp_path, steps, **family)
    result = surgery("run", path, "-o", tmp_path / "out")
    assert result.exit_code == 3
    found = [line.removeprefix(str(path)) for line in problems(result)]
    starts = [
        ":7: steps.one.lines: model.embed_tokens.weight is [64, 16] in",
        ":7: steps.one.lines: lm_head.weight is [64, 16] in",
        ":8: steps.two.grow: layers: 3-9 isn't among the 4 layers, which are 0 to 3",
        ":10: steps.four.merge: density is 2, and has to be in (0, 1]",
        ":11: steps.five.grow: vector is a task vector, and grow takes a model there",
        ":13: steps.six.apply: a is a model, and apply takes a task vector there",
        ":14: steps.seven.compose: layers: 0-4 isn't among the 4 layers, which are 0 to 3",
        ":15: steps.eight.merge: slerp merges 1 model beside the base, and got 2",
        ":16: steps.nine.merge: density has to be given",
    ]
    for start in starts:
        assert sum(line.startswith(start) for line in found) == 1, (start, found)
    assert not any("steps.three" in line for line in found)
    assert not (tmp_path / "out").exists()


def test_one_kind_of_problem_keeps_its_exit_code(family: dict[str, Path], tmp_path: Path) -> None:
    steps = "steps: {g: {grow: {model: base, factor: 0.5}}}"
    result = surgery("run", recipe(tmp_path, steps, **family), "-o", tmp_path / "out")
    assert result.exit_code == 2
    steps = "steps: {g: {grow: {model: base}}}"
    result = surgery("run", recipe(tmp_path, steps, **family))
    assert result.exit_code == 2
    assert problems(result) == ["where is g to be written? Give -o OUT, or the step a `write: OUT`"]


@pytest.mark.parametrize("dry", [True, False])
def test_targets_that_would_do_harm(
    dry: bool, family: dict[str, Path], tmp_path: Path, nothing_read: None
) -> None:
    """Before anything is read; an input of one step may not be the target of another."""
    more = ["--dry-run"] if dry else []
    steps = """
steps:
  one: {lines: {base: base, tuned: a, alpha: 0.5}, write: ONE}
  two: {lines: {base: base, tuned: b, alpha: 0.5}, write: TWO}
"""
    kept = files_in(tmp_path)

    def run(one: Path, two: Path, *args: object) -> tuple[int, list[str]]:
        text = steps.replace("ONE", str(one)).replace("TWO", str(two))
        result = surgery("run", recipe(tmp_path, text, **family), *args, *more)
        return result.exit_code, problems(result)

    out = tmp_path / "out"
    assert run(out, out / "in") == (
        5, [f"one and two would be written to {out} and {out}/in, one in the other"],
    )  # fmt: skip
    assert run(out, tmp_path / "x", "-o", out)[0] == 5
    for place in (family["b"], family["b"] / "in", family["base"]):
        code, found = run(place, out, "--overwrite")
        assert code == 5
        assert any("is, contains or lies inside the input" in text for text in found)
    out.mkdir()
    (out / "file").touch()
    code, found = run(tmp_path / "x", out)
    assert (code, len(found)) == (5, 1)
    assert "exists already" in found[0]
    for impossible in (out / "file" / "x", out / ("x" * 300)):
        code, found = run(tmp_path / "x", impossible)
        assert (code, len(found)) == (5, 1)
        assert f"{impossible} can't be written: " in found[0]
    (out / "file").unlink()
    out.rmdir()
    (tmp_path / "recipe.yml").unlink()
    assert files_in(tmp_path) == kept


def test_overwrite_replaces_as_a_whole(family: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").touch()
    path = recipe(
        tmp_path, "steps: {s: {lines: {base: base, tuned: a, alpha: 0, beta: 0}}}", **family
    )
    done("run", path, "-o", tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert weights(tmp_path / "out") == weights(family["base"])


@pytest.mark.usefixtures("nothing_read")
def test_a_dry_run_reads_headers_and_writes_nothing(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    base, a = (open_checkpoint(family[name]) for name in ("base", "a"))
    write(task_vector(base, a), tmp_path / "tau")
    monkeypatch.setattr(files.InputFile, "read_into", lambda *_: pytest.fail("a tensor was read"))
    steps = f"""
steps:
  merged: {{merge: {{models: [a, b], base: base, method: ties, lines: auto, lambda: 0.5}}}}
  applied: {{apply: {{base: base, vectors: [tau]}}, write: {tmp_path}/applied}}
  grown: {{grow: {{model: merged, factor: 1.5, choose: norm}}}}
  deep: {{expand: {{model: grown, copies: 2}}, write: {tmp_path}/deep}}
"""
    path = recipe(tmp_path, steps, tau=tmp_path / "tau", **family)
    kept = files_in(tmp_path)
    told = json.loads(done("run", path, "--dry-run", "--json").stdout)
    assert told["out"] == str(tmp_path / "deep")
    assert told["steps"]["applied"]["out"] == str(tmp_path / "applied")
    assert told["bytes_needed"] > told["steps"]["applied"]["bytes_needed"]
    assert told["memory_peak"] > 0 < len(told["tensors"]["computed"])
    shown = done("run", path, "--dry-run").stdout
    assert f"Would write to {tmp_path}/deep" in shown
    assert f"Would write to {tmp_path}/applied" in shown
    done("apply", family["base"], tmp_path / "tau", "-o", tmp_path / "x", "--dry-run")
    assert files_in(tmp_path) == kept


# Proofs.


def test_growth_is_proved_unless_it_says_not_to(family: dict[str, Path], tmp_path: Path) -> None:
    steps = """
steps:
  grown: {grow: {model: base, factor: 1.5}}
  deeper: {expand: {model: grown, copies: 2}}
  other: {grow: {model: deeper, factor: 2, layers: 0, uniform: true, verify: false}}
require:
  - same: [base, grown]
  - {compare: [base, a], at_most: {top1: 1}, at_least: {max_difference: 0.001}}
"""
    path = recipe(tmp_path, steps, **family)
    told = json.loads(done("run", path, "-o", tmp_path / "out", "--json").stdout)["verification"]
    assert told["passed"] is True
    assert [one["name"] for one in told["checks"]] == [
        "deeper computes what grown does", "grown computes what base does", "a near base",
    ]  # fmt: skip
    assert all(one["holds"] for one in told["checks"])
    assert told["checks"][1]["certificate"]["grown_mlps"] == 4
    assert told["checks"][1]["logits"]["noise_floor"] > 0
    assert told["checks"][2]["certificate"] is None
    assert told["checks"][2]["required"]["at_most"] == {"top1": 1.0}
    shown = done("run", path, "-o", tmp_path / "x", "--no-verify").stdout
    assert "grown computes what base does" in shown
    assert "deeper computes" not in shown


@pytest.mark.parametrize("out", ["out", None])
def test_what_doesnt_hold_is_all_told_and_nothing_is_written(
    out: str | None, family: dict[str, Path], tmp_path: Path
) -> None:
    steps = f"""
steps:
  soft: {{lines: {{base: base, tuned: a, alpha: 0.5}}, write: {tmp_path}/soft}}
  grown: {{grow: {{model: soft, factor: 1.5}}, write: {tmp_path}/grown}}
require:
  - {{compare: [base, soft], at_most: {{kl_mean: 1.0e-9, max_difference: 1.0e+9}}}}
  - {{compare: [base, soft], at_least: {{top1: 1}}}}
  - same: [base, soft]
"""
    path = recipe(tmp_path, steps, **family)
    report = tmp_path / "report.xml"
    before = {p.name for p in tmp_path.iterdir()}
    where = [] if out is None else ["-o", tmp_path / out]
    result = surgery("run", path, "--report", report, *where, "--json")
    assert result.exit_code == 6
    told = json.loads(result.stdout)
    assert told["out"] is None
    assert not all(check["holds"] for check in told["checks"])
    found = [line.removeprefix(str(path)) for line in problems(result)]
    assert found[0].startswith(":9: require[0]: kl_mean is ")
    assert found[0].endswith(", and has to be at most 1e-09")
    assert found[1].startswith(":10: require[1]: top1 is ")
    assert found[1].endswith(", and has to be at least 1")
    assert all(line.startswith(":11: require[2]: ") for line in found[2:-1])
    assert found[-1].startswith("and ")  # a wrong pair has more problems than are shown
    assert {p.name for p in tmp_path.iterdir()} - before == {"report.xml"}
    suites = ElementTree.parse(report).getroot()
    assert suites.attrib == {"tests": "4", "failures": "3", "errors": "0"}
    cases = suites.findall("testsuite/testcase")
    assert [case.find("failure") is None for case in cases] == [True, False, False, False]
    assert cases[0].get("name") == "grown computes what soft does"
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.get("message", "").startswith(f"{path}:9: require[0]: kl_mean is ")
    assert "differ by at most" in (cases[1].findtext("system-out") or "")


def test_a_report_of_what_holds(family: dict[str, Path], tmp_path: Path) -> None:
    path = recipe(tmp_path, "steps: {g: {grow: {model: base, factor: 2}}}", **family)
    done("run", path, "-o", tmp_path / "out", "--report", tmp_path / "r.xml", "--no-logits")
    suites = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert suites.attrib == {"tests": "1", "failures": "0", "errors": "0"}
    for place, said in (
        (tmp_path / "no" / "r.xml", "there is no directory"),
        (tmp_path, "that is a directory"),
        (tmp_path / "out" / "r.xml", "which is written as a whole"),
        (family["base"] / "r.xml", "which is an input"),
        (path, "would replace the recipe"),
    ):
        result = surgery("run", path, "-o", tmp_path / "out", "--overwrite", "--report", place)
        assert result.exit_code == 5
        assert said in problems(result)[0]


def test_requirements_that_cant_be_looked_at(
    family: dict[str, Path], tmp_path: Path, nothing_read: None
) -> None:
    steps = """
steps:
  vector: {task_vector: {base: base, tuned: a}}
  made: {apply: {base: base, vectors: [vector]}}
require:
  - same: [base, vector]
  - {compare: [base, made], at_most: {kl_mean: 1}}
"""
    path = recipe(tmp_path, steps, **family)
    for more in ([], ["--dry-run"]):
        result = surgery("run", path, "-o", tmp_path / "out", "--no-logits", *more)
        assert result.exit_code == 2
        assert [line.removeprefix(str(path)) for line in problems(result)] == [
            ":9: require[0]: vector is a task vector, which computes nothing",
            ":10: require[1]: this takes logits, which are left out",
        ]


def test_same_is_never_found_of_what_isnt(family: dict[str, Path], tmp_path: Path) -> None:
    """Not of a growth of something else, and not of two growths in a row taken for one."""
    steps = """
steps:
  grown: {grow: {model: base, factor: 2, verify: false}}
  twice: {expand: {model: grown, copies: 2, verify: false}}
  soft: {lines: {base: base, tuned: a, alpha: 0.9}}
  last: {grow: {model: soft, factor: 2, verify: false}}
require: [{same: [a, grown]}, {same: [base, last]}, {same: [a, twice]}]
"""
    path = recipe(tmp_path, steps, **family)
    result = surgery("run", path, "-o", tmp_path / "out", "--no-logits", "--report", tmp_path / "r")
    assert result.exit_code == 6
    assert ElementTree.parse(tmp_path / "r").getroot().get("failures") == "3"


def test_growth_of_what_was_grown_is_proved_step_by_step(
    family: dict[str, Path], tmp_path: Path
) -> None:
    steps = """
steps:
  wide: {grow: {model: base, factor: 1.5, verify: false}}
  deep: {expand: {model: wide, copies: 2, verify: false}}
  last: {grow: {model: deep, factor: 2}}
require: [{same: [base, last]}, {same: [last, last]}]
"""
    path = recipe(tmp_path, steps, **family)
    told = json.loads(done("run", path, "-o", tmp_path / "out", "--json", "--no-logits").stdout)
    assert [one["name"] for one in told["verification"]["checks"]] == [
        "wide computes what base does", "deep computes what wide does",
        "last computes what deep does", "last computes what last does",
    ]  # fmt: skip
    assert all(one["certificate"]["failures"] == [] for one in told["verification"]["checks"])


def test_what_lies_on_disk_is_certified_again(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = importlib.import_module(
        "surgery.writing.write"
    )  # the package's `write` is a function
    path = recipe(tmp_path, "steps: {g: {grow: {model: base, factor: 2}}}", **family)
    fill = writing._fill

    def damaged(layout: Any, stage: Any, *args: Any) -> Any:
        found = fill(layout, stage, *args)
        shard = stage.files / "model.safetensors"
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        return found

    monkeypatch.setattr(writing, "_fill", damaged)
    before = {p.name for p in tmp_path.iterdir()}
    result = surgery("run", path, "-o", tmp_path / "out", "--no-logits")
    assert result.exit_code == 6
    assert {p.name for p in tmp_path.iterdir()} == before


# The record and the card.


def test_the_record_has_the_recipe_and_every_step_once(
    family: dict[str, Path], tmp_path: Path
) -> None:
    steps = """
steps:
  merged: {merge: {models: [a, b], base: base, method: ties, density: {mlp: 0.5, default: 0.1}}}
  soft: {lines: {base: base, tuned: merged, alpha: 0.5}}
  both: {merge: {models: [soft, merged], method: linear}}
  grown: {grow: {model: both, factor: 1.5, verify: false}}
"""
    path = recipe(tmp_path, steps, **family)
    done("run", path, "-o", tmp_path / "out", "--set", "steps.soft.lines.alpha=0.25")
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["recipe"]["inputs"] == {name: str(place) for name, place in family.items()}
    assert record["recipe"]["steps"]["soft"] == {
        "lines": {"base": "base", "tuned": "merged", "alpha": 0.25}
    }
    edits = record["edits"]
    assert [edit["operation"] for edit in edits] == ["merge", "lines", "merge", "grow"]
    assert [
        {role: source.get("reference", source.get("step")) for role, source in e["inputs"].items()}
        for e in edits
    ] == [
        {"base": str(family["base"]), "model_1": str(family["a"]), "model_2": str(family["b"])},
        {"base": str(family["base"]), "tuned": "merged"},
        {"model_1": "soft", "model_2": "merged"},
        {"base": "both"},
    ]
    assert edits[0]["parameters"]["density"] == "differs by tensor"
    assert edits[1]["parameters"]["alpha"] == 0.25
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: ["base", "a", "b"]' in card
    assert "- **lines** of base `base`, tuned `merged`: alpha = 0.25" in card
    assert str(tmp_path) not in card.split("The command:")[0]


def test_the_same_recipe_gives_the_same_files(family: dict[str, Path], tmp_path: Path) -> None:
    steps = "steps: {m: {merge: {models: [a, b], base: base, method: della, density: 0.5}}}"
    path = recipe(tmp_path, steps, **family)
    for out in ("x", "y"):
        done("run", path, "-o", tmp_path / out)
    one, two = files_in(tmp_path / "x"), files_in(tmp_path / "y")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"surgery.json", "README.md"}


def test_sharding_of_the_output(family: dict[str, Path], tmp_path: Path) -> None:
    path = recipe(
        tmp_path, "steps: {m: {lines: {base: base, tuned: a, alpha: 0, beta: 0}}}", **family
    )
    done("run", path, "-o", tmp_path / "out", "--max-shard-size", "8KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert weights(tmp_path / "out") == weights(family["base"])
    with safe_open(shards[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


# Changes on the command line.


def test_set(family: dict[str, Path], tmp_path: Path) -> None:
    steps = """
steps:
  m: {merge: {models: [a, {model: b, weight: 1}], base: base, method: ties}}
"""
    path = recipe(tmp_path, steps, **{**family, "base": "./nowhere"})
    changes = [
        f"inputs.base={family['base']}",
        "steps.m.merge.method=task_arithmetic",
        "steps.m.merge.models.1.weight=[0.25, 0.5]",
        "steps.m.merge.normalize=true",
        "steps.m.merge.models.0={model: a, weight: 1e-1}",
        "output=m",
    ]
    told = json.loads(
        done("run", path, "-o", tmp_path / "out", "--json",
             *(word for change in changes for word in ("--set", change))).stdout
    )  # fmt: skip
    assert told["recipe"]["steps"]["m"]["merge"] == {
        "models": [{"model": "a", "weight": 0.1}, {"model": "b", "weight": [0.25, 0.5]}],
        "base": "base",
        "method": "task_arithmetic",
        "normalize": True,
    }
    assert told["edits"][0]["parameters"]["normalize"] is True
    for change, said in (
        ("steps.m.mrge.method=x", "there is no key 'mrge': did you mean merge?"),
        ("steps.m.merge.models.2=a", "there is no key '2': there are 0, 1"),
        ("steps.m.merge.method.x=a", "there is no key 'x': there are none"),
        ("inputs.bases=x", "there is no input 'bases': did you mean base?"),
        ("inputs.a=[", "this isn't YAML"),
    ):
        result = surgery("run", path, "-o", tmp_path / "x", "--set", change)
        assert result.exit_code == 3, change
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    result = surgery("run", path, "-o", tmp_path / "x", "--set", "nothing")
    assert result.exit_code == 2
    assert "give it as NAME=VALUE" in result.stderr


def test_what_to_do_about_vocabularies_is_said_for_recipes(
    family: dict[str, Path], make_model: Make, tmp_path: Path
) -> None:
    """Not with an argument or an option, which recipes don't have."""
    family["small"] = make_model(name="small", vocab_size=32, **QUICK)
    steps = """
steps:
  one: {lines: {base: base, tuned: small, alpha: 0.5}}
  two: {merge: {models: [a, small], method: linear}}
  three: {merge: {models: [a], method: linear, pad_to_multiple_of: 8}}
"""
    result = surgery("run", recipe(tmp_path, steps, **family), "-o", tmp_path / "out", "--dry-run")
    said = "\n".join(problems(result))
    assert "a merge with method: task_arithmetic, lines: [alpha, beta] and tokenizer: uni" in said
    assert "give the merge tokenizer: base, union or the name of a model to have rows" in said
    assert "give the merge tokenizer: base with it to keep the base's" in said
    assert "--tokenizer" not in said
    assert "tokenizer='base'" not in said


@pytest.mark.parametrize("dry", [False, True])
def test_conditions_that_fit_nothing_are_noted(
    family: dict[str, Path], tmp_path: Path, dry: bool
) -> None:
    steps = """
steps:
  merged:
    merge:
      models: [a, {model: b, weight: {router: 2, mlp: 3, default: 1}}]
      base: base
      method: ties
      density: {"*.mlp.dwn_proj.*": 0.3, "*.mlp.down_proj.*": 0.4, default: 0.2}
"""
    path = recipe(tmp_path, steps, **family)
    result = surgery("run", path, "-o", tmp_path / "o", *(["--dry-run"] if dry else []))
    assert result.exit_code == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if line.startswith("note:")]
    lines = {text: n for n, text in enumerate(path.read_text().splitlines(), 1)}
    weights, densities = (
        next(n for text, n in lines.items() if part in text) for part in ("router", "dwn_proj")
    )
    assert notes == [
        f"note: {path}:{densities}: density: no tensor fits '*.mlp.dwn_proj.*'",
        f"note: {path}:{weights}: weight: no tensor fits 'router'",
    ]
