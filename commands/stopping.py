"""What Ctrl-C, or a job scheduler's SIGTERM, does to a verb: it cleans up if it is at work; it has
nothing to clean up if it hasn't begun, and is on its way out if it is done."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from types import FrameType


class Phase(Enum):
    """How far the process has come."""

    starting = "starting"
    at_work = "at work"
    done = "done"


class Terminated(KeyboardInterrupt):
    """A job scheduler's SIGTERM, which cleans up as Ctrl-C does."""


phase = Phase.starting
PAUSE = 0.01
"""Seconds until a signal comes again that was lost."""


def take_signals() -> None:
    """Have `stop` called from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    sys.unraisablehook = come_again


def stop(number: int, frame: FrameType | None) -> None:
    """Answer a signal, which came in the middle of `frame`."""
    if phase is Phase.at_work:
        if _would_be_lost(frame):
            _later(number)
            return
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
    if phase is Phase.starting:
        os.write(2, f"{said(number)}\n".encode())
        os._exit(exit_code(number))


def come_again(lost: sys.UnraisableHookArgs) -> None:
    """What Python can't raise it prints, and goes on. If that was the answer to a signal, which
    came in the middle of a destructor, the signal is sent again in a moment."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    _later(number_of(lost.exc_value))


def _would_be_lost(frame: FrameType | None) -> bool:
    """Whether what is raised here would be lost: `come_again` is at work itself."""
    while frame is not None and frame.f_code is not come_again.__code__:
        frame = frame.f_back
    return frame is not None


def _later(number: int) -> None:
    """Answer the signal in a moment: by the system's clock, as no thread can be started while
    another signal may come."""
    signal.signal(signal.SIGALRM, lambda _, frame: stop(number, frame))
    signal.setitimer(signal.ITIMER_REAL, PAUSE)


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal that came."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT


def said(number: int) -> str:
    """What is printed in the end."""
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    return f"{word}: nothing half-written was left under the final name"


def exit_code(number: int) -> int:
    """128 and the number of the signal, as shells have it."""
    return 128 + number
