"""Going on where a run was stopped: the same bytes as of one that wasn't, or none of the old."""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_in, save_raw
from processes import started, surgery

from surgery import (
    Checkpoint,
    LazyTensor,
    OutputError,
    VerificationError,
    grow,
    lines,
    open_checkpoint,
    write,
)
from surgery.writing.digest import RunningDigest, digest_of
from surgery.writing.identity import identify
from surgery.writing.journal import Finished, Journal, read_journals
from surgery.writing.locks import locked
from surgery.writing.plan import plan

Raw = Callable[..., Path]
SHARD = 4000
writer = importlib.import_module("surgery.writing.write")


@dataclass
class Fuse:
    """When the kernels below do what: after so many shards are noted, and so many calls."""

    stage: Path | None = None
    shards: int = 0
    action: Callable[[], object] | None = None

    def noted(self) -> int:
        assert self.stage is not None
        return len(read_journals(self.stage))


FUSE = Fuse()


def fused(*rows: torch.Tensor, kernel: Callable[..., Any], first: bool) -> Any:
    """What the kernel makes; before the first tensor of the shard after those that FUSE counts,
    they are waited for, and the fuse goes."""
    if first and FUSE.action is not None:
        for _ in range(2000):
            if FUSE.noted() >= FUSE.shards:
                break
            time.sleep(0.005)
        action, FUSE.action = FUSE.action, None
        action()
    return kernel(*rows)


@pytest.fixture(autouse=True)
def _no_fuse() -> None:
    FUSE.stage, FUSE.shards, FUSE.action = None, 0, None


def with_fuse(edited: Checkpoint, shard: int, max_shard_bytes: int = SHARD) -> Checkpoint:
    """The checkpoint whose kernels look at the fuse in the first computed tensor of a shard."""
    names = [
        next(name for name in one.offsets if edited[name].kernel is not None)
        for one in plan(edited, max_shard_bytes=max_shard_bytes).shards
    ]
    made = {
        name: replace(
            tensor,
            kernel=partial(fused, kernel=tensor.kernel, first=name == names[shard]),
            tally=tensor.tally and partial(fused, kernel=tensor.tally, first=name == names[shard]),
        )
        for name, tensor in edited.items()
        if tensor.kernel is not None
    }
    return replace(edited, tensors={**edited, **made})


@pytest.fixture
def models(make_model: Raw) -> tuple[Path, Path]:
    return make_model("llama", "base"), make_model("llama", "tuned", seed=1)


def edited_of(models: tuple[Path, Path], alpha: float = 0.3) -> Checkpoint:
    return lines(open_checkpoint(models[0]), open_checkpoint(models[1]), alpha=alpha)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own; its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001  a child must not go on into pytest
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(shards: int, edited: Checkpoint, target: Path, threads: int = 1) -> list[str]:
    """A run of a process that is killed when so many shards are finished, in the next; other
    threads may be further. Returns what is finished."""

    def work() -> None:
        FUSE.stage, FUSE.shards = stage_of(target), shards
        FUSE.action = partial(os.kill, os.getpid(), signal.SIGKILL)
        write(with_fuse(edited, shards), target, max_shard_bytes=SHARD, threads=threads)

    assert in_child(work) == -signal.SIGKILL
    assert not target.exists()
    finished = sorted(read_journals(stage_of(target)))
    assert len(finished) >= shards if threads > 1 else len(finished) == shards
    return finished


def stage_of(target: Path) -> Path:
    return target.parent / f".{target.name}.staging"


def again(edited: Checkpoint, target: Path, shards: int, **how: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    written = write(
        with_fuse(edited, shards), target, max_shard_bytes=SHARD, tell=said.append, **how
    )
    assert not stage_of(target).exists()
    return written, said


# --- killed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_run_is_gone_on_with(
    models: tuple[Path, Path], tmp_path: Path, shards: int, threads: int
) -> None:
    edited = edited_of(models)
    whole = write(edited, tmp_path / "whole", max_shard_bytes=SHARD, command="surgery lines")
    inputs = [files_in(model) for model in models]
    kept = kill_after(shards, edited, tmp_path / "out", threads=threads)
    files = stage_of(tmp_path / "out") / "files"
    if threads == 1:
        assert kept == [shard.name for shard in whole.plan.shards[:shards]]
    before = {name: (files / name).stat() for name in kept}
    done: list[int] = []
    written, said = again(
        edited, tmp_path / "out", shards, command="surgery lines", progress=done.append
    )
    assert said == [f"going on: {len(kept)} of {len(whole.plan.shards)} shards were finished"]
    assert sorted(written.kept) == kept
    for name, stat in before.items():  # the file itself, not one like it
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert written.tallies == whole.tallies
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert sum(done) == edited.nbytes
    assert [files_in(model) for model in models] == inputs
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "tuned", "whole"]


