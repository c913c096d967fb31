"""The arithmetic of an update: base + scale * (tuned - base), rounded once."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from surgery.dtypes import DTYPES, DType
from surgery.kernels.updates import scale_and_square, scale_update

PAIRS = [
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.bfloat16),
]
KNOWN = {known.torch: known for known in DTYPES.values() if known.kind == "float"}


def compute_type(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def types(base: torch.Tensor, tuned: torch.Tensor) -> dict[str, DType]:
    compute = compute_type(base.dtype, tuned.dtype)
    return {"compute": KNOWN[compute], "dtype": KNOWN[tuned.dtype]}


def update(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    return scale_update(base, tuned, scale=scale, **types(base, tuned))


def both(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    return scale_and_square(base, tuned, scale=scale, **types(base, tuned))


def pair(base: torch.dtype, tuned: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(17, 9, generator=generator, dtype=torch.float64)
    step = 0.1 * torch.randn(17, 9, generator=generator, dtype=torch.float64)
    return start.to(base), (start + step).to(tuned)


@pytest.mark.parametrize(("base_type", "tuned_type"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(scale=st.floats(-2, 2), seed=st.integers(0, 999))
def test_an_update_is_rounded_once(
    base_type: torch.dtype, tuned_type: torch.dtype, scale: float, seed: int
):
    base, tuned = pair(base_type, tuned_type, seed)
    found = update(base, tuned, scale)
    assert found.dtype == tuned_type
    exact = base.double() + scale * (tuned.double() - base.double())
    compute = compute_type(base_type, tuned_type)
    sizes = base.double().abs() + abs(scale) * (tuned.double().abs() + base.double().abs())
    computing = 3 * torch.finfo(compute).eps * sizes
    rounding = torch.finfo(tuned_type).eps / 2 * exact.abs() if tuned_type != compute else 0
    least = torch.finfo(tuned_type).tiny * torch.finfo(tuned_type).eps
    assert bool(((found.double() - exact).abs() <= computing + rounding + least).all())


@pytest.mark.parametrize(("base_type", "tuned_type"), PAIRS)
def test_scale_one_is_tuned_and_scale_nought_is_base(
    base_type: torch.dtype, tuned_type: torch.dtype
):
    base, tuned = pair(base_type, tuned_type)
    base[0], tuned[0] = -0.0, 1e-7  # the round trip over tau would lose both
    base[1], tuned[1] = 1e-7, -0.0
    assert torch.equal(update(base, tuned, 1.0), tuned)
    assert torch.equal(torch.signbit(update(base, tuned, 1.0)), torch.signbit(tuned))
    assert torch.equal(update(base, tuned, 0.0), base.to(tuned_type))
    assert torch.equal(torch.signbit(update(base, tuned, 0.0)), torch.signbit(base))


def test_inputs_stay_as_they_are():
    for base_type, tuned_type in PAIRS:
        for scale in (0.0, 0.3, 1.0):
            base, tuned = pair(base_type, tuned_type)
            copies = base.clone(), tuned.clone()
            update(base, tuned, scale)
            both(base, tuned, scale)
            assert torch.equal(base, copies[0])
            assert torch.equal(tuned, copies[1])


def test_an_update_of_a_last_bit_isn_t_lost():
    """bfloat16 base and tuned are neighbours: 3/4 of the step rounds to tuned, 1/4 to the base,
    and half of it to the even one (arcee-ai/mergekit#316 rounds before it subtracts)."""
    base = torch.tensor([1.0, 1.0078125, 3.0, -5.0], dtype=torch.bfloat16)
    tuned = (base.view(torch.int16) + 1).view(torch.bfloat16)
    assert tuned.tolist() == [1.0078125, 1.015625, 3.015625, -5.03125]
    assert update(base, tuned, 0.75).tolist() == tuned.tolist()
    assert update(base, tuned, 0.25).tolist() == base.tolist()
    assert update(base, tuned, 0.5).tolist() == [1.0, 1.015625, 3.0, -5.0]
    assert update(base, tuned, 4.0).tolist() == [1.03125, 1.0390625, 3.0625, -5.125]


def test_a_float32_step_below_bfloat16_survives():
    base = torch.tensor([1.0], dtype=torch.float32)
    tuned = torch.tensor([1.0 + 2**-20], dtype=torch.float32)
    assert update(base, tuned, 0.5).tolist() == [1.0 + 2**-21]
    # A float32 base with a bfloat16 tuned model: tau is that of the values as they are.
    base = torch.tensor([1.0 + 2**-9], dtype=torch.float32)
    tuned = torch.tensor([1.0625], dtype=torch.bfloat16)
    assert update(base, tuned, 0.125).tolist() == [1.0078125]
    assert 1.0 + 2**-9 + 0.125 * (0.0625 - 2**-9) == 1.009521484375  # nearer to 1.0078 than 1.0156


@pytest.mark.parametrize(("base_type", "tuned_type"), PAIRS)
def test_the_square_is_that_of_the_difference(base_type: torch.dtype, tuned_type: torch.dtype):
    base, tuned = pair(base_type, tuned_type)
    differences = (tuned.double() - base.double()).flatten().tolist()
    wanted = math.fsum(d * d for d in differences)
    for scale in (0.0, 0.3, 1.0):
        rows, square = both(base, tuned, scale)
        assert math.isclose(square, wanted, rel_tol=1e-5)
        assert torch.equal(rows, update(base, tuned, scale))
