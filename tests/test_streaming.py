"""Models that run without being in memory: the same bits, every byte read once, nothing kept."""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from families import build, build_tuned, load, variant
from hypothesis import given
from mixtures import build_mixture
from torch import nn

from surgery import (
    Checkpoint,
    FormatError,
    UnsupportedError,
    expand,
    grow,
    lines,
    open_checkpoint,
    write,
)
from surgery.files import InputFile
from surgery.modeling import deferred as deferred_module
from surgery.modeling import lanes, streaming
from surgery.modeling.buffers import SMALL, Buffers
from surgery.modeling.build import build_deferred, build_model
from surgery.modeling.deferred import Deferred, Plain, UndeferrableError, apart, evaluate, recording
from surgery.modeling.shelf import Reader, Shelf, same_bytes
from surgery.modeling.streaming import run_together
from surgery.tensor import FileSpan, LazyTensor, gather
from surgery.verification import compare_logits, logits
from surgery.verification.device import largest_module, memory_needed

IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
MIXED = ["mixtral", "deepseek_v3", "gpt_oss", "dbrx", "qwen3_next", "jamba"]
"""Experts that are packed, kept apart, with biases, used from outside; linear attention, Mamba."""


def outputs(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, return_dict=True)[0].clone()


def streamed(*checkpoints: Checkpoint, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    models = [build_deferred(one, dtype, "cpu").model for one in checkpoints]
    return run_together(models, [lambda m=model: outputs(m) for model in models])


def whole(*checkpoints: Checkpoint, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [outputs(build_model(one, dtype, "cpu").model) for one in checkpoints]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each byte range of a file was read, by its path and first byte."""
    seen: Counter[tuple[str, int]] = Counter()
    plainly = InputFile.read_into

    def counted(self: InputFile, buffer: memoryview, offset: int) -> None:
        for at in range(offset, offset + len(buffer)):
            seen[str(self.path), at] += 1
        plainly(self, buffer, offset)

    monkeypatch.setattr(InputFile, "read_into", counted)
    return seen


# The same bits


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "gpt2", "bert", "bert_mlm", "gemma2", "phi3", "opt", "olmo2"]
)
def test_the_report_is_that_of_whole_models(name: str):
    base = open_checkpoint(build(name))
    other = grow(base, factor=1.5)
    found = compare_logits(base, other, device="cpu")
    assert found.streamed
    assert found.same
    loaded = compare_logits(base, other, device="cpu", streamed=False)
    assert not loaded.streamed
    assert replace(found, streamed=False) == loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_mlm"])
def test_outputs_are_those_of_whole_models(name: str, dtype: torch.dtype):
    base = open_checkpoint(build(name, "bfloat16"))
    tuned = open_checkpoint(build_tuned(name, "bfloat16"))
    models = [base, grow(base, factor=2), tuned, lines(base, tuned, alpha=0.5)]
    assert same(streamed(*models, dtype=dtype), whole(*models, dtype=dtype))


@pytest.mark.parametrize("name", MIXED)
def test_mixtures_too_however_the_loader_packs_experts(name: str):
    base = open_checkpoint(build_mixture(name))
    other = grow(base, factor=2)
    assert same(streamed(base, other), whole(base, other))
    found = compare_logits(base, other, device="cpu")
    loaded = compare_logits(base, other, device="cpu", streamed=False)
    assert replace(found, streamed=False) == loaded


def test_float64_swaps_types_in_the_model_and_not_in_its_weights():
    base = open_checkpoint(build("gemma2", "bfloat16"))
    other = grow(base, factor=1.5)
    found = compare_logits(base, other, device="cpu", dtype="float64")
    loaded = compare_logits(base, other, device="cpu", dtype="float64", streamed=False)
    assert replace(found, streamed=False) == loaded
    assert found.noise_floor is not None
    assert found.noise_floor < 1e-12


def test_layers_of_different_widths():
    base = open_checkpoint(build("llama"))
    other = grow(base, factor=1.5, layers="0,2")
    assert same(streamed(base, other), whole(base, other))


def test_buffers_are_those_of_whole_models():
    for name in ("llama", "gemma3", "gpt2", "opt"):
        checkpoint = open_checkpoint(build(name))
        expected = dict(build_model(checkpoint, torch.float32, "cpu").model.named_buffers())
        found = dict(build_deferred(checkpoint, torch.float32, "cpu").model.named_buffers())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert not any(isinstance(value, Deferred) for value in found.values())


def test_parameters_that_the_files_lack_are_there_and_the_same(tmp_path: Path):
    tensors = load(build("llama"))
    name = "model.layers.1.self_attn.o_proj.weight"
    del tensors[name]
    checkpoint = open_checkpoint(variant(tmp_path / "gap", build("llama"), tensors))
    built = build_deferred(checkpoint, torch.float32, "cpu")
    assert built.missing == (name,)
    assert not isinstance(built.model.get_parameter(name), Deferred)
    assert same(streamed(checkpoint), whole(checkpoint))


def test_a_tied_pair_that_differs_in_the_files_stays_apart(tmp_path: Path):
    """The loader looks at the values of both: they are read for that, and not kept."""
    tensors = load(build("llama_tied"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    checkpoint = open_checkpoint(variant(tmp_path / "apart", build("llama_tied"), tensors))
    model = build_deferred(checkpoint, torch.float32, "cpu").model
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert same(streamed(checkpoint), whole(checkpoint))


# Every byte once


@pytest.mark.parametrize("name", ["llama", "gpt2_base", "phi3"])
def test_bytes_that_models_share_are_read_once(name: str, reads: Counter[tuple[str, int]]):
    base = open_checkpoint(build(name, "bfloat16"))
    checkpoints = [base, grow(base, factor=1.5), logits._permuted(base, 0)]
    models = [build_deferred(one, torch.float32, "cpu").model for one in checkpoints]
    assert not reads
    run_together(models, [lambda m=model: outputs(m) for model in models])
    assert set(reads.values()) == {1}
    assert len(reads) == base.nbytes


def test_a_tied_head_is_the_one_tensor_that_is_held_or_read_again(
    monkeypatch: pytest.MonkeyPatch, reads: Counter[tuple[str, int]]
):
    base = open_checkpoint(build("llama_tied"))
    streamed(base, grow(base))
    assert set(reads.values()) == {1}
    reads.clear()
    monkeypatch.setattr(streaming, "MORE_BUDGET", 2000)  # no room for it meanwhile
    streamed(base, grow(base))
    span = base["model.embed_tokens.weight"].leaf
    assert isinstance(span, FileSpan)
    twice = {(str(span.file.path), at) for at in range(span.offset, span.offset + span.length)}
    assert {key for key, count in reads.items() if count > 1} == twice


@pytest.mark.parametrize("after", ["0", "-1", "0,1,2"])
def test_copies_of_a_block_are_made_of_the_bytes_that_were_read(
    after: str, reads: Counter[tuple[str, int]]
):
    base = open_checkpoint(build("llama"))
    other = expand(base, after=after)
    expected = whole(base, other)
    reads.clear()
    assert same(streamed(base, other), expected)
    assert set(reads.values()) == {1}


def test_files_of_two_models_are_each_read_once(tmp_path: Path, reads: Counter[tuple[str, int]]):
    base = open_checkpoint(build("llama"))
    write(grow(base, factor=1.5), tmp_path / "grown")
    other = open_checkpoint(tmp_path / "grown")
    reads.clear()
    streamed(base, other)
    assert set(reads.values()) == {1}
    assert len(reads) == base.nbytes + other.nbytes


def test_only_the_module_that_runs_has_its_weights():
    base = open_checkpoint(build("llama"))
    models = [build_deferred(one, torch.float32, "cpu").model for one in (base, grow(base))]
    present: list[list[str]] = []

    def look(model: Any, *_: object) -> None:
        there = [n for n, p in model.named_parameters() if not isinstance(p, Deferred)]
        present.append(there)

    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_, m=model: look(m))
    run_together(models, [lambda m=model: outputs(m) for model in models])
    assert len(present) == 2 * (3 * 7 + 1)
    assert all(len(names) == 1 for names in present)
    assert all(isinstance(p, Deferred) for model in models for p in model.parameters())


def test_models_whose_modules_run_in_any_order_come_to_an_end():
    """Orders, sizes and modules that run twice or never, which the threads can't know of."""

    class Odd(nn.Module):
        def __init__(self, order: list[int], weights: list[Deferred]) -> None:
            super().__init__()
            self.steps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in weights)
            for step, weight in zip(self.steps, weights, strict=True):
                step.weight = nn.Parameter(weight, requires_grad=False)
            self.order = order

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for at in self.order:
                x = self.steps[at](x)
            return x

    base = open_checkpoint(build("llama"))
    span = [t for t in base.values() if t.shape == (32, 32)]
    shape = torch.empty(4, 4, device="meta")

    def weight(at: int) -> Deferred:
        runs = tuple((0, row, row + 1) for row in range(4 * at, 4 * at + 4))
        first = gather((span[at % len(span)],), runs, (4, 32))
        kernel = lambda rows: rows[:, :4]
        cut = LazyTensor((4, 4), first.dtype, inputs=(first,), kernel=kernel, rowwise=True)
        return Deferred.made(cut, shape)

    orders = [[0, 1, 2, 3], [3, 2, 1, 0, 0], [1, 1], []]
    models = [Odd(order, [weight(at) for at in range(4)]) for order in orders]
    x = torch.ones(1, 4)
    found = run_together(models, [lambda m=model: m(x) for model in models])
    for order, result in zip(orders, found, strict=True):
        expected = x
        for at in order:
            expected = expected @ span[at % len(span)].whole()[4 * at : 4 * at + 4, :4].T
        assert torch.allclose(result, expected)


# What can go wrong


def test_the_first_error_stops_all_models():
    base = open_checkpoint(build("llama"))
    models = [build_deferred(base, torch.float32, "cpu").model for _ in range(3)]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the second model")

    models[1].model.layers[1].register_forward_pre_hook(fail)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="in the second model"):
        run_together(models, [lambda m=model: outputs(m) for model in models])
    assert threading.active_count() == before
    assert all(isinstance(p, Deferred) for model in models for p in model.parameters())


