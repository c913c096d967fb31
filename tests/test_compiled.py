"""The compiled kernels give the bits of those of torch and numpy, whatever the numbers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import save_raw
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merging import lazily

from surgery import Checkpoint, lines, merge, open_checkpoint, write
from surgery.dtypes import DTYPES
from surgery.kernels import compiled
from surgery.kernels.merging import (
    Combination,
    Rounding,
    combine,
    combine_bytes,
    drop,
    drop_bytes,
    trim,
    trim_bytes,
)
from surgery.kernels.selection import Window
from surgery.kernels.updates import scale_and_square, scale_and_square_bytes
from surgery.values import noise

built = pytest.mark.skipif(compiled.library() is None, reason="there was no compiler to build it")
INFINITE = float("inf")
SIZES = st.sampled_from([0, 1, 7, 8, 33, 511, 512, 513, 2500])  # beside a tile, and vectors
NUMBERS = st.sampled_from([1.0, 0.5, -0.3, 0.0, 2.0, 1 / 3, -1.0])


def can_compile() -> bool:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(compiler) is not None and headers.exists()


@built
def test_one_with_another_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "INTERFACE", compiled.INTERFACE + 1)
    assert compiled.library.__wrapped__() is None


@pytest.mark.skipif(not can_compile(), reason="there is no compiler, or no headers of Python")
def test_it_was_built_where_there_is_a_compiler() -> None:
    assert compiled.library() is not None


def inputs(seed: int, size: int, models: int) -> list[torch.Tensor]:
    """A base and models that differ little, with zeros of both signs, equal entries, tiny ones and
    huge ones."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator).mul(0.02).bfloat16()
    made = [base]
    for _ in range(models):
        step = torch.randn(size, generator=generator).mul(0.002)
        made.append((base.float() + step).bfloat16())
    odd = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 1.0, 2**-133]).bfloat16()
    for tensor in made:
        where = torch.rand(size, generator=generator) < 0.2
        chosen = torch.randint(len(odd), (size,), generator=generator)
        tensor[where] = odd[chosen][where]
    return made


@contextmanager
def called(*names: str) -> Iterator[None]:
    """Fails where torch did the work of these compiled kernels."""
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(compiled, name, watched(name, getattr(compiled, name), seen))
        yield
    assert seen == set(names)


def watched(name: str, kernel: Callable[..., Any], seen: set[str]) -> Callable[..., Any]:
    def watching(*given: Any, **options: Any) -> Any:
        seen.add(name)
        return kernel(*given, **options)

    return watching


def in_bytes(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.view(torch.uint8).numpy()


def same_values(made: numpy.ndarray | None, wanted: torch.Tensor) -> None:
    """The same bits, or both NaN: torch gives those in the middle of a tensor other bits than those
    at its end."""
    assert made is not None
    found = torch.from_numpy(made.view(numpy.uint16)).view(torch.bfloat16)
    known = ~wanted.isnan()
    assert torch.equal(known, ~found.isnan())
    assert torch.equal(found[known].view(torch.int16), wanted[known].view(torch.int16))


@built
@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 1000),
    SIZES,
    st.lists(NUMBERS, max_size=4),
    st.sampled_from([1.0, 0.0, 0.4, 1.7]),
    st.sampled_from([1.0, 0.7, -1.0]),
)
def test_combine(seed: int, size: int, steps: list[float], start: float, scale: float) -> None:
    tensors = inputs(seed, size, len(steps))
    rounding = Rounding(DTYPES["F32"], DTYPES["BF16"], scale)
    combination = Combination(start, tuple(steps))
    wanted = combine(*tensors, rounding=rounding, combination=combination)
    given = map(in_bytes, tensors)
    made = combine_bytes(*given, scale=scale, combination=combination)
    if bool(wanted.isfinite().all()):
        same_values(made, wanted)
    else:
        assert made is None
        first, *others = map(in_bytes, tensors)
        same_values(compiled.combine(first, others, start - 1, steps, scale), wanted)


BOUNDS = st.sampled_from(
    [None, (0.001, INFINITE), (0.0, 0.002), (0.0005, 0.003), (INFINITE, 0.0), (2**-149, INFINITE)]
)


@built
@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 1000),
    SIZES,
    st.lists(st.tuples(NUMBERS, BOUNDS), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.7, -1.0]),
)
@example(1, 2500, [(1.0, (0.001, INFINITE)), (-1.0, None)], True, True, 1.0)
@example(1, 2500, [(0.0, None), (0.0, None)], True, True, 1.0)
def test_trim(
    seed: int,
    size: int,
    models: list[tuple[float, tuple[float, float] | None]],
    elect: bool,
    normalize: bool,
    scale: float,
) -> None:
    tensors = inputs(seed, size, len(models))
    rounding = Rounding(DTYPES["F32"], DTYPES["BF16"], scale)
    how = {"weights": [weight for weight, _ in models], "elect": elect, "normalize": normalize}
    bounds = [pair for _, pair in models]
    wanted = trim(*tensors, **how, rounding=rounding, measured=bounds)
    same_values(trim_bytes(*map(in_bytes, tensors), **how, scale=scale, measured=bounds), wanted)


