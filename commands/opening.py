"""Opening models as the verbs do: by reference, with a user's corrections of their anatomy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery import Checkpoint


def open_model(reference: str, anatomy: Path | None, *, headers_only: bool = False) -> Checkpoint:
    """`surgery.open_checkpoint`, and what the file `anatomy` says over what is inferred."""
    import surgery

    opened = surgery.open_checkpoint(reference, headers_only=headers_only)
    if anatomy is None:
        return opened
    from surgery.recipe import correct_anatomy

    return correct_anatomy(opened, anatomy)
