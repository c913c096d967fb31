"""The exact split: shares of a weight's own dtype whose sum, in exact arithmetic, is the weight."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy
import pytest
import torch
from hypothesis import example, given, settings

from surgery.kernels.columns import take_columns
from surgery.kernels.split import dyadic_shares, share, split_columns, split_rows
from surgery.values import noise

# dtype: (bits, the integer type of that size, bits of the exponent's mask)
FORMATS = {
    torch.float64: (64, torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (32, torch.int32, 0x7F80_0000),
    torch.bfloat16: (16, torch.int16, 0x7F80),
    torch.float16: (16, torch.int16, 0x7C00),
}
DTYPES = list(FORMATS)
SLOW = settings(max_examples=40, deadline=None)


def bit_patterns(dtype: torch.dtype) -> st.SearchStrategy[list[int]]:
    """Bit patterns of finite numbers: any, and the small ones (subnormals) more often."""
    bits, _, exponent = FORMATS[dtype]
    one = st.integers(0, 2**bits - 1) | st.integers(0, 40) | st.integers(0, 2 ** (bits - 7))
    finite = one.filter(lambda pattern: pattern & exponent != exponent)
    return st.lists(finite, min_size=1, max_size=12)


def from_bits(patterns: list[int], dtype: torch.dtype) -> torch.Tensor:
    bits, whole, _ = FORMATS[dtype]
    signed = [p - 2**bits if p >= 2 ** (bits - 1) else p for p in patterns]
    return torch.tensor(signed, dtype=whole).view(dtype)


def bits_of(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(FORMATS[tensor.dtype][1]).flatten().tolist()


def edges(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, the ends of the subnormals, the largest, and neighbours of powers of two."""
    bits, _, exponent = FORMATS[dtype]
    least_normal = exponent & -exponent
    one = bits_of(torch.ones(1, dtype=dtype))[0]
    some = [0, 1, 2, 3, 5, least_normal - 1, least_normal, least_normal + 1, least_normal * 2 + 1]
    some += [exponent - 1, one - 1, one, one + 1]
    return from_bits([*some, *(p + 2 ** (bits - 1) for p in some)], dtype)


def all_shares(weight: torch.Tensor, copies: int, *draws: torch.Tensor, **options: float):
    counts = torch.full(weight.shape, copies)
    return [
        share(weight, torch.full(weight.shape, m), counts, *draws, **options) for m in range(copies)
    ]


def exact(value: torch.Tensor) -> Fraction:
    return Fraction(float(value))


def representable(value: Fraction, dtype: torch.dtype) -> bool:
    """Whether `value` is a number of `dtype`, found from the format's precision and range."""
    precision, least = {
        torch.float64: (53, -1074),
        torch.float32: (24, -149),
        torch.bfloat16: (8, -133),
        torch.float16: (11, -24),
    }[dtype]
    if value == 0:
        return True
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    return (size / unit).denominator == 1


def check_split(weight: torch.Tensor, shares: list[torch.Tensor]) -> None:
    for part in shares:
        assert part.dtype == weight.dtype
        assert part.shape == weight.shape
    for number in range(weight.numel()):
        whole = exact(weight.flatten()[number])
        parts = [exact(part.flatten()[number]) for part in shares]
        assert sum(parts) == whole
        sign = math.copysign(1, float(weight.flatten()[number]))
        for part, value in zip(shares, parts, strict=True):
            assert abs(value) <= abs(whole)
            assert math.copysign(1, float(part.flatten()[number])) == sign


