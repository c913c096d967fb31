"""What adapters do to the tensors of a base: each name matched, every shape compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from surgery.checkpoint import Checkpoint
from surgery.dtypes import DType
from surgery.errors import MismatchError, UnsupportedError
from surgery.lora.adapter import Adapter, LowRank
from surgery.lora.dora import with_magnitudes
from surgery.lora.matching import Names
from surgery.lora.product import low_rank, transposed, wide
from surgery.merging.finite import finite, known_finite
from surgery.tensor import LazyTensor, gather

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out"}


@dataclass(frozen=True, eq=False)
class Edited:
    """One tensor: what it starts from, and the updates that are added to that. `replaced` says
    that the start is no longer the base's."""

    start: LazyTensor
    updates: tuple[LazyTensor, ...] = ()
    replaced: bool = False


@dataclass(frozen=True, eq=False)
class Edits:
    """All tensors that change, by their names on disk; `unties` says that head and embedding are
    no longer one, and `vocabulary` is the number of tokens if that changes."""

    tensors: Mapping[str, Edited]
    unties: bool
    vocabulary: int | None
    notes: tuple[str, ...]


def collect(base: Checkpoint, adapters: Sequence[Adapter]) -> Edits:
    """The edits of all adapters. Raises MismatchError or UnsupportedError with everything that
    doesn't fit the base."""
    collection = _Collection(base)
    for adapter in adapters:
        collection.add(adapter)
    notes = collection.settle_head(adapters)
    vocabulary = collection.vocabulary()
    UnsupportedError.raise_if(collection.unsupported)
    MismatchError.raise_if(collection.problems)
    return Edits(collection.edits, collection.unties, vocabulary, notes)


