"""Untouched tensors on file systems that share blocks between files: nothing is copied.

On real ones, made in a file and mounted; skipped where that isn't allowed or not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from surgery import Checkpoint, LazyTensor, lines, open_checkpoint, plan, write
from surgery.dtypes import DTYPES
from surgery.writing.plan import FILE_BLOCK, SHARED_BYTES

planning = import_module("surgery.writing.plan")  # `surgery.plan` is a function

MB = 1 << 20
Raw = Callable[..., Path]


@pytest.fixture(params=["xfs", "btrfs"])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of its own."""
    kind = request.param
    if os.geteuid() != 0 or shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"needs root and mkfs.{kind}")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(512 * MB)
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
    mount = ["mount", "-o", "loop", str(image), str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"can't mount: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # files are still open


def used(folder: Path) -> int:
    """Bytes of the file system that are taken, once all is on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.sync()
        state = os.fstatvfs(fd)
    finally:
        os.close(fd)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def grown_by_a_byte(checkpoint: Checkpoint) -> Checkpoint:
    """With a tensor before all others, so that they lie elsewhere in their pages."""
    first = checkpoint["odd"]
    wide = LazyTensor(
        (1,),
        DTYPES["F64"],
        inputs=(first,),
        kernel=lambda _: torch.zeros(1, dtype=torch.float64),
        rowwise=False,
    )
    return replace(checkpoint, tensors={"before": wide, **checkpoint})


def test_untouched_tensors_take_no_room(
    sharing: Path, raw_checkpoint: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(4, 4 * MB // 4)
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": weights[n].reshape(1024, -1) for n in (0, 1)}
    tensors |= {"odd": torch.ones(3), "lm_head.weight": weights[2:].reshape(2048, -1)}
    given = raw_checkpoint(tensors, name="given")
    base = sharing / "base"
    shutil.copytree(given, base)
    opened = open_checkpoint(base)
    before = used(sharing)
    write(opened, sharing / "copy")
    assert used(sharing) - before < MB, "16 MB were copied"
    for name, tensor in open_checkpoint(sharing / "copy").items():
        assert torch.equal(tensor.whole(), tensors[name])
    monkeypatch.setattr(planning, "SHARED_BYTES", 1 << 40)
    before = used(sharing)
    write(grown_by_a_byte(opened), sharing / "elsewhere")
    assert used(sharing) - before > 8 * MB, "out of place in their pages, and yet shared"


def test_where_a_shard_begins(raw_checkpoint: Raw) -> None:
    """Large tensors keep their place in a page; small ones don't decide, nor computed ones."""
    large = torch.zeros(SHARED_BYTES // 4 + 1)
    given = raw_checkpoint({"small": torch.zeros(5), "large": large}, name="given")
    base = open_checkpoint(given)
    (shard,) = plan(base).shards
    span = next(iter(base["large"].file_spans() or ()))
    assert (shard.offsets["large"] - span.offset) % FILE_BLOCK == 0
    again = raw_checkpoint({"small": torch.zeros(5), "large": large + 1}, name="again")
    (shard,) = plan(lines(base, open_checkpoint(again), alpha=0.5)).shards
    assert shard.head == shard.head.rstrip(b" ").ljust(-(-len(shard.head.rstrip(b" ")) // 8) * 8)
