"""Runs of a model without weights, with one set of arguments after another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from surgery.verification.draws import Values
from surgery.verification.mending import mended

if TYPE_CHECKING:
    from surgery.modeling.hollow import Attempt, HollowModel

MOST_MENDS = 10
"""Of one set of arguments, one after the other."""
MOST_RUNS = 20
"""With one set of arguments and what is made of it."""
MOST_RUNS_IN_ALL = 200
MOST_MODULES = 20_000
"""Of the models of all runs together, so that a large one that refuses everything isn't run for
minutes."""
MOST_ALIKE = 12
"""Refusals for one reason, sizes aside, that are answered: a config that contradicts itself
refuses everything for the same one."""


class Trials:
    """What was tried on a model, so that nothing is twice. `mend`: what a model refuses is
    changed by the reason that it gives, and tried again."""

    def __init__(self, hollow: HollowModel, seed: int, *, mend: bool) -> None:
        self.first: Exception | None = None
        """Why the first was refused."""
        self.mend = mend
        self._hollow, self._seed = hollow, seed
        self._seen: set[tuple[Any, ...]] = set()
        self._alike: Counter[tuple[type, str]] = Counter()
        affordable = MOST_MODULES // sum(1 for _ in hollow.model.modules())
        self._left = self._left_in_all = min(MOST_RUNS_IN_ALL, max(MOST_RUNS, affordable))

    def settle(
        self, values: Values, good: Callable[[Any], bool], method: str = "forward"
    ) -> tuple[Values, Attempt] | None:
        """These arguments, or what they were changed to, and the run in which they gave a result
        that is good; None if none did."""
        self._left = min(MOST_RUNS, self._left_in_all)
        return self._try(values, good, method, MOST_MENDS if self.mend else 0)

    def _try(
        self, values: Values, good: Callable[[Any], bool], method: str, mends: int
    ) -> tuple[Values, Attempt] | None:
        known = (method, *sorted(map(_known_by, values.items())))
        if known in self._seen:
            return None
        self._seen.add(known)
        self._left -= 1
        self._left_in_all -= 1
        attempt = self._hollow.attempt(values, method)
        if attempt.error is None:
            return (values, attempt) if good(attempt.result) else None
        self.first = self.first or attempt.error
        reason = type(attempt.module), re.sub(r"\d+", "0", str(attempt.error))
        self._alike[reason] += 1
        if mends and self._alike[reason] <= MOST_ALIKE:
            for other in mended(values, attempt, self._hollow, self._seed, method):
                if self._left < 0:
                    break
                if found := self._try(other, good, method, mends - 1):
                    return found
        return None


def _known_by(item: tuple[str, Any]) -> tuple[Any, ...]:
    name, value = item
    largest = 0 if value.is_floating_point() or not value.numel() else int(value.max())
    return name, tuple(value.shape), str(value.dtype), largest
