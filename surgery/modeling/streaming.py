"""Models that run side by side without being in memory: the weights of a module are there while it
runs.

Every model runs in a thread of its own, through transformers' own forward. Before a module that
holds parameters runs, its thread waits until it is the one that is least far, or until the bytes
that the module needs are those that another model is using. So what the models have in common is
read once, however their modules differ, and no more than a module of each is in memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import nn

from surgery.modeling.build import KEPT_BUFFERS
from surgery.modeling.deferred import Deferred, apart, evaluate, made_by, same_values, sources
from surgery.modeling.lanes import Lane, Sent, buffers, lane_to
from surgery.modeling.shelf import Reader, Shelf, leaves, same_bytes
from surgery.parallel import keep_freed_memory
from surgery.tensor import LazyTensor

Result = TypeVar("Result")

MORE_BUDGET = 1 << 28
"""Bytes that may be kept for other models, beyond those of the largest module."""

LARGE = 1 << 30
"""Bytes of a module beyond which it is on a device for one of the models at a time."""

_REACH_INSIDE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch that use the weights of modules inside them without calling those."""


def run_together(
    models: Sequence[Any], calls: Sequence[Callable[[], Result]], device: str = "cpu"
) -> list[Result]:
    """What the calls return, each of which runs the model of its place, whose weights are
    deferred.

    The results don't depend on how the threads take turns. The first error stops all of them, and
    is raised here.
    """
    keep_freed_memory()
    units = [_units(model) for model in models]
    weights = _Weights(units, device)
    gate = _Gate([len(found) for found in units])
    results: list[Any] = [None] * len(models)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        turn = _Turn(gate, index, weights, lane_to(device))
        try:
            with turn, made_by(turn.unasked), contextlib.ExitStack() as hooks:
                for unit in units[index]:
                    hooks.enter_context(turn.attached(unit))
                results[index] = calls[index]()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised in the caller's thread
            errors.append(error)
            gate.stop()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gate.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
    return results


class _Stopped(BaseException):
    """Raised in a thread whose work nobody waits for any more; no error of the model's."""


@dataclass(eq=False)
class _Unit:
    """A module with the deferred parameters that it has while it runs, by owner and name."""

    module: Any
    weights: dict[tuple[Any, str], Deferred]
    keys: dict[tuple[Any, str], Hashable] = field(default_factory=dict)
    depth: int = 0

    @cached_property
    def bytes(self) -> dict[Hashable, int]:
        """The bytes of files that the weights are made of, and how many they are."""
        made_of = (source for weight in self.weights.values() for source in sources(weight))
        return {same_bytes(leaf): leaf.nbytes for source in made_of for leaf in leaves(source)}

    @property
    def nbytes_read(self) -> int:
        return sum(self.bytes.values())

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


def _units(model: Any) -> list[_Unit]:
    """The modules that hold deferred parameters, in the order in which they were made."""
    units, covered = [], set()
    for module in model.modules():
        if module in covered:
            continue
        inside = isinstance(module, _REACH_INSIDE)
        owners = list(module.modules()) if inside else [module]
        weights = {
            (owner, name): parameter
            for owner in owners
            for name, parameter in owner.named_parameters(recurse=False)
            if isinstance(parameter, Deferred)
        }
        covered.update(owners)
        if weights:
            units.append(_Unit(module, weights))
    return units


