"""The names that PEFT gives, as they are on disk: PEFT goes by transformers' modules, whose
prefixes may differ from the file's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable


class Names:
    """The names of a checkpoint's tensors, by how they end."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = set(names)
        self._endings: dict[str, list[str]] = defaultdict(list)
        for name in self._exact:
            parts = name.split(".")
            for at in range(len(parts) - 1):
                self._endings[".".join(parts[at:])].append(name)

    def find(self, parameter: str) -> str | None:
        """The tensor that `parameter` is: the one of its name, or the only one that ends as it
        does, from the list of blocks on. None where there is none, or several."""
        if parameter in self._exact:
            return parameter
        parts = parameter.split(".")
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        last = max(0, numbers[0] - 1) if numbers else len(parts) - 2
        for at in range(last + 1):
            found = self._endings.get(".".join(parts[at:]), [])
            if found:
                return found[0] if len(found) == 1 else None
        return None
