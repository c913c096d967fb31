"""The proofs: the certificate finds a flipped bit, the logits say which block departs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy
import pytest
import torch
from conftest import save_raw
from families import (
    FAMILIES,
    ROOT,
    build,
    build_tuned,
    load,
    loaded,
    made,
    variant,
)
from hypothesis import given, settings

from surgery import (
    Checkpoint,
    FormatError,
    MismatchError,
    UnsupportedError,
    VerificationError,
    certify,
    find_growths,
    grow,
    lines,
    open_checkpoint,
    verify,
    write,
)
from surgery.kernels.bits import same_bits
from surgery.tensor import LazyTensor
from surgery.values import held
from surgery.verification import compare_logits
from surgery.verification.checks import DownColumns, two_sum
from surgery.verification.columns import columns_of
from surgery.verification.discover import discover_growths

LAYOUTS = ["llama", "gpt2", "phi3", "opt"]


@cache
def grown(name: str, dtype: str = "float32", **options: Any) -> Path:
    """A grown checkpoint, shared by all tests: read it, never change it."""
    folder = ROOT / f"grown-{name}-{dtype}-{abs(hash(frozenset(options.items())))}"
    write(grow(open_checkpoint(build(name, dtype)), **options), folder)
    return folder


class Given:
    """A leaf that is a tensor in memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        return self.values.reshape(tensor.shape_of(tensor.rows))[start:stop].clone()


def with_tensor(checkpoint: Checkpoint, name: str, values: torch.Tensor) -> Checkpoint:
    lazy = replace(checkpoint[name], leaf=Given(values), inputs=(), runs=None, kernel=None)
    return replace(checkpoint, tensors={**checkpoint.tensors, name: lazy})


# The certificate


@pytest.mark.parametrize("name", [*LAYOUTS, "bert_mlm", "gemma2"])
def test_a_growth_is_certified_however_it_is_known(name: str, tmp_path: Path):
    base = open_checkpoint(build(name))
    options = {"factor": 1.5, "choose": "random", "layers": "0,2", "symmetry_break": 0.1}
    lazy = grow(base, **options)
    write(lazy, tmp_path / "grown")
    recorded = open_checkpoint(tmp_path / "grown")
    shutil.copytree(tmp_path / "grown", tmp_path / "bare")
    (tmp_path / "bare/surgery.json").unlink()
    bare = open_checkpoint(tmp_path / "bare")
    assert lazy.history
    assert not recorded.history
    assert find_growths(base, lazy) == find_growths(base, recorded) == find_growths(base, bare)
    for other in (lazy, recorded, bare):
        found = verify(base, other, logits=False)
        assert found.passed is True
        assert found.certificate is not None
        assert found.certificate.failures == ()
        assert found.certificate.grown_mlps == 2
        assert found.certificate.tensors_compared == len(base)
        assert found.certificate.bytes_compared == sum(
            tensor.nbytes for tensor in load(tmp_path / "grown").values()
        )
        assert found.summary == f"the certificate holds for {len(base)} tensors, 2 grown MLPs"
        found.require()


@pytest.mark.parametrize("record", ["{}", "no JSON", '{"edits": []}', '{"edits": 3}', "[]"])
def test_a_record_that_isn_t_ours_leaves_it_to_the_weights(record: str, tmp_path: Path):
    folder = shutil.copytree(grown("phi3"), tmp_path / "grown")
    (folder / "surgery.json").write_text(record)
    assert verify(open_checkpoint(build("phi3")), open_checkpoint(folder), logits=False).passed


def test_a_record_that_lies_proves_nothing(tmp_path: Path):
    """Another source map than that of the weights: what the record says is checked, not taken."""
    folder = shutil.copytree(grown("llama", factor=1.5), tmp_path / "grown")
    record = json.loads((folder / "surgery.json").read_text())
    for mlp in record["edits"][-1]["details"]["mlps"]:
        assert mlp["copied"] == [[0, 44]]
        mlp["copied"] = [[1, 45]]
    (folder / "surgery.json").write_text(json.dumps(record))
    found = verify(open_checkpoint(build("llama")), open_checkpoint(folder), logits=False)
    assert found.passed is False
    assert found.certificate is not None
    assert len(found.certificate.failures) == 9


def test_every_copied_neuron_is_found_again():
    base = open_checkpoint(build("gpt2"))
    lazy = grow(base, factor=2.5, choose="random", seed=3)
    assert discover_growths(base, lazy) == find_growths(base, lazy)
    assert len(discover_growths(base, lazy)[0].copied) > 10


