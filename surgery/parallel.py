"""Run many small jobs on a few threads, in no particular order, with one way to stop.

The jobs are independent and the results don't depend on which thread runs which: nothing here
may decide a bit of an output.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Protocol, TypeVar

from surgery.errors import ArgumentError

Job = TypeVar("Job")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


class Progress(Protocol):
    """Called from any thread with the number of bytes that were done since the last call."""

    def __call__(self, nbytes: int, /) -> object: ...


def default_threads() -> int:
    """As many threads as the process may use cores, and no more than 8: the memory and the disk
    are the limit before that."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, min(8, len(os.sched_getaffinity(0))))
    return max(1, min(8, os.cpu_count() or 1))


def run_all(
    jobs: Iterator[Job],
    work: Callable[[Job], object],
    threads: int | None,
    *,
    with_torch: bool = True,
) -> None:
    """Call `work` on every job. The first exception stops all threads and is raised here.

    torch, if the jobs are `with_torch`, runs on one thread in each of ours meanwhile: two pools
    would only get in each other's way. The caller's own thread takes part in no work, so that an
    interrupt reaches it at once.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}, and has to be at least 1")
    lock = threading.Lock()
    stop = threading.Event()
    failures: list[BaseException] = []

    def worker() -> None:
        try:
            if with_torch:
                _torch_threads(1)
            while not stop.is_set():
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                work(job)
        except BaseException as error:  # noqa: BLE001  raised in the caller's thread
            failures.append(error)
            stop.set()

    keep_freed_memory()
    before = _torch_threads() if with_torch else None
    pool = [threading.Thread(target=worker) for _ in range(threads or default_threads())]
    try:
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
    finally:
        stop.set()
        for thread in pool:
            if thread.ident is not None:
                thread.join()
        if before is not None:
            _torch_threads(before)
    if failures:
        raise failures[0]


def _torch_threads(count: int | None = None) -> int:
    """On how many threads torch runs here; `count` from now on, if it is given."""
    import torch

    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@cache
def keep_freed_memory() -> None:
    """Have glibc's malloc keep the temporaries of a block for the next one. By default it gives
    1 MB back to the system and faults it in again, page by page, for every block."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 28)
