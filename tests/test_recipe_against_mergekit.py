"""mergekit's configurations beside mergekit 0.1.5 itself: the same file, tensor by tensor. Skipped
where MERGEKIT_PYTHON doesn't name a Python that has it; see test_merge_against_mergekit.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.recipe import load_recipe, run_recipe

PYTHON = os.environ.get("MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="MERGEKIT_PYTHON isn't set")

# Side by side. {a}, {b}, {c} are models of six blocks.

ALIKE: dict[str, str] = {
    "linear with gradients and filters": """
merge_method: linear
models:
  - model: {a}
    parameters:
      weight:
        - {{filter: self_attn, value: [0.1, 0.9]}}
        - {{filter: mlp, value: [1, 0, 0.5]}}
        - value: 0.3
  - model: {b}
    parameters: {{weight: [0.7, 0.2, 0.4, 0.5]}}
dtype: float32
""",
    "linear with everything in one place": """
merge_method: linear
models: [{{model: {a}}}, {{model: {b}}}, {{model: {c}}}]
parameters: {{weight: [0.25, 1], normalize: false, int8_mask: true}}
""",
    "linear with a base that isn't among the models": """
merge_method: linear
base_model: {c}
models: [{{model: {a}, parameters: {{weight: 0.2}}}}, {{model: {b}}}]
parameters: {{weight: {{filter: "*", value: 0.7}}}}
""",
    "karcher with a base that isn't among the models": """
merge_method: karcher
base_model: {c}
models: [{{model: {a}}}, {{model: {b}}}]
""",
    "linear with the base last": """
merge_method: linear
base_model: {c}
models:
  - {{model: {a}, parameters: {{weight: 0.2}}}}
  - {{model: {b}, parameters: {{weight: [0.3, 0.6]}}}}
  - {{model: {c}, parameters: {{weight: 0.5}}}}
""",
    "slerp over slices": """
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 6]}}
      - {{model: {b}, layer_range: [0, 6]}}
merge_method: slerp
base_model: {a}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "slerp with the base second, cut in two": """
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 3]}}
      - {{model: {b}, layer_range: [0, 3]}}
    parameters: {{t: [0.1, 0.9]}}
  - sources:
      - {{model: {a}, layer_range: [3, 6]}}
      - {{model: {b}, layer_range: [3, 6]}}
merge_method: slerp
base_model: {b}
parameters:
  t: [{{filter: mlp, value: [0.2, 0.8]}}, {{value: 0.4}}]
""",
    "ties with a gradient for each model": """
merge_method: ties
base_model: {c}
models:
  - model: {a}
    parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}
  - model: {b}
    parameters:
      density: 0.33
      weight: [{{filter: mlp, value: 0.5}}, {{value: 0}}]
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
""",
    "ties with a base among the models": """
merge_method: ties
base_model: {c}
models:
  - model: {a}
    parameters: {{density: 0.5, weight: 0.5}}
  - model: {c}
  - model: {b}
    parameters: {{density: 0.5, weight: [0.1, 0.6]}}
parameters: {{normalize: false, lambda: [0.5, 2]}}
""",
    "ties with a density that isn't given": """
merge_method: ties
base_model: {c}
models:
  - {{model: {a}, parameters: {{weight: 0.5}}}}
  - {{model: {b}, parameters: {{weight: 0.5, density: {{filter: mlp, value: 0.4}}}}}}
""",
    "task arithmetic at every level": """
merge_method: task_arithmetic
base_model: {c}
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 2], parameters: {{weight: [{{filter: mlp, value: 0.9}}]}}}}
      - {{model: {b}, layer_range: [2, 4]}}
      - {{model: {c}, layer_range: [1, 3]}}
    parameters: {{weight: [{{filter: self_attn, value: [0.1, 0.3]}}], lambda: 0.5}}
  - sources:
      - {{model: {c}, layer_range: [0, 3]}}
      - {{model: {a}, layer_range: [3, 6], parameters: {{weight: [0, 1]}}}}
      - {{model: {b}, layer_range: [0, 3]}}
parameters: {{weight: 0.7, lambda: [1, 0.2], normalize: false}}
dtype: float32
""",
    "passthrough": """
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 4]}}]
  - sources: [{{model: {b}, layer_range: [2, 6]}}]
dtype: float32
""",
    "new blocks by hand": """
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 3]}}]
  - sources:
      - model: {a}
        layer_range: [2, 3]
        parameters:
          scale:
            - {{filter: o_proj, value: 0.0}}
            - {{filter: down_proj, value: 0.0}}
            - value: 1.0
  - sources: [{{model: {a}, layer_range: [3, 6]}}]
  - sources:
      - model: {a}
        layer_range: [5, 6]
        parameters: {{scale: [{{filter: o_proj, value: 0}}, {{filter: down_proj, value: 0}}]}}
""",
    "scaled slices": """
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 3], parameters: {{scale: [0.5, 1, 2]}}}}]
  - sources: [{{model: {b}, layer_range: [1, 2]}}]
    parameters: {{scale: [3, 4]}}
  - sources: [{{model: {c}, layer_range: [2, 6], parameters: {{scale: {{filter: q_proj, value: 9}}}}}}]
parameters: {{scale: [{{filter: norm, value: [0.25, 0.75]}}]}}
""",
    "gradients in each slice": """
merge_method: linear
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 4], parameters: {{weight: [0, 1]}}}}
      - {{model: {b}, layer_range: [0, 4], parameters: {{weight: [1, 0.25]}}}}
  - sources:
      - {{model: {b}, layer_range: [5, 6]}}
      - {{model: {c}, layer_range: [0, 1], parameters: {{weight: [{{filter: mlp, value: 3}}]}}}}
  - sources:
      - {{model: {a}, layer_range: [1, 3]}}
      - {{model: {c}, layer_range: [4, 6]}}
parameters: {{weight: [0.2, 0.8, 0.5]}}
dtype: float32
""",
    "several models on the sphere": """
merge_method: multislerp
base_model: {c}
models:
  - {{model: {a}, parameters: {{weight: [0.3, 0.6]}}}}
  - {{model: {b}, parameters: {{weight: 0.5}}}}
""",
    "nuslerp without a base": """
merge_method: nuslerp
models:
  - {{model: {a}, parameters: {{weight: [0.3, 0.6]}}}}
  - {{model: {b}, parameters: {{weight: 0.5}}}}
""",
    "model stock": """
merge_method: model_stock
base_model: {c}
models: [{{model: {a}}}, {{model: {b}}}]
""",
    "sce": """
merge_method: sce
base_model: {c}
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{select_topk: [0.2, 1]}}
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: {c}
models:
  - {{model: {a}, parameters: {{weight: 0.5, density: 0.6, gamma: [0.1, 0.3]}}}}
  - {{model: {b}, parameters: {{weight: 0.5, gamma: 0.2}}}}
""",
    "the model as a table": """
merge_method: task_arithmetic
base_model: {{model: {{path: {c}}}}}
models:
  - {{model: {{model: {{path: {a}, revision: null}}, lora: null}}, parameters: {{weight: 0.5}}}}
  - {{model: {{model: {{path: {b}}}}}, parameters: {{weight: 0.25}}}}
""",
}
# Files of several documents, {a} to {c} as above.
MULTI: dict[str, str] = {
    "two": """
name: soup
merge_method: linear
models: [{{model: {a}, parameters: {{weight: [0, 1]}}}}, {{model: {b}, parameters: {{weight: 1}}}}]
---
merge_method: slerp
base_model: soup
models: [{{model: soup}}, {{model: {c}}}]
parameters: {{t: [0.2, 0.8]}}
""",
    "one after another": """
name: first
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 1.0}}}}
  - {{model: {b}, parameters: {{weight: [0, 1]}}}}
---
merge_method: slerp
base_model: first
models: [{{model: first}}, {{model: second}}]
parameters: {{t: [0, 0.5, 1]}}
---
name: second
merge_method: task_arithmetic
base_model: {c}
models: [{{model: first, parameters: {{weight: 0.5}}}}, {{model: {a}, parameters: {{weight: 0.5}}}}]
""",
    "slices of what was merged": """
name: soup
merge_method: linear
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{weight: 1}}
---
name: tall
merge_method: passthrough
slices:
  - sources: [{{model: soup, layer_range: [0, 5]}}]
  - sources: [{{model: {c}, layer_range: [3, 6]}}]
---
merge_method: passthrough
slices:
  - sources: [{{model: tall, layer_range: [0, 8], parameters: {{scale: [1, 0.5]}}}}]
  - sources: [{{model: tall, layer_range: [7, 8]}}]
""",
}
SCRIPT = """
import json, sys, traceback
from mergekit.scripts import multimerge, run_yaml
for arguments in json.load(open(sys.argv[1])):
    command = multimerge if "--out-path" in arguments else run_yaml
    try:
        command.main(arguments, standalone_mode=False)
    except Exception:
        traceback.print_exc()
"""