def test_killed_again_and_again(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # few shards wait to be synced: else a slow disk has noted too few when all is computed
    monkeypatch.setattr(importlib.import_module("surgery.writing.shards"), "AHEAD", 1)
    edited = edited_of(models)
    write(edited, tmp_path / "whole", max_shard_bytes=SHARD)
    # the fuse is part of what is compared: one that is in every shard
    for shards in (1, 2, 4):

        def work(shards: int = shards) -> None:
            FUSE.stage, FUSE.shards = stage_of(tmp_path / "out"), shards
            FUSE.action = partial(os.kill, os.getpid(), signal.SIGKILL)
            write(everywhere(edited), tmp_path / "out", max_shard_bytes=SHARD)

        assert in_child(work) == -signal.SIGKILL
        assert len(read_journals(stage_of(tmp_path / "out"))) >= shards
    write(everywhere(edited), tmp_path / "out", max_shard_bytes=SHARD)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def waiting(*rows: torch.Tensor, kernel: Callable[..., Any]) -> Any:
    """What the kernel makes; with enough shards noted, the fuse goes."""
    if FUSE.action is not None and FUSE.noted() >= FUSE.shards:
        FUSE.action()
    time.sleep(0.01)
    return kernel(*rows)


def everywhere(edited: Checkpoint) -> Checkpoint:
    made = {
        name: replace(
            tensor,
            kernel=partial(waiting, kernel=tensor.kernel),
            tally=tensor.tally and partial(waiting, kernel=tensor.tally),
        )
        for name, tensor in edited.items()
        if tensor.kernel is not None
    }
    return replace(edited, tensors={**edited, **made})


def test_killed_when_all_is_written(models: tuple[Path, Path], tmp_path: Path) -> None:
    """In the check, say: no shard is written again, and the check is made again."""
    edited = edited_of(models)
    write(edited, tmp_path / "whole", max_shard_bytes=SHARD)

    def work() -> None:
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        write(edited, tmp_path / "out", max_shard_bytes=SHARD, check=lambda _: kill())

    assert in_child(work) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    checked: list[int] = []
    said: list[str] = []
    written = write(
        edited,
        tmp_path / "out",
        max_shard_bytes=SHARD,
        tell=said.append,
        check=lambda staged: checked.append(len(staged)),
    )
    count = len(written.plan.shards)
    assert said == [f"going on: {count} of {count} shards were finished"]
    assert checked == [len(edited)]
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("when", ["aside", "there"])
def test_killed_while_it_replaces(models: tuple[Path, Path], tmp_path: Path, when: str) -> None:
    edited, target = edited_of(models), tmp_path / "out"
    write(edited_of(models, 0.7), target)
    old = files_in(target)
    rename = os.rename

    def work() -> None:
        def killing(source: Any, to: Any) -> None:
            if Path(source).name == "files" and when == "aside":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, to)
            if Path(source).name == "files":
                os.kill(os.getpid(), signal.SIGKILL)

        os.rename = killing  # type: ignore[assignment]  in this process alone
        write(edited, target, max_shard_bytes=SHARD, overwrite=True)

    assert in_child(work) == -signal.SIGKILL
    write(edited, tmp_path / "whole", max_shard_bytes=SHARD)
    if when == "aside":
        assert not target.exists()
        with pytest.raises(OutputError, match="was put aside by a run that was stopped, and has"):
            write(edited, target, max_shard_bytes=SHARD)
        assert files_in(target) == old
        said: list[str] = []
        write(edited, target, max_shard_bytes=SHARD, overwrite=True, tell=said.append)
        assert [line.split(":")[0] for line in said] == ["going on"]
    else:
        assert files_in(target) == files_in(tmp_path / "whole")
        with pytest.raises(OutputError, match="surgery clean"):
            write(edited, target, max_shard_bytes=SHARD, overwrite=True)
        assert files_in(tmp_path / ".out.replaced") == old
    assert files_in(target) == files_in(tmp_path / "whole")


