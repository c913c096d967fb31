"""Limits on what a config can have transformers build: a number in it costs a stranger nothing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.errors import UnsupportedError

MOST_LAYERS = 5_000
MOST_EXPERTS = 100_000
MOST_PARAMETERS = 1_000_000
"""Parameter tensors of a model that is built: the largest mixtures have some 100,000."""
MOST_TIMES, SLACK = 4, 200_000_000
"""A model may have this many times the elements of its files, and these: heads that are tied,
parameters that are moved as the loader converts them, masks."""

_LAYERS = re.compile(r"(num|n)_([a-z]\w*_)?(layers?|blocks?)|\w*depths?|\w*_layers")
_EXPERTS = re.compile(r"\w*experts")


def check_counts(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a config with more layers or experts than anybody builds: the
    config classes make lists of that many before anything else."""
    UnsupportedError.raise_if(_too_many(config))


def _too_many(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _too_many(value, f"{path}{key}.")
            continue
        name = str(key)
        most = MOST_EXPERTS if _EXPERTS.fullmatch(name) else None
        most = MOST_LAYERS if _LAYERS.fullmatch(name) else most
        numbers = [n for n in (value if isinstance(value, list) else [value]) if _is_number(n)]
        if most is not None and any(number > most for number in numbers):
            shown = f"{max(numbers):.3g}" if max(numbers) >= 1e9 else f"{max(numbers):,}"
            yield f"the config has {path}{name} = {shown}, and {most:,} is the most that is built"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextlib.contextmanager
def counted(stored: int | None = None) -> Iterator[None]:
    """Ends the building of a model inside it that comes to too many parameters, whatever number
    in its config asks for them; or to far more elements than the `stored` ones of the files,
    where memory is taken for them."""
    from torch.nn.modules import module

    count = elements = 0
    most = None if stored is None else MOST_TIMES * stored + SLACK

    def count_one(_module: object, _name: str, tensor: Any) -> None:
        nonlocal count, elements
        count += 1
        elements += 0 if tensor is None else tensor.numel()
        if count > MOST_PARAMETERS:
            raise UnsupportedError(
                f"the config describes a model of more than {MOST_PARAMETERS:,} parameter tensors, "
                f"which isn't built"
            )
        if most is not None and elements > most:
            raise UnsupportedError(
                f"the config describes a model of {elements:,} parameters and more, and the files "
                f"have {stored:,}: they don't belong together"
            )

    hooks = (
        module.register_module_parameter_registration_hook(count_one),
        module.register_module_buffer_registration_hook(count_one),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