@dataclass
class _Collection:
    """The edits so far, and what was wrong."""

    base: Checkpoint
    edits: dict[str, Edited] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    rescaled: set[str] = field(default_factory=set)
    unties: bool = False

    def __post_init__(self) -> None:
        anatomy = self.base.anatomy
        self.names = Names(self.base)
        self.embedding, self.head = anatomy.embedding, anatomy.head
        self.tied = anatomy.tied and self.embedding is not None

    def add(self, adapter: Adapter) -> None:
        where = adapter.source.reference
        known: dict[str, str] = {}
        for parameter in adapter.saved:
            if name := self._name(parameter, known, where):
                self._save(name, adapter, parameter)
        for module in adapter.tokens:
            if name := self._name(f"{module}.weight", {}, where):
                self._replace_rows(name, adapter, module)
        known = {}
        for module, update in adapter.updates.items():
            if name := self._name(f"{module}.weight", known, where):
                self._add_update(name, module, update, adapter)
            if update.bias is not None and (name := self._name(f"{module}.bias", known, where)):
                self._add_bias(name, module, update, adapter)

    def _name(self, parameter: str, known: dict[str, str], where: str) -> str | None:
        """The name on disk; `known` are those of the same adapter, for no two may be one."""
        name = self.names.find(parameter)
        if name is None and self.tied and parameter in _HEADS and self.head in (None, parameter):
            name = self.head = parameter  # the base doesn't store it
        if name is None:
            self.problems.append(
                f"{where} was made for another base: it has {parameter}, and "
                f"{self.base.source.reference} has no such tensor"
            )
        elif name in known:
            self.problems.append(
                f"{where} was made for another base: its {known[name]} and {parameter} are both "
                f"{name} of {self.base.source.reference}"
            )
        elif name in self.base and self.base[name].dtype.kind != "float":
            self.problems.append(
                f"{where} changes {name}, which holds {self.base[name].dtype} and no floats"
            )
        else:
            known[name] = parameter
            return name
        return None

    def _edited(self, name: str) -> Edited:
        if name not in self.edits:
            own = name if name in self.base else self.embedding
            assert own is not None
            return Edited(finite(self.base, own))
        return self.edits[name]

    def _save(self, name: str, adapter: Adapter, parameter: str) -> None:
        """The adapter's own tensor in the place of the base's, which may have other tokens."""
        saved, before = adapter.saved[parameter], self._edited(name).start
        resized = name in (self.embedding, self.head) and saved.shape[1:] == before.shape[1:]
        if saved.dtype.kind != "float" or (saved.shape != before.shape and not resized):
            self.problems.append(self._shapes(adapter, parameter, saved.shape, name))
        elif name in self.edits:
            self.unsupported.append(_in_each_others_way(adapter, name))
        else:
            checked = known_finite(saved, _called(adapter, parameter))
            self.edits[name] = Edited(checked, replaced=True)

    def _replace_rows(self, name: str, adapter: Adapter, module: str) -> None:
        """The rows of some tokens. They are what was trained, and no difference."""
        rows, tokens = adapter.tokens[module]
        start = self._edited(name).start
        if rows.width != start.width or max(tokens) >= start.rows:
            self.problems.append(
                f"{adapter.source.reference} was made for another base: it has rows of "
                f"{rows.width} for tokens up to {max(tokens)} of {module}, and {name} is "
                f"{list(start.shape)}"
            )
            return
        kind = wide(start, rows)
        inputs = (_in(start, kind), _in(known_finite(rows, _called(adapter, module)), kind))
        runs = tuple(_with_rows(start.rows, tokens))
        made = gather(inputs, runs, start.shape)
        self.edits[name] = replace(self._edited(name), start=made, replaced=True)

    def _add_update(self, name: str, module: str, update: LowRank, adapter: Adapter) -> None:
        edited = self._edited(name)
        outputs, inputs = update.b.shape[0], update.a.shape[1]
        turned = self._stored_turned(name, update, adapter)
        if edited.start.shape != ((inputs, outputs) if turned else (outputs, inputs)):
            shape = (inputs, outputs) if update.embedding else (outputs, inputs)
            self.problems.append(self._shapes(adapter, module, shape, name))
            return
        a = known_finite(transposed(update.a) if turned else update.a, _called(adapter, module))
        b = known_finite(transposed(update.b) if turned else update.b, _called(adapter, module))
        left, right = (a, b) if turned else (b, a)
        delta = low_rank(left, right, update.scale, wide(edited.start, left, right))
        if name in self.rescaled or (update.magnitude is not None and edited.updates):
            self.unsupported.append(_in_each_others_way(adapter, name))
        elif update.magnitude is None:
            self.edits[name] = replace(edited, updates=(*edited.updates, delta))
        else:
            self.rescaled.add(name)
            start = with_magnitudes(
                edited.start,
                delta,
                known_finite(update.magnitude, _called(adapter, module)),
                wide(edited.start, delta),
                columns=turned,
            )
            self.edits[name] = Edited(start, replaced=True)

    def _stored_turned(self, name: str, update: LowRank, adapter: Adapter) -> bool:
        """Whether the weight is stored (in, out), as an embedding always is. Shapes tell; of a
        square matrix the config does."""
        if update.embedding:
            return True
        shape, outputs, inputs = (
            self._edited(name).start.shape,
            update.b.shape[0],
            update.a.shape[1],
        )
        return shape == (inputs, outputs) and (outputs != inputs or adapter.config.fan_in_fan_out)

    def _add_bias(self, name: str, module: str, update: LowRank, adapter: Adapter) -> None:
        from surgery.kernels.updates import total_update

        edited, bias = self._edited(name), update.bias
        assert bias is not None
        if edited.start.shape != bias.shape:
            self.problems.append(self._shapes(adapter, f"{module}.bias", bias.shape, name))
            return
        kind = wide(edited.start, bias)
        kernel = partial(total_update, scales=(update.scale,), compute=kind)
        checked = known_finite(bias, _called(adapter, f"{module}.bias"))
        scaled = LazyTensor(bias.shape, kind, inputs=(checked,), kernel=kernel)
        self.edits[name] = replace(edited, updates=(*edited.updates, scaled))

    def _shapes(self, adapter: Adapter, what: str, shape: tuple[int, ...], name: str) -> str:
        have = self._edited(name).start.shape
        return (
            f"{adapter.source.reference} was made for another base: its {what} is {list(shape)}, "
            f"and {name} of {self.base.source.reference} is {list(have)}"
        )

    def settle_head(self, adapters: Sequence[Adapter]) -> tuple[str, ...]:
        """Make head and embedding what they were in training, where the base ties them: one, or,
        if an adapter trained either of them alone, two. Returns a note if it is two."""
        head = self.head or _new_head(self.base)
        if (
            not self.tied
            or self.embedding is None
            or not {self.embedding, head} & self.edits.keys()
        ):
            return ()
        if all(_keeps_tied(adapter) for adapter in adapters):
            edited = self.edits.get(self.embedding) or self.edits[head or ""]
            self.edits[self.embedding] = edited
            if head is not None and head in self.base:
                self.edits[head] = edited
            elif head is not None:
                self.edits.pop(head, None)
            return ()
        if head is None:
            self.unsupported.append(
                f"{self.base.source.reference} ties its head to {self.embedding}, which the "
                f"adapter trained alone, and what the head would be called isn't known"
            )
            return ()
        self.unties, self.head = True, head
        if head not in self.edits and head not in self.base:
            self.edits[head] = Edited(self.base[self.embedding])
        note = f"{self.embedding} and {head} were tied, and an adapter trained them apart: they are"
        return (f"{note} two tensors now",)

    def vocabulary(self) -> int | None:
        """The number of tokens if it changes; head and embedding have to agree on it."""
        rows = {
            name: (self.edits[name].start if name in self.edits else self.base[name]).rows
            for name in (self.embedding, self.head)
            if name is not None and (name in self.edits or name in self.base)
        }
        if len(set(rows.values())) > 1:
            self.problems.append(
                "head and embedding would differ in their tokens: "
                + " and ".join(f"{name} has {count:,}" for name, count in rows.items())
            )
        after = rows.get(self.embedding or "")
        before = None if self.embedding is None else self.base[self.embedding].rows
        return after if after != before else None