def test_what_is_half_removed_has_no_name(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed while it removes what it has replaced: nothing may take the rest for a model."""
    edited, target = edited_of(models), tmp_path / "out"
    write(edited_of(models, 0.7), target)
    write(edited, tmp_path / "whole", max_shard_bytes=SHARD)

    def work() -> None:
        unlink = os.unlink

        def killing(path: Any, **how: Any) -> None:
            unlink(path, **how)
            if (stage_of(target) / "old").exists():
                os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = killing  # in this process alone
        write(edited, target, max_shard_bytes=SHARD, overwrite=True)

    assert in_child(work) == -signal.SIGKILL
    assert files_in(target) == files_in(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == [".out.staging", "base", "out", "tuned", "whole"]
    shutil.rmtree(target)
    said: list[str] = []
    write(edited, target, max_shard_bytes=SHARD, tell=said.append)
    assert said == []
    assert files_in(target) == files_in(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "tuned", "whole"]


# --- not the same ---------------------------------------------------------------------------


def test_another_setting(models: tuple[Path, Path], tmp_path: Path) -> None:
    kill_after(2, edited_of(models), tmp_path / "out")
    other = edited_of(models, 0.5)
    written, said = again(other, tmp_path / "out", 2)
    (text,) = said
    assert text.startswith("starting anew, not with the shards that an earlier run has finished: ")
    assert "lines: alpha was 0.3 and is 0.5" in text
    assert written.kept == ()
    write(other, tmp_path / "whole", max_shard_bytes=SHARD)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("how", ["touched", "changed", "header"])
def test_another_input(models: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    kill_after(2, edited_of(models), tmp_path / "out")
    path = models[1] / "model.safetensors"
    stat, content = path.stat(), bytearray(path.read_bytes())
    if how == "changed":
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "touched":
        os.utime(path, ns=(1, 1))
    else:  # another header of the same length, at the same time
        path.write_bytes(bytes(content).replace(b'"pt"', b'"tp"'))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    written, said = again(edited_of(models), tmp_path / "out", 2)
    what = "header" if how == "header" else "time"
    assert re.search(f": {re.escape(str(path))} has changed: its {what}$", said[0])
    assert (written.kept, len(said)) == ((), 1)
    write(edited_of(models), tmp_path / "whole", max_shard_bytes=SHARD)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_other_shards(models: tuple[Path, Path], tmp_path: Path) -> None:
    edited = edited_of(models)
    kill_after(2, edited, tmp_path / "out")
    said: list[str] = []
    write(with_fuse(edited, 2), tmp_path / "out", tell=said.append)
    (text,) = said
    count = len(plan(edited, max_shard_bytes=SHARD).shards)
    assert text.endswith(f": the shards are others: {count} before, 1 now")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["Surgery", "torch"])
def test_another_version(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    edited = edited_of(models)
    kill_after(2, edited, tmp_path / "out")
    identity = importlib.import_module("surgery.writing.identity")
    version = identity.version
    package = {"Surgery": "model-surgery"}.get(name, name)
    monkeypatch.setattr(
        identity, "version", lambda given: "99.9" if given == package else version(given)
    )
    written, said = again(edited, tmp_path / "out", 2)
    assert said[0].endswith(f": {name} was {version(package)} and is 99.9")
    assert written.kept == ()


def second(*rows: torch.Tensor) -> torch.Tensor:
    return rows[1]


def test_a_tensor_computed_otherwise(models: tuple[Path, Path], tmp_path: Path) -> None:
    """The edits say the same; what is computed isn't."""
    edited = edited_of(models)
    kill_after(2, edited, tmp_path / "out")
    name = next(iter(edited))
    changed = replace(edited, tensors={**edited, name: replace(edited[name], kernel=second)})
    written, said = again(changed, tmp_path / "out", 2)
    assert said[0].endswith(": tensors are computed in another way")
    assert written.kept == ()


def test_a_function_without_a_name(models: tuple[Path, Path], tmp_path: Path) -> None:
    edited = edited_of(models)
    kill_after(2, edited, tmp_path / "out")
    name = next(iter(edited))
    shadow = replace(edited[name], kernel=lambda *rows: rows[0])
    written, said = again(replace(edited, tensors={**edited, name: shadow}), tmp_path / "out", 2)
    assert "a function without a name" in said[0]
    assert written.kept == ()


def test_anew_because_it_is_said(models: tuple[Path, Path], tmp_path: Path) -> None:
    edited = edited_of(models)
    kill_after(2, edited, tmp_path / "out")
    written, said = again(edited, tmp_path / "out", 2, resume=False)
    assert said == ["starting anew: 2 finished shards of an earlier run are removed"]
    assert written.kept == ()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "unreadable"])
