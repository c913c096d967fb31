"""A call of each kind fails; `python -m tests.reliability.faults` makes every call fail."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from .faults import KILL, SHORT, Breaker, Fault
from .forker import Ended, Forker
from .scene import Scene

FAULTS = [
    Fault("lines", "out", "create", errno.EACCES, 3),
    Fault("lines", "out", "write", errno.ENOSPC, 4),
    Fault("lines", "out", "pwrite", errno.EIO, 20),
    Fault("lines", "out", "fsync", errno.EIO, 5),
    Fault("lines", "out", "rename", errno.EROFS, 1),
    Fault("lines", "out", "any", errno.ESTALE, 60, ever=True),
    Fault("lines", "out", "any", KILL, 90),
    Fault("lines", "out", "pwrite", SHORT, 9),
    Fault("lines", "out", "pwrite", errno.EINTR, 7),
    Fault("lines", "out", "rename", KILL, 2, overwrite=True),
    Fault("lines", "inputs", "pread", errno.EIO, 11),
    Fault("lines", "inputs", "open", errno.EMFILE, 9),
    Fault("lines", "inputs", "any", errno.EIO, 120, ever=True),
    Fault("lines", "inputs", "fstat", errno.EIO, 17),
    Fault("lines", "inputs", "fstat", errno.ESTALE, 46),
    Fault("lines", "inputs", "stat", errno.EACCES, 66),
    Fault("lines", "out", "stat", errno.EIO, 13),
    Fault("lines", "out", "stat", errno.EACCES, 14),
]


@pytest.fixture(scope="module")
def breaker(
    scene: Scene, forker: Forker, breaks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Breaker:
    return Breaker(scene, forker, tmp_path_factory.mktemp("faults") / "place")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_call_that_fails(breaker: Breaker, fault: Fault) -> None:
    met = breaker.met(fault)
    assert met is not None, "the run never came to that call"
    assert met.wrong is None, f"at {met.at}: {met.said}"


def test_what_is_wrong_is_seen(breaker: Breaker) -> None:
    """A harness that calls nothing wrong would prove nothing."""
    fault = Fault("lines", "out", "pwrite", errno.EIO, 1)
    at = str(breaker.folder / ".out.staging" / "files" / "model.safetensors")
    good = f"error: writing to {at} failed: Input/output error"
    assert breaker.wrong_end(fault, Ended(5, good, 1.0), "absent", at) is None
    for code, said, state in (
        (0, "", "absent"),
        (3, good, "absent"),
        (5, "error: it failed", "absent"),
        (5, f"{good}\n{good}", "absent"),
        (1, "Traceback (most recent call last)", "absent"),
    ):
        assert breaker.wrong_end(fault, Ended(code, said, 1.0), state, at) is not None
    sync = Fault("lines", "out", "fsync", errno.EIO, 1)
    assert breaker.wrong_end(sync, Ended(0, "", 1.0), "whole", at) is not None