@pytest.mark.parametrize(
    ("copies", "shares"),
    [
        (1, [1]),
        (2, [2, 2]),
        (3, [2, 4, 4]),
        (4, [4, 4, 4, 4]),
        (5, [4, 4, 4, 8, 8]),
        (6, [4, 4, 8, 8, 8, 8]),
        (7, [4, 8, 8, 8, 8, 8, 8]),
        (8, [8] * 8),
        (9, [8] * 7 + [16, 16]),
    ],
)
def test_dyadic_shares_are_powers_of_two_as_equal_as_can_be(copies: int, shares: list[int]):
    assert [Fraction(s) for s in dyadic_shares(copies)] == [Fraction(1, d) for d in shares]
    assert sum(Fraction(s) for s in dyadic_shares(copies)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@SLOW
@given(data=st.data(), copies=st.integers(1, 9))
def test_shares_sum_exactly_to_the_weight(dtype: torch.dtype, data: st.DataObject, copies: int):
    weight = from_bits(data.draw(bit_patterns(dtype)), dtype)
    check_split(weight, all_shares(weight, copies))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_edges_of_the_format_are_split_exactly(dtype: torch.dtype):
    for copies in range(1, 10):
        check_split(edges(dtype), all_shares(edges(dtype), copies))


@pytest.mark.parametrize("dtype", DTYPES)
@SLOW
@given(data=st.data(), copies=st.integers(1, 9))
def test_shares_are_dyadic_wherever_those_can_be_represented(
    dtype: torch.dtype, data: st.DataObject, copies: int
):
    weight = torch.cat([from_bits(data.draw(bit_patterns(dtype)), dtype), edges(dtype)])
    fractions = [Fraction(1)]
    while len(fractions) < copies:  # halve the largest, from the last of them on
        at = max(i for i, f in enumerate(fractions) if f == max(fractions))
        fractions[at : at + 1] = [fractions[at] / 2] * 2
    shares = all_shares(weight, copies)
    seen = 0
    for number in range(weight.numel()):
        whole = exact(weight[number])
        if all(representable(whole * f, dtype) for f in fractions):
            assert [exact(part[number]) for part in shares] == [whole * f for f in fractions]
            seen += 1
    assert seen >= 8  # of the edges alone


def test_a_float16_subnormal_is_split_without_loss():
    """Five units can't be halved: half would be 2.5 of them."""
    weight = torch.tensor([5 * 2.0**-24], dtype=torch.float16)
    first, second = all_shares(weight, 2)
    assert {float(first) * 2**24, float(second) * 2**24} == {2.0, 3.0}


def mixed(rows: int, width: int, wide: int, dtype: torch.dtype, seed: int):
    """A weight (rows, width) with tiny and usual values, and a random map of `wide` columns."""
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-24, 3, (rows, width), generator=generator)
    weight = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    weight[::3, ::5] = 0
    more = torch.randint(0, width, (wide - width,), generator=generator)
    sources = torch.cat([torch.arange(width), more])
    copies = torch.bincount(sources)[sources]
    ordinals = torch.tensor([int((sources[:j] == s).sum()) for j, s in enumerate(sources)])
    return weight, sources, ordinals, copies


@pytest.mark.parametrize("symmetry_break", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**30), cut=st.integers(1, 10))
@example(seed=0, cut=1)
def test_blocks_of_rows_don_t_change_a_bit(
    dtype: torch.dtype, symmetry_break: float, seed: int, cut: int
):
    weight, sources, ordinals, copies = mixed(11, 8, 29, dtype, seed)
    draws = [torch.rand(weight.shape) * 2 - 1 for _ in range(int(copies.max()) - 1)]
    draws = draws if symmetry_break else []
    given = {"sources": sources, "ordinals": ordinals, "copies": copies}
    whole = split_columns(weight, *draws, **given, symmetry_break=symmetry_break)
    pieces = [
        split_columns(
            weight[at : at + cut],
            *(d[at : at + cut] for d in draws),
            **given,
            symmetry_break=symmetry_break,
        )
        for at in range(0, 11, cut)
    ]
    assert bits_of(whole) == bits_of(torch.cat(pieces))
    for column in range(8):
        for row in range(11):
            parts = [exact(v) for v in whole[row, sources == column]]
            assert sum(parts) == exact(weight[row, column])
    # The same weight stored (in, out): neurons are rows, and are cut into blocks too.
    turned, wide_draws = weight.T[sources], [d.T[sources] for d in draws]
    by_rows = [
        split_rows(
            turned[at : at + cut],
            ordinals[at : at + cut],
            copies[at : at + cut],
            *(d[at : at + cut] for d in wide_draws),
            symmetry_break=symmetry_break,
        )
        for at in range(0, 29, cut)
    ]
    assert bits_of(torch.cat(by_rows).T) == bits_of(whole)


