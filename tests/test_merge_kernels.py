"""Every merge method against a formula of its own, in float64, written out plainly; and the laws
that merges keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import case, lazily, merged, model_count, with_base

from surgery.dtypes import DTYPES
from surgery.kernels.merging import by_rank
from surgery.kernels.selection import Search, Window, order_statistics
from surgery.merging import measures
from surgery.merging.methods import METHODS
from surgery.values import noise

Formula = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 3e-6) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


def doubled(base: torch.Tensor, models: list[torch.Tensor]) -> tuple[torch.Tensor, list]:
    return base.double(), [model.double() - base.double() for model in models]


def disjoint_mean(taus: list[torch.Tensor], weights: list[float], normalize: bool) -> torch.Tensor:
    """TIES's elect and merge, entry by entry."""
    out = torch.zeros_like(taus[0])
    for at in itertools.product(*(range(side) for side in out.shape)):
        values = [weight * float(tau[at]) for tau, weight in zip(taus, weights, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        chosen = [(v, w) for v, w in zip(values, weights, strict=True) if v * sign > 0]
        if chosen:
            divisor = sum(w for _, w in chosen) if normalize else 1
            out[at] = sum(v for v, _ in chosen) / divisor
    return out


def keep_ranks(tau: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Zero all but the magnitudes of ranks first to last (excluded), from the smallest."""
    order = sorted(range(tau.numel()), key=lambda at: abs(float(tau.reshape(-1)[at])))
    out = torch.zeros(tau.numel(), dtype=tau.dtype)
    for at in order[first:last]:
        out[at] = tau.reshape(-1)[at]
    return out.reshape(tau.shape)


def test_linear() -> None:
    _, models = case()
    w = [0.2, 0.5, 0.7]
    total = sum(weight * model.double() for weight, model in zip(w, models, strict=True))
    close(merged("linear", None, models, weight=w), total / 1.4)
    close(merged("linear", None, models, weight=w, normalize=False), total)


def test_task_arithmetic() -> None:
    base, models = case()
    start, taus = doubled(base, models)
    total = 0.5 * taus[0] - 1.0 * taus[1] + 2.0 * taus[2]
    w = [0.5, -1.0, 2.0]
    close(merged("task_arithmetic", base, models, weight=w), start + total)
    found = merged("task_arithmetic", base, models, weight=w, normalize=True, **{"lambda": 0.3})
    close(found, start + 0.3 * total / 1.5)


def test_wise_ft_and_expo() -> None:
    base, models = case(models=1)
    start, (tau,) = doubled(base, models)
    close(merged("wise_ft", base, models, alpha=0.3), start + 0.3 * tau)
    close(merged("expo", base, models, alpha=0.3), start + 1.3 * tau)


def test_passthrough() -> None:
    _, models = case(models=1)
    assert torch.equal(merged("passthrough", None, models), models[0])
    close(merged("passthrough", None, models, scale=0.3), 0.3 * models[0].double())


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_a_rotation_between_directions(t: float) -> None:
    base, models = case(models=1, step=1.0)
    a, b = base.double().reshape(-1), models[0].double().reshape(-1)
    theta = math.acos(float(a @ b / (a.norm() * b.norm())))
    wanted = (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)
    close(merged("slerp", base, models, t=t), wanted.reshape(base.shape))


def test_slerp_of_parallel_and_of_zero_tensors_is_a_straight_line() -> None:
    base, _ = case()
    close(merged("slerp", base, [2 * base], t=0.25), 1.25 * base.double())
    close(
        merged("slerp", torch.zeros(3, 2), [torch.ones(3, 2)], t=0.25),
        torch.full((3, 2), 0.25).double(),
    )


@pytest.mark.parametrize("based", [False, True])
def test_nuslerp(based: bool) -> None:
    base, models = case(models=2, step=1.0)
    start = base.double() if based else torch.zeros_like(base).double()
    a, b = (model.double() - start for model in models)
    theta = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    t = 3 / 4
    wanted = start + (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)
    close(merged("nuslerp", base if based else None, models, weight=[1.0, 3.0]), wanted)


@pytest.mark.parametrize("based", [False, True])
def test_multislerp(based: bool) -> None:
    base, models = case(step=1.0)
    start = base.double() if based else torch.zeros_like(base).double()
    w = [0.5, 0.3, 0.2]
    vectors = [model.double() - start for model in models]
    mean = sum(weight * v / v.norm() for weight, v in zip(w, vectors, strict=True))
    length = sum(weight * float(v.norm()) for weight, v in zip(w, vectors, strict=True))
    wanted = start + length * mean / mean.norm()
    close(merged("multislerp", base if based else None, models, weight=w), wanted)


def test_karcher_is_where_the_pulls_of_all_models_cancel() -> None:
    _, models = case(step=1.0)
    w = [0.5, 0.3, 0.2]
    found = merged("karcher", None, models, weight=w, max_iter=100, tol=1e-12).double()
    length = sum(weight * float(m.double().norm()) for weight, m in zip(w, models, strict=True))
    assert float(found.norm()) == pytest.approx(length, rel=1e-6)
    mean = found / found.norm()
    pull = torch.zeros_like(mean)
    for weight, model in zip(w, models, strict=True):
        unit = model.double() / model.double().norm()
        cosine = float((unit * mean).sum())
        pull += weight * math.acos(cosine) / math.sin(math.acos(cosine)) * (unit - cosine * mean)
    assert float(pull.norm()) < 1e-6


def test_karcher_of_two_is_slerp_half_way() -> None:
    base, models = case(models=1, step=1.0)
    unit = [tensor / tensor.norm() for tensor in (base, models[0])]
    close(merged("karcher", None, unit), merged("slerp", unit[0], unit[1:]).double())


def test_model_stock() -> None:
    base, models = case()
    start, taus = doubled(base, models)
    cosines = [
        float((a * b).sum() / (a.norm() * b.norm())) for a, b in itertools.combinations(taus, 2)
    ]
    cosine = sum(cosines) / 3
    t = 3 * cosine / (1 + 2 * cosine)
    close(merged("model_stock", base, models), start + t * sum(taus) / 3)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(normalize: bool) -> None:
    base, models = case((7, 9))
    start, taus = doubled(base, models)
    w, density = [1.0, 0.5, 0.7], [0.2, 0.5, 1.0]
    trimmed = [
        keep_ranks(tau, 63 - int(part * 63), 63) for tau, part in zip(taus, density, strict=True)
    ]
    wanted = start + 0.4 * disjoint_mean(trimmed, w, normalize)
    found = merged(
        "ties", base, models, weight=w, density=density, normalize=normalize, **{"lambda": 0.4}
    )
    close(found, wanted)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(method: str) -> None:
    base, models = case((10, 10))
    start, taus = doubled(base, models)
    kept = [keep_ranks(tau, 100 - 70 - 10, 90) for tau in taus]
    wanted = sum(kept) if method == "breadcrumbs" else disjoint_mean(kept, [1.0] * 3, False)
    close(merged(method, base, models, density=0.7, gamma=0.1), start + wanted)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(method: str) -> None:
    base, models = case((40, 30))
    start, taus = doubled(base, models)
    kept = [
        (((noise((40, 30), 7, f"{at}:w").whole().double() + 1) / 2) < 0.4) * tau / 0.4
        for at, tau in enumerate(taus)
    ]
    found = merged(method, base, models, density=0.4, seed=7)
    elected = disjoint_mean(kept, [1.0] * 3, False)
    close(found, start + (sum(kept) if method == "dare_linear" else elected))
    share = float((kept[0] != 0).double().mean())
    assert share == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("shape", [(20, 30), (50,), (1,), ()])
@pytest.mark.parametrize("method", ["della_linear", "della"])
def test_della(method: str, shape: tuple[int, ...]) -> None:
    base, models = case(shape)
    start, taus = doubled(base, models)
    kept = []
    for at, tau in enumerate(taus):
        rows = tau.reshape(-1, shape[-1] if shape else 1)
        uniform = ((noise(shape, 7, f"{at}:w").whole().double() + 1) / 2).reshape(rows.shape)
        out = torch.zeros_like(rows)
        for i, row in enumerate(rows):
            order = sorted(range(len(row)), key=lambda j: abs(float(row[j])))
            for rank, j in enumerate(order):
                p = 0.6 if len(row) == 1 else 0.6 - 0.3 + 0.6 * rank / (len(row) - 1)
                if float(uniform[i, j]) < p:
                    out[i, j] = row[j] / p
        kept.append(out.reshape(shape))
    wanted = sum(kept) if method == "della_linear" else disjoint_mean(kept, [1.0] * 3, True)
    close(merged(method, base, models, density=0.6, epsilon=0.3, seed=7), start + wanted)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, width=32, allow_infinity=False), min_size=2, max_size=40),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_ranks_are_places_in_a_stable_order(values: list[float], dtype: torch.dtype) -> None:
    """Also of floats that agree in one half of their bits, denormal ones and zeros."""
    repeated = [value for value in values for _ in range(2)]
    tau = torch.tensor([repeated, repeated[::-1]], dtype=dtype)
    last = len(repeated) - 1
    ranks = by_rank(-tau, 0.5, 0.5).mul(last).round()  # from 0 to 1
    for row, found in zip(tau.tolist(), ranks.tolist(), strict=True):
        order = sorted(range(len(row)), key=row.__getitem__)
        assert [found[at] for at in order] == list(range(len(row)))


def test_consensus() -> None:
    base, models = case()
    start, taus = doubled(base, models)
    total = sum(taus)
    votes = sum((tau.abs() >= 0.6 * (total - tau).abs()).int() for tau in taus)
    wanted = start + 0.8 * total * (votes >= 2)
    close(merged("consensus", base, models, mask=0.6, **{"lambda": 0.8}), wanted)


def test_magmax() -> None:
    base, models = case()
    start, taus = doubled(base, models)
    stack = torch.stack(taus)
    largest = stack.abs().argmax(0, keepdim=True)
    close(merged("magmax", base, models), start + stack.gather(0, largest)[0])


def test_nearswap() -> None:
    base, models = case(models=1)
    start, (tau,) = doubled(base, models)
    share = (0.05 / tau.abs()).clamp(max=1)
    close(merged("nearswap", base, models, t=0.05), start + share * tau)


@pytest.mark.parametrize("topk", [1.0, 0.4, 0.0])
def test_sce(topk: float) -> None:
    base, models = case()
    start, taus = doubled(base, models)
    stack = torch.stack(taus)
    spread = stack.var(0, unbiased=False)
    chosen = torch.zeros(30, dtype=torch.bool)
    chosen[spread.reshape(-1).topk(int(30 * topk)).indices] = True
    stack = stack * chosen.reshape(base.shape)
    shares = stack.square().sum((1, 2))
    shares = shares / shares.sum() if shares.sum() > 0 else shares
    agree = (stack > 0) == (stack.sum(0) >= 0)
    weights = shares[:, None, None] * agree * (stack != 0)
    wanted = (weights * stack).sum(0) / weights.sum(0).clamp(min=1e-30)
    close(merged("sce", base, models, select_topk=topk), start + wanted)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram(method: str) -> None:
    base, models = case()
    models = [torch.where(torch.rand(6, 5) < 0.5, base, model) for model in models]
    start, taus = doubled(base, models)
    changed = [tau.abs() > 1e-5 for tau in taus]
    count = sum(mask.int() for mask in changed)
    factors = [1.0] * 3
    if method == "ramplus_tl":
        factors = [
            1 + 0.1 * min(0.5, int((m & (count > 1)).sum()) / int((m & (count == 1)).sum()))
            for m in changed
        ]
    wanted = torch.zeros_like(start)
    for tau, mask, factor in zip(taus, changed, factors, strict=True):
        wanted += torch.where(count == 1, factor * tau, tau / count.clamp(min=1)) * mask
    extra = {"alpha": 0.5} if method == "ramplus_tl" else {}
    close(merged(method, base, models, **extra), start + wanted)


@pytest.mark.parametrize("shape", [(8, 6), (40,)])
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    base, models = case(shape, models=1, step=0.5)
    start, (tau,) = doubled(base, models)
    p, q = (t.double().softmax(-1) + 1e-8 for t in (models[0], base))
    scores = tau.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = scores.reshape(-1).sort().values
    low, median, high = (float(ordered[int(x * (len(ordered) - 1))]) for x in (0.25, 0.5, 0.75))
    assert 0 < int((scores >= median + 1.5 * (high - low)).sum()) < tau.numel()
    wanted = start + tau * (scores >= median + 1.5 * (high - low))
    close(merged("arcee_fusion", base, models), wanted)


SPECTRAL = ["tsv_m", "iso_c", "iso_cts", "wudi", "knots_ties"]


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, values, right = numpy.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy(left), torch.from_numpy(values), torch.from_numpy(right)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = svd(matrix)
    return left @ right


def test_tsv_m() -> None:
    base, models = case((12, 9))
    start, taus = doubled(base, models)
    parts = [svd(tau) for tau in taus]
    left = polar(torch.cat([u[:, :3] for u, _, _ in parts], 1))
    right = polar(torch.cat([v[:3] for _, _, v in parts], 0))
    middle = torch.diag(torch.cat([s[:3] for _, s, _ in parts]))
    close(merged("tsv_m", base, models), start + left @ middle @ right, 1e-4)


def test_iso_c() -> None:
    base, models = case((12, 9))
    start, taus = doubled(base, models)
    _, values, _ = svd(sum(taus))
    close(merged("iso_c", base, models), start + polar(sum(taus)) * values.mean(), 1e-4)


def test_iso_cts() -> None:
    base, models = case((12, 9))
    start, taus = doubled(base, models)
    u, s, v = svd(sum(taus))
    each, shared = 1, 6  # round((9 - 5) / 3) of each task, and the rest, for common = 0.6
    parts = [svd(tau - u[:, :shared] @ u[:, :shared].T @ tau) for tau in taus]
    left = polar(torch.cat([u[:, :shared], *(p[0][:, :each] for p in parts)], 1))
    right = polar(torch.cat([v[:shared], *(p[2][:each] for p in parts)], 0))
    size = torch.cat([s[:shared], *(p[1][:each] for p in parts)]).mean()
    close(merged("iso_cts", base, models, common=0.6), start + size * left @ right, 1e-4)


def test_wudi_is_where_the_gradient_of_its_loss_vanishes() -> None:
    base, models = case((12, 9), dtype=torch.float64)
    start, taus = doubled(base, models)
    update = (merged("wudi", base, models) - start).requires_grad_()
    loss = sum(((update - t) @ t.T).square().sum() / t.square().sum() for t in taus)
    loss.backward()
    assert float(update.grad.abs().max()) < 1e-10
    best = float(loss.detach())
    for tau in (taus[0], sum(taus), torch.zeros_like(start)):
        other = sum(((tau - t) @ t.T).square().sum() / t.square().sum() for t in taus)
        assert float(other) > best


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_knots_ties(density: float) -> None:
    base, models = case((12, 9))
    start, taus = doubled(base, models)
    left, _, _ = svd(torch.cat(taus, 1))
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    parts = []
    for tau, weight in zip(taus, weights, strict=True):
        inside = left.T @ tau  # S V_i^T
        least = inside.abs().flatten().sort().values[-int(density * inside.numel())]
        parts.append(weight * inside * (inside.abs() >= least))
    stacked = torch.stack(parts)
    agree = stacked * sum(parts).sign() > 0
    counted = (agree * weights[:, None, None]).sum(0)
    fused = (stacked * agree).sum(0) / counted.clamp(min=1e-9)
    found = merged("knots_ties", base, models, density=density, weight=[0.5, 1.0, 2.0])
    close(found, start + left @ fused, 1e-4)


@pytest.mark.parametrize("method", SPECTRAL)
def test_what_is_no_matrix_is_averaged_by_methods_for_matrices(method: str) -> None:
    base, models = case((30,))
    start, taus = doubled(base, models)
    found = merged(method, base, models, matrix=False, **{"lambda": 0.5})
    close(found, start + 0.5 * sum(taus) / 3)


@pytest.mark.parametrize("method", SPECTRAL)
def test_matrices_of_low_rank_bring_no_noise(method: str) -> None:
    base, _ = case((12, 9))
    taus = [torch.outer(torch.randn(12), torch.randn(9)) for _ in range(2)]
    found = merged(method, base, [base + tau for tau in taus]) - base
    values = torch.linalg.svdvals(found.double())
    assert float(values[2:].max()) < 1e-4 * float(values[0])
    assert torch.equal(merged(method, base, [base, base]), base)


# Laws


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_threads_change_no_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (64, 33)
    base, models = case(shape, model_count(method), torch.bfloat16)
    start = base if with_base(method) else None
    monkeypatch.setattr(measures, "BLOCK_ELEMENTS", 500)
    wanted = merged(method, start, models)
    lazy = lazily(method, start, models)
    for step in (1, 7, 64):
        pieces = [lazy.read(at, min(at + step, 64)) for at in range(0, 64, step)]
        assert torch.equal(torch.cat(pieces), wanted)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(merged(method, start, models), wanted)
    finally:
        torch.set_num_threads(before)


ITSELF = ["linear", "slerp", "nuslerp", "multislerp", "karcher", "passthrough"]


@pytest.mark.parametrize("method", ITSELF)
@given(seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_model_merged_with_itself_is_itself(method: str, seed: int, dtype: torch.dtype) -> None:
    base, _ = case((5, 7), 1, dtype, seed)
    weight = {"weight": [0.1, 0.7]} if method not in ("slerp", "passthrough") else {}
    if method == "slerp":
        found = merged(method, base, [base], t=0.3)
    else:
        models = [base, base] if method != "passthrough" else [base]
        found = merged(method, None, models, **weight)
    assert torch.equal(found, base)


@pytest.mark.parametrize("method", [name for name in METHODS if with_base(name)])
def test_the_base_merged_with_itself_is_itself(method: str) -> None:
    base, _ = case((12, 9))
    assert torch.equal(merged(method, base, [base] * model_count(method)), base)


FULL = {
    "model_stock": {},
    "task_arithmetic": {"normalize": True},
    "ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "normalize": True},
    "breadcrumbs_ties": {"density": 1.0, "normalize": True},
    "dare_linear": {"density": 1.0, "normalize": True},
    "dare_ties": {"density": 1.0, "normalize": True},
    "della": {"density": 1.0},
    "della_linear": {"density": 1.0, "normalize": True},
    "magmax": {},
    "sce": {},
    "ram": {},
    "multislerp": {},
    "wudi": {},
    "knots_ties": {},
}


@pytest.mark.parametrize("method", FULL)
def test_one_fine_tune_given_three_times_is_itself(method: str) -> None:
    """Within rounding: the update is added back to the base."""
    base, models = case((12, 9), 1)
    close(merged(method, base, models * 3, **FULL[method]), models[0].double(), 1e-5)


DRAWN = {"dare_linear", "dare_ties", "della", "della_linear"}


@pytest.mark.parametrize("method", [n for n in METHODS if model_count(n) == 3 and n not in DRAWN])
@given(order=st.permutations([0, 1, 2]))
def test_the_order_of_models_does_not_matter(method: str, order: list[int]) -> None:
    base, models = case((12, 9), 3, step=0.5)
    weights = [0.5, 0.3, 0.2]
    start = base if with_base(method) else None
    weighted = any(parameter.name == "weight" for parameter in METHODS[method].parameters)
    found = [
        merged(method, start, [models[at] for at in order], **how)
        for order, how in (
            ([0, 1, 2], {"weight": weights} if weighted else {}),
            (order, {"weight": [weights[at] for at in order]} if weighted else {}),
        )
    ]
    close(found[0], found[1].double(), 1e-4)


@given(seed=st.integers(0, 99), weight=st.floats(-2, 2))
def test_ties_of_one_model_at_density_1_is_task_arithmetic(seed: int, weight: float) -> None:
    base, models = case((5, 7), 1, torch.bfloat16, seed)
    how = {"weight": weight, "normalize": False}
    whole = merged("ties", base, models, density=1.0, **how)
    assert torch.equal(whole, merged("task_arithmetic", base, models, **how))


@pytest.mark.parametrize("method", [name for name in METHODS if with_base(name)])
def test_scale_scales_the_update_and_bare_is_the_update(method: str) -> None:
    base, models = case((12, 9), model_count(method), torch.float64)
    how = {"t": 0.5} if method == "slerp" else {}
    whole = merged(method, base, models, factor=1.0, **how)
    half = merged(method, base, models, factor=0.5, **how)
    update = merged(method, base, models, bare=True, **how)
    torch.testing.assert_close(base + 0.5 * (whole - base), half, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole - base, update, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0), (2, 3, 4)])
def test_any_shape(method: str, shape: tuple[int, ...]) -> None:
    base, models = case(shape, model_count(method))
    found = merged(method, base if with_base(method) else None, models, matrix=False)
    assert found.shape == shape
    assert found.isfinite().all()


# Selection


@given(
    values=st.lists(st.floats(0, width=32, allow_nan=False), min_size=1, max_size=60),
    data=st.data(),
)
def test_order_statistics_are_exact(values: list[float], data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=4))
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(values, dtype=dtype)
        ordered = tensor.sort().values
        assert order_statistics(tensor.numpy(), ranks) == [float(ordered[rank]) for rank in ranks]


def test_order_statistics_of_a_stream() -> None:
    torch.manual_seed(0)
    values = torch.randn(100_000).abs() * 1e-3
    search = Search([0, 50_000, 99_999], DTYPES["F32"])
    while not search.done:
        for part in values.split(777):
            search.count(part.numpy())
        search.narrow()
    ordered = values.sort().values
    assert search.found == [float(ordered[at]) for at in (0, 50_000, 99_999)]


@given(
    shape=st.sampled_from([(1,), (2,), (9,), (3, 5), (40, 30)]),
    density=st.floats(0.001, 1),
    gamma=st.floats(0, 0.5),
    coarse=st.booleans(),
    seed=st.integers(0, 9),
)
def test_thresholds_keep_what_a_sort_keeps(
    shape: tuple[int, ...], density: float, gamma: float, coarse: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = torch.randn(shape)
    if coarse:
        model = (model * 4).round() / 4  # many equal ones
    base, sizes = torch.zeros(shape), model.abs().reshape(-1).sort().values
    count = model.numel()
    trimmed = merged("ties", base, [model], density=density)
    low = sizes[count - max(1, int(density * count))]
    assert torch.equal(trimmed, model * (model.abs() >= low))
    both = merged("breadcrumbs", base, [model], density=density, gamma=gamma)
    size = int(density * count)
    first = max(0, count - size - int(gamma * count))
    within = (model.abs() >= sizes[first % count]) & (model.abs() <= sizes[first + size - 1])
    wanted = model * within if size else torch.zeros(shape)
    assert torch.equal(both, model if density == 1 else wanted)


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(600, 1000), (600_000,), (3, 200_000), (1, 600_000)])
def test_thresholds_of_large_tensors(shape: tuple[int, ...], shift: float) -> None:
    """Sampled first, and searched for where the sample misleads: with `shift`, the rows that are
    sampled are unlike all others."""
    torch.manual_seed(0)
    model = torch.randn(shape)
    if len(shape) > 1:
        model[torch.arange(shape[0]) % (600 // 32) < 4] += shift  # 4 rows at each of 32 places
    else:
        model[::1000] += shift
    found = merged("ties", torch.zeros(shape), [model], density=0.3)
    low = model.abs().reshape(-1).sort().values[-int(0.3 * model.numel())]
    assert torch.equal(found, model * (model.abs() >= low))


def test_a_window_that_the_value_is_not_in() -> None:
    values = torch.arange(1000.0)
    for sample, found in ((numpy.arange(1000, dtype=numpy.float32), 300.0),
                          (numpy.arange(500, 600, dtype=numpy.float32), None)):  # fmt: skip
        window = Window(300, 1000, sample)
        window.count(values[:450].numpy())
        window.count(values[450:].numpy())
        assert window.found == found
    many = torch.linspace(0, 1, 1 << 18)
    window = Window(1000, many.numel(), numpy.array([0, 0, 2], dtype=numpy.float32))
    window.count(many.numpy())
    assert window.found is None  # more than it holds


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(0, 12), min_size=1, max_size=300),
    sample=st.lists(st.integers(0, 12), min_size=1, max_size=20),
    data=st.data(),
)
def test_a_window_finds_what_sorting_finds(
    values: list[int], sample: list[int], data: st.DataObject
) -> None:
    """Few values, each many times, wherever the window lies; or it says that it doesn't know."""
    rank = data.draw(st.integers(0, len(values) - 1))
    window = Window(rank, len(values), numpy.sort(numpy.array(sample, dtype=numpy.float32)))
    for part in torch.tensor(values, dtype=torch.float32).split(100):
        window.count(part.numpy())
    assert window.found in (None, sorted(values)[rank])
    whole = Window(rank, len(values), numpy.sort(numpy.array(values, dtype=numpy.float32)))
    whole.count(numpy.array(values, dtype=numpy.float32))
    assert whole.found == sorted(values)[rank]


def test_equal_magnitudes_are_kept_together() -> None:
    base = torch.zeros(2, 4)
    model = torch.tensor([[1.0, -1.0, 1.0, 0.5], [0.1, 0.2, 0.3, 0.4]])
    found = merged("ties", base, [model], density=0.25)
    assert found.tolist() == [[1.0, -1.0, 1.0, 0.0], [0.0] * 4]