ODDS = st.sampled_from([(0.5, 0.1), (0.3, 0.0), (0.9, 0.1), (1.0, 0.0), (0.05, 0.04), (1, 0.1)])


@built
@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 1000),
    st.sampled_from([(0, 3), (1, 1), (3, 1), (1, 700), (5, 33), (2, 512), (3, 1025)]),
    st.lists(st.tuples(NUMBERS, ODDS), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.7, -1.0]),
)
def test_drop(
    seed: int,
    shape: tuple[int, int],
    models: list[tuple[float, tuple[float, float]]],
    by_rank: bool,
    rescale: bool,
    elect: bool,
    normalize: bool,
    scale: float,
) -> None:
    """With magnitudes that are equal, rows that are longer than a tile, and columns."""
    tensors = [t.view(shape) for t in inputs(seed, math.prod(shape), len(models))]
    noises = [noise(shape, seed, str(at)).read() for at in range(len(models))]
    how: dict[str, Any] = {
        "weights": [weight for weight, _ in models],
        "densities": [density for _, (density, _) in models],
        "spreads": [spread for _, (_, spread) in models] if by_rank else None,
        "rescale": rescale,
        "elect": elect,
        "normalize": normalize,
    }
    given = [in_bytes(tensor.reshape(-1)) for tensor in (*tensors, *noises)]
    made = drop_bytes(*given, width=shape[-1], scale=scale, **how)
    rounding = Rounding(DTYPES["F32"], DTYPES["BF16"], scale)
    same_values(made, drop(*tensors, *noises, rounding=rounding, **how).reshape(-1))


@built
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 30), st.integers(0, 20))
def test_noise(seed: int, width: int, start: int, rows: int) -> None:
    """That of numpy's generator, from wherever."""
    values = noise((50, width), seed, "w")
    quick = values.read_bytes(start, start + rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        assert quick.tobytes() == values.read_bytes(start, start + rows).tobytes()
        whole = values.read_bytes(0, 50).view(numpy.float32)
    assert numpy.array_equal(
        quick.view(numpy.float32), whole[start * width : (start + rows) * width]
    )


@built
@settings(deadline=None, max_examples=200)
@given(st.integers(0, 1000), SIZES, st.floats(0, 1))
def test_window(seed: int, size: int, part: float) -> None:
    base, model = inputs(seed, size, 1)
    sizes = model.float().sub(base.float()).abs()
    ascending = numpy.sort(sizes.numpy())
    rank = int(part * (size - 1)) if size else 0
    sample = ascending[:: max(1, size // 50)] if size else numpy.zeros(1, numpy.float32)
    quick, slow = Window(rank, max(1, size), sample), Window(rank, max(1, size), sample)
    finite = quick.count_between(in_bytes(base), in_bytes(model))
    assert finite == bool(sizes.isfinite().all())
    slow.count(sizes.numpy())
    assert quick._below == slow._below
    assert quick._equal == slow._equal
    assert numpy.array_equal(numpy.concatenate(quick._near), numpy.concatenate(slow._near))
    assert quick.found == slow.found
    if quick.found is not None and size:
        assert quick.found == float(ascending[rank])


@built
@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 1000),
    st.sampled_from([1, 7, 33, 512, 2500]),
    st.sampled_from([None, float("nan"), -float("nan"), INFINITE, -INFINITE, 3.38e38]),
    st.floats(0, 1),
)
def test_finite(seed: int, size: int, odd: float | None, where: float) -> None:
    (values,) = inputs(seed, size, 0)
    if odd is not None:
        values[int(where * (size - 1))] = odd
    assert compiled.finite(in_bytes(values)) == bool(values.isfinite().all())


@built
@settings(deadline=None, max_examples=200)
@given(st.integers(0, 1000), SIZES, st.booleans())
def test_products(seed: int, size: int, from_base: bool) -> None:
    """Sums side by side, which is what decides the last bits."""
    base, one, other = inputs(seed, size, 2)
    start = base.double() if from_base else torch.zeros(size, dtype=torch.float64)
    products = (one.double() - start) * (other.double() - start)
    wanted = [0.0] * compiled.TILE
    for at, product in enumerate(products.tolist()):
        wanted[at % compiled.TILE] += product
    given = in_bytes(one), in_bytes(other), in_bytes(base) if from_base else None
    assert compiled.products(*given).tolist() == wanted


@built
@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1000), SIZES, st.sampled_from([0.0, 0.4, 1.0, 1.5]))
def test_scale_and_square(seed: int, size: int, scale: float) -> None:
    base, tuned = inputs(seed, size, 1)
    how: dict[str, Any] = {"scale": scale, "compute": DTYPES["F32"], "dtype": DTYPES["BF16"]}
    wanted, _ = scale_and_square(base, tuned, **how)
    square = float((tuned.double() - base.double()).square().sum())
    made = scale_and_square_bytes(in_bytes(base), in_bytes(tuned), scale=scale)
    if made is None:
        assert not bool(wanted.isfinite().all())
    else:
        same_values(made[0], wanted)
        assert made[1] == pytest.approx(square, rel=1e-5)


