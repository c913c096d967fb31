"""What Ctrl-C, or a job scheduler's SIGTERM, does to a verb: it cleans up if it is at work; it has
nothing to clean up if it hasn't begun, and is on its way out if it is done."""

from __future__ import annotations

import os
import signal
from enum import Enum
from types import FrameType

INTERRUPTED = 130
SAID = "interrupted: nothing half-written was left under the final name"


class Phase(Enum):
    """How far the process has come."""

    starting = "starting"
    at_work = "at work"
    done = "done"


phase = Phase.starting


def take_signals() -> None:
    """Have `stop` called from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def stop(signum: int, frame: FrameType | None) -> None:
    """Answer a signal."""
    if phase is Phase.at_work:
        raise KeyboardInterrupt
    if phase is Phase.starting:
        os.write(2, f"{SAID}\n".encode())
        os._exit(INTERRUPTED)
