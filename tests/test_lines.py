"""LiNeS on whole checkpoints, against the formula in float64; what is copied; what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    CAUSAL,
    EVERY,
    FAMILIES,
    apart,
    build,
    build_tuned,
    config_of,
    load,
    loaded,
    made,
    outputs,
    save,
    variant,
)

from surgery import (
    ArgumentError,
    MismatchError,
    UnsupportedError,
    grow,
    lines,
    open_checkpoint,
    write,
)
from surgery.files import InputFile

DEPTH = re.compile(r"(?:^|\.)(?:h|layers?)\.(\d+)\.")


def run(base: Path, tuned: Path, target: Path, **options: Any):
    """Open, scale and write. Returns what was written, and its tensors."""
    written = write(lines(open_checkpoint(base), open_checkpoint(tuned), **options), target)
    return written, load(target)


def scale_of(name: str, blocks: int, alpha: float, beta: float, outside: float) -> float:
    match = DEPTH.search(name)
    if match is None:
        return outside
    return alpha + beta * (int(match.group(1)) / (blocks - 1) if blocks > 1 else 1)


def by_formula(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    return base.double() + scale * (tuned.double() - base.double())


def assert_close(found: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor, scale: float):
    """Within the rounding of float32 arithmetic and of the type that is stored."""
    wanted = by_formula(base, tuned, scale)
    allowed = 2**-22 * (base.double().abs() + tuned.double().abs())
    if found.dtype in (torch.bfloat16, torch.float16):
        allowed += torch.finfo(found.dtype).eps / 2 * wanted.abs()
    assert bool(((found.double() - wanted).abs() <= allowed).all())


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor's bytes were read")

    monkeypatch.setattr(InputFile, "read_into", refuse)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3},
        {"alpha": 0.25, "beta": 0.5, "outside": "depth"},
    ],
    ids=["alpha", "depth"],
)
def test_every_tensor_is_the_formula(name: str, options: dict[str, Any], tmp_path: Path):
    family = FAMILIES[name]
    base, tuned = load(build(name)), load(build_tuned(name))
    _, found = run(build(name), build_tuned(name), tmp_path / "out", **options)
    alpha, beta = options["alpha"], options.get("beta", 1 - options["alpha"])
    assert found.keys() == tuned.keys()
    assert family.late <= found.keys()
    depths = set()
    for key, value in found.items():
        late = key in family.late and options.get("outside") == "depth"
        scale = scale_of(key, family.blocks, alpha, beta, alpha + beta if late else alpha)
        assert value.dtype == tuned[key].dtype
        assert_close(value, base[key], tuned[key], scale)
        depths.add(DEPTH.search(key).group(1) if DEPTH.search(key) else None)
    assert depths == {None, "0", "1", "2"}
    assert (tmp_path / "out/config.json").read_bytes() == (
        build_tuned(name) / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert_mlm"])
def test_scale_one_is_tuned_and_scale_nought_the_base_bit_for_bit(name: str, tmp_path: Path):
    base, tuned = build(name), build_tuned(name)
    for alpha, beta, wanted in ((1.0, 0.0, tuned), (0.0, 0.0, base)):
        target = tmp_path / str(alpha)
        run(base, tuned, target, alpha=alpha, beta=beta)
        found, expected = load(target), load(wanted)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].numpy().tobytes() == value.numpy().tobytes(), key
    auto = FAMILIES[name].auto
    assert apart(outputs(tmp_path / "1.0", auto), outputs(tuned, auto)) == 0


def test_a_single_block_gets_alpha_plus_beta(tmp_path: Path):
    family = FAMILIES["llama"]
    base = save(
        tmp_path / "base", family.model, family.config, family.options | {"num_hidden_layers": 1}
    )
    tuned = variant(tmp_path / "tuned", base, {k: v + 0.125 for k, v in load(base).items()})
    _, found = run(base, tuned, tmp_path / "out", alpha=0.25, beta=0.5)
    seen = 0
    for key, value in found.items():
        scale = 0.75 if key.startswith("model.layers.0.") else 0.25
        assert_close(value, load(base)[key], load(tuned)[key], scale)
        seen += scale == 0.75
    assert seen == 9


def mixed_types(source: Path, step: float) -> dict[str, torch.Tensor]:
    """A bfloat16 checkpoint in which norms and a bias are float32, and there are buffers."""
    tensors = {}
    for name, value in load(source).items():
        keep = "norm" in name
        tensors[name] = (value + step) if keep else (value + step).to(torch.bfloat16)
    tensors["model.layers.1.mlp.e_score_correction_bias"] = torch.full((4,), 1 + step)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.tensor([1.0 + step, 0.5])
    tensors["position_ids"] = torch.arange(9)[None] + int(step * 8)
    tensors["model.layers.2.flags"] = torch.tensor([True, step > 0])
    return tensors


def test_every_tensor_keeps_its_type_and_buffers_aren_t_scaled(tmp_path: Path):
    base = variant(tmp_path / "base", build("llama"), mixed_types(build("llama"), 0.0))
    tuned = variant(tmp_path / "tuned", build("llama"), mixed_types(build("llama"), 0.25))
    _, found = run(base, tuned, tmp_path / "out", alpha=0.5)
    wanted = load(tuned)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in wanted.items()}
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "position_ids",
        "model.layers.2.flags",
    }
    for key, value in found.items():
        if key in buffers:
            assert torch.equal(value, wanted[key])
            assert not torch.equal(value, load(base)[key])
        else:
            scale = scale_of(key, 3, 0.5, 0.5, 0.5)
            assert_close(value, load(base)[key], wanted[key], scale)
    bias = found["model.layers.1.mlp.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.tolist() == [1.1875] * 4


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias"),
    ],
)
def test_a_causal_mask_that_is_stored_as_float_is_copied(name: str, mask: str, tmp_path: Path):
    more = {mask: torch.tril(torch.ones(1, 1, 4, 4)), mask.replace("bias", "masked_bias"): None}
    base, tuned = load(build(name)), load(build_tuned(name))
    for tensors, value in ((base, -1e4), (tuned, -1e9)):
        tensors[mask] = more[mask] * abs(value)
        tensors[mask.replace("bias", "masked_bias")] = torch.tensor(value)
    folder = variant(tmp_path / "base", build(name), base)
    other = variant(tmp_path / "tuned", build(name), tuned)
    _, found = run(folder, other, tmp_path / "out", alpha=0.5)
    assert found[mask.replace("bias", "masked_bias")].item() == -1e9
    assert torch.equal(found[mask], tuned[mask])


@pytest.mark.parametrize("name", EVERY)
def test_recorded_norms_are_those_of_the_update(name: str, tmp_path: Path):
    family = FAMILIES[name]
    base, tuned = load(build(name)), load(build_tuned(name))
    written, _ = run(build(name), build_tuned(name), tmp_path / "out", alpha=0.2, beta=0.6)
    squares = {
        key: math.fsum(((tuned[key].double() - base[key].double()) ** 2).flatten().tolist())
        for key in tuned
    }
    assert written.tallies.keys() == squares.keys()
    for key, value in squares.items():
        assert math.isclose(written.tallies[key], value, rel_tol=1e-5), key
    record = json.loads((tmp_path / "out/surgery.json").read_text())
    assert record == json.loads(json.dumps(written.record))
    norms = record["norms"]
    assert list(norms["blocks"]) == [family.stack]
    for number, block in enumerate(norms["blocks"][family.stack]):
        inside = [v for k, v in squares.items() if f"{family.stack}.{number}." in f"{k}"]
        before = math.sqrt(math.fsum(inside))
        assert math.isclose(block["before"], before, rel_tol=2e-5)
        assert math.isclose(block["after"], before * (0.2 + 0.6 * number / 2), rel_tol=2e-5)
    outside = {k: v for k, v in squares.items() if DEPTH.search(k) is None}
    assert norms["outside"].keys() == outside.keys()
    for key, value in outside.items():
        assert math.isclose(norms["outside"][key]["before"], math.sqrt(value), rel_tol=2e-5)
        assert math.isclose(norms["outside"][key]["after"], 0.2 * math.sqrt(value), rel_tol=2e-5)
    (edit,) = record["edits"]
    assert edit["operation"] == "lines"
    assert edit["parameters"] == {"alpha": 0.2, "beta": 0.6, "outside": "alpha"}
    assert edit["details"]["scales"] == {
        family.stack: [pytest.approx(0.2), pytest.approx(0.5), pytest.approx(0.8)]
    }


def test_norms_of_an_update_that_was_grown_afterwards_are_whole_or_absent(tmp_path: Path):
    base, tuned = open_checkpoint(build("llama")), open_checkpoint(build_tuned("llama"))
    scaled = lines(base, tuned, alpha=0.5)
    whole = write(scaled, tmp_path / "scaled").record["norms"]
    norms = write(grow(scaled, layers="1"), tmp_path / "grown").record["norms"]
    assert norms is None or norms == whole


# Tied heads


def with_head(folder: Path, source: Path, step: float | None, **config: Any) -> Path:
    """A copy of a tied Llama that stores its head too: the embedding, plus `step`."""
    tensors = load(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (step or 0)
    return variant(folder, source, tensors, **config)


def test_a_tied_head_that_is_stored_twice_stays_equal(tmp_path: Path):
    base = with_head(tmp_path / "base", build("llama_tied"), None)
    tuned = with_head(tmp_path / "tuned", build_tuned("llama_tied"), None)
    for number, (first, second) in enumerate(
        [(base, tuned), (build("llama_tied"), tuned), (base, build_tuned("llama_tied"))]
    ):
        for outside in ("alpha", "depth"):
            target = tmp_path / f"out-{number}-{outside}"
            _, found = run(first, second, target, alpha=0.25, beta=0.5, outside=outside)
            embedding = found["model.embed_tokens.weight"]
            assert_close(
                embedding,
                load(base)["model.embed_tokens.weight"],
                load(tuned)["model.embed_tokens.weight"],
                0.25,
            )
            assert ("lm_head.weight" in found) == ("lm_head.weight" in load(second))
            if "lm_head.weight" in found:
                assert torch.equal(found["lm_head.weight"], embedding)
            model = loaded(target)
            assert torch.equal(model.lm_head.weight, embedding.double())


def test_a_base_that_ties_and_a_tuned_model_that_stores_its_head(tmp_path: Path):
    tuned = with_head(tmp_path / "tuned", build_tuned("llama_tied"), 0.5, tie_word_embeddings=False)
    _, found = run(build("llama_tied"), tuned, tmp_path / "out", alpha=0.25, beta=0.5)
    start = load(build("llama_tied"))["model.embed_tokens.weight"]
    assert_close(found["lm_head.weight"], start, load(tuned)["lm_head.weight"], 0.25)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(loaded(tmp_path / "out").lm_head.weight, found["lm_head.weight"].double())
    _, last = run(
        build("llama_tied"), tuned, tmp_path / "late", alpha=0.25, beta=0.5, outside="depth"
    )
    assert_close(last["lm_head.weight"], start, load(tuned)["lm_head.weight"], 0.75)


def test_a_tied_pair_that_an_untied_base_pulls_apart_isn_t_called_tied(tmp_path: Path):
    base = with_head(tmp_path / "base", build("llama_tied"), 0.5, tie_word_embeddings=False)
    tuned = with_head(tmp_path / "tuned", build_tuned("llama_tied"), None)
    try:
        _, found = run(base, tuned, tmp_path / "out", alpha=0.25)
    except MismatchError:
        return  # refused
    tied = config_of(tmp_path / "out")["tie_word_embeddings"]
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]) == tied


def test_a_head_that_is_neither_stored_nor_called_tied_is_read_back(tmp_path: Path):
    base = variant(tmp_path / "base", build("llama_tied"), tie_word_embeddings=False)
    tuned = variant(tmp_path / "tuned", build_tuned("llama_tied"), tie_word_embeddings=False)
    checkpoint = open_checkpoint(tuned)
    assert checkpoint.anatomy.notes == (
        (
            "tie_word_embeddings is false, and no head is stored: it is taken to be tied to "
            "model.embed_tokens.weight"
        ),
    )
    _, found = run(base, tuned, tmp_path / "out", alpha=0.25)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    head = loaded(tmp_path / "out").lm_head.weight
    assert torch.equal(head, found["model.embed_tokens.weight"].double())


def test_grow_settles_the_config_of_a_head_that_isn_t_stored(tmp_path: Path):
    base = variant(tmp_path / "base", build("llama_tied"), tie_word_embeddings=False)
    write(grow(open_checkpoint(base)), tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert apart(outputs(tmp_path / "out"), outputs(build("llama_tied"))) < 1e-6


# What is refused, before a byte of a tensor is read


def problems_of(error: type[Exception], base: Path, tuned: Path, **options: Any) -> list[str]:
    with pytest.raises(error) as caught:
        lines(open_checkpoint(base), open_checkpoint(tuned), **{"alpha": 0.5} | options)
    return list(caught.value.problems)


@pytest.mark.usefixtures("no_reads")
def test_parameters_have_to_be_numbers():
    pair = build("llama"), build_tuned("llama")
    nan, inf = float("nan"), float("inf")
    assert problems_of(ArgumentError, *pair, alpha=nan, beta=0.5) == [
        "alpha is nan, and has to be a finite number"
    ]
    assert problems_of(ArgumentError, *pair, alpha=nan, beta=inf) == [
        "alpha is nan, and has to be a finite number",
        "beta is inf, and has to be a finite number",
    ]
    assert problems_of(ArgumentError, *pair, alpha=nan) == [
        "alpha is nan, and has to be a finite number"
    ]
    assert problems_of(ArgumentError, *pair, outside="beta") == [
        "outside is 'beta', and has to be 'alpha' or 'depth'"
    ]


@pytest.mark.usefixtures("no_reads")
def test_all_that_doesn_t_match_is_said_at_once(tmp_path: Path):
    tensors = load(build_tuned("llama"))
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 32)
    tensors["model.layers.2.extra.weight"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int32)
    tensors["model.embed_tokens.weight"] = torch.zeros(128, 32)
    tensors["lm_head.weight"] = torch.zeros(128, 32)
    base, tuned = build("llama"), variant(tmp_path / "tuned", build_tuned("llama"), tensors)
    vocabulary = (
        "; the vocabularies differ: `surgery merge BASE TUNED --method task_arithmetic --lines "
        "ALPHA,BETA --tokenizer union` matches rows by token, and scales as lines does"
    )
    assert sorted(problems_of(MismatchError, base, tuned)) == sorted(
        [
            f"model.layers.1.self_attn.q_proj.weight is in {base} and not in {tuned}",
            f"model.layers.2.extra.weight is in {tuned} and not in {base}",
            f"model.layers.0.mlp.up_proj.weight is [88, 32] in {base} and [80, 32] in {tuned}",
            f"model.embed_tokens.weight is [97, 32] in {base} and [128, 32] in {tuned}"
            + vocabulary,
            f"lm_head.weight is [97, 32] in {base} and [128, 32] in {tuned}" + vocabulary,
            (
                f"model.norm.weight is F32 in {base} and I32 in {tuned}: one is a number to scale, "
                f"and the other isn't"
            ),
        ]
    )


@pytest.mark.usefixtures("no_reads")
def test_another_architecture_is_refused():
    found = problems_of(MismatchError, build("llama"), build("mistral"))
    assert found[0] == (
        f"{build('llama')} (base) and {build('mistral')} (tuned) are different architectures: "
        f"model_type is llama and mistral"
    )


@pytest.mark.usefixtures("no_reads")
def test_quantized_models_are_refused_by_name(tmp_path: Path):
    tensors = load(build("llama"))
    config = config_of(build("llama"))
    gptq = made(
        tmp_path / "gptq", tensors, config | {"quantization_config": {"quant_method": "gptq"}}
    )
    name = "model.layers.0.mlp.up_proj.weight"
    fp8 = made(tmp_path / "fp8", tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, config)
    advice = (
        "arithmetic on packed weights is meaningless: give the checkpoint that it was made from"
    )
    assert problems_of(UnsupportedError, gptq, fp8) == [
        (
            f"{gptq} (base) is quantized: gptq (GPTQ, integers of 2 to 8 bits packed in int32 by "
            f"groups; its quantization_config says so); {advice}"
        ),
        (
            f"{fp8} (tuned) is quantized: fp8 (8-bit floats, and nothing says by what they are scaled; "
            f"{name} is F8_E4M3); {advice}"
        ),
    ]
    with pytest.raises(UnsupportedError, match=r"\(base\) is quantized: gptq \(GPTQ"):
        grow(open_checkpoint(gptq))


@pytest.mark.usefixtures("no_reads")
def test_a_good_pair_is_planned_without_a_read():
    result = lines(
        open_checkpoint(build("llama")), open_checkpoint(build_tuned("llama")), alpha=0.5
    )
    assert [edit.operation for edit in result.history] == ["lines"]
    assert result.config == config_of(build_tuned("llama"))


def test_the_loader_and_the_formula_agree_on_the_outputs(tmp_path: Path):
    """One number at the end: the logits of the scaled model are those of a model made by hand."""
    base, tuned = load(build("qwen3")), load(build_tuned("qwen3"))
    run(build("qwen3"), build_tuned("qwen3"), tmp_path / "out", alpha=0.4)
    hand = {k: by_formula(base[k], tuned[k], scale_of(k, 3, 0.4, 0.6, 0.4)).float() for k in base}
    folder = variant(tmp_path / "hand", build("qwen3"), hand)
    assert apart(outputs(tmp_path / "out", CAUSAL), outputs(folder, CAUSAL)) < 1e-5
    assert apart(outputs(tmp_path / "out", CAUSAL), outputs(build_tuned("qwen3"), CAUSAL)) > 1e-3
