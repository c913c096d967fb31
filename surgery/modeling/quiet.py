"""Keeping transformers quiet, and off the network, while it builds a model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


class _Collect(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """No progress bar and nothing printed; what transformers would have logged is collected. Nor is
    the Hub asked for anything, as some configs have their classes do (a pretrained backbone)."""
    from huggingface_hub import constants
    from transformers.utils import logging as hf_logging

    messages: list[str] = []
    root = logging.getLogger("transformers")
    hf_logging.get_verbosity()  # installs transformers' own handler, which is put back below
    handlers, propagate = root.handlers[:], root.propagate
    hook = hf_logging.set_tqdm_hook(lambda _, args, kwargs: hf_logging.EmptyTqdm(*args, **kwargs))
    root.handlers, root.propagate = [_Collect(messages)], False
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        constants.HF_HUB_OFFLINE = offline
        root.handlers, root.propagate = handlers, propagate
        hf_logging.set_tqdm_hook(hook)
