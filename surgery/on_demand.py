"""torch, imported when something of it is first used: a plan names the kernels that will run, and
needs none of the second that importing torch takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> object:
            import torch

            found = vars(self)[name] = getattr(torch, name)
            return found

    torch = _Torch()
