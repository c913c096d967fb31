"""LazyTensor: rows of leaves, gathers and kernels against the same done by plain torch."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import TORCH_DTYPES, bytes_of, entry, random_tensor, safetensors_bytes, shapes
from hypothesis import given
from hypothesis import strategies as st

from surgery import FormatError, LazyTensor, NotFoundError, UnsupportedError, open_checkpoint
from surgery.dtypes import DTYPES
from surgery.files import InputFile, as_bytes
from surgery.header import read_header
from surgery.parallel import run_all
from surgery.tensor import FileSpan, gather
from surgery.values import noise, table, zeros


def stored(path: Path, *tensors: torch.Tensor) -> list[LazyTensor]:
    """These tensors, one after the other behind some bytes that are no tensor's."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    content = b"x" * 5
    made = []
    for tensor in tensors:
        data = bytes_of(tensor)
        span = FileSpan(InputFile(path), len(content), len(data))
        made.append(LazyTensor(tuple(tensor.shape), DTYPES[names[tensor.dtype]], leaf=span))
        content += data
    path.write_bytes(content + b"y" * 5)
    return made


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """(rows, width), or (rows,) for a vector or a scalar."""
    shape = tuple(tensor.shape)
    return tensor.reshape(prod(shape[:-1]), shape[-1]) if len(shape) > 1 else tensor.reshape(-1)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, and in type and shape: NaNs too."""
    return (found.dtype, found.shape, bytes_of(found)) == (
        wanted.dtype,
        wanted.shape,
        bytes_of(wanted),
    )


def path_of(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "tensors.bin"


DTYPE = st.sampled_from([*TORCH_DTYPES])


@given(dtype=DTYPE, shape=shapes(max_dims=4), data=st.data())
def test_rows_of_a_file(tmp_path_factory: Any, dtype: str, shape: Any, data: st.DataObject) -> None:
    neighbour = random_tensor("U8", [3], 1)
    wanted = random_tensor(dtype, shape, 0)
    _, lazy = stored(path_of(tmp_path_factory), neighbour, wanted)
    flat = rows_of(wanted)
    assert (lazy.rows, lazy.numel) == (flat.shape[0], wanted.numel())
    assert lazy.width == (shape[-1] if len(shape) > 1 else 1)
    assert lazy.nbytes == wanted.numel() * wanted.element_size()
    start = data.draw(st.integers(0, lazy.rows))
    stop = data.draw(st.integers(start, lazy.rows))
    assert same(lazy.read(start, stop), flat[start:stop])
    assert same(lazy.read(start), flat[start:])
    assert same(lazy.read(), flat)
    assert same(lazy.whole(), wanted)


@given(shape=shapes(max_dims=4), elements=st.integers(1, 30))
def test_blocks_are_the_tensor(shape: tuple[int, ...], elements: int) -> None:
    tensor = zeros(shape, DTYPES["F32"])
    blocks = list(tensor.blocks(elements))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(tensor.rows))
    assert all(start < stop for start, stop in blocks)
    assert all(
        (stop - start) * tensor.width <= max(elements, tensor.width) for start, stop in blocks
    )


@given(dtype=DTYPE, width=st.integers(0, 4), data=st.data())
def test_a_gather(tmp_path_factory: Any, dtype: str, width: int, data: st.DataObject) -> None:
    """Rows of up to three inputs in any order, some of them 3-D, in runs that may be empty."""
    heights = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    inputs = [
        random_tensor(dtype, (1, h, width) if h % 2 else (h, width), i)
        for i, h in enumerate(heights)
    ]
    flat = [rows_of(tensor) for tensor in inputs]
    runs = []
    for at in data.draw(st.lists(st.integers(0, len(inputs) - 1), max_size=5)):
        stop = data.draw(st.integers(0, heights[at]))
        runs.append((at, data.draw(st.integers(0, stop)), stop))
    pieces = [flat[at][start:stop] for at, start, stop in runs]
    kind = flat[0].new_empty(0, width)
    count = sum(len(piece) for piece in pieces)
    wanted = torch.empty((count, width), dtype=kind.dtype)
    done = 0
    for piece in pieces:
        wanted[done : done + len(piece)] = piece
        done += len(piece)
    lazy = stored(path_of(tmp_path_factory), *inputs)
    made = gather(tuple(lazy), tuple(runs), (count, width))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert same(made.whole(), wanted)
    assert same(made.read(start, stop), wanted[start:stop])
    spans = made.file_spans()
    assert spans is not None
    content = path_of(tmp_path_factory).read_bytes()
    copied = b"".join(content[span.offset : span.offset + span.length] for span in spans)
    assert copied == bytes_of(wanted)


def test_a_gather_of_a_vector_and_of_itself(tmp_path: Path) -> None:
    bias = torch.arange(5, dtype=torch.float16)
    (lazy,) = stored(tmp_path / "x", bias)
    made = gather((lazy,), ((0, 0, 5), (0, 3, 4), (0, 3, 4)), (7,))
    assert made.whole().tolist() == [0, 1, 2, 3, 4, 3, 3]
    twice = gather((made,), ((0, 4, 6), (0, 0, 1)), (3,))
    assert twice.whole().tolist() == [4, 3, 0]
    assert made.file_spans() is not None
    assert twice.file_spans() is None  # the rows of a gather lie in no one place


def test_a_gather_with_computed_rows_has_no_spans(tmp_path: Path) -> None:
    (lazy,) = stored(tmp_path / "x", torch.ones(2, 3))
    made = gather((lazy, zeros((1, 3), DTYPES["F32"])), ((0, 0, 2), (1, 0, 1)), (3, 3))
    assert made.file_spans() is None
    assert made.whole().tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_a_gather_that_does_not_add_up(tmp_path: Path) -> None:
    a, b = stored(tmp_path / "x", torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(AssertionError):
        gather((a,), ((0, 0, 2),), (3, 3))
    with pytest.raises(AssertionError):
        gather((a, b), ((0, 0, 1), (1, 0, 1)), (2, 3))


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (7,), ()])
def test_a_kernel_by_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
    made = LazyTensor(
        shape, DTYPES["F32"], inputs=tuple(stored(tmp_path / "x", a, b)), kernel=torch.sub
    )
    assert same(made.whole(), a - b)
    assert made.file_spans() is None
    for start, stop in made.blocks(3):
        assert same(made.read(start, stop), rows_of(a - b)[start:stop])


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (7,), ()])
def test_a_kernel_of_whole_inputs(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """It gets its inputs in their own shapes, and its rows are cut from what it makes."""
    a = torch.randn(shape)
    seen = []

    def kernel(tensor: torch.Tensor, flip: bool) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return (tensor.flip(0) if flip and tensor.dim() else tensor) / 2

    (lazy,) = stored(tmp_path / "x", a)
    made = LazyTensor(
        shape, DTYPES["F32"], inputs=(lazy,), kernel=partial(kernel, flip=True), rowwise=False
    )
    wanted = rows_of(a.flip(0) if a.dim() else a) / 2
    assert same(made.read(0, 1), wanted[:1])
    assert same(made.whole(), wanted.reshape(shape))
    assert seen == [shape, shape]


def test_blocks_of_what_takes_its_inputs_whole(tmp_path: Path) -> None:
    """One block, also where it lies deeper: every block would compute all of it again."""
    (lazy,) = stored(tmp_path / "x", torch.randn(6, 4))
    whole = LazyTensor((6, 4), DTYPES["F32"], inputs=(lazy,), kernel=torch.neg, rowwise=False)
    after = LazyTensor((6, 4), DTYPES["F32"], inputs=(lazy, whole), kernel=torch.add)
    assert [list(t.blocks(8)) for t in (lazy, whole, after)] == [
        [(0, 2), (2, 4), (4, 6)],
        [(0, 6)],
        [(0, 6)],
    ]
    assert [t.streams for t in (lazy, whole, after)] == [True, False, False]
    assert same(after.whole(), torch.zeros(6, 4))


def test_a_measure_is_made_once(tmp_path: Path) -> None:
    a = torch.randn(60, 4)
    (lazy,) = stored(tmp_path / "x", a)
    made = []

    def largest(inputs: tuple[LazyTensor, ...]) -> float:
        made.append(inputs)
        return float(inputs[0].whole().abs().max())

    def normed(tensor: torch.Tensor, *, measured: float) -> torch.Tensor:
        return tensor / measured

    tensor = LazyTensor((60, 4), DTYPES["F32"], inputs=(lazy,), kernel=normed, measure=largest)
    assert tensor.file_spans() is None
    found = torch.zeros(60, 4)

    def work(block: tuple[int, int]) -> None:
        found[slice(*block)] = tensor.read(*block)

    assert made == []
    run_all(tensor.blocks(4), work, 4)
    assert same(found, a / a.abs().max())
    assert made == [(lazy,)]


def test_a_measure_that_fails_is_made_again(tmp_path: Path) -> None:
    """It leaves no half of a result behind, and no lock that is held."""
    (lazy,) = stored(tmp_path / "x", torch.ones(2))
    answers: list[Any] = [OSError("gone"), 2.0]

    def measure(_: tuple[LazyTensor, ...]) -> float:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return float(answer)

    def kernel(tensor: torch.Tensor, *, measured: float) -> torch.Tensor:
        return tensor * measured

    tensor = LazyTensor((2,), DTYPES["F32"], inputs=(lazy,), kernel=kernel, measure=measure)
    with pytest.raises(OSError, match=r"^gone$"):
        tensor.read()
    assert tensor.read().tolist() == [2, 2]


@pytest.mark.parametrize("made", ["file", "gather", "zeros", "table", "noise"])
def test_what_is_read_belongs_to_the_caller(tmp_path: Path, made: str) -> None:
    (lazy,) = stored(tmp_path / "x", torch.arange(6.0))
    tensor = {
        "file": lazy,
        "gather": gather((lazy,), ((0, 1, 4),), (3,)),
        "zeros": zeros((4,), DTYPES["F32"]),
        "table": table(numpy.arange(4)),
        "noise": noise((4,), 0, "w"),
    }[made]
    wanted = tensor.read().clone()
    tensor.read().fill_(7)
    assert same(tensor.read(), wanted)


@pytest.mark.parametrize(("start", "stop"), [(1, 3), (2, 3), (-1, 1), (2, 1)])
def test_rows_that_are_not_there(tmp_path: Path, start: int, stop: int) -> None:
    """The bytes behind a tensor are its neighbour's."""
    _, lazy, _ = stored(tmp_path / "x", *(torch.full((2, 2), float(i)) for i in range(3)))
    for tensor in (lazy, gather((lazy,), ((0, 0, 2),), (2, 2)), zeros((2, 2), DTYPES["F32"])):
        with pytest.raises(IndexError) as caught:
            tensor.read(start, stop)
        assert str(caught.value) == f"rows {start} to {stop} of a tensor that has 2"