def test_a_file_that_was_cut_short_is_named(tmp_path: Path):
    base = open_checkpoint(variant(tmp_path / "cut", build("llama")))
    other = grow(base)
    (tmp_path / "cut/model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"cut/model.safetensors ends at byte 0"):
        compare_logits(base, other, device="cpu")


class _Never:
    """A loader that needs the values of a weight."""

    def __call__(self, *_: object) -> Any:
        raise UndeferrableError("aten.add_.Tensor writes into a weight")


def test_where_the_loader_needs_values_models_are_loaded_whole(monkeypatch: pytest.MonkeyPatch):
    base = open_checkpoint(build("llama"))
    expected = compare_logits(base, grow(base), device="cpu", streamed=False)
    monkeypatch.setattr("surgery.modeling.build.build_deferred", _Never())
    assert compare_logits(base, grow(base), device="cpu") == expected
    message = "can't be run a module at a time: aten.add_.Tensor writes into a weight"
    with pytest.raises(UnsupportedError, match=message):
        compare_logits(base, grow(base), device="cpu", streamed=True)


def test_memory_is_asked_for_as_much_as_the_way_of_running_takes(monkeypatch: pytest.MonkeyPatch):
    base = open_checkpoint(build("llama"))
    other = grow(base)
    monkeypatch.setattr("surgery.verification.device.BESIDE_WEIGHTS", 0)
    monkeypatch.setattr("surgery.modeling.build.KEPT_BUFFERS", 0)
    little = memory_needed(other, "float32")
    much = memory_needed(other, "float32", streamed=False)
    assert little == 2 * 4 * max(tensor.numel for tensor in other.values())
    assert much > 5 * little

    class Memory:
        available = little

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    assert compare_logits(base, other, device="cpu").streamed
    with pytest.raises(UnsupportedError, match="a model at a time, takes about"):
        compare_logits(base, other, device="cpu", streamed=False)
    monkeypatch.setattr("surgery.modeling.build.build_deferred", _Never())
    with pytest.raises(UnsupportedError, match="a model at a time, takes about"):
        compare_logits(base, other, device="cpu")
    Memory.available = little - 1
    with pytest.raises(UnsupportedError, match="a module at a time, takes about"):
        compare_logits(base, other, device="cpu")


def test_experts_of_a_block_count_as_one_module():
    base = open_checkpoint(build_mixture("mixtral"))
    experts = [t for n, t in base.items() if n.startswith("model.layers.1.") and "experts." in n]
    assert largest_module(base) == sum(tensor.numel for tensor in experts)


# Deferred tensors


def lazily(values: torch.Tensor) -> LazyTensor:
    from surgery.dtypes import DTYPES

    class Given:
        def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
            return values.reshape(tensor.shape_of(tensor.rows))[start:stop].clone()

    return LazyTensor(tuple(values.shape), DTYPES["F32"], leaf=Given())


def value(deferred: torch.Tensor) -> torch.Tensor:
    assert isinstance(deferred, Deferred)
    with apart():
        return evaluate(deferred, Plain(torch.device("cpu")))


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "t": lambda x: x.transpose(0, 1),
    "half": lambda x: x.chunk(2, dim=0)[1],
    "split": lambda x: torch.cat(x.split(1, dim=1)[::-1], dim=1),
    "stack": lambda x: torch.stack([x, x * 2]).flatten(0, 1),
    "pack": lambda x: torch.cat([torch.stack([x, x + 1]), torch.stack([x, x])], -1)[1],
    "rope": lambda x: x.view(2, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape),
    "cast": lambda x: x.to(torch.bfloat16).to(torch.float64),
    "rows": lambda x: x[torch.tensor([1, 0])].repeat(2, 1),
    "slice": lambda x: x[::2, 1:].contiguous(),
    "pad": lambda x: nn.functional.pad(x, (0, 2)),
}