def test_a_kept_shard_that_isnt_what_it_was(
    models: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    edited = edited_of(models)
    whole = write(edited, tmp_path / "whole", max_shard_bytes=SHARD)
    kill_after(3, edited, tmp_path / "out")
    name = whole.plan.shards[1].name
    path = stage_of(tmp_path / "out") / "files" / name
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-7] ^= 16
        path.write_bytes(content)
    elif how == "cut":
        os.truncate(path, len(content) - 1)
    else:
        path.unlink()
        if how == "unreadable":
            path.mkdir()
    written, said = again(edited, tmp_path / "out", 3)
    assert said == [
        f"{name} isn't what was written any more, and is written again",
        f"going on: 2 of {len(whole.plan.shards)} shards were finished",
    ]
    assert name not in written.kept
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("how", ["no identity", "not JSON", "a list", "cut", "format"])
def test_a_stage_that_says_too_little(models: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    edited = edited_of(models)
    kill_after(2, edited, tmp_path / "out")
    path = stage_of(tmp_path / "out") / "identity.json"
    if how == "no identity":
        path.unlink()
    elif how == "format":
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    else:
        text = {"not JSON": b"\xff{", "a list": b"[1]", "cut": b'{"format": 1, "versions": 3}'}
        path.write_bytes(text[how])
    written, said = again(edited, tmp_path / "out", 2)
    assert said[0].startswith("starting anew, not with the shards that an earlier run has")
    assert (written.kept, len(said)) == ((), 1)


# --- stopped from outside, or wrong ---------------------------------------------------------


def stopped(
    models: tuple[Path, Path], target: Path, action: Callable[[], object], **how: Any
) -> tuple[BaseException, list[str]]:
    """What a run raises, and says, in which this happens after two shards."""
    FUSE.stage, FUSE.shards, FUSE.action = stage_of(target), 2, action
    said: list[str] = []
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        write(
            with_fuse(edited_of(models), 2),
            target,
            max_shard_bytes=SHARD,
            threads=1,
            tell=said.append,
            **how,
        )
    assert not target.exists()
    return caught.value, said


def fail(error: BaseException) -> None:
    raise error


HOW = "2 of {} shards are finished and kept in {}: run the same command again to go on, or "


def test_an_interrupt_keeps_what_is_finished(models: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        error, said = stopped(models, target, interrupt)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert type(error) is KeyboardInterrupt
    count = len(plan(edited_of(models), max_shard_bytes=SHARD).shards)
    assert said == [
        HOW.format(count, stage_of(target)) + f"remove them with `surgery clean {target}`"
    ]
    _, said = again(edited_of(models), target, 2)
    assert said == [f"going on: 2 of {count} shards were finished"]
    write(edited_of(models), tmp_path / "whole", max_shard_bytes=SHARD)
    assert files_in(target) == files_in(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_keeps_what_is_finished(
    models: tuple[Path, Path], tmp_path: Path, code: int
) -> None:
    target = tmp_path / "out"
    error, said = stopped(models, target, partial(fail, OSError(code, os.strerror(code))))
    assert type(error) is OutputError
    reason = "the disk is full" if code == errno.ENOSPC else "Input/output error"
    count = len(plan(edited_of(models), max_shard_bytes=SHARD).shards)
    how = HOW.format(count, stage_of(target)) + f"remove them with `surgery clean {target}`"
    where = stage_of(target) / "files" / "model-00003-of-00007.safetensors"
    assert str(error).startswith(f"writing to {where} failed: {reason}; {how}")
    assert said == []
    assert len(again(edited_of(models), target, 2)[0].kept) == 2


def test_what_would_fail_again_keeps_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    error, said = stopped(models, tmp_path / "out", partial(fail, ValueError("a kernel's")))
    assert (type(error), said) == (ValueError, [])
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


def test_a_check_that_fails_keeps_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        write(
            edited_of(models),
            tmp_path / "out",
            max_shard_bytes=SHARD,
            check=lambda _: fail(VerificationError("it isn't")),
        )
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


def test_a_sync_that_fails_is_a_failure(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread that finishes shards, while others are written."""
    fsync = os.fsync

    def failing(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(names[1]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("what a descriptor stands for is read from /proc")
    names = [shard.name for shard in plan(edited_of(models), max_shard_bytes=SHARD).shards]
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OutputError, match=r"failed: Input/output error; [1-6] of 7 "):
        write(edited_of(models), tmp_path / "out", max_shard_bytes=SHARD, threads=1)
    monkeypatch.undo()
    kept = [*read_journals(stage_of(tmp_path / "out"))]  # in their order, as one thread writes
    assert names[0] in kept
    assert names[1] not in kept


def test_a_stage_that_is_gone(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Somebody removed it: the error says what couldn't be written, and not what couldn't be
    removed."""
    target = tmp_path / "out"
    error, _ = stopped(models, target, partial(shutil.rmtree, stage_of(target)))
    assert type(error) is OutputError
    assert str(error).startswith(f"writing to {stage_of(target)}/")
    assert "No such file or directory" in str(error)


def test_a_run_that_cannot_be_gone_on_with_keeps_nothing(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    edited = edited_of(models)
    names = list(edited)
    kernels = {name: replace(edited[name], tally=None) for name in names}
    made = {name: replace(kernels[name], kernel=lambda *rows: rows[1]) for name in names[:-1]}
    last = replace(kernels[names[-1]], kernel=lambda *rows: fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(
            replace(edited, tensors={**made, names[-1]: last}),
            tmp_path / "out",
            max_shard_bytes=SHARD,
        )
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


def test_the_disk_is_kept_busy_and_not_far_behind(
    raw_checkpoint: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is on its way to the disk soon after it is written, and waited for before many
    more are."""
    shards = importlib.import_module("surgery.writing.shards")
    calls: list[tuple[str, int, int]] = []

    def seen(fd: int, start: int, stop: int, flags: int) -> None:
        calls.append(("begin" if flags == 2 else "wait", start, stop))

    monkeypatch.setattr(shards, "sync_range", seen)
    monkeypatch.setattr(shards, "STEP_BYTES", 100)
    monkeypatch.setattr(shards, "BEHIND_BYTES", 400)
    opened = open_checkpoint(raw_checkpoint({f"w{i:03}": torch.ones(10) for i in range(100)}))
    write(opened, tmp_path / "out", threads=1)
    begun = waited = 0
    for kind, start, stop in calls:
        if kind == "begin":
            assert start <= begun < stop <= begun + 140  # a step, and the tensor that ended it
            begun = stop
        else:
            assert start <= waited < stop
            waited = stop
        assert begun - waited <= 400 + 2 * 140
    assert 4000 - begun < 140


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such call here")
@pytest.mark.parametrize("why", ["", "small", "slow", "read again"])
def test_what_is_on_the_disk_leaves_the_page_cache(
    raw_checkpoint: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """What a large file has there; not where the disk is slow, or the bytes are needed again."""
    shards = importlib.import_module("surgery.writing.shards")
    dropped: list[tuple[int, int]] = []

    def seen(fd: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append((start, start + length))

    monkeypatch.setattr(os, "posix_fadvise", seen)
    monkeypatch.setattr(shards, "STEP_BYTES", 100)
    monkeypatch.setattr(shards, "BEHIND_BYTES", 10_000 if why == "small" else 400)
    monkeypatch.setattr(shards, "SLOW_SECONDS", -1 if why == "slow" else 60)
    opened = open_checkpoint(raw_checkpoint({f"w{i:03}": torch.ones(10) for i in range(100)}))
    write(opened, tmp_path / "out", threads=1, checksums=why == "read again")
    if why:
        assert not dropped
        return
    assert dropped.pop() == (0, 0)  # all that is left, after the file was synced
    end = 0
    for start, stop in dropped:
        assert start <= end < stop
        end = stop
    assert 3000 < end < 4000  # the rest may not be on the disk yet


def test_the_system_is_asked_as_its_manual_says(tmp_path: Path) -> None:
    shards = importlib.import_module("surgery.writing.shards")
    with (tmp_path / "x").open("wb") as file:
        file.write(bytes(10_000))
        file.flush()
        for flags in (2, 7):
            shards.sync_range(file.fileno(), 0, 10_000, flags)
    if sys.platform == "linux":
        with pytest.raises(OSError, match="Bad file descriptor"):
            shards.sync_range(-1, 0, 1, 2)


def test_files_are_open_only_while_they_are_written(
    raw_checkpoint: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of a thousand shards would be stopped by the limit on open files."""
    opened = open_checkpoint(raw_checkpoint({f"w{i}": torch.ones(4) for i in range(300)}))
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 150, hard))
    try:
        written = write(opened, tmp_path / "out", max_shard_bytes=1, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(written.plan.shards) == 300


# --- two at once ----------------------------------------------------------------------------


def test_of_two_runs_one_is_refused_before_it_proves_anything(
    make_model: Raw, tmp_path: Path
) -> None:
    """Real processes: the other holds the lock while it proves, long before it writes."""
    base, target = make_model("llama", "base"), tmp_path / "out"
    hold = (
        "import sys; from pathlib import Path; from surgery.writing.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    arguments = ("grow", base, "-o", target, "--factor", "2", "--no-logits")
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        second = surgery(*arguments)
        listed = surgery("clean", tmp_path, "--yes", "--json")
        other.stdin.close()
    assert (second.returncode, second.stdout) == (5, "")
    assert second.stderr == f"error: another run is writing {target}: wait for it\n"
    (leftover,) = json.loads(listed.stdout)["leftovers"]
    assert (leftover["in_use"], leftover["cleared"]) == (True, False)
    assert surgery(*arguments).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_a_lock_can_be_had_again_by_its_own_thread_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "out"
    failed: list[BaseException] = []

    def other() -> None:
        try:
            with locked(target):
                pass
        except OutputError as error:
            failed.append(error)

    with locked(target):
        with locked(target):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(failed) == 1
        assert stage_of(target).is_dir()
    assert os.listdir(tmp_path) == []  # nor the directories that were made for it


# --- the command line -----------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model whose writing takes a while, in shards of 4 MB."""
    made = {f"t{i}": torch.randn(256, 4096) for i in range(40)}
    return save_raw(tmp_path / "large", made)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on(large: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, code = tmp_path / "out", {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -9)
    arguments = ("lines", large, large, "-o", out, "--alpha", "0.5", "--max-shard-size", "5MB")
    with started(*arguments, stderr=subprocess.PIPE) as running:
        while running.poll() is None and len(read_journals(stage_of(out))) < 3:
            time.sleep(0.001)
        running.send_signal(number)
        assert running.stderr is not None
        said = running.stderr.read()
    assert running.returncode == code, said
    assert "Traceback" not in said
    if number != signal.SIGKILL:
        assert "shards are finished and kept in" in said
    listed = surgery("clean", tmp_path)
    assert listed.returncode == 0
    assert re.search(r"\d+ finished +to remove", listed.stdout)
    assert "Nothing was removed" in listed.stdout
    second = surgery(*arguments)
    assert second.returncode == 0, second.stderr
    assert re.search(r"^going on: \d+ of 40 shards were finished$", second.stderr, re.MULTILINE)
    resumed = files_in(out)
    third = surgery(*arguments, "--overwrite", "--fresh")
    assert third.returncode == 0, third.stderr
    assert "going on" not in third.stderr
    again = files_in(out)
    records = [json.loads(found.pop("surgery.json")) for found in (resumed, again)]
    cards = [found.pop("README.md") for found in (resumed, again)]
    assert resumed == again
    assert cards[0] == cards[1]
    commands = [record.pop("command") for record in records]
    assert commands[1] == commands[0]  # --overwrite and --fresh say nothing of what is written
    assert records[0] == records[1]


def test_clean(models: tuple[Path, Path], tmp_path: Path) -> None:
    """A stage, a model that lost its name, one that was replaced; and what only has such names."""
    kill_after(2, edited_of(models), tmp_path / "out")
    kill_after(2, edited_of(models), tmp_path / "other")
    write(edited_of(models), tmp_path / "lost")
    (tmp_path / "lost").rename(tmp_path / ".lost.replaced")
    write(edited_of(models), tmp_path / "there")
    write(edited_of(models), tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / ".there.replaced")
    for name in (".mine.staging", ".mine.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    (tmp_path / ".linked.staging").symlink_to("base")
    lost = files_in(tmp_path / ".lost.replaced")

    one = surgery("clean", tmp_path / "out", "--yes")
    assert one.returncode == 0, one.stderr
    assert not stage_of(tmp_path / "out").exists()
    assert stage_of(tmp_path / "other").exists()

    shown = surgery("clean", tmp_path, "--json")
    told = {Path(one["path"]).name: one for one in json.loads(shown.stdout)["leftovers"]}
    assert {name: (one["remedy"], one["finished_shards"]) for name, one in told.items()} == {
        ".other.staging": ("remove", 2),
        ".lost.replaced": ("put back", 0),
        ".there.replaced": ("remove", 0),
    }
    assert not any(one["cleared"] or one["in_use"] for one in told.values())
    assert all(one["bytes"] > 4000 and one["age_seconds"] < 600 for one in told.values())
    assert files_in(tmp_path / ".lost.replaced") == lost

    assert surgery("clean", tmp_path, "--yes").returncode == 0
    assert files_in(tmp_path / "lost") == lost
    assert (tmp_path / "there" / "config.json").exists()
    assert sorted(os.listdir(tmp_path)) == [
        ".linked.staging", ".mine.replaced", ".mine.staging", "base", "lost", "there", "tuned",
    ]  # fmt: skip
    nothing = surgery("clean", tmp_path)
    assert (nothing.returncode, nothing.stdout) == (0, f"Nothing was left below {tmp_path}\n")
    missing = surgery("clean", tmp_path / "no" / "such")
    assert missing.returncode == 3
    assert "there is no directory" in missing.stderr


# --- what is compared -----------------------------------------------------------------------


def test_growth_can_be_gone_on_with(models: tuple[Path, Path]) -> None:
    def made(seed: int) -> Any:
        opened = open_checkpoint(models[0])
        return identify(
            plan(grow(opened, factor=1.5, choose="random", symmetry_break=0.1, seed=seed))
        )

    assert made(0) is not None
    assert made(0) == made(0)
    assert made(0) != made(1)


IDENTITIES = """
import json, sys
from merging import NEEDED
from surgery import *
from surgery.merging.methods import METHODS
from surgery.writing.identity import identify
base, tuned = (open_checkpoint(path) for path in sys.argv[1:])
tau = task_vector(base, tuned)
ties = merge([tuned, base], base=base, method="ties", lines="auto")
made = {
    "grow": grow(base, factor=1.5, choose="norm", symmetry_break=0.1),
    "expand": expand(base, copies=1),
    "tau": tau,
    "apply": apply(base, tau, scale=-0.5),
    "lora": extract_lora(base, tuned, rank=4),
    "chain": grow(lines(base, ties, alpha=0.2), factor=2),
}
for name, method in METHODS.items():
    models = [tuned, base, tuned][: method.models[1] or 3]
    start = base if method.base != "none" else None
    made[name] = merge(models, base=start, method=name, **NEEDED.get(name, {}))
print(json.dumps({name: identify(plan(edited)) for name, edited in made.items()}))
"""


def test_the_identity_is_the_same_in_another_process(models: tuple[Path, Path]) -> None:
    """No address, and no order of a set, which differs with the seed of hashing."""
    found = []
    for seed in "12":
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", IDENTITIES, *map(str, models)],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
        )
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert [name for name, identity in found[0].items() if identity is None] == []
    assert len({json.dumps(identity) for identity in found[0].values()}) == len(found[0])


def one_tensor(models: tuple[Path, Path], kernel: Callable[..., torch.Tensor]) -> Any:
    opened = open_checkpoint(models[0])
    name, tensor = next(iter(opened.items()))
    made = LazyTensor(tensor.shape, tensor.dtype, inputs=(tensor,), kernel=kernel)
    return identify(plan(replace(opened, tensors={name: made})))


def test_what_tells_kernels_apart(models: tuple[Path, Path]) -> None:
    one = partial(one_tensor, models)
    a, b = torch.ones(3), torch.ones(3).double()
    same = [partial(torch.add, other=torch.ones(3)), partial(torch.add, other=a)]
    assert one(same[0]) == one(same[1])
    different = [
        torch.clone,
        torch.neg,
        torch.Tensor.neg,
        partial(torch.add, other=1),
        partial(torch.add, other=1.0),
        partial(torch.add, other=a),
        partial(torch.add, other=b),
        partial(torch.add, other=a * 2),
        partial(torch.add, other=a, alpha=2),
        in_child,
        fail,
    ]
    found = [json.dumps(one(kernel)) for kernel in different]
    assert len({*found}) == len(found)
    assert one(a.add) is None  # a method of one tensor
    assert one(lambda rows: rows) is None
    assert one(partial(torch.add, other=threading.Lock())) is None


# --- the journal ----------------------------------------------------------------------------


def test_the_journal_keeps_floats_exactly(tmp_path: Path) -> None:
    tallies = {"a": 0.1, "b": 2.0**-1074, "c": 1e300 / 3, "d\n\u2028": float("inf"), "e": -0.0}
    finished = Finished("x.safetensors", 7, "xxh3_128:00", tallies)
    Journal(tmp_path).append(finished)
    assert read_journals(tmp_path) == {"x.safetensors": finished}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_short(tmp_path: Path, cut: int) -> None:
    """By a kill, or a power cut: the shards before and after it count, it doesn't."""
    made = [Finished(f"{name}.safetensors", 1, "d", {"t": 1.5}) for name in "abc"]
    journal = Journal(tmp_path)
    journal.append(made[0])
    journal.append(made[1])
    os.truncate(journal.path, journal.path.stat().st_size - cut)
    journal.append(made[2])
    wanted = made if cut == 1 else [made[0], made[2]]  # at 1 only the end of the line is lost
    assert [*read_journals(tmp_path).values()] == wanted


@pytest.mark.parametrize("size", [0, 1, 4096, (1 << 24) + 3])
def test_the_digest_is_that_of_all_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Mapped, and read where the system can't be asked for pages."""
    import xxhash

    content = os.urandom(size)
    (tmp_path / "x").write_bytes(content)
    wanted = f"xxh3_128:{xxhash.xxh3_128(content).hexdigest()}"
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        assert digest_of(fd) == wanted
        monkeypatch.setattr(importlib.import_module("surgery.writing.digest"), "_POPULATE_READ", -1)
        assert digest_of(fd) == wanted
        for error in (OSError(errno.ENODEV, "No such device"), ValueError("too short")):
            monkeypatch.setattr("mmap.mmap", lambda *_, e=error, **__: fail(e))
            assert digest_of(fd) == wanted
    finally:
        os.close(fd)


@pytest.mark.parametrize("held", [0, 1000, 1 << 26])
def test_the_digest_of_parts_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """In any order, by several threads, from memory or from the file."""
    monkeypatch.setattr(importlib.import_module("surgery.writing.digest"), "HELD_BYTES", held)
    draw = random.Random(held)
    content = draw.randbytes(300_000)
    cuts = sorted({0, len(content), *(draw.randrange(len(content)) for _ in range(400))})
    parts = [(start, stop, draw.random() < 0.5) for start, stop in itertools.pairwise(cuts)]
    draw.shuffle(parts)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        digest = RunningDigest(fd)

        def add(part: tuple[int, int, bool]) -> None:
            start, stop, in_memory = part
            os.pwrite(fd, content[start:stop], start)
            data = memoryview(content)[start:stop] if in_memory else None
            digest.add(start, stop - start, data)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add, parts[1:]))
        with pytest.raises(AssertionError, match="300,000 bytes were digested"):
            digest.result(len(content))
        add(parts[0])
        digest.add(len(content), 0)
        assert digest.result(len(content)) == digest_of(fd)
    finally:
        os.close(fd)
