"""Merging checkpoints: what is merged and what is kept, tied heads, LiNeS on top, errors, and the
command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_in, save_raw
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from surgery.commands.main import app
from typer.testing import CliRunner

from surgery import (
    ArgumentError,
    MismatchError,
    UnsupportedError,
    merge,
    open_checkpoint,
    write,
)
from surgery.merging.methods import METHODS
from surgery.merging.parameters import Parameter, resolve

CONFIG = {"model_type": "toy", "num_hidden_layers": 3, "hidden_size": 4}
NEEDED = {"nearswap": {"t": 0.01}} | {
    name: {"density": 0.5} for name in ("dare_linear", "dare_ties", "della", "della_linear")
}


def toy(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Three blocks, what is around them, and things that aren't to be merged."""
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, 4),
        "model.norm.weight": torch.randn(4),
        "lm_head.weight": torch.randn(10, 4),
        **{
            f"model.layers.{at}.{name}.weight": torch.randn(shape)
            for at in range(3)
            for name, shape in (
                ("self_attn.q_proj", (4, 4)),
                ("self_attn.o_proj", (4, 4)),
                ("mlp.up_proj", (8, 4)),
                ("mlp.down_proj", (4, 8)),
                ("input_layernorm", (4,)),
            )
        },
    }
    torch.manual_seed(seed)
    changed = {
        name: (tensor + (0.1 * torch.randn(tensor.shape) if seed else 0)).to(dtype)
        for name, tensor in tensors.items()
    }
    changed["model.layers.0.mlp.router_bias"] = torch.randn(4)  # float32 among bfloat16
    changed["model.position_ids"] = torch.full((3,), seed)
    changed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((2,), float(seed))
    return changed


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    """A base and three fine-tunes."""
    return [
        save_raw(tmp_path / f"m{seed}", toy(seed), config=CONFIG, files={"vocab.txt": f"{seed}"})
        for seed in range(4)
    ]


