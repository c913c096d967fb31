"""Surgery: post-hoc surgery on model checkpoints.

    from surgery import open_checkpoint, lines, grow, verify, write

A checkpoint is opened, not loaded; an operation turns lazy tensors into lazy tensors; nothing is
computed until the verifier or the writer asks, a slice at a time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.public import *
else:

    def __getattr__(name: str) -> object:
        """What is public, imported when it is first asked for: that takes a quarter of a second,
        which `surgery --help` needs not."""
        public = import_module("surgery.public")
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("surgery.public").__all__})
