"""Writing: the bytes that were planned, all of them or none, and nothing that wasn't asked for."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors
import torch
import yaml
from conftest import (
    INDEX,
    bytes_of,
    entry,
    files_in,
    random_tensor,
    safetensors_bytes,
    save_raw,
    shared,
    tensors,
)
from hypothesis import given
from hypothesis import strategies as st

from surgery import (
    ArgumentError,
    Checkpoint,
    Edit,
    FormatError,
    InputError,
    LazyTensor,
    OutputError,
    SurgeryError,
    grow,
    lines,
    open_checkpoint,
    plan,
    write,
)
from surgery.dtypes import DTYPES
from surgery.header import read_header
from surgery.hub import Source
from surgery.tensor import gather
from surgery.values import noise
from surgery.writing import locks
from surgery.writing.locks import locked
from surgery.writing.record import record_bytes
from surgery.writing.staging import staging

writer = importlib.import_module("surgery.writing.write")
Raw = Callable[..., Path]
A = torch.arange(12.0).reshape(3, 4)
B = torch.arange(5, dtype=torch.bfloat16)


@pytest.fixture
def given_folder(raw_checkpoint: Raw) -> Path:
    return raw_checkpoint(
        {"a": A, "b": B},
        name="given",
        config={"model_type": "made_up"},
        files={"tokenizer.json": b"{\r\n}", "1_Pooling/config.json": b'{"x": 1}'},
    )


@pytest.fixture
def checkpoint(given_folder: Path) -> Checkpoint:
    return open_checkpoint(given_folder)


def whole(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: bytes_of(tensor.whole()) for name, tensor in checkpoint.items()}


def computed(checkpoint: Checkpoint, kernel: Callable[..., torch.Tensor]) -> Checkpoint:
    """The checkpoint with this kernel on each of its tensors."""
    made = {
        name: LazyTensor(tensor.shape, tensor.dtype, inputs=(tensor,), kernel=kernel)
        for name, tensor in checkpoint.items()
    }
    return replace(checkpoint, tensors=made)


def refused(checkpoint: Checkpoint, target: Path | str, **how: Any) -> str:
    with pytest.raises(SurgeryError) as caught:
        write(checkpoint, target, **how)
    assert type(caught.value) is OutputError
    return str(caught.value)


def everything(folder: Path) -> dict[str, Any]:
    """Every file with its bytes, every link with where it leads, every directory."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


# --- the bytes ------------------------------------------------------------------------------


@given(made=tensors(min_size=1), max_shard_bytes=st.integers(1, 200), threads=st.integers(1, 3))
def test_what_was_read_is_written(
    tmp_path_factory: Any, made: dict[str, torch.Tensor], max_shard_bytes: int, threads: int
) -> None:
    folder = tmp_path_factory.mktemp("given")
    save_raw(folder / "in", made)
    opened = open_checkpoint(folder / "in")
    write(opened, folder / "out", max_shard_bytes=max_shard_bytes, threads=threads)
    again = open_checkpoint(folder / "out")
    assert again.notes == ()
    assert whole(again) == {name: bytes_of(tensor) for name, tensor in made.items()}
    for name, tensor in made.items():
        assert (again[name].shape, again[name].dtype.torch) == (tuple(tensor.shape), tensor.dtype)
    loaded = {}
    for path in (folder / "out").glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118  it isn't a mapping
                loaded[name] = bytes_of(file.get_tensor(name))
    assert loaded == {name: bytes_of(tensor) for name, tensor in made.items()}


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_types_that_torch_lacks_are_copied(tmp_path: Path, dtype: str) -> None:
    size = 4 * DTYPES[dtype].bits // 8
    data = bytes(range(7, 7 + size))
    (tmp_path / "in").mkdir()
    content = safetensors_bytes({"w": entry(dtype, [2, 2], 0, size)}, data)
    (tmp_path / "in" / "model.safetensors").write_bytes(content)
    write(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    written = tmp_path / "out" / "model.safetensors"
    found = read_header(written).entries["w"]
    assert (found.dtype.name, found.shape) == (dtype, (2, 2))
    assert written.read_bytes()[found.start : found.stop] == data


@given(
    dtype=st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL"]),
    height=st.integers(0, 9),
    width=st.integers(0, 4),
    data=st.data(),
)
def test_gathers_and_kernels_are_written(
    tmp_path_factory: Any, dtype: str, height: int, width: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("gather")
    wanted = random_tensor(dtype, (height, width), 5)
    opened = open_checkpoint(save_raw(folder / "in", {"w": wanted, "v": wanted[:, :0].clone()}))
    given_tensor = opened["w"]
    runs = [
        (0, *sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height)))))
        for _ in range(data.draw(st.integers(0, 4)))
    ]
    count = sum(stop - start for _, start, stop in runs)
    copied = gather((given_tensor,), tuple(runs), (count, width))
    kernel = torch.clone
    made = {
        "copied": copied,
        "computed": LazyTensor((count, width), copied.dtype, inputs=(copied,), kernel=kernel),
        "whole": LazyTensor(
            (height, width), copied.dtype, inputs=(given_tensor,), kernel=kernel, rowwise=False
        ),
    }
    layout = write(replace(opened, tensors={**opened, **made}), folder / "out", threads=2).plan
    assert (layout.computed, layout.copied) == (("computed", "whole"), ("copied",))
    assert layout.untouched == ("v", "w")
    rows = torch.cat([wanted[:0], *(wanted[start:stop] for _, start, stop in runs)])
    again = open_checkpoint(folder / "out")
    assert again["copied"].shape == (count, width)
    assert whole(again) == {
        "w": bytes_of(wanted),
        "v": b"",
        "copied": bytes_of(rows),
        "computed": bytes_of(rows),
        "whole": bytes_of(wanted),
    }


