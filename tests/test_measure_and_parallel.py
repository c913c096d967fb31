"""Statistics against plain formulas, and the threads that do the work."""

from __future__ import annotations

import importlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from surgery import ArgumentError, open_checkpoint
from surgery.measure import neuron_norms
from surgery.parallel import default_threads, run_all

measure = importlib.import_module("surgery.measure")


# --- neuron norms ---------------------------------------------------------------------------


def plain_norms(ups: list[list[list[float]]], down: list[list[float]], width: int) -> list[float]:
    """ups: (width, hidden) each, down: (hidden, width), as nested lists."""
    norms = []
    for neuron in range(width):
        incoming = sum(x * x for up in ups for x in up[neuron]) ** 0.5
        outgoing = sum(row[neuron] ** 2 for row in down) ** 0.5
        norms.append(incoming * outgoing)
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [7, 100, 1 << 18])
def test_norms_of_a_gated_mlp(
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    block: int,
) -> None:
    monkeypatch.setattr(measure, "BLOCK_ELEMENTS", block)
    checkpoint = open_checkpoint(make_model("llama", dtype=dtype))
    for (_, layer), mlp in checkpoint.anatomy.mlps.items():
        stem = f"model.layers.{layer}.mlp"
        gate, up, down = (
            checkpoint[f"{stem}.{part}_proj.weight"].whole().double().tolist()
            for part in ("gate", "up", "down")
        )
        found = neuron_norms(checkpoint, mlp)
        assert found.dtype is torch.float64
        assert found.tolist() == pytest.approx(plain_norms([gate, up], down, 24), rel=1e-12)
    assert len(checkpoint.anatomy.mlps) == 2


def test_norms_of_gpt2(make_model: Callable[..., Path]) -> None:
    """Conv1D: c_fc is (in, out), and a neuron is a column of it and a row of c_proj."""
    checkpoint = open_checkpoint(make_model("gpt2"))
    for (_, layer), mlp in checkpoint.anatomy.mlps.items():
        stem = f"transformer.h.{layer}.mlp"
        c_fc = checkpoint[f"{stem}.c_fc.weight"].whole().double()
        c_proj = checkpoint[f"{stem}.c_proj.weight"].whole().double()
        assert (c_fc.shape, c_proj.shape) == ((16, 24), (24, 16))
        wanted = plain_norms([c_fc.T.tolist()], c_proj.T.tolist(), 24)
        assert neuron_norms(checkpoint, mlp).tolist() == pytest.approx(wanted, rel=1e-12)
    assert len(checkpoint.anatomy.mlps) == 2


def test_norms_of_a_fused_mlp(raw_checkpoint: Callable[..., Path]) -> None:
    """Gate and up stacked in one matrix: neuron j is row j and row width + j."""
    stem = "model.layers.{}.mlp.{}.weight"
    tensors = {"model.embed_tokens.weight": torch.randn(32, 4)}
    for layer in range(2):
        tensors[stem.format(layer, "gate_up_proj")] = torch.randn(12, 4)
        tensors[stem.format(layer, "down_proj")] = torch.randn(4, 6)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(4)
    config = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2}
    checkpoint = open_checkpoint(raw_checkpoint(tensors, config=config))
    for (_, layer), mlp in checkpoint.anatomy.mlps.items():
        fused = tensors[stem.format(layer, "gate_up_proj")].double()
        down = tensors[stem.format(layer, "down_proj")].double().tolist()
        wanted = plain_norms([fused[:6].tolist(), fused[6:].tolist()], down, 6)
        assert neuron_norms(checkpoint, mlp).tolist() == pytest.approx(wanted, rel=1e-12)
    assert len(checkpoint.anatomy.mlps) == 2


def test_norms_do_not_overflow(raw_checkpoint: Callable[..., Path]) -> None:
    """The square of a float32 can be beyond float32; that of a float16 needs no more than 1000."""
    stem = "model.layers.{}.mlp.{}_proj.weight"
    tensors = {"model.embed_tokens.weight": torch.randn(32, 2)}
    for layer in range(2):
        for part, shape in (("gate", (3, 2)), ("up", (3, 2)), ("down", (2, 3))):
            tensors[stem.format(layer, part)] = torch.full(shape, 1e30)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(2)
    config = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 2}
    checkpoint = open_checkpoint(raw_checkpoint(tensors, config=config))
    (mlp, _) = checkpoint.anatomy.mlps.values()
    big = float(torch.tensor(1e30))
    wanted = [2 * big * 2**0.5 * big] * 3
    assert neuron_norms(checkpoint, mlp).tolist() == pytest.approx(wanted, rel=1e-12)


# --- threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 2, 4])
def test_every_job_is_done_once(threads: int | None) -> None:
    done: list[int] = []
    run_all(iter(range(500)), done.append, threads)
    assert Counter(done) == Counter(range(500))


def test_no_jobs() -> None:
    run_all(iter(()), pytest.fail, 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_jobs_run_at_once_and_not_in_the_callers_thread(threads: int) -> None:
    barrier = threading.Barrier(threads, timeout=10)
    seen: set[int] = set()

    def work(_: int) -> None:
        seen.add(threading.get_ident())
        barrier.wait()

    run_all(iter(range(threads * 4)), work, threads)
    assert len(seen) == threads
    assert threading.get_ident() not in seen


@pytest.mark.parametrize("threads", [0, -1])
def test_a_number_of_threads_that_cannot_be(threads: int) -> None:
    """With none, all of it would be left undone, and nobody told."""
    with pytest.raises(ArgumentError) as caught:
        run_all(iter(range(5)), pytest.fail, threads)
    assert str(caught.value) == f"threads is {threads}, and has to be at least 1"


class Trouble(BaseException):
    """Not an Exception: a thread mustn't swallow such a one either."""


@pytest.mark.parametrize("kind", [ValueError, Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_exception_stops_all_and_is_raised(kind: type[BaseException], threads: int) -> None:
    error = kind("this one")
    done: list[int] = []

    def work(job: int) -> None:
        if job == 20:
            raise error
        if job > 20:
            time.sleep(0.001)
        done.append(job)

    with pytest.raises(kind) as caught:
        run_all(iter(range(100_000)), work, threads)
    assert caught.value is error
    assert len(done) < 1000
    assert threading.active_count() == 1 or not any(
        thread.name.endswith("(worker)") for thread in threading.enumerate()
    )


def test_an_exception_while_the_jobs_are_made() -> None:
    def jobs() -> Iterator[int]:
        yield 1
        raise LookupError("no such tensor")

    with pytest.raises(LookupError, match=r"^no such tensor$"):
        run_all(jobs(), lambda job: None, 3)


@pytest.mark.parametrize("fails", [False, True])
def test_torch_gets_its_threads_back(fails: bool) -> None:
    before = torch.get_num_threads()
    inside: list[int] = []

    def work(job: int) -> None:
        inside.append(torch.get_num_threads())
        if fails:
            raise ValueError

    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(ValueError, match=r"^$"):
                run_all(iter(range(4)), work, 2)
        else:
            run_all(iter(range(4)), work, 2)
        assert set(inside) == {1}
        assert torch.get_num_threads() == 2
        later: list[int] = []  # the number is one for each thread, and one for new threads
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("surgery.parallel")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert default_threads() == 3
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(100), raising=False)
    assert default_threads() == 8
    monkeypatch.delattr(module.os, "sched_getaffinity")
    monkeypatch.setattr(module.os, "cpu_count", lambda: None)
    assert default_threads() == 1
