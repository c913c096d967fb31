"""Surgery in a process of its own, as a shell starts it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

RUN = "from surgery.commands.main import run; run()"
"""What the installed console script does."""

ELSEWHERE = tempfile.gettempdir()
"""`python -c` looks for modules in the working directory first. In the repository it would take
`surgery` from its sources, which have no `surgery.commands`: only an installation has that."""


def started(*arguments: object, **how: Any) -> subprocess.Popen[str]:
    """`surgery *arguments`, under way; `how` as of `subprocess.Popen`."""
    argv = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(argv, text=True, cwd=ELSEWHERE, **how)


def surgery(*arguments: object, code: str = RUN, **how: Any) -> subprocess.CompletedProcess[str]:
    """`surgery *arguments`, to its end; `how` as of `subprocess.run`."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ELSEWHERE,
        **how,
    )