@pytest.mark.parametrize(
    "choose",
    [
        "first",
        pytest.param(
            "random",
            marks=pytest.mark.xfail(
                strict=True,
                reason="discover counts a copy to the first of the equal neurons it may come from: "
                "where the base holds copies itself, the sums of the right growth don't come out",
            ),
        ),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_growth_of_a_grown_model_is_discovered(name: str, choose: Any, tmp_path: Path):
    write(grow(open_checkpoint(grown(name)), factor=1.75, choose=choose), tmp_path / "twice")
    (tmp_path / "twice/surgery.json").unlink()
    base, other = open_checkpoint(grown(name)), open_checkpoint(tmp_path / "twice")
    assert verify(base, other, logits=False).passed is True


@pytest.mark.parametrize(
    "judged",
    [
        {True, None},
        pytest.param(
            {True},
            marks=pytest.mark.xfail(
                strict=True,
                reason="a Growth has its padding last: copies behind zero neurons aren't "
                "described, so that the growth isn't seen",
            ),
        ),
    ],
    ids=["not-failed", "passed"],
)
def test_copies_behind_padding(judged: set[bool | None]):
    base = open_checkpoint(build("llama"))
    twice = grow(grow(base, layers="1", uniform=True), factor=1.25)
    assert verify(base, twice, logits=False).passed in judged


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_certificate_for_float64_with_all_its_bits(factor: int, tmp_path: Path):
    """Three quarters of a float64 have more bits than float64 has: the sum of all copies fits,
    the partial sums don't."""
    for name in ("llama", "gpt2"):
        tensors = {
            key: value.double() * (1 + torch.rand(value.shape, dtype=torch.float64))
            for key, value in load(build(name)).items()
        }
        base = open_checkpoint(variant(tmp_path / name, build(name), tensors))
        found = verify(base, grow(base, factor=factor), logits=False)
        assert found.certificate is not None
        assert found.certificate.failures == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_single_flipped_bit_is_found(name: str, dtype: str, data: st.DataObject):
    base = open_checkpoint(build(name, dtype))
    other = open_checkpoint(grown(name, dtype, factor=1.5, choose="random", symmetry_break=0.1))
    key = data.draw(st.sampled_from(sorted(other)), "tensor")
    assert find_growths(base, other)
    values = other[key].whole()
    whole = {2: torch.int16, 4: torch.int32}[values.element_size()]
    bits = values.view(whole).clone()
    at = data.draw(st.integers(0, bits.numel() - 1), "element")
    bit = data.draw(st.integers(0, 8 * values.element_size() - 1), "bit")
    mask = 1 << bit if bit < 8 * values.element_size() - 1 else -(1 << bit)
    bits.view(-1)[at] ^= mask
    damaged = with_tensor(other, key, bits.view(values.dtype))
    if key.endswith(FAMILIES[name].down) and damaged[key].whole().equal(values):
        return  # the sign of a zero: the sum is the same
    found = verify(base, damaged, logits=False)
    assert found.certificate is not None
    assert [text.split(":")[0] for text in found.certificate.failures] == [key]
    assert found.passed is False
    with pytest.raises(VerificationError) as caught:
        found.require()
    assert list(caught.value.problems) == list(found.certificate.failures)


def test_names_shapes_and_types_are_part_of_the_certificate(tmp_path: Path):
    base, right = open_checkpoint(build("llama")), grown("llama")
    tensors = load(right)
    norm = tensors.pop("model.norm.weight")
    tensors["model.norm.scale"] = norm
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].double()
    wrong = variant(tmp_path / "wrong", right, tensors)
    found = certify(base, open_checkpoint(wrong), find_growths(base, open_checkpoint(right)))
    assert found.failures == (
        "model.norm.weight is missing in the grown checkpoint",
        "model.norm.scale isn't in the base",
        f"{key} is F64 [176, 32], and should be F32 [176, 32]",
    )
    assert not found.holds


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_has_to_be_zero(name: str, tmp_path: Path):
    family = FAMILIES[name]
    right = grown(name, layers="1", uniform=True)
    base = open_checkpoint(build(name))
    assert verify(base, open_checkpoint(right), logits=False).passed is True
    growths = find_growths(base, open_checkpoint(right))
    assert sorted((growth.mlp.block, growth.padding) for growth in growths) == [
        (0, family.width),
        (1, 0),
        (2, family.width),
    ]
    messages = set()
    for inner in (*family.up, *family.up_biases, family.down):
        key = family.name(2, inner)
        values = load(right)[key]
        values.view(-1)[-1] = 1e-30  # the last row and column are padding
        damaged = with_tensor(open_checkpoint(right), key, values)
        found = certify(base, damaged, growths)
        (failure,) = found.failures
        assert failure.startswith(f"{key}: ")
        messages.add(failure.removeprefix(f"{key}: "))
    p = family.width
    row = f"rows {p} to {2 * p - 1} are padding, and aren't zero"
    outgoing = "outgoing weights of padding aren't zero"
    column = "columns of padding aren't zero"
    assert messages == ({row, outgoing} if name == "llama" else {row, outgoing, column})


finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8))
def test_two_sum_is_exact(pairs: list[tuple[float, float]]):
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    total, rest = two_sum(a, b)
    for x, y, s, r in zip(a.tolist(), b.tolist(), total.tolist(), rest.tolist(), strict=True):
        assert s == x + y
        assert Fraction(s) + Fraction(r) == Fraction(x) + Fraction(y)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_columns_of_a_down_projection_in_any_order(data: st.DataObject):
    """Any columns copied any number of times, padding anywhere: what sums to the base holds, and
    one weight off, or a weight of the base that nothing has, doesn't."""
    width = data.draw(st.integers(1, 6), "width")
    copies = data.draw(st.lists(st.integers(0, 4), min_size=width, max_size=width), "copies")
    padding = data.draw(st.integers(0 if sum(copies) else 1, 3), "padding")
    order = [at for at, many in enumerate(copies) for _ in range(many)] + [-1] * padding
    if data.draw(st.booleans(), "shuffled"):
        order = data.draw(st.permutations(order), "order")
    sources = numpy.array(order)
    ordinals = numpy.array(
        [order[:at].count(one) if one >= 0 else 0 for at, one in enumerate(order)]
    )
    counts = numpy.array([copies[one] if one >= 0 else 0 for one in order])
    grown = torch.tensor([[draw_weight(data) if one >= 0 else 0.0 for one in order]] * 2)
    base = torch.zeros(2, width)
    for column, one in enumerate(order):
        if one >= 0:
            base[:, one] += grown[:, column]
    apart = columns_of(sources, ordinals, counts, width)

    def run() -> str | None:
        return DownColumns("down", held(base), held(grown), (0, 2), apart).run(0, 2)

    assert run() is None
    at = data.draw(st.integers(0, len(order) - 1), "damaged")
    grown[1, at] += 1
    assert ("padding" if order[at] < 0 else "don't sum") in str(run())
    grown[1, at] -= 1
    base[0, data.draw(st.integers(0, width - 1), "changed")] += 1
    assert "(off by up to 1)" in str(run())


