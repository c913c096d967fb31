"""Our numbers beside mergekit 0.1.5's, in float32. It pins its dependencies, so it lives in an
environment of its own: MERGEKIT_PYTHON names that environment's Python; skipped without.

    python -m venv mk && mk/bin/pip install mergekit==0.1.5
    MERGEKIT_PYTHON=mk/bin/python pytest tests/test_merge_against_mergekit.py

Where results differ and why is in docs/mergekit.md.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import case, merged
from safetensors.torch import load_file, save_file

from surgery import merge, open_checkpoint
from surgery.merging.methods import METHODS

PYTHON = os.environ.get("MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="MERGEKIT_PYTHON isn't set")

SCRIPT = """
import json, sys
from safetensors.torch import load_file, save_file
from mergekit.merge_methods import merge_tensors
folder = sys.argv[1]
tensors = load_file(folder + "/inputs.safetensors")
made = {}
for name, case in json.load(open(folder + "/cases.json")).items():
    inputs = [tensors[key] for key in case["inputs"]]
    how = {"parameters": case["parameters"]}
    if case["based"]:
        how["base_index"] = 0
    made[name] = merge_tensors(inputs, case["method"], **how).contiguous()
save_file(made, folder + "/outputs.safetensors")
"""

# name: (method, number of models, with base, ours, mergekit's where they are called otherwise)
CASES: dict[str, tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", 3, False, {"weight": [0.2, 0.5, 0.9]}, {}),
    "linear, plain": ("linear", 3, False, {"weight": [0.2, 0.5, 0.9], "normalize": False}, {}),
    "slerp": ("slerp", 1, True, {"t": 0.3}, {}),
    "nuslerp": ("nuslerp", 2, False, {"weight": [0.3, 0.9]}, {}),
    "nuslerp, base": ("nuslerp", 2, True, {"weight": [0.3, 0.9]}, {}),
    "multislerp": ("multislerp", 3, False, {"weight": [0.2, 0.5, 0.9]}, {}),
    "multislerp, base": ("multislerp", 3, True, {"weight": [0.2, 0.5, 0.9]}, {}),
    "karcher": ("karcher", 3, False, {}, {}),
    "model_stock": ("model_stock", 3, True, {}, {}),
    "task_arithmetic": (
        "task_arithmetic", 3, True, {"weight": [0.2, -0.5, 0.9], "lambda": 0.4}, {},
    ),
    "task_arithmetic, mean": (
        "task_arithmetic", 3, True, {"weight": [0.2, -0.5, 0.9], "normalize": True}, {},
    ),
    "ties": ("ties", 3, True, {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 1.0]}, {}),
    "ties, sum": (
        "ties", 3, True,
        {"weight": [0.2, -0.5, 0.9], "density": 0.3, "normalize": False, "lambda": 0.7}, {},
    ),
    "breadcrumbs": (
        "breadcrumbs", 3, True, {"weight": [0.2, 0.5, 0.9], "density": 0.6, "gamma": 0.1}, {},
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties", 3, True, {"weight": 0.5, "density": 0.6, "gamma": 0.1}, {},
    ),
    "dare_linear, all": ("dare_linear", 3, True, {"weight": 0.5, "density": 1.0}, {}),
    "dare_ties, all": ("dare_ties", 3, True, {"weight": 0.5, "density": 1.0}, {}),
    "della, all": ("della", 3, True, {"weight": 0.5, "density": 1.0}, {}),
    "della_linear, all": ("della_linear", 3, True, {"weight": 0.5, "density": 1.0}, {}),
    "sce": ("sce", 3, True, {"select_topk": 0.4}, {}),
    "sce, all": ("sce", 3, True, {}, {}),
    "nearswap": ("nearswap", 1, True, {"t": 0.05}, {}),
    "ram": ("ram", 3, True, {"epsilon": 0.1}, {}),
    "ramplus_tl": ("ramplus_tl", 3, True, {"epsilon": 0.1}, {}),
    "arcee_fusion": ("arcee_fusion", 1, True, {}, {}),
    "passthrough": ("passthrough", 1, False, {"scale": 0.3}, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("mergekit")
    base, models = inputs()
    tensors = {"base": base, **{f"m{at}": model for at, model in enumerate(models)}}
    save_file(tensors, folder / "inputs.safetensors")
    cases = {}
    for name, (method, count, based, ours, own) in CASES.items():
        parameters = {**ours, **own}
        for parameter in METHODS[method].parameters:
            value = parameters.get(parameter.name)
            if parameter.name == "weight" and value is None and method != "karcher":
                value = 1.0
            if parameter.per_model and value is not None:
                values = value if isinstance(value, list) else [value] * count
                parameters[parameter.name] = values
        cases[name] = {
            "method": method,
            "based": based,
            "inputs": ["base"] * based + [f"m{at}" for at in range(count)],
            "parameters": parameters,
        }
    (folder / "cases.json").write_text(json.dumps(cases))
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "outputs.safetensors")


def inputs() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Far apart, so that what mergekit takes for too small (see docs/mergekit.md) isn't met."""
    return case((40, 30), 3, step=0.3)


@pytest.mark.parametrize("name", CASES)
def test_tensors(name: str, theirs: dict[str, torch.Tensor]) -> None:
    method, count, based, ours, _ = CASES[name]
    base, models = inputs()
    found = merged(method, base if based else None, models[:count], **ours)
    torch.testing.assert_close(found, theirs[name], rtol=0, atol=5e-6)


YAML = """
merge_method: {method}
base_model: {base}
dtype: float32
models:
  - model: {a}
    parameters: {{weight: {wa}, density: 0.5}}
  - model: {b}
    parameters: {{weight: {wb}, density: 0.5}}
"""


def run_mergekit(folder: Path, **values: object) -> dict[str, torch.Tensor]:
    (folder / "config.yml").write_text(YAML.format(**values))
    assert PYTHON is not None
    command = [PYTHON, "-m", "mergekit.scripts.run_yaml", "config.yml", "theirs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "theirs" / "model.safetensors")


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_models(method: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    base, a, b = (make_model(name=f"m{seed}", seed=seed) for seed in range(3))
    theirs = run_mergekit(tmp_path, method=method, base=base, a=a, b=b, wa=0.3, wb=0.6)
    how = {"density": 0.5} if method == "ties" else {}
    models = [open_checkpoint(path) for path in (a, b)]
    found = merge(models, base=open_checkpoint(base), method=method, weight=(0.3, 0.6), **how)
    assert set(found) == set(theirs)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.whole(), theirs[name], rtol=0, atol=2e-6)


def test_lines_is_a_gradient_over_depth(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """mergekit's gradient gives the embedding, the head and the final norm its first value; ours
    gives them alpha, as LiNeS's own implementation does."""
    how = {"num_hidden_layers": 4}
    base, a, b = (make_model(name=f"m{seed}", seed=seed, **how) for seed in range(3))
    gradient = "[0.2, 0.8]"
    theirs = run_mergekit(
        tmp_path, method="task_arithmetic", base=base, a=a, b=b, wa=gradient, wb=gradient
    )
    models = [open_checkpoint(path) for path in (a, b)]
    found = merge(models, base=open_checkpoint(base), method="task_arithmetic", lines=(0.2, 0.6))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.whole(), theirs[name], rtol=0, atol=2e-6)
