"""Where models run to be compared, and whether their memory suffices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

from surgery.checkpoint import Checkpoint
from surgery.errors import ArgumentError, UnsupportedError
from surgery.untrusted import brief

VerifyDtype = Literal["float32", "float64"]
DEVICES = ("auto", "cpu", "cuda", "mps")

BESIDE_WEIGHTS = 600_000_000
"""Bytes that verification takes beside weights: libraries, activations, buffers."""


def check_device(
    base: Checkpoint,
    other: Checkpoint,
    device: str,
    dtype: VerifyDtype,
    *,
    streamed: bool = True,
) -> str:
    """The device to run on. Raises UnsupportedError if it isn't there or too small, where the
    process would be killed for memory after minutes, or if transformers has no such models."""
    _check_known(base, other)
    device = _pick_device(device, dtype)
    check_size((base, other), device, dtype, streamed=streamed)
    return device


def _check_known(*checkpoints: Checkpoint) -> None:
    from surgery.modeling.stock import known

    strangers = [one for one in checkpoints if not known(one.config)]
    UnsupportedError.raise_if(
        f"{one.source.reference}: "
        + (
            f"the installed transformers doesn't know the model type "
            f"{brief(one.config.get('model_type'))}, so the model can't be run: install one that "
            f"does, or --no-logits leaves the certificate"
            if one.config
            else "there is no config.json, so no model can be run: --no-logits leaves the "
            "certificate, which is proof enough for the weights"
        )
        for one in strangers[:1]  # the other is made of it
    )


def _pick_device(device: str, dtype: VerifyDtype) -> str:
    """ "auto" is CUDA, or Apple's MPS (which has no float64), or the CPU."""
    import torch

    if dtype not in get_args(VerifyDtype):
        raise ArgumentError(f"dtype is {dtype!r}, and has to be 'float32' or 'float64'")
    if device not in DEVICES:  # of several GPUs CUDA_VISIBLE_DEVICES chooses one
        raise ArgumentError(f"device is {device!r}, and has to be 'auto', 'cpu', 'cuda' or 'mps'")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if cuda else "mps" if mps and dtype == "float32" else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UnsupportedError(f"there is no {device} device here: use --device cpu or auto")
    if device == "mps" and dtype == "float64":
        raise UnsupportedError("MPS has no float64: use --device cpu")
    return device


def memory_needed(checkpoint: Checkpoint, dtype: VerifyDtype, *, streamed: bool = True) -> int:
    """Bytes that running a checkpoint takes, about: its largest module in `dtype`, while it is
    made, and memory for those that come next; or all of its weights, and one tensor."""
    size = 8 if dtype == "float64" else 4
    if streamed:
        from surgery.modeling.build import KEPT_BUFFERS

        waiting = min(KEPT_BUFFERS, 3 * size * checkpoint.numel)
        return BESIDE_WEIGHTS + waiting + 2 * size * largest_module(checkpoint)
    largest = max((tensor.numel for tensor in checkpoint.values()), default=0)
    return size * (checkpoint.numel + 2 * largest)


def largest_module(checkpoint: Checkpoint) -> int:
    """Elements of the largest tensor, with the experts of a block counted as one: the loader
    packs them."""
    together: Counter[str] = Counter()
    prefixes = tuple(f"{stack}." for stack in checkpoint.anatomy.stacks)
    for name, tensor in checkpoint.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            block, _, inner = name[len(prefix) :].partition(".")
            if (module := _before_number(inner)) is not None:
                name = f"{prefix}{block}.{module}"
        together[name] += tensor.numel
    return max(together.values(), default=0)


@lru_cache(maxsize=1 << 12)  # blocks have the same names inside
def _before_number(inner: str) -> str | None:
    """What comes before the first number in a name; None where there is none."""
    parts = inner.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[:at])


def check_size(
    checkpoints: Sequence[Checkpoint], device: str, dtype: VerifyDtype, *, streamed: bool
) -> None:
    """Raises UnsupportedError if the free memory is less than what the largest of them takes."""
    import psutil
    import torch

    need = max(memory_needed(one, dtype, streamed=streamed) for one in checkpoints)
    have = psutil.virtual_memory().available
    if device == "cuda":
        have = torch.cuda.mem_get_info()[0]
    if need > have:
        how = "a module at a time" if streamed else "a model at a time"
        raise UnsupportedError(
            f"comparing logits in {dtype}, {how}, takes about {need / 1e9:,.1f} GB of memory, and "
            f"{have / 1e9:,.1f} GB are free on {device}: --no-logits leaves the certificate, "
            f"which is proof enough for the weights"
        )