def draw_weight(data: st.DataObject) -> float:
    """A small whole number, so that sums of several are exact."""
    return float(data.draw(st.integers(-50, 50), "weight"))


@pytest.mark.parametrize("in_out", [False, True])
def test_a_sum_that_only_looks_exact_is_found(in_out: bool, tmp_path: Path):
    """1 and 2^-80 add to 1 in float64, and not in truth."""
    name = "gpt2" if in_out else "llama"
    right = grown(name)
    family = FAMILIES[name]
    key = family.name(1, family.down)
    for tiny in (2.0**-80, -(2.0**-100)):
        before, after = load(build(name))[key], load(right)[key]
        for values, copies in ((before, [1.0]), (after, [1.0, tiny])):
            for number, value in enumerate(copies):
                at = number * family.width
                values[(at, 0) if in_out else (0, at)] = value
        assert 1.0 + tiny == 1.0
        base = with_tensor(open_checkpoint(build(name)), key, before)
        other = with_tensor(open_checkpoint(right), key, after)
        assert verify(base, other, logits=False).certificate.failures == (
            (
                f"{key}: the outgoing weights of a neuron's copies don't sum to what it had (off by up "
                f"to {abs(tiny):.3g})"
            ),
        )


def test_same_bits_tells_zeros_and_nans_apart():
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert not same_bits(zero, torch.zeros(2))
    other = (nan.view(torch.int32) + 1).view(torch.float32)
    assert not same_bits(nan, other)


# The logits


