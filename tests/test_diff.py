"""surgery.diff against formulas written here."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import save_raw
from safetensors.torch import load_file, save_file
from surgery.commands import diff as command
from surgery.commands.main import app
from surgery.commands.terminal import plain_console
from typer.testing import CliRunner

from surgery import diff, open_checkpoint
from surgery.operations.diff import Difference

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


def printed(found: Difference, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of so many columns shows."""
    shown = StringIO()
    made = plain_console(file=shown, width=width)
    monkeypatch.setattr(command, "console", lambda: made)
    command._print(found, "base", "other")
    return shown.getvalue()


def changed(path: Path, folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The same model with tensors changed, by a part of their names."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        for part, change in changes.items():
            if part in name:
                tensors[name] = change(tensor)
    return save_raw(folder, tensors, config=json.loads((path / "config.json").read_text()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_figure_is_cut_at_any_width(
    kind: str, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(kind, "base")
    other = changed(
        make_model(kind, "tuned", seed=1),
        tmp_path / "other",
        norm=lambda t: t * 1e7,
        ln_1=torch.exp,
    )
    found = diff(open_checkpoint(base), open_checkpoint(other), effective_rank=True)
    whole = Counter(printed(found, 400, monkeypatch).split())
    figures = Counter({word: n for word, n in whole.items() if "." in word and word[0].isdigit()})
    assert figures.total() > 20
    for width in range(60, 121):
        text = printed(found, width, monkeypatch)
        assert "\N{HORIZONTAL ELLIPSIS}" not in text, width
        assert figures <= Counter(text.split()), width
        assert max(map(len, text.splitlines())) <= width


def test_tables_are_as_wide_as_there_is_room(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another table begins only where one more column has no room."""
    found = diff(
        open_checkpoint(make_model(name="a")), open_checkpoint(make_model(name="b", seed=1))
    )
    whole = printed(found, 400, monkeypatch)
    wide = max(len(line) for line in whole.splitlines())
    assert printed(found, wide, monkeypatch) == whole
    assert printed(found, wide - 1, monkeypatch).count("block ") > whole.count("block ")


def test_long_names_go_on_in_the_next_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model." + "very_long." * 8 + "weight"
    a = open_checkpoint(save_raw(tmp_path / "a", {name: torch.ones(3)}))
    b = open_checkpoint(save_raw(tmp_path / "b", {name: torch.tensor([1.0, 1.0, 2.0])}))
    text = printed(diff(a, b), 60, monkeypatch)
    assert "0.5774   0.9428" in text
    assert name in "".join(line.split("   ")[0].strip() for line in text.splitlines())


def test_small_changes_are_told_from_none(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(name="base")
    other = changed(base, tmp_path / "other", q_proj=lambda t: t * (1 + 1e-5))
    found = diff(open_checkpoint(base), open_checkpoint(other))
    words = printed(found, 120, monkeypatch).split()
    assert words[:5] == ["2", "of", "21", "tensors", "changed"]
    assert words.count("1.0e-05") == 2
    assert words.count("1.0000") == 2
    assert "0.0000" not in words


def test_what_is_not_finite_is_named(make_model: Make, tmp_path: Path) -> None:
    base = make_model(name="base")
    nan, infinity = math.nan, math.inf

    def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: torch.cat([torch.tensor([value]), tensor.flatten()[1:]]).view_as(
            tensor
        )

    other = changed(base, tmp_path / "other", q_proj=first(nan), norm=first(-infinity))
    found = diff(open_checkpoint(base), open_checkpoint(other), effective_rank=True)
    assert len(found.not_finite) == 7
    assert set(found.not_finite.values()) == {(False, True)}
    result = CliRunner().invoke(app, ["diff", str(base), str(other)])
    assert result.exit_code == 0
    notes = [line for line in result.stdout.splitlines() if line.startswith("note ")]
    names = ", ".join(list(found.not_finite)[:3])
    assert notes == [f"note      NaN or infinity in 7 tensors of {other}: {names}, ..."]
    result = CliRunner().invoke(app, ["diff", str(other), str(base), "--json"])
    assert json.loads(result.stdout)["not_finite"] == {"base": list(found.not_finite), "other": []}


def test_the_same_nan_and_infinity_are_no_change(tmp_path: Path) -> None:
    odd = {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([1.0, math.inf])}
    one = open_checkpoint(save_raw(tmp_path / "one", odd))
    two = open_checkpoint(save_raw(tmp_path / "two", odd))
    found = diff(one, two)
    assert found.identical
    assert all(change.norm == change.relative == 0 for change in found.changes)
    assert found.not_finite == {"a": (True, True), "b": (True, True)}
    save_file({**odd, "a": torch.tensor([math.nan, 1.0])}, tmp_path / "two" / "model.safetensors")
    assert not diff(one, open_checkpoint(tmp_path / "two")).identical
