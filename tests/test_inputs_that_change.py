"""Inputs that somebody writes to while they are in use, and errors of the system in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entry, safetensors_bytes

from surgery import (
    Checkpoint,
    FormatError,
    InputError,
    LazyTensor,
    NotFoundError,
    OutputError,
    open_checkpoint,
    write,
)
from surgery.system import naming, reading, reason, remedy
from surgery.tensor import input_files
from surgery.writing.failures import told

Raw = Callable[..., Path]
A = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def shard(raw_checkpoint: Raw) -> Path:
    return raw_checkpoint({"a": A, "b": A + 1}, name="given") / "model.safetensors"


def other_bytes(path: Path, *, keep_time: bool = False) -> None:
    """Change the last byte in place; the size stays."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


def changed_in_the_middle(checkpoint: Checkpoint, change: Callable[[], object]) -> Checkpoint:
    """The checkpoint, with `change` called after its first tensor was read."""
    calls: list[int] = []

    def kernel(rows: torch.Tensor) -> torch.Tensor:
        if not calls:
            change()
        calls.append(1)
        return rows

    tensors = {
        name: LazyTensor(t.shape, t.dtype, inputs=(t,), kernel=kernel)
        for name, t in checkpoint.items()
    }
    return replace(checkpoint, tensors=tensors)


def test_an_input_rewritten_in_place_is_seen_before_anything_is_published(
    shard: Path, tmp_path: Path
) -> None:
    edited = changed_in_the_middle(open_checkpoint(shard.parent), lambda: other_bytes(shard))
    with pytest.raises(FormatError) as caught:
        write(edited, tmp_path / "out", threads=1)
    assert str(caught.value).startswith(f"{shard} was changed while it was in use")
    assert os.listdir(tmp_path) == ["given"]


def test_an_input_replaced_before_it_is_read_is_seen(shard: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(shard.parent)
    other = tmp_path / "other"
    other.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    other.rename(shard)
    with pytest.raises(FormatError, match="was changed while it was in use"):
        opened["a"].read()
    with pytest.raises(FormatError, match="was changed while it was in use"):
        write(opened, tmp_path / "out")
    assert os.listdir(tmp_path) == ["given"]


def test_an_input_replaced_after_it_was_opened_is_no_matter(shard: Path, tmp_path: Path) -> None:
    """The file that was checked is read on, though its name leads to another."""

    def replace_it() -> None:
        other = tmp_path / "other"
        other.write_bytes(b"another")
        other.rename(shard)

    edited = changed_in_the_middle(open_checkpoint(shard.parent), replace_it)
    write(edited, tmp_path / "out", threads=1)
    assert torch.equal(open_checkpoint(tmp_path / "out")["b"].whole(), A + 1)


def test_an_input_that_grew_is_seen(shard: Path, tmp_path: Path) -> None:
    def grow() -> None:
        with shard.open("ab") as file:
            file.write(b"more")

    edited = changed_in_the_middle(open_checkpoint(shard.parent), grow)
    with pytest.raises(FormatError, match="was changed"):
        write(edited, tmp_path / "out", threads=1)


def test_a_file_that_is_only_read_is_no_matter(shard: Path, tmp_path: Path) -> None:
    edited = changed_in_the_middle(open_checkpoint(shard.parent), shard.read_bytes)
    write(edited, tmp_path / "out")


def test_the_files_that_tensors_are_made_of(raw_checkpoint: Raw, make_model: Raw) -> None:
    """Through kernels, gathers, wider values and leaves that are made of other tensors."""
    from surgery.lora.product import _LowRank

    opened = [open_checkpoint(raw_checkpoint({"w": A}, name=f"m{i}"))["w"] for i in range(4)]
    one, two, three, four = opened
    made = LazyTensor(A.shape, one.dtype, inputs=(one,), kernel=torch.neg, exact=two)
    product = LazyTensor(A.shape, one.dtype, leaf=_LowRank(three, four, 1.0))
    both = LazyTensor(A.shape, one.dtype, inputs=(made, product, made), kernel=torch.add)
    found = {file.path.parent.name for file in input_files([both])}
    assert found == {"m0", "m1", "m2", "m3"}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full. Make room, or choose another place"),
        (errno.EROFS, "Read-only file system. The file system is read-only: choose another place"),
        (errno.EXDEV, "Invalid cross-device link"),
    ],
)
def test_what_the_system_says(number: int, said: str) -> None:
    error = OSError(number, os.strerror(number))
    assert reason(error) + remedy(error) == said


def test_whose_fault_it_is(tmp_path: Path) -> None:
    def fails(path: Path | None, kind: type[Exception] = OSError) -> Any:
        def fail() -> None:
            with told(tmp_path / "stage", [tmp_path / "in"]), naming(path or "nothing"):
                if kind is InputError:
                    raise InputError(f"{path} can't be read: no")
                raise OSError(errno.EIO, "no")

        return fail

    for path, wanted in (("in/a", InputError), ("stage/a", OutputError), ("else", OutputError)):
        with pytest.raises(wanted, match=f"{tmp_path / path}.*no"):
            fails(tmp_path / path)()
    with pytest.raises(OutputError, match="can't be read: no; nothing was kept"):
        fails(tmp_path / "stage" / "a", InputError)()
    with pytest.raises(InputError, match=r"can't be read: no$"):
        fails(tmp_path / "in" / "a", InputError)()


def test_a_folder_that_cannot_be_listed_is_not_passed_over(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """os.walk says nothing of a folder that it can't list, and its files would be lost."""
    (shard.parent / "1_Pooling").mkdir()
    scandir = os.scandir

    def fail(path: Any) -> Any:
        if str(path).endswith("1_Pooling"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(InputError, match=r"1_Pooling can't be read: Permission denied\. Check"):
        open_checkpoint(shard.parent)


def test_what_isnt_there_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="x can't be read"), reading("x"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_a_stamp_is_of_what_was_read(tmp_path: Path) -> None:
    from surgery.header import read_header

    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"w": entry("U8", [1], 0, 1)}, b"x"))
    stamp = read_header(path).stamp
    seen = path.stat()
    assert stamp == (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
