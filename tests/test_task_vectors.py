"""Task vectors: made, stored, added up, applied, and refused where they don't belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import bytes_of, files_in, save_raw
from hypothesis import given
from hypothesis import strategies as st

from surgery import (
    ArgumentError,
    Checkpoint,
    FormatError,
    MismatchError,
    OutputError,
    UnsupportedError,
    apply,
    lines,
    merge,
    open_checkpoint,
    open_task_vector,
    task_vector,
    write,
)

Raw = Callable[..., Path]
Make = Callable[..., Path]
POSITIONS = torch.arange(4)


def models(folder: Path, dtype: torch.dtype = torch.float32, count: int = 3) -> list[Checkpoint]:
    """A base and fine-tunes of it, with a tensor of integers that nothing should touch."""
    torch.manual_seed(1)
    base = {"w": torch.randn(5, 4), "b": torch.randn(5), "s": torch.randn(())}
    opened = []
    for at in range(count):
        values = {k: (v + 0.1 * at * torch.randn(v.shape)).to(dtype) for k, v in base.items()}
        path = save_raw(folder / f"m{at}", {**values, "position_ids": POSITIONS})
        opened.append(open_checkpoint(path))
    return opened


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {k: t.whole().double() for k, t in checkpoint.items() if k != "position_ids"}


def test_a_task_vector_is_the_difference(tmp_path: Path) -> None:
    base, tuned, _ = models(tmp_path)
    tau = task_vector(base, tuned)
    assert list(tau) == ["b", "s", "w"]
    for name, value in tau.items():
        wanted = (tuned[name].whole() - base[name].whole()).numpy()
        assert value.whole().numpy().tobytes() == wanted.tobytes()
        assert value.shape == base[name].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_base_and_its_task_vector_are_the_tuned_model(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tuned, _ = models(tmp_path, dtype)
    write(task_vector(base, tuned), tmp_path / "tau")
    made = apply(base, open_task_vector(tmp_path / "tau"))
    for name in tuned:
        found, wanted = made[name].whole(), tuned[name].whole()
        if dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(found, wanted)
        elif name == "position_ids":
            assert made[name] is base[name]
        else:
            ulp = torch.finfo(dtype).eps * base[name].whole().abs().max()
            assert (found - wanted).abs().max() <= ulp


def test_arithmetic_is_that_of_vectors(tmp_path: Path) -> None:
    base, one, two = models(tmp_path)
    x, y = task_vector(base, one), task_vector(base, two)
    made = apply(base, 0.5 * x - y / 4 + -x, scale=2.0)
    for name, start in values(base).items():
        tau_x = values(one)[name] - start
        tau_y = values(two)[name] - start
        wanted = start + 2 * (0.5 * tau_x - tau_y / 4 - tau_x)
        torch.testing.assert_close(made[name].whole().double(), wanted, rtol=0, atol=1e-6)
    assert sum([x, y])["w"].whole().equal((x + y)["w"].whole())


def test_several_with_scales_of_their_own_are_task_arithmetic(tmp_path: Path) -> None:
    base, one, two = models(tmp_path, torch.bfloat16)
    x, y = task_vector(base, one), task_vector(base, two)
    made = apply(base, x, y, scale=[0.7, -0.3])
    wanted = merge([one, two], base=base, method="task_arithmetic", weight=[0.7, -0.3])
    for name in base:
        assert bytes_of(made[name].whole()) == bytes_of(wanted[name].whole())


@given(scale=st.floats(-2, 2))
def test_unlearning_undoes_learning(tmp_path_factory: pytest.TempPathFactory, scale: float) -> None:
    base, tuned, _ = models(tmp_path_factory.mktemp("m"), torch.float64)
    tau = task_vector(base, tuned)
    made = apply(base, tau, tau, scale=[scale, -scale])
    for name, start in values(base).items():
        torch.testing.assert_close(made[name].whole(), start, rtol=0, atol=1e-14)


def test_a_stored_one_says_what_it_belongs_to_and_refuses_another(tmp_path: Path) -> None:
    base, tuned, other = models(tmp_path)
    write(task_vector(base, tuned), tmp_path / "tau")
    told = json.loads((tmp_path / "tau" / "task_vector.json").read_text())["base"]
    assert told == {"reference": str(tmp_path / "m0"), "fingerprint": base.fingerprint}
    tau = open_task_vector(tmp_path / "tau")
    apply(open_checkpoint(tmp_path / "m0"), tau)
    with pytest.raises(MismatchError, match=r"belongs to .*m0 .*m2 has other weights"):
        apply(other, tau)
    with pytest.raises(MismatchError, match="has other weights"):
        _ = tau + task_vector(other, tuned)


def test_the_fingerprint_knows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    weights = {"a": torch.randn(300, 40), "b": torch.randn(7)}
    one = open_checkpoint(save_raw(tmp_path / "one", weights))
    split = open_checkpoint(save_raw(tmp_path / "split", {"b": weights["b"]}, {"a": weights["a"]}))
    assert one.fingerprint == split.fingerprint
    weights["a"][0, 5] += 1
    assert open_checkpoint(save_raw(tmp_path / "x", weights)).fingerprint != one.fingerprint


def test_a_task_vector_is_no_model_and_a_model_no_task_vector(tmp_path: Path) -> None:
    base, tuned, _ = models(tmp_path)
    write(task_vector(base, tuned), tmp_path / "tau")
    with pytest.raises(FormatError, match="is a task vector and no model"):
        open_checkpoint(tmp_path / "tau")
    with pytest.raises(FormatError, match="it is no task vector"):
        open_task_vector(tmp_path / "m1")


def test_shards_and_types_of_a_stored_one(tmp_path: Path) -> None:
    base, tuned, _ = models(tmp_path, torch.bfloat16)
    write(task_vector(base, tuned), tmp_path / "wide", max_shard_bytes=60)
    assert "task_vector.safetensors.index.json" in files_in(tmp_path / "wide")
    assert {t.dtype.name for t in open_task_vector(tmp_path / "wide").values()} == {"F32"}
    write(task_vector(base, tuned, dtype="tuned"), tmp_path / "narrow")
    narrow = open_task_vector(tmp_path / "narrow")
    assert {t.dtype.name for t in narrow.values()} == {"BF16"}
    for name, tau in narrow.items():
        wanted = (tuned[name].whole().float() - base[name].whole().float()).bfloat16()
        assert torch.equal(tau.whole(), wanted)


def test_tied_heads_follow_their_embedding(make_model: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = open_checkpoint(make_model(name="base", tie_word_embeddings=True))
    tuned = open_checkpoint(make_model(name="tuned", seed=1, tie_word_embeddings=True))
    write(apply(base, task_vector(base, tuned)), tmp_path / "out")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").lm_head.weight
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
    untied = open_checkpoint(make_model(name="untied", seed=1, tie_word_embeddings=False))
    with pytest.raises(UnsupportedError, match="has a head of its own"):
        task_vector(base, untied)


def test_what_cant_be_meant(tmp_path: Path) -> None:
    base, tuned, _ = models(tmp_path)
    tau = task_vector(base, tuned)
    with pytest.raises(ArgumentError, match="scale has 2 values, and there are 1 task vectors"):
        apply(base, tau, scale=[1, 2])
    with pytest.raises(ArgumentError, match="has to be a finite number"):
        apply(base, tau, scale=float("nan"))
    with pytest.raises(ArgumentError, match="no task vector to apply"):
        apply(base)
    with pytest.raises(ArgumentError, match="can't be multiplied by inf"):
        _ = tau * float("inf")
    with pytest.raises(TypeError):
        _ = tau * tau  # type: ignore[operator]
    with pytest.raises(TypeError):
        _ = tau + base  # type: ignore[operator]


def test_a_damaged_one(tmp_path: Path) -> None:
    base, tuned, _ = models(tmp_path)
    write(task_vector(base, tuned), tmp_path / "tau")
    path = tmp_path / "tau" / "task_vector.json"
    path.write_text('{"format": 2}')
    with pytest.raises(FormatError, match="isn't of a format that this version knows"):
        open_task_vector(tmp_path / "tau")
    path.write_text('{"format": 1, "base": {"reference": "x"}}')
    with pytest.raises(FormatError, match="doesn't say which base"):
        open_task_vector(tmp_path / "tau")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_isnt_finite_is_named(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    base, tuned, _ = models(tmp_path, dtype)
    broken = {k: t.whole() for k, t in tuned.items()}
    broken["w"][3, 1] = bad
    model = open_checkpoint(save_raw(tmp_path / "broken", broken))
    for made in (
        lines(base, model, alpha=0.5),
        task_vector(base, model),
        merge([model, tuned], base=base, method="ties"),
        merge([tuned], base=model, method="task_arithmetic"),
        merge([tuned], base=model, method="slerp", t=0.5),
        apply(model, task_vector(model, tuned)),
    ):
        with pytest.raises(FormatError, match=r"^w of .*broken holds NaN or infinity"):
            write(made, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_target_may_not_be_the_task_vector(tmp_path: Path) -> None:
    base, tuned, _ = models(tmp_path)
    write(task_vector(base, tuned), tmp_path / "tau")
    made = apply(base, open_task_vector(tmp_path / "tau"))
    with pytest.raises(OutputError, match="lies inside the input"):
        write(made, tmp_path / "tau", overwrite=True)


def test_the_record_says_what_was_applied(tmp_path: Path) -> None:
    base, tuned, _ = models(tmp_path)
    write(task_vector(base, tuned), tmp_path / "tau")
    write(apply(base, open_task_vector(tmp_path / "tau"), scale=-0.5), tmp_path / "out")
    edit = json.loads((tmp_path / "out" / "surgery.json").read_text())["edits"][-1]
    assert edit["operation"] == "apply"
    assert edit["parameters"] == {"scale": [-0.5]}
    assert [*edit["inputs"]] == ["base", "task_vector_1"]
    assert edit["inputs"]["task_vector_1"]["edits"][0]["operation"] == "task_vector"
