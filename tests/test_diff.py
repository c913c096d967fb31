"""surgery.diff against formulas written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery import diff, open_checkpoint

Make = Callable[..., Path]


def test_norms_cosines_and_ranks(make_model: Make) -> None:
    paths = make_model(name="a"), make_model(name="b", seed=1)
    a, b = (load_file(path / "model.safetensors") for path in paths)
    found = diff(*map(open_checkpoint, paths), effective_rank=True)
    assert {change.name for change in found.changes} == set(a)
    for change in found.changes:
        x, y = a[change.name].double().flatten(), b[change.name].double().flatten()
        assert change.norm == pytest.approx(float((y - x).norm()), rel=1e-12)
        assert change.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
        assert change.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-9)
        assert not change.equal
        if a[change.name].ndim == 2:
            singular = torch.linalg.svdvals((b[change.name] - a[change.name]).double())
            share = (singular / singular.sum()).tolist()
            entropy = -sum(p * math.log(p) for p in share if p > 0)
            assert change.effective_rank == pytest.approx(math.exp(entropy), rel=1e-4)
    assert not found.identical


def test_a_module_is_its_tensors_as_one_vector(make_model: Make) -> None:
    paths = make_model("gpt2", "a"), make_model("gpt2", "b", seed=1)
    a, b = (load_file(path / "model.safetensors") for path in paths)
    change = diff(*map(open_checkpoint, paths)).modules["transformer.h", "mlp.c_fc", 1]
    names = ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias"]
    tau = torch.cat([(b[n].double() - a[n].double()).flatten() for n in names])
    base = torch.cat([a[n].double().flatten() for n in names])
    assert change.relative == pytest.approx(float(tau.norm() / base.norm()), rel=1e-12)


def test_a_checkpoint_is_identical_with_itself(make_model: Make) -> None:
    path = make_model()
    found = diff(open_checkpoint(path), open_checkpoint(path))
    assert found.identical
    assert all(c.equal and c.norm == 0 and c.cosine == pytest.approx(1) for c in found.changes)


def test_names_shapes_types_and_config(raw_checkpoint: Make) -> None:
    a = {"kept": torch.ones(2), "gone": torch.ones(1), "wide": torch.ones(2), "half": torch.ones(2)}
    b = {
        "kept": torch.ones(2),
        "new": torch.ones(1),
        "wide": torch.ones(3),
        "half": torch.ones(2).half(),
    }
    base = raw_checkpoint(a, name="a", config={"same": 1, "inner": {"x": 1, "y": 2}})
    other = raw_checkpoint(b, name="b", config={"same": 1, "inner": {"x": 3, "y": 2}, "more": None})
    found = diff(open_checkpoint(base), open_checkpoint(other))
    assert found.added == ("new",)
    assert found.removed == ("gone",)
    assert found.reshaped == {"wide": ((2,), (3,))}
    assert found.retyped == {"half": ("F32", "F16")}
    assert found.config == {"inner.x": (1, 3)}
    assert not found.identical


def test_the_heat_map_is_a_picture(make_model: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from surgery.commands.heatmap import draw

    found = diff(
        open_checkpoint(make_model(name="a")), open_checkpoint(make_model(name="b", seed=1))
    )
    draw(found, tmp_path / "map.png", "a to b")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