def runs(folder: Path, models: dict[str, str]) -> list[list[str]]:
    """The configurations, written as `NAME.yml`, and for every merge mergekit-yaml's arguments.

    One file of two documents goes to mergekit-multi. The others are run document by document,
    with paths for names: 0.1.5 stops at them itself ("Circular reference detected").
    """
    places = ["--intermediate-dir", f"{folder}/parts", "--out-path", f"{folder}/two"]
    made = [[f"{folder}/two.yml", *places]]
    for name, text in {**ALIKE, **MULTI}.items():
        (folder / f"{name}.yml").write_text(text.format(**models))
        if name == "two":
            continue
        single = [part.format(**models) for part in text.split("---\n")]
        called = {n: part for part in single if (n := part.split()[1]) and "name:" in part}
        unnamed = [part for part in single if "name:" not in part]
        for own, part in [*called.items(), (name, unnamed[0])]:
            body = "\n".join(line for line in part.splitlines() if not line.startswith("name:"))
            for other in called:
                body = re.sub(rf": {other}\b", f": {folder}/{other}", body)
            (folder / f"{own} alone.yml").write_text(body)
            made.append([f"{folder}/{own} alone.yml", f"{folder}/{own}"])
    return made


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configurations, `NAME.yml`, and what mergekit made of them, `NAME`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("mergekit")
    models = {}
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
        model.save_pretrained(folder / name)
        models[name] = str(folder / name)
    (folder / "runs.json").write_text(json.dumps(runs(folder, models)))
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, folder / "runs.json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    (folder / "errors").write_text(done.stderr)
    return folder


@pytest.mark.parametrize("name", [*ALIKE, *MULTI])
def test_beside_mergekit(name: str, theirs: Path, tmp_path: Path) -> None:
    assert (theirs / name).is_dir(), (theirs / "errors").read_text()[-3000:]
    run_recipe(load_recipe(theirs / f"{name}.yml"), tmp_path / "out")
    wanted = {
        k: v for path in (theirs / name).glob("*.safetensors") for k, v in load_file(path).items()
    }
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert torch.allclose(found[tensor], value, rtol=1e-6, atol=5e-6), tensor
    ours, other = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "out", theirs / name)
    )
    assert ours["num_hidden_layers"] == other["num_hidden_layers"]