def test_values_narrower_than_a_byte(tmp_path: Path) -> None:
    """Whole bytes in all, and rows that aren't: such a tensor can be copied and not read."""
    content = safetensors_bytes({"w": entry("F4", [2, 3], 0, 3)}, b"\x12\x34\x56")
    (tmp_path / "model.safetensors").write_bytes(content)
    tensor = open_checkpoint(tmp_path)["w"]
    spans = tensor.file_spans()
    assert spans is not None
    assert [(span.offset, span.length) for span in spans] == [(len(content) - 3, 3)]
    with pytest.raises(UnsupportedError) as caught:
        tensor.read()
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'}: a row of 3 F4 values isn't whole bytes, so the tensor "
        f"can only be copied"
    )
    made = gather((tensor,), ((0, 1, 2),), (1, 3))
    assert made.file_spans() is None


def test_a_type_that_torch_lacks(tmp_path: Path) -> None:
    content = safetensors_bytes({"w": entry("F4", [2, 4], 0, 4)}, bytes(4))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        UnsupportedError, match=r"^torch has no type for F4: it can only be copied$"
    ):
        open_checkpoint(tmp_path)["w"].read()


# --- the file under it ----------------------------------------------------------------------


@pytest.fixture
def one(raw_checkpoint: Callable[..., Path]) -> Path:
    return raw_checkpoint({"w": torch.arange(1000.0)}) / "model.safetensors"