@given(st.lists(st.sampled_from([*OPERATIONS]), max_size=5))
def test_what_is_put_off_is_what_would_have_been_done(names: list[str]):
    values = torch.arange(48, dtype=torch.float32).reshape(8, 6) / 7
    with recording():
        later: torch.Tensor = Deferred.of(lazily(values))
        now = values
        for name in names:
            if min(now.shape) < 2 or now.shape[0] % 2 or not now.is_contiguous():
                break
            now, later = OPERATIONS[name](now), OPERATIONS[name](later)
    assert isinstance(later, Deferred)
    assert (later.shape, later.dtype, later.stride()) == (now.shape, now.dtype, now.stride())
    assert torch.equal(value(later), now)


def test_parts_that_are_packed_are_in_memory_one_after_the_other():
    alive: list[weakref.ref[torch.Tensor]] = []

    class Counting(Plain):
        def read(self, tensor: LazyTensor, dtype: torch.dtype | None) -> torch.Tensor:
            assert not [one for one in alive if one() is not None]
            made = super().read(tensor, dtype)
            alive.append(weakref.ref(made))
            return made

    parts = [torch.full((2, 3), float(n)) for n in range(6)]
    with recording():
        later = [Deferred.of(lazily(part)).to(torch.float64) for part in parts]
        packed = torch.cat([torch.stack(later[:3]), torch.stack(later[3:])], dim=1)
    assert isinstance(packed, Deferred)
    with apart():
        found = evaluate(packed, Counting(torch.device("cpu")))
    assert len(alive) == 6
    now = [part.double() for part in parts]
    assert torch.equal(found, torch.cat([torch.stack(now[:3]), torch.stack(now[3:])], dim=1))


