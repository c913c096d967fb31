"""Parameters of a recipe that differ from tensor to tensor, by an independent formula."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_raw

from surgery import Checkpoint, open_checkpoint
from surgery.recipe.settings import parse_setting, spot_of


def blocks(depth: int, stack: str = "model.layers", seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"self_attn.q_proj": (4, 4), "mlp.up_proj": (8, 4), "mlp.gate_proj": (8, 4),
              "mlp.down_proj": (4, 8), "input_layernorm": (4,)}  # fmt: skip
    return {
        f"{stack}.{at}.{name}.weight": torch.randn(shape)
        for at in range(depth)
        for name, shape in shapes.items()
    }


def model(folder: Path, depths: dict[str, int]) -> Checkpoint:
    around = {
        "model.embed_tokens.weight": torch.randn(10, 4),
        "model.norm.weight": torch.randn(4),
        "lm_head.weight": torch.randn(10, 4),
    }
    inside = {k: v for stack, depth in depths.items() for k, v in blocks(depth, stack).items()}
    config = {"model_type": "toy", "num_hidden_layers": max(depths.values())}
    return open_checkpoint(save_raw(folder, {**around, **inside}, config=config))


ROLES = {"self_attn": "attention", "mlp": "mlp", "layernorm": "norm", "model.norm": "norm",
         "lm_head": "head", "embed": "embedding"}  # fmt: skip


def wanted(setting: Any, name: str, depths: dict[str, int]) -> float | None:
    """The value of a setting, said once more: by name alone."""
    if isinstance(setting, dict):
        role = next(role for part, role in ROLES.items() if part in name)
        for key, inner in setting.items():
            if key in (role, "default") or ("*" in key and fnmatchcase(name, key)):
                return wanted(inner, name, depths)
        return None
    if not isinstance(setting, list):
        return float(setting)
    position = 1.0 if name in ("model.norm.weight", "lm_head.weight") else 0.0
    for stack, depth in depths.items():
        if name.startswith(f"{stack}."):
            block = int(name.removeprefix(f"{stack}.").split(".")[0])
            position = block / (depth - 1) if depth > 1 else 1.0
    points = [at / (len(setting) - 1) for at in range(len(setting))] if len(setting) > 1 else [0.0]
    for low, high, left, right in zip(points, points[1:], setting, setting[1:], strict=False):
        if low <= position <= high:
            return float(left + (position - low) / (high - low) * (right - left))
    return float(setting[-1])


SETTINGS = [
    0.3,
    2,
    [1, 0],
    [0, 0.5, 0.25, 2],
    [7],
    {"attention": 0.25, "default": 1},
    {"*.0.*": 5, "mlp": [0, 1], "norm": 0.5},
    {"default": [1, 2], "mlp": 9},
    {"*embed*": 3, "head": 4, "*.mlp.*": [1, 3], "default": 0},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "depths", [{"model.layers": 5}, {"model.layers": 1},
               {"encoder.layers": 3, "decoder.layers": 6}], ids=str,
)  # fmt: skip
def test_settings_by_an_independent_formula(
    setting: Any, depths: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = model(tmp_path / "m", depths)
    anatomy = checkpoint.anatomy
    assert anatomy.stacks == depths
    for name in checkpoint:
        found = parse_setting(setting).at(spot_of(name, anatomy.places[name], anatomy))
        expected = wanted(setting, name, depths)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-12)), name


def test_ends_of_a_gradient_are_exact(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "m", {"model.layers": 4})
    anatomy = checkpoint.anatomy
    for values in ([0.1, 0.7], [0.3, 0.9, 0.1, 0.7]):
        for block, value in ((0, values[0]), (3, values[-1])):
            name = f"model.layers.{block}.mlp.up_proj.weight"
            spot = spot_of(name, anatomy.places[name], anatomy)
            assert parse_setting(values).at(spot) == value


def test_depth_counts_inside_spans(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "m", {"model.layers": 6})
    anatomy = checkpoint.anatomy
    found = [
        spot_of(name, anatomy.places[name], anatomy, (3, 1, 2))
        for name in checkpoint
        if "up_proj" in name
    ]
    assert [(spot.span, spot.depth) for spot in sorted(found, key=lambda spot: spot.name)] == [
        (0, 0.0), (0, 0.5), (0, 1.0), (1, 1.0), (2, 0.0), (2, 1.0),
    ]  # fmt: skip
    head = spot_of("lm_head.weight", None, anatomy, (3, 1, 2))
    assert (head.span, head.depth) == (2, 1.0)
