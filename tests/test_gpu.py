"""On a GPU: the figures of the CPU, weights that stream to it, and merges to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import build
from mixtures import build_mixture
from test_streaming import IDS, outputs

from surgery import grow, open_checkpoint
from surgery.dtypes import DTYPES
from surgery.kernels.merging import Combination, Rounding, combine, fuse
from surgery.kernels.updates import apply_updates, scale_update
from surgery.modeling.build import build_deferred, build_model
from surgery.modeling.deferred import Deferred
from surgery.modeling.lanes import PinnedBuffers
from surgery.modeling.streaming import run_together
from surgery.verification import compare_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
NAMES = ["llama", "llama_tied", "gpt2", "bert_mlm", "gemma2", "phi3"]


def on_gpu(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS.cuda(), return_dict=True)[0].clone()


@pytest.mark.parametrize("name", NAMES)
def test_streamed_models_give_what_whole_ones_do(name: str):
    base = open_checkpoint(build(name))
    checkpoints = [base, grow(base, factor=1.5)]
    models = [build_deferred(one, torch.float32, "cuda").model for one in checkpoints]
    assert all(isinstance(p, Deferred) and p.is_cuda for m in models for p in m.parameters())
    assert all(buffer.is_cuda for model in models for buffer in model.buffers())
    found = run_together(models, [lambda m=model: on_gpu(m) for model in models], "cuda")
    for checkpoint, result in zip(checkpoints, found, strict=True):
        whole = on_gpu(build_model(checkpoint, torch.float32, "cuda").model)
        torch.testing.assert_close(result, whole, rtol=1e-6, atol=1e-6)
        on_cpu = outputs(build_model(checkpoint, torch.float32, "cpu").model)
        scale = float(on_cpu.abs().max())
        torch.testing.assert_close(result.cpu(), on_cpu, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "dbrx"])
def test_mixtures_are_packed_there(name: str):
    base = open_checkpoint(build_mixture(name))
    model = build_deferred(base, torch.float32, "cuda").model
    (found,) = run_together([model], [lambda: on_gpu(model)], "cuda")
    whole = on_gpu(build_model(base, torch.float32, "cuda").model)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_report_is_that_of_the_cpu_but_for_rounding(name: str):
    base = open_checkpoint(build(name))
    other = grow(base, factor=1.5)
    there = compare_logits(base, other, device="cuda")
    here = compare_logits(base, other, device="cpu")
    assert (there.device, there.streamed, there.same) == ("cuda", True, True)
    assert there.noise_floor is not None
    assert here.noise_floor is not None
    assert 1 / 8 < there.noise_floor / here.noise_floor < 8
    assert (there.tokens, there.top1, there.first_departure) == (
        here.tokens,
        here.top1,
        here.first_departure,
    )
    exact = compare_logits(base, other, device="cuda", dtype="float64")
    assert exact.same
    assert exact.relative < 1e-12


def test_the_same_figures_every_time():
    base = open_checkpoint(build("llama", "bfloat16"))
    other = grow(base, factor=2)
    first, second = (compare_logits(base, other, device="cuda") for _ in range(2))
    whole = compare_logits(base, other, device="cuda", streamed=False)
    assert first == second
    assert math.isclose(whole.noise_floor or 0, first.noise_floor or 0, rel_tol=0.5)
    assert replace(whole, streamed=True).top1 == first.top1


def test_weights_wait_in_pinned_memory():
    assert PinnedBuffers(0).empty((2, 3), torch.bfloat16).is_pinned()


def test_elementwise_merges_are_those_of_the_cpu_to_the_bit():
    """Add, subtract and multiply round correctly on both, and so does division by a tensor. (By
    a number it doesn't: CUDA multiplies with the reciprocal.)"""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(513, 257, generator=generator).bfloat16() for _ in range(3)]
    base, a, b = inputs
    types: dict[str, Any] = {"compute": DTYPES["F32"], "dtype": DTYPES["BF16"]}
    rounding = Rounding(scale=0.7, **types)

    def merges(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        taus = [a.float() - base.float(), b.float() - base.float()]
        return [
            scale_update(base, a, scale=0.3, **types),
            apply_updates(base, a.float(), b.float(), scales=(0.3, -0.7), **types),
            combine(base, a, b, rounding=rounding, combination=Combination(0.9, (0.3, 0.6))),
            fuse(taus, (0.3, 0.7), elect=True, normalize=True),
        ]

    there = merges(*(tensor.cuda() for tensor in inputs))
    for found, expected in zip(there, merges(base, a, b), strict=True):
        assert torch.equal(found.cpu(), expected)
