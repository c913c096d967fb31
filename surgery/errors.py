"""Every error that Surgery raises on purpose, in one tree, each with its exit code.

    SurgeryError                1   the root: catch this to catch them all
    ├── ArgumentError           2   a parameter that can't be meant: alpha = nan, layers 40-50 of 12
    ├── InputError              3   something is wrong with what was given to read
    │   ├── NotFoundError       3   no such directory, file or Hub repository
    │   ├── FormatError         3   a damaged file; header and index that disagree
    │   ├── MismatchError       3   two checkpoints that don't belong together
    │   └── RecipeError         3   a recipe that can't be meant, with the line
    ├── UnsupportedError        4   sound input that this operation can't edit, and why
    ├── OutputError             5   the target exists or lies inside an input; the disk is full
    └── VerificationError       6   the edited checkpoint isn't what it has to be: nothing written

An error carries all the problems that were found, not the first one: each names the file or
the tensor, the values that disagree, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class SurgeryError(Exception):
    """One or more problems, each a sentence or two. `exit_code` is the command line's."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    @classmethod
    def raise_if(cls, problems: Iterable[str]) -> None:
        """Raise this error with all of `problems`, if there are any."""
        found = tuple(problems)
        if found:
            raise cls(*found)


class ArgumentError(SurgeryError):
    """A parameter has a value that can't be meant."""

    exit_code = 2


class InputError(SurgeryError):
    """Something is wrong with a checkpoint, a recipe or a reference that was given."""

    exit_code = 3


class NotFoundError(InputError):
    """No such directory, file or repository."""


class FormatError(InputError):
    """A file isn't what its format or its neighbours say."""


class MismatchError(InputError):
    """Two checkpoints that should belong together don't."""


class RecipeError(InputError):
    """A recipe says something that can't be meant."""


class UnsupportedError(SurgeryError):
    """The input is sound, and this operation can't edit it; the message says why."""

    exit_code = 4


class OutputError(SurgeryError):
    """The output can't be written, or must not be."""

    exit_code = 5


class VerificationError(SurgeryError):
    """The edited checkpoint isn't what it has to be."""

    exit_code = 6