def opened(paths: list[Path]) -> list[Any]:
    return [open_checkpoint(path) for path in paths]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_a_checkpoint(method: str, family: list[Path], tmp_path: Path) -> None:
    base, *models = opened(family)
    models = models[: METHODS[method].models[1] or 3]
    start = base if METHODS[method].needs_base else None
    edited = merge(models, base=start, method=method, seed=3, **NEEDED.get(method, {}))
    outs = [write(edited, tmp_path / f"out{threads}", threads=threads).target for threads in (1, 4)]
    assert files_in(outs[0]) == files_in(outs[1])
    found = load_file(outs[0] / "model.safetensors")
    first = load_file(family[0 if start is not None else 1] / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in first.items()
    }
    for name in ("model.position_ids", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        assert torch.equal(found[name], first[name])
    changed = [name for name in found if not torch.equal(found[name], first[name])]
    assert len(changed) > 10 or method == "passthrough"
    assert (outs[0] / "vocab.txt").read_text() == ("0" if start is not None else "1")
    record = json.loads((outs[0] / "surgery.json").read_text())["edits"][0]
    assert record["operation"] == "merge"
    assert record["parameters"]["method"] == method
    assert ("seed" in record["parameters"]) == METHODS[method].random


def test_a_merge_is_what_its_formula_says_rounded_once(family: list[Path]) -> None:
    base, a, b, _ = opened(family)
    edited = merge([a, b], base=base, method="task_arithmetic", weight=(0.5, 0.25))
    for name, tensor in edited.items():
        if "position" in name or "inv_freq" in name:
            continue
        start, one, two = (model[name].whole().double() for model in (base, a, b))
        wanted = start + 0.5 * (one - start) + 0.25 * (two - start)
        assert tensor.dtype == base[name].dtype
        half_ulp = {"BF16": 2.0**-8, "F32": 0.0}[tensor.dtype.name]
        error = (tensor.whole().double() - wanted).abs()
        assert bool((error <= half_ulp * wanted.abs() + 2e-7).all())


def test_seed_decides_what_is_dropped(family: list[Path]) -> None:
    base, *models = opened(family)
    name = "model.layers.1.mlp.up_proj.weight"
    rows = [
        merge(models, base=base, method="dare_linear", density=0.5, seed=seed)[name].whole()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_parameters_can_differ_by_tensor(family: list[Path]) -> None:
    base, a, *_ = opened(family)

    def weights(name: str) -> dict[str, float]:
        return {"weight": 0.0 if "mlp" in name else 1.0}

    edited = merge([a], base=base, method="task_arithmetic", per_tensor=weights)
    up, q = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(edited[up].whole(), base[up].whole())
    torch.testing.assert_close(edited[q].whole(), a[q].whole())
    with pytest.raises(ArgumentError, match="there is no parameter 'wieght': did you mean weight"):
        merge([a], base=base, method="task_arithmetic", per_tensor=lambda name: {"wieght": 1})


# Tied heads


def tied(seed: int, head: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = toy(seed)
    del tensors["lm_head.weight"]
    if head == "same":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif head == "own":
        tensors["lm_head.weight"] = torch.randn(10, 4).bfloat16()
    config = {
        **CONFIG,
        "architectures": ["ToyForCausalLM"],
        "tie_word_embeddings": head != "own",
    }
    return tensors, config


@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear"])
def test_a_tied_head_that_is_stored_stays_equal(method: str, tmp_path: Path) -> None:
    paths = []
    for seed, head in enumerate(("same", None, "same")):
        tensors, config = tied(seed, head)
        paths.append(save_raw(tmp_path / f"t{seed}", tensors, config=config))
    base, *models = opened(paths)
    edited = merge(
        models if method != "linear" else [base, *models],
        base=base if method != "linear" else None,
        method=method,
        **NEEDED.get(method, {}),
    )
    head, embedding = (edited[n].whole() for n in ("lm_head.weight", "model.embed_tokens.weight"))
    assert torch.equal(head, embedding)
    assert edited.config["tie_word_embeddings"] is True


def test_a_head_that_one_model_has_of_its_own_unties(tmp_path: Path) -> None:
    paths = []
    for seed, head in enumerate((None, "own", None)):
        tensors, config = tied(seed, head)
        paths.append(save_raw(tmp_path / f"t{seed}", tensors, config=config))
    base, a, b = opened(paths)
    edited = merge([a, b], base=base, method="task_arithmetic", weight=0.5)
    embedding = "model.embed_tokens.weight"
    start, one, two = base[embedding].whole(), a["lm_head.weight"].whole(), b[embedding].whole()
    wanted = start.double() + 0.5 * (one.double() - start) + 0.5 * (two.double() - start)
    torch.testing.assert_close(edited["lm_head.weight"].whole().double(), wanted, rtol=4e-3, atol=0)
    assert edited.config["tie_word_embeddings"] is False
    out = write(edited, tmp_path / "out").target
    assert open_checkpoint(out).anatomy.head == "lm_head.weight"


# LiNeS on top


def block_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "slerp", "iso_c", "sce"])
def test_lines_scales_the_merged_update_with_depth(method: str, tmp_path: Path) -> None:
    paths = [
        save_raw(tmp_path / f"f{seed}", toy(seed, torch.float64), config=CONFIG)
        for seed in range(3)
    ]
    base, *models = opened(paths)
    models = models[: METHODS[method].models[1]]
    edited = merge(models, base=base, method=method, lines=(0.2, 0.6))
    whole = merge(models, base=base if method != "linear" else None, method=method)
    for name, tensor in edited.items():
        if tensor.dtype.name != "F64":
            continue
        at = block_of(name)
        scale = 0.2 if at is None else 0.2 + 0.6 * at / 2
        start = base[name].whole()
        wanted = start + scale * (whole[name].whole() - start)
        torch.testing.assert_close(tensor.whole(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "linear", "tsv_m"])
@pytest.mark.parametrize("threads", [1, 3])
def test_automatic_alpha(method: str, threads: int, family: list[Path]) -> None:
    base, *models = opened(family)
    own = NEEDED.get(method, {}) | ({"lambda_": 0.4} if method != "linear" else {})
    edited = merge(models, base=base, method=method, lines="auto", threads=threads, **own)
    plain = NEEDED.get(method, {})
    whole = merge(models, base=base if method != "linear" else None, method=method, **plain)
    summed, merged_norm = 0.0, 0.0
    for name, tensor in base.items():
        if tensor.dtype.kind != "float" or "inv_freq" in name:
            continue
        start = tensor.whole().double()
        summed += float(sum(model[name].whole().double() - start for model in models).abs().sum())
        merged_norm += float((whole[name].whole().double() - start).abs().sum())
    found = edited.history[-1].details["lines"]
    assert found["alpha"] == pytest.approx(summed / 3 / merged_norm, rel=5e-3)
    assert found["beta"] == (0.4 if method != "linear" else 1.0)
    by_hand = merge(
        models, base=base, method=method, lines=(found["alpha"], found["beta"]), **plain
    )
    for name in edited:
        assert torch.equal(edited[name].whole(), by_hand[name].whole())


def test_automatic_alpha_of_models_that_did_not_change(family: list[Path]) -> None:
    base = open_checkpoint(family[0])
    with pytest.raises(UnsupportedError, match=r"the models don't differ from the base"):
        merge([base], base=base, method="ties", lines="auto")


# Bad input


def problems(error: type[Exception], *args: Any, **how: Any) -> tuple[str, ...]:
    with pytest.raises(error) as raised:
        merge(*args, **how)
    found: tuple[str, ...] = raised.value.problems  # type: ignore[attr-defined]
    return found


def test_an_unknown_method_names_the_nearest(family: list[Path]) -> None:
    base, a, *_ = opened(family)
    (text,) = problems(ArgumentError, [a], base=base, method="tie")
    assert text == "there is no merge method 'tie': did you mean ties?; see `surgery methods`"


def test_all_that_is_wrong_with_arguments_is_said_at_once(family: list[Path]) -> None:
    _, a, b, _ = opened(family)
    found = problems(
        ArgumentError, [a, b], method="ties", weight=(1, 2, 3), density=1.5, lamda=1, lines=(1, "x")
    )
    assert found == (
        "ties needs the base that the models were fine-tuned from",
        "lines scales the update from a base, and there is none: give the base",
        "there is no parameter 'lamda': did you mean lambda?",
        "weight has 3 values, and there are 2 models: give one for each, or one for all",
        "density is 1.5, and has to be in (0, 1]",
        "beta of lines is 'x', and has to be a finite number",
    )


@pytest.mark.parametrize(
    ("method", "count", "how", "text"),
    [
        ("slerp", 2, {}, "slerp merges 1 model beside the base, and got 2"),
        ("nuslerp", 3, {}, "nuslerp merges 2 models beside the base, and got 3"),
        ("model_stock", 1, {}, "model_stock merges at least 2 models beside the base, and got 1"),
        ("nearswap", 1, {}, "t has to be given: how near; farther ones move by this much"),
        ("ties", 2, {"normalize": 1}, "normalize is 1, not true or false"),
        ("ties", 2, {"weight": float("nan")}, "weight is nan, and has to be a finite number"),
        ("consensus", 2, {"agreement": 1.5}, "agreement is 1.5, and has to be a whole number"),
        ("consensus", 2, {"agreement": 3}, "agreement is 3, and there are 2 models"),
        ("task_arithmetic", 2, {"lambda": (1, 2)}, "lambda takes one value for all models, not 2"),
        ("linear", 2, {"weight": (1, -1)}, "the weights add up to 0, and an average divides by"),
        ("della", 2, {"density": 0.9}, "density 0.9 and epsilon 0.15: density - epsilon and"),
        ("ties", 2, {"lines": "deep"}, "lines is 'deep', and has to be 'auto' or alpha and beta"),
        ("ties", 2, {"lines": (0, 1), "lambda": 1}, "beta of lines takes the place of lambda: giv"),
    ],
)
def test_arguments_that_cannot_be_meant(
    method: str, count: int, how: dict[str, Any], text: str, family: list[Path]
) -> None:
    base, *models = opened(family)
    found = problems(ArgumentError, models[:count], base=base, method=method, **how)
    assert [problem[: len(text)] for problem in found] == [text]


def test_models_that_do_not_belong_together(family: list[Path], tmp_path: Path) -> None:
    base, a, b, _ = opened(family)
    wide = toy(1)
    wide["model.embed_tokens.weight"] = torch.zeros(12, 4)
    wide["extra"] = torch.zeros(2)
    odd = open_checkpoint(save_raw(tmp_path / "odd", wide, config={**CONFIG, "model_type": "x"}))
    found = problems(MismatchError, [a, odd, b], base=base, method="ties")
    assert len(found) == 3
    assert "model_type is toy and x" in found[0]
    assert "[10, 4]" in found[1]
    assert "the vocabularies differ" in found[1]
    assert found[2].startswith("extra is in ")


def test_packed_weights_are_refused(family: list[Path], tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    packed = open_checkpoint(save_raw(tmp_path / "q", toy(1), config=config))
    base, a, *_ = opened(family)
    (text,) = problems(UnsupportedError, [a, packed], base=base, method="ties")
    assert "(model 2) is quantized: gptq" in text


@given(
    value=st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.none(), st.just([])),
    low=st.floats(-1, 0),
    above=st.booleans(),
)
def test_a_parameter_is_taken_or_refused_and_nothing_else(
    value: Any, low: float, above: bool
) -> None:
    parameter = Parameter("x", 0.5, "doc", per_model=True, low=low, high=1, above_low=above)
    values, found = resolve([parameter], {"x": value}, 2)
    if found:
        assert all(text.startswith("x ") for text in found)
    else:
        assert len(values["x"]) == 2
        assert all(low <= item <= 1 for item in values["x"])


# The command line


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_merge_command(family: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    base, a, b, _ = family
    result = run("merge", base, a, b, "--method", "ties", "--weight", "0.5,0.5", "--density", 0.2,
                 "--param", "lambda=0.4", "--lines", "auto", "-o", out, "--threads", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "lambda from" in result.stdout
    one, two = opened([a, b])
    wanted = merge([one, two], base=open_checkpoint(base), method="ties", weight=(0.5, 0.5),
                   density=0.2, lambda_=0.4, lines="auto")  # fmt: skip
    found = load_file(out / "model.safetensors")
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.whole())


def test_merge_command_dry_run_and_json(family: list[Path], tmp_path: Path) -> None:
    base, a, b, _ = family
    args = ("merge", base, a, b, "--method", "ties", "-o", tmp_path / "out", "--json")
    result = run(*args, "--dry-run", "--lines", "auto", "--param", "lambda=0.4")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shards"][0]["tensors"] == len(toy(0))
    assert not (tmp_path / "out").exists()
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["edits"][0]["parameters"]["density"] == [0.2, 0.2]


def test_a_method_without_base_wants_to_hear_so(family: list[Path], tmp_path: Path) -> None:
    _, a, b, _ = family
    args = ("merge", a, b, "--method", "linear", "-o", tmp_path / "out")
    result = run(*args)
    assert result.exit_code == 2
    assert "linear takes no base: pass --no-base to merge all 2 models given" in result.output
    assert run(*args, "--no-base").exit_code == 0
    found = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    one, two = (load_file(path / "model.safetensors")["model.norm.weight"] for path in (a, b))
    assert torch.equal(found, ((one.float() + two.float()) / 2).bfloat16())


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--method", "tie"), "did you mean ties?"),
        (("--method", "ties", "--param", "lambda"), "--param lambda: give it as NAME=VALUE"),
        (("--method", "ties", "--weight", "x"), "weight is 'x', and has to be a finite number"),
        (("--method", "ties", "--lines", "0.5"), "--lines is '0.5', and has to be auto or ALPHA"),
        (("--method", "ties", "--no-base"), "ties needs the base: leave --no-base out"),
        (("--method", "ties", "--weight", "1", "--param", "weight=1"), "weight is given twice"),
    ],
)
def test_merge_command_errors(
    args: tuple[str, ...], text: str, family: list[Path], tmp_path: Path
) -> None:
    result = run("merge", *family[:3], "-o", tmp_path / "out", *args)
    assert result.exit_code == 2
    assert text in result.output
    assert not (tmp_path / "out").exists()


def test_methods_command() -> None:
    result = run("methods")
    assert result.exit_code == 0
    for name in METHODS:
        assert name in result.stdout
    found = json.loads(run("methods", "--json").stdout)
    assert [method["name"] for method in found] == list(METHODS)
    assert {"name", "default", "range", "doc", "per_model", "type"} == set(
        found[0]["parameters"][0]
    )


def test_a_merged_model_loads(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    paths = [make_model(name=f"m{seed}", seed=seed) for seed in range(3)]
    base, *models = opened(paths)
    out = write(merge(models, base=base, method="ties", lines="auto"), tmp_path / "out").target
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
