"""Many runs of `surgery` quickly: a process that has imported everything once, and forks a child
for each. The child runs the console script's own function, with argv as a shell would give it, in
a session of its own; how it ends is seen from outside.

    with Forker() as forker:
        run = forker.start(["lines", "base", "tuned", "-o", "out", "--alpha", "0.5"], folder)
        os.kill(run.pid, signal.SIGKILL)
        print(run.ended().code)
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import Self

TESTS = Path(__file__).parents[1]
DEAD_AFTER = 120
"""Seconds after which a run counts as hung."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or the negative number of the signal that killed it."""

    code: int
    said: str
    seconds: float


@dataclass
class Run:
    """A run under way, in a session of its own whose id is `pid`."""

    forker: Forker
    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)

    def ended(self) -> Ended:
        """Wait for the end. Until then its number isn't given to another process."""
        code = self.forker.ask({"wait": self.pid})
        seconds = time.monotonic() - self.began
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(code, said, seconds)


class Forker:
    """The process that forks. `preload` is a library that it is started with.

    It finds this package, but not the sources of `surgery` beside it: they have no
    `surgery.commands`, which only an installation has."""

    def __init__(self, logs: Path, *, preload: Path | None = None) -> None:
        self.logs = logs
        self.count = 0
        logs.mkdir(parents=True, exist_ok=True)
        env = dict(os.environ, PYTHONPATH=str(TESTS), COLUMNS="120", HF_HUB_OFFLINE="1")
        if preload is not None:
            env["LD_PRELOAD"] = str(preload)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reliability.forker"],
            cwd=logs,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, job: Mapping[str, Any]) -> Any:
        """One request, one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv: Sequence[str], folder: Path, **how: Any) -> Run:
        """Begin `surgery *argv` in `folder`. `how`: `address_space`, in bytes; `cgroup`, the
        directory of one; `user`, a numeric id; `fault`, the arguments of `arm` in faults.c."""
        self.count += 1
        log = self.logs / f"log-{self.count % 64}"
        log.unlink(missing_ok=True)
        job = {"argv": list(argv), "folder": str(folder), "log": str(log), **how}
        return Run(self, self.ask(job), log)

    def run(self, argv: Sequence[str], folder: Path, **how: Any) -> Ended:
        """`surgery *argv` in `folder`, to its end."""
        return self.start(argv, folder, **how).ended()


def _serve() -> dict[str, Any] | None:
    """Answer requests; in a child, the job that it is to do. None at the end."""
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = _wait(job["wait"])
        elif (answer := os.fork()) == 0:
            return dict(job)
        print(json.dumps(answer), flush=True)
    return None


def _wait(pid: int) -> int:
    stop = time.monotonic() + DEAD_AFTER
    pause = 0.001
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.02, pause * 1.2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999


def _prepare(job: Mapping[str, Any]) -> None:
    """Become what the job asks for: as a shell or a container would have started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a signal before `surgery` has begun just kills
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(fd, place)
    os.chdir(job["folder"])
    sys.argv = ["surgery", *job["argv"]]
    if cgroup := job.get("cgroup"):
        Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    if user := job.get("user"):
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if limit := job.get("address_space"):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if fault := job.get("fault"):
        call, under, number, errno, more, report = fault
        ctypes.CDLL(None).arm(call.encode(), under.encode(), number, errno, more, report.encode())
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> NoReturn:
    """Import what runs need, once; no thread may be started before the last fork."""
    import surgery.commands.main as command
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama

    import surgery.recipe
    import surgery.verification.logits

    for module in (surgery, torch, transformers):
        assert module is not None
    gc.freeze()
    job = _serve()
    if job is not None:
        _prepare(job)
        command.run()
    sys.exit(0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