class _Gate:
    """Who may go on. The one that is least far always may, so that somebody always can."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.arithmetic = threading.Lock()
        self._length = lengths
        self._begun = [0] * len(lengths)
        self._running = set(range(len(lengths)))
        self._announced: set[Hashable] = set()
        self._stopped = False
        self._changed = threading.Condition()

    def wait(self, index: int, needed: AbstractSet[Hashable]) -> None:
        """Until these bytes are those that somebody else is using, or it is our turn to read."""
        with self._changed:
            while not (self._stopped or needed <= self._announced or self._is_last(index)):
                self._changed.wait()
            if self._stopped:
                raise _Stopped
            self._begun[index] += 1
            self._announced |= needed
            self._changed.notify_all()

    def _is_last(self, index: int) -> bool:
        def progress(of: int) -> tuple[float, int]:
            return self._begun[of] / max(1, self._length[of]), of

        return index == min(self._running, key=progress)

    def leave(self, index: int) -> None:
        with self._changed:
            self._running.discard(index)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class _Turn:
    """One model's thread: it computes when no other does. What a device needs is sent to it
    meanwhile; on the CPU, where making weights is arithmetic too, two that compute at once would
    take each other's cores."""

    def __init__(self, gate: _Gate, index: int, weights: _Weights, lane: Lane) -> None:
        self._gate, self._index, self._weights, self._lane = gate, index, weights, lane
        self._unasked: dict[object, torch.Tensor] = {}

    def __enter__(self) -> None:
        self._gate.arithmetic.acquire()

    def __exit__(self, *_: object) -> None:
        self._gate.arithmetic.release()
        self._gate.leave(self._index)

    @contextlib.contextmanager
    def attached(self, unit: _Unit) -> Iterator[None]:
        """Hooks that give a unit its weights before it runs, and take them after."""
        before = unit.module.register_forward_pre_hook(partial(self._before, unit), prepend=True)
        after = unit.module.register_forward_hook(partial(self._after, unit), always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, unit: _Unit, *_: object) -> None:
        unit.depth += 1
        if unit.depth > 1:  # called inside itself
            return
        self._unasked.clear()
        drawn = torch.get_rng_state()  # each model draws as it would alone
        with apart():
            self._gate.arithmetic.release()
            try:
                self._gate.wait(self._index, unit.bytes.keys())
                values = self._fetched(unit) if self._meanwhile(unit) else {}
            finally:
                self._gate.arithmetic.acquire()
            torch.set_rng_state(drawn)
            for (owner, name), value in (values or self._fetched(unit)).items():
                setattr(owner, name, nn.Parameter(self._lane.arrived(value), requires_grad=False))

    def _meanwhile(self, unit: _Unit) -> bool:
        return self._weights.device.type != "cpu" and unit.nbytes <= LARGE

    def _fetched(self, unit: _Unit) -> dict[tuple[Any, str], Sent]:
        with self._lane:
            return {at: self._weights.take(unit, at, self._lane) for at in unit.weights}

    def _after(self, unit: _Unit, *_: object) -> None:
        unit.depth -= 1
        if unit.depth == 0:
            for (owner, name), weight in unit.weights.items():
                setattr(owner, name, weight)
            self._lane.done()

    def unasked(self, weight: Deferred) -> torch.Tensor:
        """A weight of a module that doesn't run itself: another uses it. Kept until the next
        module runs, since a loop may use it often."""
        if weight.recipe not in self._unasked:
            with apart():
                with self._lane:
                    sent = self._weights.make(weight, self._lane)
                self._unasked[weight.recipe] = self._lane.arrived(sent)
        return self._unasked[weight.recipe]


class _Weights:
    """The finished weights of all models, each made once for all that have the same."""

    def __init__(self, models: Sequence[Sequence[_Unit]], device: str) -> None:
        self.device = torch.device(device)
        uses: Counter[Hashable] = Counter()
        reads: Counter[Hashable] = Counter()
        read = finished = 0
        for units in models:
            times: Counter[Hashable] = Counter()
            for unit in units:
                read = max(read, unit.nbytes_read)
                finished = max(finished, unit.nbytes)
                for at, weight in unit.weights.items():
                    values = same_values(weight)
                    key = unit.keys[at] = (values, times[values])
                    times[values] += 1
                    uses[key] += 1
                    if uses[key] == 1:
                        for source in sources(weight):
                            reads.update({same_bytes(leaf) for leaf in leaves(source)})
        self._reader = Reader(reads, read + MORE_BUDGET, buffers(device, KEPT_BUFFERS))
        self._finished: Shelf[Sent] = Shelf(uses, finished + MORE_BUDGET)

    def take(self, unit: _Unit, at: tuple[Any, str], lane: Lane) -> Sent:
        """A weight of a unit, which others may share."""
        weight = unit.weights[at]
        return self._finished.take(unit.keys[at], weight.nbytes, lambda: self.make(weight, lane))

    def make(self, weight: Deferred, lane: Lane) -> Sent:
        """Any weight, made now."""
        return lane.sent(evaluate(weight, self))

    def read(self, tensor: LazyTensor, dtype: torch.dtype | None) -> torch.Tensor:
        """A lazy tensor, on the device."""
        if self.device.type == "cpu":
            return self._reader.read(tensor, dtype)
        values = self._reader.read(tensor).to(self.device, non_blocking=True)
        return values if dtype is None else values.to(dtype)  # cast there: fewer bytes move

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device."""
        if self.device.type == "cpu":
            return self._reader.buffers.empty(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)