def test_a_file_that_shrinks(one: Path) -> None:
    """A mapped file would end the process with a bus error (st#762)."""
    tensor = open_checkpoint(one)["w"]
    assert tensor.read(0, 1).tolist() == [0]
    start = read_header(one).entries["w"].start
    os.truncate(one, start + 1100)
    assert tensor.read(270, 275).tolist() == [270, 271, 272, 273, 274]
    for first in (0, 274, 275, 500):
        with pytest.raises(FormatError) as caught:
            tensor.read(first)
        assert str(caught.value) == (
            f"{one} ends at byte {start + 1100:,}, and its header promised more: it was cut short "
            f"while it was read"
        )


def test_a_file_that_goes(one: Path) -> None:
    checkpoint = open_checkpoint(one)
    one.unlink()
    with pytest.raises(NotFoundError) as caught:
        checkpoint["w"].read()
    assert str(caught.value) == f"{one} is gone: it was there when it was opened"


def test_a_file_that_is_replaced_while_it_is_read(one: Path, tmp_path: Path) -> None:
    tensor = open_checkpoint(one)["w"]
    assert tensor.read(0, 1).tolist() == [0]
    (tmp_path / "other").write_bytes(bytes(one.stat().st_size))
    (tmp_path / "other").replace(one)
    assert tensor.read(998).tolist() == [998, 999]


