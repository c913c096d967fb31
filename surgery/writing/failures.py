"""What is said when the system fails us while an output is written: whose fault it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import InputError, OutputError
from surgery.system import reason, remedy

NOTHING = "nothing was kept"


@contextmanager
def told(
    folder: Path, inputs: Iterable[Path], kept: Callable[[], str] = lambda: NOTHING
) -> Iterator[None]:
    """Make an error of the system an InputError if it names a file of `inputs`, else an
    OutputError that names the file, or `folder`, where the output is made. What can't be read
    back from there is an OutputError too. `kept` says what a later run can go on from."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename or folder)
        if any(path == place or path in place.parents for path in inputs):
            raise InputError(f"{place} can't be read: {reason(error)}{remedy(error)}") from error
        raise OutputError(
            f"writing to {place} failed: {reason(error)}; {kept()}{remedy(error)}"
        ) from error
    except InputError as error:
        if str(folder) not in str(error):
            raise
        raise OutputError(*(f"{problem}; {kept()}" for problem in error.problems)) from error