@pytest.mark.parametrize("way", ["missing", "refused", "nothing", "little"])
def test_copying_without_help_of_the_system(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Other file systems and systems: no call, EXDEV, zero bytes copied, a few at a time."""
    calls = []

    def call(source: int, target: int, count: int, at: int, to: int) -> int:
        calls.append(count)
        if way == "refused":
            raise OSError(errno.EXDEV, "not between these")
        if way == "nothing":
            return 0
        return os.pwrite(target, os.pread(source, min(3, count), at), to)

    monkeypatch.setattr(os, "copy_file_range", call, raising=False)
    if way == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(writer, "COPY_BYTES", 7)
    write(checkpoint, tmp_path / "out")
    assert whole(open_checkpoint(tmp_path / "out")) == {"a": bytes_of(A), "b": bytes_of(B)}
    assert bool(calls) == (way != "missing")


def test_an_input_that_shrinks_while_it_is_copied(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "given" / "model.safetensors"
    start = read_header(source).entries["a"].start
    os.truncate(source, start + 10)
    with pytest.raises(FormatError) as caught:
        write(checkpoint, tmp_path / "out", threads=1)
    assert str(caught.value).startswith(f"{source} ends at byte {start + 10}, and its header")
    assert os.listdir(tmp_path) == ["given"]


@pytest.fixture
def edits(raw_checkpoint: Raw, make_model: Raw) -> dict[str, Checkpoint]:
    """An identity, a LiNeS and a growth with noise: copied, computed and gathered tensors."""
    base, tuned = make_model("llama", "base"), make_model("llama", "tuned", seed=1)
    opened = open_checkpoint(base)
    return {
        "identity": opened,
        "lines": lines(opened, open_checkpoint(tuned), alpha=0.3),
        "grow": grow(opened, factor=1.5, choose="random", symmetry_break=0.1),
    }


def test_the_same_bytes_every_time(
    edits: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any number of threads and in any blocks; all files, also those that are made (st#584)."""
    for name, edited in edits.items():
        found = []
        for number, (threads, block) in enumerate([(1, 1 << 18), (2, 40), (3, 100), (4, 1)]):
            monkeypatch.setattr(writer, "BLOCK_ELEMENTS", block)
            target = tmp_path / f"{name}-{number}"
            write(edited, target, threads=threads, max_shard_bytes=9000)
            found.append(files_in(target))
        assert len([path for path in found[0] if path.endswith(".safetensors")]) > 1
        for other in found[1:]:
            assert other.keys() == found[0].keys()
            assert [path for path in other if other[path] != found[0][path]] == []


def test_the_record_is_the_same_whichever_thread_is_first(
    raw_checkpoint: Raw, tmp_path: Path
) -> None:
    base = open_checkpoint(raw_checkpoint({"a": A, "b": A}, name="base"))
    tuned = open_checkpoint(raw_checkpoint({"a": A + 1, "b": A + 2}, name="tuned"))
    edited = lines(base, tuned, alpha=0.5)
    found = []
    for last in "ab":
        done = threading.Event()

        def tally(
            *rows: torch.Tensor, wait: bool, done: threading.Event
        ) -> tuple[torch.Tensor, float]:
            if wait:
                assert done.wait(10)
            else:
                threading.Timer(0.1, done.set).start()
            return rows[1], float((rows[1] - rows[0]).square().sum())

        made = {
            name: replace(tensor, tally=partial(tally, wait=name == last, done=done))
            for name, tensor in edited.items()
        }
        write(replace(edited, tensors=made), tmp_path / last, threads=2)
        found.append((tmp_path / last / "surgery.json").read_bytes())
    assert json.loads(found[0]) == json.loads(found[1])
    assert found[0] == found[1]


def test_the_layout_of_a_file(tmp_path: Path) -> None:
    """Every tensor is aligned to its own type, also where the input's weren't."""
    sizes = {"odd": ("U8", 3), "wide": ("F64", 3), "half": ("BF16", 5), "byte": ("BOOL", 1)}
    sizes |= {"empty": ("F32", 0), "single": ("F32", 1)}
    table: dict[str, Any] = {}
    end = 0
    for name, (dtype, count) in sizes.items():
        start, end = end, end + count * DTYPES[dtype].bits // 8
        table[name] = entry(dtype, [count], start, end)
    data = bytes(range(end))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").write_bytes(safetensors_bytes(table, data))
    write(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    written = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert content[8 : 8 + length].rstrip(b" ").endswith(b"}")
    assert next(iter(written)) == "__metadata__"
    assert written.pop("__metadata__") == {"format": "pt"}
    assert sorted(written) == sorted(sizes)
    end = 0
    for name, value in written.items():
        start, stop = value["data_offsets"]
        assert start == end
        assert start % (DTYPES[value["dtype"]].bits // 8) == 0
        given_start, given_stop = table[name]["data_offsets"]
        assert content[8 + length + start : 8 + length + stop] == data[given_start:given_stop]
        end = stop
    assert len(content) == 8 + length + end


def test_shards_and_their_index(raw_checkpoint: Raw, tmp_path: Path) -> None:
    made = {name: torch.full((10,), float(i)) for i, name in enumerate("fcaebd")}
    made["big"] = torch.zeros(100)
    opened = open_checkpoint(raw_checkpoint(made))
    order = [*opened]
    layout = plan(opened, max_shard_bytes=80)
    groups = [[*shard.offsets] for shard in layout.shards]
    assert [name for group in groups for name in group] == order
    count = len(groups)
    for group in groups:
        assert sum(opened[name].nbytes for name in group) <= 80 or len(group) == 1
    for one, following in pairwise(groups):
        assert sum(opened[name].nbytes for name in [*one, following[0]]) > 80
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [shard.name for shard in layout.shards] == names
    written = write(opened, tmp_path / "out", max_shard_bytes=80)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 6 * 40 + 400}
    assert [*index["weight_map"]] == sorted(made)
    where = {name: file for group, file in zip(groups, names, strict=True) for name in group}
    assert index["weight_map"] == where
    sizes = [(tmp_path / "out" / name).stat().st_size for name in names]
    assert [shard.size for shard in written.plan.shards] == sizes
    assert written.plan.weight_bytes == sum(sizes)


@pytest.mark.parametrize(("most", "count"), [(127, 2), (128, 1), (5_000_000_000, 1), (1, 2)])
def test_a_shard_is_full_before_the_next(raw_checkpoint: Raw, most: int, count: int) -> None:
    layout = plan(open_checkpoint(raw_checkpoint({"a": A, "b": A[:, :].clone()[:2]})))
    assert len(layout.shards) == 1
    assert layout.index is None
    opened = open_checkpoint(raw_checkpoint({"a": torch.zeros(16), "b": torch.ones(16)}, name="x"))
    assert len(plan(opened, max_shard_bytes=most).shards) == count


def test_what_is_loaded_by_transformers(edits: dict[str, Checkpoint], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write(edits["lines"], tmp_path / "out", max_shard_bytes=9000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base, tuned = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("base", "tuned")
    )
    for name, scale in (
        ("model.layers.0.mlp.up_proj.weight", 0.3),
        ("model.layers.1.mlp.up_proj.weight", 1.0),
        ("model.embed_tokens.weight", 0.3),
    ):
        wanted = base[name].double() + scale * (tuned[name].double() - base[name].double())
        assert torch.allclose(loaded[name].double(), wanted, rtol=2**-23, atol=2**-24)


def test_progress_counts_every_byte(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done: list[int] = []
    edited = computed(checkpoint, torch.clone)
    write(replace(edited, tensors={**edited, "c": checkpoint["a"]}), tmp_path / "out",
          progress=done.append)  # fmt: skip
    assert sum(done) == checkpoint.nbytes + checkpoint["a"].nbytes


def test_tallies_are_summed_exactly(
    raw_checkpoint: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e16 + 1 + 1 - 1e16: the order in which threads finish can't show."""
    opened = open_checkpoint(raw_checkpoint({"w": torch.tensor([1e16, 1.0, 1.0, -1e16]).double()}))
    tensor = LazyTensor(
        (4,),
        DTYPES["F64"],
        inputs=(opened["w"],),
        kernel=torch.clone,
        tally=lambda rows: (rows, float(rows.sum())),
    )
    monkeypatch.setattr(writer, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(writer, "make_record", lambda *_: {"edits": []})
    written = write(replace(opened, tensors={"w": tensor}), tmp_path / "out", threads=4)
    assert written.tallies == {"w": 2.0}


def test_a_number_of_threads_that_cannot_be(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """No thread would start, and the tensors would be zeros."""
    with pytest.raises(ArgumentError):
        write(checkpoint, tmp_path / "out", threads=-1)
    assert os.listdir(tmp_path) == ["given"]


def test_a_shard_that_could_hold_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="max_shard_bytes is 0, and has to be at least 1"):
        write(checkpoint, tmp_path / "out", max_shard_bytes=0)
    assert os.listdir(tmp_path) == ["given"]


@pytest.mark.parametrize("how", ["short", "wide"])
def test_a_kernel_that_breaks_its_promise(checkpoint: Checkpoint, tmp_path: Path, how: str) -> None:
    """Rows of another number or type than planned would lie in the next tensor's place."""
    kernel = {"short": lambda rows: rows[:-1], "wide": torch.Tensor.double}[how]
    with pytest.raises(AssertionError):
        write(computed(checkpoint, kernel), tmp_path / "out")
    assert os.listdir(tmp_path) == ["given"]


# --- where it may be written ----------------------------------------------------------------


def test_what_is_there_is_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("out")
    before = everything(tmp_path)
    assert refused(checkpoint, tmp_path / "out") == (
        f"{tmp_path / 'out'} exists already: choose another place, or replace it with --overwrite"
    )
    for overwrite in (False, True):
        assert refused(checkpoint, tmp_path / "file", overwrite=overwrite) == (
            f"{tmp_path / 'file'} exists and is no directory: choose another place"
        )
        for name in ("dangling", "link"):
            assert refused(checkpoint, tmp_path / name, overwrite=overwrite) == (
                f"{tmp_path / name} is a link: give the place that it leads to, or another"
            )
    assert everything(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", [".", "..", "sub", "1_Pooling", "../link", "../link/new"])
def test_an_input_is_never_written_to(
    checkpoint: Checkpoint, tmp_path: Path, where: str, overwrite: bool
) -> None:
    """st#762: it is being read."""
    (tmp_path / "link").symlink_to("given")
    before = everything(tmp_path)
    target = Path(os.path.normpath(tmp_path / "given" / where))
    assert refused(checkpoint, target, overwrite=overwrite) == (
        f"{target} is, contains or lies inside the input {tmp_path / 'given'}: choose another place"
    )
    assert everything(tmp_path) == before


def test_an_input_of_an_earlier_step_is_never_written_to(
    checkpoint: Checkpoint, raw_checkpoint: Raw, tmp_path: Path
) -> None:
    base = open_checkpoint(raw_checkpoint({"a": A + 1, "b": B}, name="base"))
    edited = lines(base, checkpoint, alpha=0.5)
    before = everything(tmp_path)
    said = refused(edited, tmp_path / "base", overwrite=True)
    assert said == (
        f"{tmp_path / 'base'} is, contains or lies inside the input {tmp_path / 'base'}: choose "
        f"another place"
    )
    both = refused(edited, tmp_path, overwrite=True).splitlines()
    assert sorted(line.split("input ")[1] for line in both) == [
        f"{tmp_path / name}: choose another place" for name in ("base", "given")
    ]
    assert everything(tmp_path) == before


def test_the_folder_of_a_single_file_is_an_input(given_folder: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(given_folder / "model.safetensors")
    said = refused(opened, given_folder, overwrite=True)
    assert said.startswith(f"{given_folder} is, contains or lies inside the input ")
    write(opened, given_folder / "out")
    assert whole(open_checkpoint(given_folder / "out")) == whole(opened)


def test_an_empty_directory_is_filled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(checkpoint, tmp_path / "out")
    assert whole(open_checkpoint(tmp_path / "out")) == whole(checkpoint)
    assert sorted(os.listdir(tmp_path)) == ["given", "out"]


def test_parents_are_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write(checkpoint, tmp_path / "a" / "b" / "out")
    assert whole(open_checkpoint(tmp_path / "a" / "b" / "out")) == whole(checkpoint)
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


def test_a_relative_target(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert write(checkpoint, "out").target == tmp_path / "out"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_is_replaced_is_replaced_as_a_whole(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Stale shards and a stale index would be loaded."""
    write(checkpoint, tmp_path / "out", max_shard_bytes=1)
    (tmp_path / "out" / "tokenizer.model").write_text("stale")
    (tmp_path / "out" / "sub").mkdir()
    write(checkpoint, tmp_path / "fresh")
    write(checkpoint, tmp_path / "out", overwrite=True)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "fresh")
    assert not (tmp_path / "out" / "sub").exists()
    assert sorted(os.listdir(tmp_path)) == ["fresh", "given", "out"]


def test_a_target_that_is_made_meanwhile(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A long run, and the name was free when it began: --overwrite wasn't given."""

    def somebody(_: Checkpoint) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("precious")

    assert refused(checkpoint, tmp_path / "out", check=somebody) == (
        f"{tmp_path / 'out'} was made by somebody else meanwhile: nothing written"
    )
    assert everything(tmp_path / "out") == {"x": b"precious"}


@pytest.mark.parametrize(
    "failing",
    [
        "staging",
        "sync",
    ],
)
def test_the_old_checkpoint_outlives_a_failure(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("the old one")
    before = everything(tmp_path)
    rename = os.rename
    said = {"staging": "can't be published", "sync": "writing to .* failed: no; nothing was kept"}

    def fail(source: Any, target: Any) -> None:
        if Path(source).name == "files":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    if failing == "staging":
        monkeypatch.setattr(os, "rename", fail)
    else:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    with pytest.raises(OutputError, match=said[failing]):
        write(checkpoint, tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "kind",
    [
        OSError,
        KeyboardInterrupt,
    ],
)
def test_the_old_checkpoint_outlives_an_interrupt(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseException],
) -> None:
    """One that comes when the old one is aside, and the new one not yet there."""
    write(checkpoint, tmp_path / "out")
    before = everything(tmp_path)
    rename = os.rename

    def interrupted(source: Any, target: Any) -> None:
        if Path(source).name == "files":
            raise kind
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(checkpoint, tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert everything(tmp_path) == before


def test_what_an_interrupted_run_put_aside_is_seen_beforehand(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write(checkpoint, tmp_path / "out")
    write(checkpoint, tmp_path / ".out.replaced")
    before = everything(tmp_path)
    seen: list[Checkpoint] = []
    said = refused(checkpoint, tmp_path / "out", overwrite=True, check=seen.append)
    assert said == (
        f"{tmp_path / '.out.replaced'} is there: it is what a run that was stopped has replaced. "
        f"Look at it, and remove it with `surgery clean {tmp_path / 'out'}`"
    )
    assert everything(tmp_path) == before
    assert seen == []


@pytest.mark.parametrize(
    "file",
    [
        False,
        True,
    ],
)
@pytest.mark.parametrize("name", [".out.staging", ".out.replaced"])
def test_an_input_under_a_name_that_we_use(
    raw_checkpoint: Raw, tmp_path: Path, name: str, file: bool
) -> None:
    """What an interrupted run left behind is a checkpoint to somebody who looks for his own."""
    folder = raw_checkpoint({"a": A}, name=name)
    given_path = folder / "model.safetensors" if file else folder
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("to be replaced")
    before = everything(tmp_path)
    said = refused(open_checkpoint(given_path), tmp_path / "out", overwrite=True)
    assert said == (
        f"{given_path} is an input, under a name that writing {tmp_path / 'out'} needs: move it"
    )
    assert everything(tmp_path) == before


# --- all or nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, FormatError, MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, kind: type[Exception], overwrite: bool
) -> None:
    if overwrite:
        write(checkpoint, tmp_path / "out")
    before = everything(tmp_path)

    def kernel(rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype is torch.bfloat16:
            assert (tmp_path / ".out.staging" / "files" / "model.safetensors").exists()
            raise kind("in the middle")
        return rows

    with pytest.raises(kind, match=r"^in the middle$"):
        write(computed(checkpoint, kernel), tmp_path / "out", overwrite=overwrite)
    assert everything(tmp_path) == before


def test_a_check_that_fails_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = everything(tmp_path)

    def check(staged: Checkpoint) -> None:
        assert not (tmp_path / "out").exists()
        assert whole(staged) == whole(checkpoint)
        assert {"config.json", "README.md", "surgery.json", "1_Pooling"} < {
            *os.listdir(staged.source.path)
        }
        raise LookupError("not the same")

    with pytest.raises(LookupError, match=r"^not the same$"):
        write(checkpoint, tmp_path / "out", check=check)
    assert everything(tmp_path) == before


def test_a_write_that_the_disk_refuses(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(tmp_path)

    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert refused(checkpoint, tmp_path / "out") == (
        f"writing to {tmp_path / '.out.staging' / 'files' / 'model.safetensors'} failed: the disk "
        f"is full; nothing was kept. Make room, or choose another place"
    )
    monkeypatch.undo()
    assert everything(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can mount a file system to fill")
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"a file system to fill can't be mounted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(
    raw_checkpoint: Raw, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {name: torch.rand(200, 100) for name in "abcde"}
    opened = open_checkpoint(raw_checkpoint(made))
    monkeypatch.setattr(writer, "free_bytes", lambda _: 1 << 40)
    staged = small_disk / ".out.staging" / "files" / "model.safetensors"
    for edited in (opened, computed(opened, torch.neg)):
        said = refused(edited, small_disk / "out")
        assert said == (
            f"writing to {staged} failed: the disk is full; nothing was kept. Make room, or choose "
            f"another place"
        )
        assert os.listdir(small_disk) == []
    monkeypatch.undo()
    said = refused(opened, small_disk / "out")
    assert said.startswith(f"{small_disk / 'out'} needs {plan(opened).bytes_needed:,} bytes, and ")
    assert said.endswith(" are free there: make room, or choose another place")


def test_a_mount_point_as_a_target(checkpoint: Checkpoint, small_disk: Path) -> None:
    """`docker run -v $PWD/out:/out`: an empty directory that is there, and can't be replaced."""
    assert refused(checkpoint, small_disk) == (
        f"{small_disk} is a mount point, which can't be replaced in one step: choose a directory "
        f"in it"
    )
    assert os.listdir(small_disk) == []


def test_a_disk_that_is_too_small_is_said_beforehand(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan(checkpoint).bytes_needed
    files = [path for path in (tmp_path / "given").rglob("*.json") if path.name != "config.json"]
    small = sum(path.stat().st_size for path in files)
    small += (tmp_path / "given" / "1_Pooling" / "config.json").stat().st_size
    assert needed == plan(checkpoint).weight_bytes + small + (1 << 20)
    before = everything(tmp_path)
    monkeypatch.setattr(writer, "free_bytes", lambda _: needed - 1)
    assert refused(checkpoint, tmp_path / "out") == (
        f"{tmp_path / 'out'} needs {needed:,} bytes, and {needed - 1:,} are free there: make "
        f"room, or choose another place"
    )
    assert everything(tmp_path) == before
    monkeypatch.setattr(writer, "free_bytes", lambda _: needed)
    write(checkpoint, tmp_path / "out")


def test_an_interrupt_leaves_nothing(raw_checkpoint: Raw, tmp_path: Path) -> None:
    made = {f"w{number}": torch.zeros(2, 2) for number in range(200)}
    opened = open_checkpoint(raw_checkpoint(made))
    before = everything(tmp_path)
    calls: list[int] = []

    def kernel(rows: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)
        return rows

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(computed(opened, kernel), tmp_path / "out", threads=2)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(calls) < 100
    assert everything(tmp_path) == before


@pytest.mark.parametrize("taken", [locked, partial(locked, shared=True), staging])
def test_an_interrupt_before_the_stage_is_there_leaves_nothing(
    taken: Callable[[Path], AbstractContextManager[object]], tmp_path: Path
) -> None:
    """At every instruction, from the first one to the block's."""
    ours = {
        locks.__file__,
        contextlib.__file__,
        importlib.import_module(staging.__module__).__file__,
    }
    before = everything(tmp_path)

    def entered(interrupted: int) -> bool:
        """Whether the block is entered before so many instructions are done."""
        instructions = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal instructions
            if frame.f_code.co_filename not in ours:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                instructions += 1
                if instructions == interrupted:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with taken(tmp_path / "a" / "out"):
                sys.settrace(None)
                return True
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(None)

    gc.collect()
    gc.disable()  # an interrupt in the finalizer of what another test left would be lost
    try:
        reached = 0
        while not entered(reached + 1):
            reached += 1
            assert everything(tmp_path) == before, f"at instruction {reached}"
    finally:
        gc.enable()
    assert reached > 200


HOLD = """
import sys
from pathlib import Path
from surgery.writing.staging import staging
with staging(Path(sys.argv[1])) as stage:
    stage.clear()
    (stage.files / "half.safetensors").write_bytes(b"half")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_writers_and_one_that_was_killed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            before = everything(tmp_path)
            assert ".out.staging/files/half.safetensors" in before
            assert refused(checkpoint, target) == (f"another run is writing {target}: wait for it")
            assert everything(tmp_path) == before
            write(checkpoint, tmp_path / "elsewhere")
        finally:
            other.kill()
            other.wait()
    assert (tmp_path / ".out.staging" / "files" / "half.safetensors").exists()
    write(checkpoint, target)
    assert files_in(target) == files_in(tmp_path / "elsewhere")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "given", "out"]


def test_a_lock_that_was_removed_meanwhile(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run publishes, and removes its stage with the lock, between our opening and
    locking that, and a third begins: the lock that we get is nobody's, and the third has its own.
    """
    module = importlib.import_module("surgery.writing.locks")
    flock = module.fcntl.flock
    folder = tmp_path / ".out.staging"
    third: list[int] = []

    def late(fd: int, how: int) -> None:
        if not third:
            (folder / "lock").unlink()
            (folder / "the third's").write_text("precious")
            third.append(os.open(folder / "lock", os.O_RDWR | os.O_CREAT))
            flock(third[0], how)
        flock(fd, how)

    monkeypatch.setattr(module.fcntl, "flock", late)
    said = refused(checkpoint, tmp_path / "out")
    assert said == f"another run is writing {tmp_path / 'out'}: wait for it"
    assert everything(folder) == {"the third's": b"precious", "lock": b""}
    os.close(third[0])
    write(checkpoint, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["given", "out"]


def test_a_file_system_without_locks(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(importlib.import_module("surgery.writing.locks").fcntl, "flock", none)
    said = refused(checkpoint, tmp_path / "out")
    assert said.startswith(f"{tmp_path} can't be locked against other runs: No locks available")


def test_staging_is_not_made_over_a_link(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("precious")
    (tmp_path / ".out.staging").symlink_to("precious")
    assert refused(checkpoint, tmp_path / "out") == (
        f"{tmp_path / '.out.staging'} is a link, and staging needs that name: remove it"
    )
    assert everything(tmp_path / "precious") == {"x": b"precious"}


def test_a_parent_that_is_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(checkpoint, tmp_path / "file" / "out")
    assert "Not a directory" in said or "File exists" in said


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask(checkpoint: Checkpoint, tmp_path: Path, mask: int) -> None:
    """st#782: temporary files are made with mode 0600, and kept it."""
    before = os.umask(mask)
    try:
        write(checkpoint, tmp_path / "out", max_shard_bytes=1)
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert len(found) >= 8
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_all_is_synced_before_it_is_published(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    synced: dict[str, bool] = {}

    def seen(fd: int) -> None:
        synced[os.readlink(f"/proc/self/fd/{fd}")] = (tmp_path / "out").exists()
        fsync(fd)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("what a descriptor stands for is read from /proc")
    monkeypatch.setattr(os, "fsync", seen)
    write(checkpoint, tmp_path / "out")
    staged = tmp_path / ".out.staging" / "files"
    inside = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")]
    assert {str(staged / path) for path in inside} | {str(staged)} <= {
        path for path, late in synced.items() if not late
    }
    assert [path for path, late in synced.items() if late] == [str(tmp_path)]


# --- the small files ------------------------------------------------------------------------


def test_companions_and_config_byte_for_byte(raw_checkpoint: Raw, tmp_path: Path) -> None:
    files = {
        "config.json": b'{\n   "b" : 1.0,\r\n "a": {"__float__": "Infinity"}, "e": 1e-5}',
        "tokenizer.json": bytes(range(256)),
        "generation_config.json": b'{"eos_token_id": [1, 2, 3]}',
        "modeling_made_up.py": b"class Model: ...\n",
        "1_Pooling/config.json": b"{ }",
        "additional_chat_templates/deep/tool.jinja": b"{{ x }}",
        "pytorch_model.bin": b"pickle",
        "surgery.json": b'{"edits": []}',
    }
    opened = open_checkpoint(raw_checkpoint({"a": A}, files=files))
    write(opened, tmp_path / "out")
    found = files_in(tmp_path / "out")
    stays = {"pytorch_model.bin", "surgery.json"}
    for name in files.keys() - stays:
        assert found.pop(name) == files[name], name
    assert found.pop("surgery.json") != files["surgery.json"]
    assert sorted(found) == ["README.md", "model.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux has it")
def test_a_companion_that_cannot_be_read_is_the_input_s_fault(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The first bytes of a process are nobody's: reading them is an error of the device."""
    broken = checkpoint.source.path / "added_tokens.json"
    broken.symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=f"^{broken} can't be read: Input/output error"):
        write(replace(checkpoint, companions={"added_tokens.json": broken}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_companion_that_an_edit_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    edit = Edit("made_up", {}, {"base": checkpoint.source})
    """The companions that an edit gives are all there are."""
    given_files = {
        **checkpoint.companions,
        "sub/modeling.py": b"made",
        "tokenizer.json": b"replaced",
    }
    write(checkpoint.edited(edit, {}, companions=given_files), tmp_path / "out")
    found = files_in(tmp_path / "out")
    assert found["sub/modeling.py"] == b"made"
    assert found["tokenizer.json"] == b"replaced"
    assert found["1_Pooling/config.json"] == b'{"x": 1}'


def test_a_config_that_was_changed_keeps_its_keys(raw_checkpoint: Raw) -> None:
    text = '{"z": 1, "rope_theta": 1e4, "a": {"y": null, "x": [1, 2.5]}, "name": "\u00e9\u2028"}'
    opened = open_checkpoint(raw_checkpoint({"a": A}, files={"config.json": text}))
    assert opened.own_files().get("config.json") == text.encode()
    changed = replace(opened, config={**opened.config, "z": 2})
    written = changed.own_files().get("config.json")
    assert [*json.loads(written)] == ["z", "rope_theta", "a", "name"]
    assert json.loads(written) == {**json.loads(text), "z": 2}
    assert written.endswith(b"}\n")
    assert b"\\u" not in written


@pytest.mark.parametrize(("was", "becomes"), [("1", True), ("0", False), ("1", 1.0)])
def test_a_config_that_was_changed_in_type_alone(
    raw_checkpoint: Raw, was: str, becomes: object
) -> None:
    opened = open_checkpoint(raw_checkpoint({"a": A}, files={"config.json": f'{{"k": {was}}}'}))
    found = json.loads(replace(opened, config={"k": becomes}).own_files()["config.json"])
    assert type(found["k"]) is type(becomes)


def test_no_config_is_made_up(raw_checkpoint: Raw, tmp_path: Path) -> None:
    write(open_checkpoint(raw_checkpoint({"a": A})), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_empty_config_travels(raw_checkpoint: Raw, tmp_path: Path) -> None:
    write(open_checkpoint(raw_checkpoint({"a": A}, config={})), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"


def test_an_adapter_beside_a_model_that_is_written_in_shards(
    raw_checkpoint: Raw, tmp_path: Path
) -> None:
    given_files = {"adapter_config.json": "{}"}
    opened = open_checkpoint(raw_checkpoint({"a": A, "b": B}, files=given_files))
    write(opened, tmp_path / "out", max_shard_bytes=1)
    assert whole(open_checkpoint(tmp_path / "out")) == whole(opened)


def test_the_record(checkpoint: Checkpoint, raw_checkpoint: Raw, tmp_path: Path) -> None:
    base = open_checkpoint(raw_checkpoint({"a": A + 1, "b": B}, name="base"))
    verification = {"summary": "it is the same", "logits": {"kl": 0.0, "shares": [1, 2]}}
    written = write(
        lines(base, checkpoint, alpha=0.25),
        tmp_path / "out",
        verification=verification,
        command="surgery lines --alpha 0.25 'a b'",
    )
    text = (tmp_path / "out" / "surgery.json").read_text()
    record = json.loads(text)
    assert record == json.loads(json.dumps(written.record))
    assert record["command"] == "surgery lines --alpha 0.25 'a b'"
    assert record["verification"] == verification
    (edit,) = record["edits"]
    assert edit["operation"] == "lines"
    assert edit["parameters"] == {"alpha": 0.25, "beta": 0.75, "outside": "alpha"}
    sizes = {
        role: (tmp_path / name / "model.safetensors").stat().st_size
        for role, name in (("base", "base"), ("tuned", "given"))
    }
    for role, name in (("base", "base"), ("tuned", "given")):
        source = edit["inputs"][role]
        assert (source["reference"], source["revision"]) == (str(tmp_path / name), None)
        assert source["files"] == {"model.safetensors": {"size": sizes[role], "sha256": None}}
    assert record["norms"]["outside"] == {
        "a": {"before": float(f"{12**0.5:.6g}"), "after": float(f"{0.25 * 12**0.5:.6g}")},
        "b": {"before": 0.0, "after": 0.0},
    }
    assert record["versions"]["torch"] == torch.__version__
    assert record["surgery"]
    assert str(tmp_path / "out") not in text


def test_the_record_keeps_no_time(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of the run nor that of the files."""
    edited = lines(checkpoint, checkpoint, alpha=0.5)
    write(edited, tmp_path / "one", threads=1)
    for path in (tmp_path / "given").rglob("*"):
        os.utime(path, (1, 1))
    checkpoint = open_checkpoint(tmp_path / "given")
    edited = lines(checkpoint, checkpoint, alpha=0.5)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write(edited, tmp_path / "two", threads=1)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


@pytest.mark.parametrize(
    "how",
    [
        "grow after lines",
        "lines",
    ],
)
def test_the_norms_of_a_record_are_those_of_whole_blocks(
    make_model: Raw, tmp_path: Path, how: str
) -> None:
    base, tuned = make_model("llama", "base"), make_model("llama", "tuned", seed=1)
    edited = lines(open_checkpoint(base), open_checkpoint(tuned), alpha=0.5)
    wanted = {}
    for block in range(2):
        names = [name for name in edited if f".layers.{block}." in name]
        pairs = [
            (open_checkpoint(base)[n].whole(), open_checkpoint(tuned)[n].whole()) for n in names
        ]
        wanted[block] = (
            sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5
        )
    written = write(edited if how == "lines" else grow(edited), tmp_path / "out")
    norms = written.record["norms"]
    if how == "grow after lines":
        assert norms is None  # of the MLPs' rows some would count twice, and some not at all
    else:
        found = [block["before"] for block in norms["blocks"]["model.layers"]]
        assert found == pytest.approx([*wanted.values()], rel=1e-5)


def strict_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} isn't JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(("value", "dtype"), [(1e30, torch.float32), (1e300, torch.float64)])
def test_the_record_is_json_whatever_the_weights(
    raw_checkpoint: Raw, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    """Other languages read no infinity; the norm of 1e30 in float32 is none."""
    base = open_checkpoint(raw_checkpoint({"w": torch.zeros(3, dtype=dtype)}, name="base"))
    tuned = open_checkpoint(raw_checkpoint({"w": torch.full((3,), value, dtype=dtype)}, name="t"))
    write(lines(base, tuned, alpha=0.5), tmp_path / "out")
    norms = strict_json((tmp_path / "out" / "surgery.json").read_text())["norms"]["outside"]["w"]
    if value == 1e30:
        assert norms == {"before": 1.73205e30, "after": 8.66025e29}
    else:
        assert norms == {"before": None, "after": None}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_record_is_json_whatever_the_verification(
    checkpoint: Checkpoint, tmp_path: Path, value: float
) -> None:
    """An infinite divergence, say: a reason to raise before the work, or to write null."""
    verification = {"summary": "x", "logits": {"kl": value}}
    write(checkpoint, tmp_path / "out", verification=verification)
    strict_json((tmp_path / "out" / "surgery.json").read_text())


@pytest.mark.parametrize(
    "text",
    [
        "a [ 1   2 ] b",
        "[ x ]",
        "[\t1\t]",
        "[\n 1,\n 2\n]",
        "{ [ ] }",
    ],
)
def test_the_record_keeps_what_is_in_quotes(text: str) -> None:
    assert json.loads(record_bytes({"command": text, text: [1, 2]})) == {
        "command": text,
        text: [1, 2],
    }


def test_lists_in_the_record_lie_on_one_line() -> None:
    record = {"scales": [0.5, 1.0], "copied": [[0, 3], [7, 8]], "none": [], "names": ["a", "b"]}
    text = record_bytes(record).decode()
    assert json.loads(text) == record
    assert '"scales": [0.5, 1.0]' in text
    assert "[0, 3],\n" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "[]",
        '{"edits": 3}',
        "{}",
        "\xff",
        '{"edits": [' + "[" * 100_000,
        '{"edits": ["\\ud800"]}',
    ],
)
def test_an_earlier_record_that_is_none(raw_checkpoint: Raw, tmp_path: Path, text: str) -> None:
    """It came with a model from somebody else; the weights are all right."""
    content = text.encode("latin-1")
    opened = open_checkpoint(raw_checkpoint({"a": A}, files={"surgery.json": content}))
    write(lines(opened, opened, alpha=0.5), tmp_path / "out")
    (edit,) = json.loads((tmp_path / "out" / "surgery.json").read_text())["edits"]
    assert edit["inputs"]["base"]["edits"] == []


def test_the_record_tells_what_was_done_before(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write(lines(checkpoint, checkpoint, alpha=0.5), tmp_path / "one")
    first = open_checkpoint(tmp_path / "one")
    write(lines(first, first, alpha=0.25), tmp_path / "two")
    record = json.loads((tmp_path / "two" / "surgery.json").read_text())
    earlier = record["edits"][0]["inputs"]["tuned"]["edits"]
    assert [edit["parameters"]["alpha"] for edit in earlier] == [0.5]
    assert record["edits"][0]["parameters"]["alpha"] == 0.25


def test_the_record_lists_the_files_that_were_read(raw_checkpoint: Raw, tmp_path: Path) -> None:
    folder = raw_checkpoint({"a": A})
    (folder / "stray.safetensors").write_bytes(b"left out")
    opened = open_checkpoint(folder)
    record = write(lines(opened, opened, alpha=0.5), tmp_path / "out").record
    assert [*record["edits"][0]["inputs"]["base"]["files"]] == ["model.safetensors"]


# --- the model card -------------------------------------------------------------------------


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    """The card's metadata and its text, by the rule of the Hub: between the first two `---`."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    _, metadata, body = text.split("\n---\n", 1)[0], *text[4:].split("\n---\n", 1)
    return yaml.safe_load(metadata), body


def test_the_card(checkpoint: Checkpoint, raw_checkpoint: Raw, tmp_path: Path) -> None:
    base = open_checkpoint(raw_checkpoint({"a": A + 1, "b": B}, name="base"))
    write(
        lines(base, checkpoint, alpha=0.25),
        tmp_path / "out",
        command="surgery lines\n--alpha 0.25",
        verification={"summary": "all is well"},
    )
    metadata, body = front_matter(tmp_path / "out")
    assert metadata == {
        "base_model": ["base", "given"],
        "library_name": "transformers",
        "tags": ["surgery", "lines"],
    }
    assert "\n- **lines** of base `base`, tuned `given`: alpha = 0.25, beta = 0.75, " in body
    assert "\n    surgery lines\n    --alpha 0.25\n" in body
    assert "\nVerified before it was written: all is well.\n" in body
    assert str(tmp_path) not in body


def test_the_card_names_models_on_the_hub(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Source("org/name@main", tmp_path / "given", "org/name", "c0ffee")
    edited = checkpoint.edited(Edit("grow", {"factor": 2.0, "width": None}, {"base": source}), {})
    write(edited, tmp_path / "out")
    metadata, body = front_matter(tmp_path / "out")
    assert metadata["base_model"] == ["org/name"]
    assert "- **grow** of base `org/name`: factor = 2.0.\n" in body
    assert "`surgery.json` lists the new index ranges" in body


@pytest.mark.parametrize(
    "where",
    [
        ".",
        "../given/.",
    ],
)
def test_the_card_names_the_folder_that_we_are_in(
    given_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(given_folder)
    opened = open_checkpoint(where)
    write(lines(opened, opened, alpha=0.5), tmp_path / "out")
    assert front_matter(tmp_path / "out")[0]["base_model"] == ["given"]


def test_the_card_keeps_the_licence(raw_checkpoint: Raw, tmp_path: Path) -> None:
    card = (
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: [en, fr]\n"
        "pipeline_tag: text-generation\ntags: [x]\nbase_model: y\nmodel-index: [{}]\n---\n# Given\n"
    )
    write(open_checkpoint(raw_checkpoint({"a": A}, files={"README.md": card})), tmp_path / "out")
    metadata, body = front_matter(tmp_path / "out")
    assert metadata == {
        "base_model": [],
        "library_name": "transformers",
        "tags": ["surgery"],
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "language": ["en", "fr"],
        "pipeline_tag": "text-generation",
    }
    assert "# Given" not in body
    assert (tmp_path / "out" / "README.input.md").read_bytes() == card.encode()


HOSTILE = {
    "no front matter": "# just text",
    "a list": "---\n- a\n- b\n---\n",
    "unclosed": "---\nlicense: mit\n",
    "not YAML": "---\nlicense: [mit\n---\n",
    "a tag": '---\nlicense: !!python/object/apply:os.system ["touch x"]\n---\n',
    "breaks out": '---\nlicense: "x\\n---\\n# Owned\\nlicense: y"\n---\n',
    "quotes": '---\nlicense: "\\"], \\\\ }\\n"\n---\n',
    "newlines": '---\nlicense: "x\\r\\nbase_model: evil"\n---\n',
    "null": "---\nlicense: null\n---\n",
    "nested": "---\nlicense: {a: [1, {b: c}]}\n---\n",
    "a date": "---\nlicense: 2020-01-01\n---\n",
    "bytes": "---\nlicense: !!binary aGk=\n---\n",
    "not UTF-8": b"---\nlicense: \xff\n---\n",
    "CRLF": "---\r\nlicense: mit\r\n---\r\n",
    "no such day": "---\ndate: 2023-02-30\nlicense: mit\n---\n",
    "a date as a key": "---\nlicense: {2020-01-01: x}\n---\n",
    "in itself": "---\nlicense: &a [*a]\n---\n",
    "deep": "---\nlicense: " + "[" * 500 + "\n---\n",
    "delete": '---\nlicense: "\\x7f"\n---\n',
    "line separator": '---\nlicense: "a\\u2028--- b"\n---\n',
    "next line": '---\nlicense: "a\\x85b"\n---\n',
    "half a pair": '---\nlicense: "\\ud800"\n---\n',
    "a number that is none": "---\nlicense: !!int x\n---\n",
}


@pytest.mark.parametrize("card", HOSTILE.values(), ids=HOSTILE)
def test_the_card_of_an_input_can_do_no_harm(
    raw_checkpoint: Raw, tmp_path: Path, card: str | bytes
) -> None:
    """It comes from somebody else: the write goes through, and the new card can be parsed."""
    opened = open_checkpoint(raw_checkpoint({"a": A}, files={"README.md": card}))
    write(lines(opened, opened, alpha=0.5), tmp_path / "out")
    metadata, body = front_matter(tmp_path / "out")
    assert metadata["base_model"] == ["raw"]
    assert metadata["tags"] == ["surgery", "lines"]
    assert {*metadata} <= {"base_model", "library_name", "tags", "license"}
    assert body.startswith("\n# Edited with Surgery\n")
    assert "Owned" not in body
    try:
        wanted = yaml.safe_load(card.split("---")[1]) if isinstance(card, str) else {}
    except (yaml.YAMLError, ValueError, IndexError, RecursionError):
        return
    if isinstance(wanted, dict) and isinstance(wanted.get("license"), str):
        assert metadata.get("license") in (wanted["license"], None)


@pytest.mark.parametrize(
    "name",
    [
        "a`b",
        'a"b',
        "a\nb",
        "a: b # c",
        "--- x",
        "a\\b",
        "<script>",
        "\u2028- b",
        "a\rb",
    ],
)
def test_the_name_of_an_input_can_do_no_harm(
    raw_checkpoint: Raw, tmp_path: Path, name: str
) -> None:
    opened = open_checkpoint(raw_checkpoint({"a": A}, name=name, config={"auto_map": name}))
    write(lines(opened, opened, alpha=0.5), tmp_path / "out")
    metadata, body = front_matter(tmp_path / "out")
    assert metadata["base_model"] == [name]
    (line,) = (line for line in body.split("\n") if line.startswith("- **lines**"))
    assert line.count("`") == 4
    assert "\r" not in body


def test_tensors_of_any_name_are_not_in_the_card(raw_checkpoint: Raw, tmp_path: Path) -> None:
    name = "w\n---\n# Owned"
    opened = open_checkpoint(raw_checkpoint({name: A}))
    write(lines(opened, opened, alpha=0.5), tmp_path / "out", max_shard_bytes=1)
    assert "Owned" not in (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert [*record["norms"]["outside"]] == [name]


def test_a_shared_model_is_written_as_it_is(tmp_path: Path) -> None:
    folder = shared("models", "stories260K")
    opened = open_checkpoint(folder)
    write(opened, tmp_path / "out", max_shard_bytes=300_000)
    again = open_checkpoint(tmp_path / "out")
    assert len(again.source.files) > 1
    assert whole(again) == whole(opened)
    before, after = files_in(folder), files_in(tmp_path / "out")
    for name in before.keys() - {"model.safetensors"}:
        assert after[name] == before[name], name


def test_values_made_on_demand_are_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Noise is a leaf without a file: nothing to copy, and no input to read."""
    tensor = noise((30, 7), 1, "w")
    write(replace(checkpoint, tensors={"w": tensor}), tmp_path / "out", threads=2)
    assert whole(open_checkpoint(tmp_path / "out")) == {"w": bytes_of(tensor.whole())}


def test_what_is_no_model_isnt_replaced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="holds no model that could be replaced"):
        write(checkpoint, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "precious.txt").read_text() == "x"