def by_hand(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The logits of the tokens that verification draws, without its code: (128, 97)."""
    model = loaded(folder).to(dtype)
    generator = torch.Generator().manual_seed(0)
    special = {
        v for k, v in json.loads((folder / "config.json").read_text()).items() if "token" in k
    }
    ordinary = torch.tensor([token for token in range(97) if token not in special])
    ids = ordinary[torch.randint(0, len(ordinary), (2, 64), generator=generator)]
    with torch.no_grad():
        return model(input_ids=ids).logits.flatten(0, 1).double()


def test_the_report_is_what_independent_formulas_give():
    base, tuned = build("llama"), build_tuned("llama")
    report = compare_logits(open_checkpoint(base), open_checkpoint(tuned), device="cpu")
    x, y = by_hand(base), by_hand(tuned)
    assert report.tokens == x.shape[0] == 128
    assert (report.device, report.dtype, report.uninitialised) == ("cpu", "float32", ())
    largest = float((x - y).abs().max())
    assert math.isclose(report.max_difference, largest, rel_tol=1e-4)
    assert math.isclose(report.relative, largest / float(x.abs().max()), rel_tol=1e-4)
    divergences, same = [], 0
    for row_x, row_y in zip(x.tolist(), y.tolist(), strict=True):
        norm_x = math.log(math.fsum(math.exp(v) for v in row_x))
        norm_y = math.log(math.fsum(math.exp(v) for v in row_y))
        divergences.append(
            math.fsum(
                math.exp(a - norm_x) * (a - norm_x - b + norm_y)
                for a, b in zip(row_x, row_y, strict=True)
            )
        )
        same += row_x.index(max(row_x)) == row_y.index(max(row_y))
    assert math.isclose(report.kl_mean, math.fsum(divergences) / 128, rel_tol=1e-4)
    assert math.isclose(report.kl_max, max(divergences), rel_tol=1e-4)
    assert report.top1 == same / 128
    assert 0.02 < report.top1 < 0.98
    assert report.first_departure == "model.layers.0"
    assert not report.same
    assert report.noise_floor is not None
    assert 1e-7 < report.noise_floor < 1e-4  # float32 and logits of about 5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_grown_model_stays_within_the_noise(dtype: Any):
    base = open_checkpoint(build("gemma2"))
    report = compare_logits(base, grow(base, factor=1.5), device="cpu", dtype=dtype)
    assert report.same
    assert report.first_departure is None
    assert report.top1 == 1.0
    limit = 1e-4 if dtype == "float32" else 1e-12
    assert report.noise_floor is not None
    assert report.threshold == 8 * report.noise_floor < limit


@pytest.mark.parametrize(
    ("name", "block"),
    [("llama", 0), ("llama", 1), ("gpt2", 2), ("gpt_neox", 1), ("opt", 2), ("bert_mlm", 1)],
)
def test_the_damaged_block_is_named(name: str, block: int):
    family = FAMILIES[name]
    base = open_checkpoint(build(name))
    key = family.name(block, family.down)
    other = grow(base)
    values = other[key].whole()
    values[3] *= 1.01
    damaged = with_tensor(other, key, values)
    found = verify(base, damaged, device="cpu")
    assert found.logits is not None
    assert found.logits.first_departure == f"{family.stack}.{block}"
    assert found.passed is False
    with pytest.raises(VerificationError) as caught:
        found.require()
    first, second = caught.value.problems
    assert first.startswith(f"{key}: the outgoing weights of a neuron's copies don't sum")
    assert second == (
        f"logits differ by {found.logits.max_difference:.3g}, and rounding explains "
        f"{found.logits.threshold:.3g} (8 noise floors); the first to depart is "
        f"{family.stack}.{block}"
    )


def test_damage_behind_the_blocks_is_in_no_block():
    base = open_checkpoint(build("llama"))
    values = base["lm_head.weight"].whole()
    values[5] *= 1.01
    found = verify(base, with_tensor(grow(base), "lm_head.weight", values), device="cpu")
    assert found.logits is not None
    assert found.logits.first_departure is None
    assert not found.logits.same
    with pytest.raises(VerificationError, match=r"depart is no single block; the output$"):
        found.require()


@pytest.mark.parametrize("name", ["bert", "gpt2_base"])
def test_hidden_states_stand_for_the_logits_of_a_model_without_a_head(name: str):
    base = open_checkpoint(build(name))
    found = verify(base, grow(base, factor=1.5), device="cpu")
    assert found.passed is True
    assert found.logits is not None
    assert found.logits.tokens == 128
    assert (found.logits.kl_mean, found.logits.kl_max, found.logits.top1) == (None, None, None)
    report = found.as_json()
    assert report["passed"] is True
    assert report["logits"]["same"] is True
    assert report["logits"]["threshold"] == found.logits.threshold
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(report, default=str))


def test_a_nan_is_infinitely_far_away():
    base = open_checkpoint(build("llama"))
    values = base["lm_head.weight"].whole()
    values[0, 0] = float("nan")
    report = compare_logits(base, with_tensor(base, "lm_head.weight", values), device="cpu")
    assert report.max_difference == math.inf
    assert not report.same


def test_what_the_files_lack_is_reported(tmp_path: Path):
    """A parameter that no tensor is there for is the same on both sides, and named."""
    tensors = load(build("bert_mlm"))
    del tensors["bert.embeddings.LayerNorm.weight"]
    base = open_checkpoint(variant(tmp_path / "base", build("bert_mlm"), tensors))
    report = compare_logits(base, grow(base), device="cpu")
    assert report.uninitialised == ("bert.embeddings.LayerNorm.weight",)
    assert report.same


def test_a_fine_tuned_model_is_reported_and_not_judged():
    base, tuned = open_checkpoint(build("qwen2")), open_checkpoint(build_tuned("qwen2"))
    found = verify(base, tuned, device="cpu")
    assert found.passed is None
    assert found.certificate is None
    assert found.logits is not None
    assert found.logits.max_difference > 0.1
    assert found.summary == (
        f"logits of 128 random tokens in float32 on cpu differ by at most "
        f"{found.logits.max_difference:.3g} (noise floor {found.logits.noise_floor:.3g}), "
        f"KL mean {found.logits.kl_mean:.3g}, first choices agree on {found.logits.top1:.1%}"
    )
    found.require()
    assert verify(base, tuned, logits=False).summary == "nothing was compared"
    scaled = lines(base, tuned, alpha=0.0, beta=0.5)
    drift = verify(base, scaled, device="cpu").logits
    assert drift is not None
    assert drift.max_difference < found.logits.max_difference
    assert drift.first_departure == "model.layers.1"  # block 0 and the embedding keep the base's


def test_a_scaled_growth_isn_t_judged_as_a_growth(tmp_path: Path):
    """lines of two grown models: a grow lies in the history, and another edit after it."""
    base = open_checkpoint(build("llama"))
    first, second = grow(base), grow(open_checkpoint(build_tuned("llama")))
    scaled = lines(first, second, alpha=0.5)
    write(scaled, tmp_path / "scaled")
    assert verify(base, open_checkpoint(tmp_path / "scaled"), logits=False).passed is None
    assert verify(base, scaled, logits=False).passed is None


def test_models_of_different_vocabularies_have_no_common_logits(tmp_path: Path):
    tensors = load(build("llama"))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.zeros(3, 32)])
    other = variant(tmp_path / "other", build("llama"), tensors, vocab_size=100)
    with pytest.raises(UnsupportedError, match=r"outputs differ in shape: \[128, 97\] and \[128"):
        verify(open_checkpoint(build("llama")), open_checkpoint(other), device="cpu")
    with pytest.raises(MismatchError):
        lines(open_checkpoint(build("llama")), open_checkpoint(other), alpha=0.5)


def test_a_model_type_that_transformers_lacks_leaves_the_certificate(tmp_path: Path):
    base = variant(tmp_path / "base", build("llama"), model_type="made_up")
    other = grow(open_checkpoint(base))
    assert verify(open_checkpoint(base), other, logits=False).passed is True
    with pytest.raises(UnsupportedError, match="doesn't know the model type 'made_up'"):
        verify(open_checkpoint(base), other, device="cpu")


def test_tensors_alone_can_be_certified(tmp_path: Path):
    """A directory without a config: the widths are those of the shapes."""
    base = open_checkpoint(made(tmp_path / "base", load(build("llama"))))
    write(grow(base, factor=1.5), tmp_path / "grown")
    assert not (tmp_path / "grown/config.json").exists()
    assert verify(base, open_checkpoint(tmp_path / "grown"), logits=False).passed is True


def test_logits_that_arent_finite_prove_nothing(tmp_path: Path) -> None:
    weights = {name: tensor.whole() for name, tensor in open_checkpoint(build("llama")).items()}
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    weights[name][0, 0] = float("nan")
    config = json.loads((build("llama") / "config.json").read_text())
    broken = open_checkpoint(save_raw(tmp_path / "nan", weights, config=config))
    with pytest.raises(FormatError, match=r"nan gives logits that aren't finite"):
        verify(broken, grow(broken, factor=2), device="cpu")


def test_outputs_of_zeros_prove_nothing() -> None:
    base = open_checkpoint(build("llama"))
    blank = with_tensor(base, "lm_head.weight", torch.zeros(base["lm_head.weight"].shape))
    with pytest.raises(UnsupportedError, match=r"nothing but zeros on .* random tokens"):
        verify(blank, grow(blank, factor=2), device="cpu")