def test_short_reads_are_continued(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call reads at most 2 GB on Linux."""
    preadv = os.preadv

    def a_little(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:7]], offset)

    monkeypatch.setattr("os.preadv", a_little)
    assert open_checkpoint(one)["w"].read().tolist() == list(range(1000))


def test_files_are_closed(one: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    if before is None:
        pytest.skip("open files are counted in /proc")
    for _ in range(5):
        open_checkpoint(one)["w"].read()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_bytes_of_a_tensor_are_shared_with_it() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    view = as_bytes(tensor)
    assert (len(view), view.format, view.readonly) == (12, "B", False)
    view[10:12] = b"\x80\x3f"
    assert tensor.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 4).T[:1, :1], torch.from_numpy(numpy.zeros(0, dtype=numpy.float32))],
)
def test_the_bytes_of_what_is_contiguous_by_its_size(tensor: torch.Tensor) -> None:
    """One element or none: torch calls it contiguous, whatever its strides are."""
    assert tensor.is_contiguous()
    assert bytes(as_bytes(tensor.contiguous())) == bytes_of(tensor)


# --- values without a file ------------------------------------------------------------------


@given(shape=shapes(max_side=9), seed=st.integers(-5, 5), name=st.text(max_size=3), data=st.data())
def test_noise_depends_on_its_position_alone(
    shape: tuple[int, ...], seed: int, name: str, data: st.DataObject
) -> None:
    tensor = noise(shape, seed, name)
    whole = tensor.read()
    start = data.draw(st.integers(0, tensor.rows))
    stop = data.draw(st.integers(start, tensor.rows))
    assert whole.dtype is torch.float32
    assert same(tensor.read(start, stop), whole[start:stop])
    blocks = list(tensor.blocks(data.draw(st.integers(1, 20))))
    if blocks:
        pieces = [tensor.read(*block) for block in reversed(blocks)]
        assert same(torch.cat(pieces[::-1]), whole)


def test_noise_of_another_shape_has_the_same_values() -> None:
    """A position is counted in elements: (a, b) and (a * b,) are the same stream."""
    assert same(noise((30, 7), 3, "w").whole().reshape(-1), noise((210,), 3, "w").whole())
    assert same(noise((50,), 3, "w").read(0, 9), noise((9,), 3, "w").whole())


def test_noise_is_uniform() -> None:
    values = noise((1000, 100), 0, "w").whole().to(torch.float64).reshape(-1)
    assert float(values.min()) >= -1
    assert float(values.max()) < 1
    assert float(values.min()) < -0.9999
    assert float(values.max()) > 0.9999
    count = values.numel()
    assert abs(float(values.mean())) < 4 * (1 / 3 / count) ** 0.5
    assert abs(float(values.square().mean()) - 1 / 3) < 4 * (4 / 45 / count) ** 0.5
    parts = torch.histc(values, bins=10, min=-1, max=1)
    assert float(((parts - count / 10) ** 2 / (count / 10)).sum()) < 28  # chi squared, 0.1 % of 9
    neighbours = float((values[1:] * values[:-1]).mean()) * 3
    assert abs(neighbours) < 4 / count**0.5


def test_noise_differs_by_name_and_by_seed() -> None:
    made = [
        noise((100,), seed, name).whole()
        for seed, name in ((0, "w"), (1, "w"), (0, "v"), (-1, "w"), (0, ""), (2**70, "w"))
    ]
    for i, one in enumerate(made):
        for other in made[:i]:
            correlation = float((one * other).mean()) * 3
            assert abs(correlation) < 0.5
            assert not torch.equal(one, other)


def test_noise_stays_what_it_is() -> None:
    """A recipe has to give the same bytes next year: these values are part of the format."""
    values = noise((2, 3), 0, "model.layers.0.mlp.down_proj.weight").whole()
    digest = __import__("hashlib").sha256(b"0:model.layers.0.mlp.down_proj.weight").digest()
    words = numpy.random.PCG64DXSM(int.from_bytes(digest[:16], "little")).random_raw(3)
    halves = [half for word in words for half in (int(word) % 2**32, int(word) >> 32)]
    wanted = [(half >> 8) / 2**23 - 1 for half in halves]
    assert values.reshape(-1).tolist() == wanted


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I64", "BOOL"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (5,), (), (0, 3)])
def test_zeros(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = zeros(shape, DTYPES[dtype])
    assert same(tensor.whole(), torch.zeros(shape, dtype=TORCH_DTYPES[dtype]))
    assert tensor.file_spans() is None
    assert tensor.read(0, 0).shape[0] == 0


def test_a_table() -> None:
    values = numpy.array([3, -1, 2**40])
    tensor = table(values)
    assert (tensor.shape, str(tensor.dtype)) == ((3,), "I64")
    assert tensor.read(1, 3).tolist() == [-1, 2**40]
    assert same(tensor.whole(), torch.from_numpy(values))


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_what_is_computed_in_which_type(name: str) -> None:
    wanted = torch.float64 if name == "F64" else torch.float32
    assert DTYPES[name].compute.torch is wanted


@pytest.mark.parametrize("name", DTYPES)
def test_there_is_one_of_each_type(name: str) -> None:
    """A copy is the type itself: types are compared by being the same."""
    assert pickle.loads(pickle.dumps(DTYPES[name])) is DTYPES[name]
    assert copy.deepcopy(DTYPES[name]) is DTYPES[name]


def test_kinds_of_types() -> None:
    kinds: dict[str, set[str]] = {"float": set(), "integer": set(), "packed": set()}
    for dtype in DTYPES.values():
        kinds[dtype.kind].add(dtype.name)
    assert kinds["float"] == {"F64", "F32", "F16", "BF16"}
    assert kinds["integer"] == {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