@pytest.mark.parametrize("dtype", DTYPES)
@SLOW
@given(
    data=st.data(),
    copies=st.integers(2, 9),
    symmetry_break=st.floats(2**-6, 0.499),
    seed=st.integers(0, 99),
)
def test_an_unequal_split_is_exact_too(
    dtype: torch.dtype, data: st.DataObject, copies: int, symmetry_break: float, seed: int
):
    weight = torch.cat([from_bits(data.draw(bit_patterns(dtype)), dtype), edges(dtype)])
    draws = [noise((weight.numel(),), seed, f"w:{m}").read() for m in range(copies - 1)]
    check_split(weight, all_shares(weight, copies, *draws, symmetry_break=symmetry_break))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_copies_get_one_half_plus_and_minus_the_noise(dtype: torch.dtype):
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    draw = noise((40, 50), 7, "w").read()
    first, second = all_shares(weight, 2, draw, symmetry_break=0.1)
    unit = torch.finfo(dtype).eps
    wanted = 0.5 + 0.1 * draw.double()
    assert float((first.double() / weight.double() - wanted).abs().max()) <= unit
    assert float((second.double() / weight.double() - (1 - wanted)).abs().max()) <= unit
    assert float((first != second).double().mean()) > 0.9
    again = all_shares(weight, 2, noise((40, 50), 7, "w").read(), symmetry_break=0.1)
    assert bits_of(again[0]) == bits_of(first)
    other = all_shares(weight, 2, noise((40, 50), 8, "w").read(), symmetry_break=0.1)
    assert bits_of(other[0]) != bits_of(first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_leaves_its_inputs_as_they_are(dtype: torch.dtype):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    ordinals, copies = torch.tensor([0, 0, 0, 1, 1, 1]), torch.full((6,), 2)
    split_rows(weight, ordinals, copies)
    assert torch.equal(weight, before)


def test_columns_without_copies_are_zero():
    weight = torch.tensor([[3.0, -5.0]])
    nothing = torch.tensor([1, 1, 0])
    wide = split_columns(
        weight,
        sources=torch.tensor([0, 1, 1]),
        ordinals=torch.tensor([0, 0, 0]),
        copies=nothing,
    )
    assert wide.tolist() == [[3.0, -5.0, 0.0]]
    assert take_columns(weight, sources=torch.tensor([1, -1, 0])).tolist() == [[-5.0, 0.0, 3.0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 30), length=st.integers(0, 30))
def test_noise_doesn_t_depend_on_how_it_is_read(seed: int, start: int, length: int):
    field = noise((37, 5), seed, "name")
    start, stop = min(start, 37), min(start + length, 37)
    assert torch.equal(field.read(start, stop), field.read()[start:stop])
    flat = noise((185,), seed, "name").read()
    assert torch.equal(flat, field.read().flatten())


def test_noise_is_uniform_and_belongs_to_its_seed_and_name():
    values = noise((1000, 50), 0, "a").read().double()
    assert values.min() >= -1
    assert values.max() < 1
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.var()) - 1 / 3) < 0.01
    histogram, _ = numpy.histogram(values.numpy(), bins=10, range=(-1, 1))
    assert histogram.min() > 4700
    assert histogram.max() < 5300
    for seed, name in ((1, "a"), (0, "b")):
        other = noise((1000, 50), seed, name).read().double()
        assert abs(float((values * other).mean())) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("small", [False, True])
def test_the_prepared_split_is_the_general_one(dtype: torch.dtype, small: bool) -> None:
    """Runs of columns, padding behind them, and weights that can't be halved in one column."""
    from surgery.kernels.split import Dyadic

    runs = ((0, 5), (0, 5), (1, 3))
    sources = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 1, 2, 0])
    ordinals = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0])
    copies = torch.tensor([2, 3, 3, 2, 2, 2, 3, 3, 2, 2, 3, 3, 0])
    weight = torch.randn(7, 5).to(dtype)
    if small:
        weight[2, 3] = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * 3
    given = {"sources": sources, "ordinals": ordinals, "copies": copies}
    plan = Dyadic.plan(runs, ordinals, copies, 5, dtype)
    assert (plan.split(weight) is None) == small
    prepared = split_columns(weight, **given, dyadic=plan)
    assert torch.equal(prepared, split_columns(weight, **given))
    for column in range(5):
        total = prepared[:, (sources == column) & (copies > 0)].double().sum(1)
        assert torch.equal(total, weight[:, column].double())
