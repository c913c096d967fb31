"""How weights get from the memory of the host to where they are used.

On CUDA they lie in pinned memory, are copied on a stream of their own while the last module still
computes, and are cast there, so that as few bytes as there are in the file cross the bus.

Libraries that load checkpoints to a GPU (fastsafetensors, Run:ai's model streamer) bring whole
files, in the order of the files. Here weights come in the order in which modules run, most of them
are made of others on the way, and what lies on the device has to stay small: so none is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery.modeling.buffers import Buffers

AHEAD = 2
"""Of how many modules one model may have the weights on the device at a time."""


@dataclass(frozen=True)
class Sent:
    """Values on their way: there once `event` has happened, if there is one."""

    values: torch.Tensor
    event: Any = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class Lane:
    """To where one model computes. On the CPU there is no way to go."""

    def __enter__(self) -> None:
        """Weights are made and sent inside."""

    def __exit__(self, *_: object) -> None:
        pass

    def sent(self, values: torch.Tensor) -> Sent:
        return Sent(values)

    def arrived(self, sent: Sent) -> torch.Tensor:
        """The values, for what is computed from here on."""
        return sent.values

    def done(self) -> None:
        """What was asked for so far has no use for the weights of the last module after it."""


class CudaLane(Lane):
    """A stream of its own, never more than two modules ahead of what the device has computed."""

    def __init__(self) -> None:
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._ends: deque[Any] = deque()
        self._inside: Any = None

    def __enter__(self) -> None:
        if len(self._ends) >= AHEAD:
            self._ends.popleft().synchronize()
        self._inside = torch.cuda.stream(self._stream)
        self._inside.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)

    def sent(self, values: torch.Tensor) -> Sent:
        return Sent(values, self._stream.record_event())

    def arrived(self, sent: Sent) -> torch.Tensor:
        computing = torch.cuda.current_stream()
        computing.wait_event(sent.event)
        sent.values.record_stream(computing)  # its memory isn't given out again before that
        return sent.values

    def done(self) -> None:
        self._ends.append(torch.cuda.current_stream().record_event())


class PinnedBuffers(Buffers):
    """Pinned memory, which torch itself gives out again once no copy from it is under way."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


def lane_to(device: str) -> Lane:
    """The way to `device` for the weights of one model."""
    return CudaLane() if device == "cuda" else Lane()


def buffers(device: str, keep: int) -> Buffers:
    """Memory of the host for what goes to `device`."""
    return PinnedBuffers(keep) if device == "cuda" else Buffers(keep)
