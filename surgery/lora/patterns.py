"""Regular expressions of an adapter's config, matched as PEFT matches them, within limits: one
from a stranger may take longer than anybody lives, or more memory than there is."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from time import monotonic
from typing import Any

from surgery.errors import FormatError
from surgery.untrusted import brief

LONGEST = 1_000
MOST_REPEATS = 1_000
"""What the counts in braces may multiply to: they are written out as a pattern is compiled."""
SECONDS = 2.0
"""For all patterns of an adapter. Sound ones take microseconds."""

_COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}", re.ASCII)


def why_not(pattern: str) -> str | None:
    """Why this isn't a regular expression that can be matched; None if it is."""
    if len(pattern) > LONGEST:
        return f"it has {len(pattern):,} characters"
    counts = [int(n) for pair in _COUNTED.findall(pattern) for n in pair if len(n) < 9 and n]
    counts += [MOST_REPEATS + 1 for pair in _COUNTED.findall(pattern) if max(map(len, pair)) >= 9]
    if prod(filter(None, counts)) > MOST_REPEATS:
        return f"it repeats something more than {MOST_REPEATS:,} times"
    try:
        _compiled(pattern)
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:  # both modules' errors, too
        return str(error)
    return None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    import regex

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python will take otherwise
            re.compile(pattern)
            return regex.compile(rf"(.*\.)?({pattern})$")
    except (re.error, regex.error) as error:
        raise ValueError(str(error)) from error


@dataclass
class Matcher:
    """Matches the ends of modules' names, until `SECONDS` have gone in all."""

    spent: float = field(default=0.0, compare=False)

    def matches(self, pattern: str, module: str) -> bool:
        """Whether the pattern fits the end of the name. Raises FormatError when time is up."""
        start = monotonic()
        try:
            found = _compiled(pattern).match(module, timeout=max(0.01, SECONDS - self.spent))
        except TimeoutError as error:
            raise FormatError(
                f"adapter_config.json has the pattern {brief(pattern)}, and matching it with "
                f"{brief(module)} doesn't come to an end"
            ) from error
        self.spent += monotonic() - start
        if self.spent > SECONDS:
            raise FormatError(
                f"adapter_config.json has patterns whose matching takes more than {SECONDS:g} s"
            )
        return found is not None
