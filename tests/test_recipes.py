"""Every recipe in recipes/, run by the command in its first line, on tiny models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from surgery.commands.main import app
from typer.testing import CliRunner

from surgery import extract_lora, open_checkpoint, write

RECIPES = sorted(Path(__file__).parents[1].glob("recipes/*.yaml"))
DEPTH = 24
"""Blocks of the models that the recipes name."""


@pytest.fixture
def fine_tunes(make_model: Callable[..., Path]) -> Callable[[str], Path]:
    """A model by the name of an input: `base`, or the base with small updates."""
    base = make_model(name="base", num_hidden_layers=DEPTH, tie_word_embeddings=True)

    def model(name: str) -> Path:
        if name == "base":
            return base
        made = base.parent / name
        if name == "adapter":
            pair = (open_checkpoint(path) for path in (base, model("tuned")))
            write(extract_lora(*pair, rank=2), made)
        if not made.exists():
            torch.manual_seed(sum(name.encode()))
            made.mkdir()
            (made / "config.json").write_bytes((base / "config.json").read_bytes())
            weights = load_file(base / "model.safetensors")
            tuned = {k: v + 0.02 * torch.randn(v.shape) for k, v in weights.items()}
            save_file(tuned, made / "model.safetensors", metadata={"format": "pt"})
        return made

    return model


def test_there_are_ten_and_more() -> None:
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_runs_as_its_first_line_says(
    recipe: Path,
    fine_tunes: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *_ = recipe.read_text().splitlines()
    command = shlex.split(first.removeprefix("# "))
    assert command[:3] == ["surgery", "run", f"recipes/{recipe.name}"]
    inputs = yaml.safe_load(recipe.read_text())["inputs"]
    changes = [f"--set=inputs.{name}={fine_tunes(name)}" for name in inputs]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(recipe.parent)
    result = CliRunner().invoke(app, [*command[1:], *changes])
    assert result.exit_code == 0, result.output
    out = tmp_path / command[command.index("-o") + 1]
    record = json.loads((out / "surgery.json").read_text())
    assert [*record["recipe"]["steps"]]
    if recipe.stem == "lora-extract":
        assert (out / "adapter_model.safetensors").exists()
    else:
        assert len(open_checkpoint(out)) > 0
    if "--report" in command:
        assert (tmp_path / command[command.index("--report") + 1]).exists()