def test_values_that_are_asked_for_are_given():
    with recording():
        a, b = (Deferred.of(lazily(torch.full((2, 2), float(n)))) for n in (1, 2))
        assert not torch.equal(a, b)
        assert torch.equal(a, a)
        assert (a + b).sum().item() == 12
    assert type(a + b) is torch.Tensor
    assert torch.equal(a + b, torch.full((2, 2), 3.0))


def test_a_weight_that_is_written_to_cant_be_put_off():
    with pytest.raises(UndeferrableError, match=r"add_.* writes into a weight"), recording():
        Deferred.of(lazily(torch.ones(2))).add_(1)


def test_what_cant_be_put_off_shows_even_if_its_error_is_swallowed():
    def loader() -> None:
        try:
            Deferred.of(lazily(torch.ones(2))).mul_(2)
        except Exception as error:
            raise RuntimeError("a report of the loader") from error

    with pytest.raises(UndeferrableError, match="writes into a weight"), recording():
        loader()
    with pytest.raises(ValueError, match="its own"), recording():
        raise ValueError("its own")


def test_a_part_of_a_real_tensor_can_take_deferred_values():
    with recording():
        real = torch.zeros(2, 2)
        real[0] = Deferred.of(lazily(torch.ones(2)))
    assert torch.equal(real, torch.tensor([[1.0, 1], [0, 0]]))


# Shelves and buffers


def test_a_shelf_makes_each_value_once_for_all_that_take_it():
    made: list[str] = []

    def make() -> torch.Tensor:
        made.append("x")
        return torch.zeros(2)

    shelf: Shelf[torch.Tensor] = Shelf(Counter({"a": 8}), 100)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(shelf.take("a", 8, make))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["x"]
    assert len({id(one) for one in found}) == 1
    assert not shelf._slots
    shelf.take("a", 8, make)  # once more than was foreseen
    assert made == ["x", "x"]
    assert not shelf._slots


def test_a_shelf_drops_the_oldest_beyond_its_budget():
    made: Counter[str] = Counter()

    def take(key: str) -> None:
        shelf.take(key, 8, lambda: made.update([key]) or torch.zeros(2))

    shelf: Shelf[torch.Tensor] = Shelf(Counter(dict.fromkeys("abc", 9)), 16)
    for key in "abab" + "c" + "bc" + "a":
        take(key)
    assert made == {"a": 2, "b": 1, "c": 1}