def _keeps_tied(adapter: Adapter) -> bool:
    """Whether head and embedding are still one after this adapter: it trained neither (tokens
    alone are replaced in both, and a vocabulary that was resized is saved on the way), or both,
    and says that it kept them equal. PEFT says so even where it trained one alone."""
    saved = {name.rpartition(".")[0] for name in adapter.saved}
    touched = _ends((*adapter.updates, *saved)) & _EMBEDDINGS
    trained = _ends((*adapter.updates, *adapter.config.saved)) & _EMBEDDINGS
    return not trained or (adapter.config.keeps_tied and len(touched) == 2)


def _ends(modules: Iterable[str]) -> set[str]:
    return {module.rpartition(".")[2] for module in modules}


def _new_head(base: Checkpoint) -> str | None:
    """What a causal model calls the head that it has stored nowhere."""
    name = str((base.config.get("architectures") or [""])[0])
    return _HEADS[0] if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _in_each_others_way(adapter: Adapter, name: str) -> str:
    return (
        f"{adapter.source.reference} replaces or rescales {name}, which another update changes "
        f"too: what was meant depends on the order; merge them one by one, into a checkpoint each"
    )


def _called(adapter: Adapter, module: str) -> str:
    return f"{module} of {adapter.source.reference}"


def _in(tensor: LazyTensor, kind: DType) -> LazyTensor:
    """`tensor` in the type `kind`."""
    from surgery.kernels.rounding import rounded

    if tensor.dtype == kind:
        return tensor
    kernel = partial(rounded, dtype=kind)
    return LazyTensor(tensor.shape, kind, inputs=(tensor,), kernel=kernel)


def _with_rows(count: int, tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of a gather: all rows of the first input, but those of the second for `tokens`."""
    at = 0
    for row, token in sorted((token, row) for row, token in enumerate(tokens)):
        if at < row:
            yield 0, at, row
        yield 1, token, token + 1
        at = row + 1
    if at < count:
        yield 0, at, count