GIVEN: dict[str, dict[str, object]] = {
    "ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.4, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.05},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6, "rescale": False},
    "della": {"density": 0.6, "epsilon": 0.2},
    "della_linear": {"density": 0.6},
    "linear": {"weight": 0.4},
    "task_arithmetic": {"weight": 0.7, "lambda": 0.6},
    "slerp": {"t": 0.3},
    "model_stock": {},
}

USED = dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties"), ("window", "trim")) | (
    dict.fromkeys(("dare_linear", "dare_ties", "della", "della_linear"), ("noise", "drop"))
)


@built
@pytest.mark.parametrize("method", GIVEN)
def test_files_are_the_same_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Of tensors of many tiles, with whatever measures them first."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 701, generator=generator).mul(0.02)
    folders = []
    for at in range(3):
        tuned = start + at * torch.randn(start.shape, generator=generator).mul(0.001)
        folders.append(tmp_path / f"model{at}")
        tensors = {"w": tuned.bfloat16(), "v": tuned[7].bfloat16()}
        save_raw(folders[-1], tensors, config={"model_type": "toy"})
    base, *others = map(open_checkpoint, folders)
    models = others[:1] if method == "slerp" else others

    def made(name: str) -> bytes:
        write(merge(models, base=base, method=method, **GIVEN[method]), tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    with called(*USED.get(method, ("combine",))):
        quick = made("quick")
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert quick == made("slow")


@built
@pytest.mark.parametrize(
    ("method", "used"), [("ties", ("window", "trim")), ("task_arithmetic", ("combine",))]
)
def test_what_is_too_large_comes_of_finite_inputs(
    tmp_path: Path, method: str, used: tuple[str, ...]
) -> None:
    """Unlike NaN and infinity in an input, which end the run: see test_task_vectors.py."""
    start = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tuned = start + 1
    start[3, 4], tuned[3, 4] = -3e38, 3e38
    base, model = (
        open_checkpoint(save_raw(tmp_path / name, {"w": w}, config={"model_type": "toy"}))
        for name, w in (("base", start), ("tuned", tuned))
    )
    with called(*used):
        write(merge([model], base=base, method=method), tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")["w"].read()
    assert made.isinf().nonzero().tolist() == [[3, 4]]


def test_thresholds_are_measured_in_the_type_of_the_merge() -> None:
    """Which is float64 if any model is, though not one that is trimmed."""
    base = torch.arange(1.0, 65.0).mul(1e-9).bfloat16()
    ones, double = torch.ones_like(base), torch.zeros(64, dtype=torch.float64)
    made = lazily("ties", base, [ones, double], density=[0.5, 1.0]).whole()
    assert 24 <= int((made > 0.4).sum()) <= 40  # in float32 all differences are 1


@built
def test_lines_are_the_same_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]
) -> None:
    """With a scale of 1 for the last block, whose update is looked at all the same."""
    folders = [make_model(name=f"m{seed}", seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]

    def made(name: str) -> tuple[bytes, Any]:
        base, tuned = map(open_checkpoint, folders)
        write(lines(base, tuned, alpha=0.4), tmp_path / name)
        record = json.loads((tmp_path / name / "surgery.json").read_text())
        return (tmp_path / name / "model.safetensors").read_bytes(), record["norms"]

    with called("products", "combine"):
        quick, norms = made("quick")
    monkeypatch.setattr(compiled, "library", lambda: None)
    slow, others = made("slow")
    assert quick == slow
    for one, other in zip(norms["blocks"].values(), others["blocks"].values(), strict=True):
        for block, same in zip(one, other, strict=True):
            assert block == pytest.approx(same, rel=1e-4)


@built
@pytest.mark.parametrize("method", GIVEN)
def test_merges_without_torch(tmp_path: Path, method: str) -> None:
    """What the system copies and what kernels make of bytes takes no second to start."""
    for at in range(3):
        step = torch.arange(2100.0).view(70, 30).mul(at / 2100)
        tensors = {"w": step.bfloat16(), "n": torch.full((9,), at / 4).bfloat16()}
        save_raw(tmp_path / f"model{at}", tensors, config={"model_type": "toy"})
    folders = ["model0", "model1", "model2"][: 2 if method == "slerp" else 3]
    run_without_torch(
        "import json\n"
        "base, *models = map(open_checkpoint, sys.argv[3:])\n"
        "given = json.loads(sys.argv[2])\n"
        "write(merge(models, base=base, method=sys.argv[1], **given), 'out')\n",
        tmp_path,
        *(method, json.dumps(GIVEN[method]), *folders),
    )
    base, *models = (open_checkpoint(tmp_path / folder) for folder in folders)
    wanted = merge(models, base=base, method=method, **GIVEN[method])
    made = open_checkpoint(tmp_path / "out")
    for name in ("w", "n"):
        slow = replace(wanted[name], direct=None).whole()
        assert torch.equal(made[name].whole(), slow)


@built
def test_lines_without_torch(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    folders = [make_model(name=f"m{seed}", seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    run_without_torch(
        "write(lines(*map(open_checkpoint, sys.argv[1:]), alpha=0.4), 'out')\n",
        tmp_path,
        *map(str, folders),
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_check_without_torch(tmp_path: Path) -> None:
    """Of two files, whose channels are compared."""
    tensors = {
        f"model.layers.{block}.{part}.weight": torch.randn(40, 64).bfloat16()
        for block in range(4)
        for part in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj")
    }
    names = sorted(tensors)
    shards = [{name: tensors[name] for name in part} for part in (names[:6], names[6:])]
    save_raw(tmp_path / "model", *shards, config={"model_type": "toy"})
    run_without_torch(
        "from surgery.integrity import strangers\n"
        "seen, look = [], strangers._channels\n"
        "strangers._channels = lambda tensor: seen.append(tensor) or look(tensor)\n"
        "assert check('model').sound\n"
        "assert len(seen) == 12\n",
        tmp_path,
    )


def run_without_torch(code: str, folder: Path, *arguments: str) -> None:
    """In a process of its own, in a folder that isn't the project's: the package that is imported
    is the one that was installed, and built."""
    start = "import sys\nfrom surgery import check, lines, merge, open_checkpoint, write\n"
    code = f"{start}{code}assert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=folder)


@built
def test_what_needs_torch(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(7, 3).bfloat16()}
    model = open_checkpoint(save_raw(tmp_path / "model", tensors, config={"model_type": "toy"}))

    def needed(*models: Checkpoint, method: str = "task_arithmetic", **options: Any) -> bool:
        return merge(models, base=model, method=method, **options)["w"].needs_torch

    def other(dtype: str) -> Checkpoint:
        return replace(model, tensors={"w": replace(model["w"], dtype=DTYPES[dtype])})

    turned = replace(model["w"], shape=(3, 7))
    assert compiled.takes([model["w"], model["w"]])
    assert not compiled.takes([model["w"], turned])
    assert not Rounding(DTYPES["F32"], DTYPES["F32"]).plain
    assert not Rounding(DTYPES["F32"], DTYPES["BF16"], bare=True).plain
    assert not model["w"].needs_torch
    assert not needed(model)
    assert not needed(merge([model], base=model, method="task_arithmetic"))  # in no file
    assert needed(merge([model], base=model, method="magmax"))
    assert needed(model, dtype="float32")
    assert needed(model, other("F16"))
    assert not needed(*[model] * compiled.MOST_MODELS)
    assert needed(*[model] * (compiled.MOST_MODELS + 1))
    assert not needed(model, method="della", density=0.5)
    assert needed(model, method="magmax")


@built
@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["task_arithmetic", "ties", "breadcrumbs", "dare_ties", "della"]),
    st.integers(0, 1000),
    st.sampled_from([(), (0,), (9,), (3, 0), (700, 3)]),
)
def test_rows_are_those_of_the_kernel(method: str, seed: int, shape: tuple[int, ...]) -> None:
    """Read as bytes or as numbers, of inputs that lie in no file."""
    base, *models = (tensor.view(shape) for tensor in inputs(seed, math.prod(shape), 2))
    made = lazily(method, base, models, **({} if method == "task_arithmetic" else {"density": 0.4}))
    assert made.direct is not None
    slow = replace(made, direct=None)
    for start, stop in ((0, made.rows), (made.rows // 3, made.rows // 2)):
        rows, wanted = made.read(start, stop), slow.read(start, stop)
        assert rows.shape == wanted.shape
        same_values(in_bytes(rows.reshape(-1)), wanted.reshape(-1))
        assert made.read_bytes(start, stop).tobytes() == in_bytes(rows.reshape(-1)).tobytes()