def test_a_value_that_one_thread_cant_make_another_may():
    shelf: Shelf[torch.Tensor] = Shelf(Counter({"a": 3}), 100)

    def fail() -> torch.Tensor:
        raise FormatError("gone")

    with pytest.raises(FormatError, match="gone"):
        shelf.take("a", 8, fail)
    assert torch.equal(shelf.take("a", 8, lambda: torch.ones(1)), torch.ones(1))


def test_a_kernel_that_overwrites_its_input_leaves_the_shared_bytes_as_they_were(
    raw_checkpoint: Callable[..., Path],
):
    norm = open_checkpoint(raw_checkpoint({"norm": torch.arange(1.0, 9.0)}))["norm"]
    given_rows = gather((norm,), ((0, 0, norm.rows),), norm.shape)
    reader = Reader(Counter({same_bytes(norm): 4}), 1 << 20, Buffers(0))
    for made_of in (norm, given_rows):
        negated = LazyTensor(norm.shape, norm.dtype, inputs=(made_of,), kernel=torch.Tensor.neg_)
        assert torch.equal(reader.read(negated), -norm.whole())
        assert torch.equal(reader.read(norm), norm.whole())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3 * SMALL)), max_size=12))
def test_no_buffer_is_given_out_while_a_view_of_it_lives(steps: list[tuple[int, int]]):
    buffers = Buffers(keep=8 * SMALL)
    alive: dict[int, torch.Tensor] = {}
    for place, size in steps:
        alive.pop(place, None)
        whole = buffers.empty((size,), torch.uint8)
        whole.fill_(place)
        alive[place] = whole[size // 2 :].view(1, -1)  # a view keeps the memory
        del whole
        for number, tensor in alive.items():
            assert bool((tensor == number).all())
    assert sum(map(len, buffers._free)) <= 8 * SMALL


def test_memory_comes_back_as_the_last_view_dies():
    buffers = Buffers(keep=1 << 30)
    first = buffers.empty((4, SMALL), torch.float32)
    assert first.is_contiguous()
    address = first.data_ptr()
    part = first[1:]
    del first
    second = buffers.empty((4, SMALL), torch.float32)
    assert second.data_ptr() != address
    del part
    assert buffers.empty((4, SMALL), torch.float32).data_ptr() == address
    assert math.prod(buffers.empty((0, 3), torch.float32).shape) == 0


# On the way to a device


def test_a_model_that_moves_keeps_its_ties_and_reads_nothing(reads: Counter[tuple[str, int]]):
    model = build_deferred(open_checkpoint(build("llama_tied")), torch.float32, "meta").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(isinstance(p, Deferred) and p.device.type == "meta" for p in model.parameters())
    assert all(buffer.device.type == "meta" for buffer in model.buffers())
    assert not reads


def test_a_device_gets_weights_before_their_module_and_never_many(
    monkeypatch: pytest.MonkeyPatch,
):
    """The protocol of streams and events, with a double of CUDA that writes down what is asked."""
    log: list[tuple[str, int]] = []

    class Event:
        def __init__(self, kind: str) -> None:
            self.kind, self.number = kind, sum(1 for k, _ in log if k == kind)
            log.append((kind, self.number))

        def synchronize(self) -> None:
            log.append(("over", self.number))

    class Stream:
        def __init__(self, kind: str = "sent") -> None:
            self.kind = kind

        def record_event(self) -> Event:
            return Event(self.kind)

        def wait_event(self, event: Event) -> None:
            log.append(("awaited", event.number))

    inside: list[Stream] = []

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        inside.append(stream)
        yield
        inside.remove(stream)

    computing = Stream("end")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, _: kept.append(self))
    monkeypatch.setattr(streaming, "lane_to", lambda _: lanes.CudaLane())

    base = open_checkpoint(build("llama"))
    assert same(streamed(base), whole(base))
    assert not inside
    weights = len(base)
    assert Counter(kind for kind, _ in log) == {
        "sent": weights,
        "awaited": weights,
        "end": weights,
        "over": weights - lanes.AHEAD,
    }
    for number in range(weights):
        places = [log.index((kind, number)) for kind in ("sent", "awaited", "end")]
        assert places == sorted(places)
        if number >= lanes.AHEAD:  # it was sent only after that module was over
            assert log.index(("over", number - lanes.AHEAD)) < places[0]
    assert len(kept) == weights


@pytest.fixture(autouse=True)
def _nothing_is_left_recording() -> Iterator[None]:
    yield
    assert getattr(deferred_module._local, "failures", None) is None
