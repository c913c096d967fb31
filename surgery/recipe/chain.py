"""The steps of a recipe as one lazy chain: every checkpoint it names, before any is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from surgery.checkpoint import Checkpoint, Weights
from surgery.errors import ArgumentError, MismatchError, RecipeError, SurgeryError
from surgery.hub import Source
from surgery.lora.adapter import Adapter, is_adapter, open_adapter
from surgery.lora.bake import adapter_task_vector
from surgery.lora.extract import extract_lora, outline_lora
from surgery.lora.written import LoraAdapter
from surgery.merging.methods import find_method
from surgery.models import open_checkpoint
from surgery.operations.blocks import compose, main_stack
from surgery.operations.dequantize import dequantize
from surgery.operations.expand import expand
from surgery.operations.grow import grow
from surgery.operations.layers import parse_layers
from surgery.operations.lines import ALIGN_FIRST, lines
from surgery.operations.merge import KEEP_TOKENIZER, merge
from surgery.operations.mergeable import MATCH_ROWS
from surgery.operations.task_vectors import apply, task_vector
from surgery.operations.tying import RESIZE_ONE
from surgery.operations.vocabulary import Tokenizer
from surgery.parallel import Progress
from surgery.recipe.anatomy import Given, correct, correct_anatomy
from surgery.recipe.conditions import check_every_tensor, unused_conditions
from surgery.recipe.document import Steps
from surgery.recipe.schema import (
    ApplyArguments,
    ComposeArguments,
    DequantizeArguments,
    ExpandArguments,
    GrowArguments,
    LinesArguments,
    LoraArguments,
    MergeArguments,
    Recipe,
    Step,
    TaskVectorArguments,
)
from surgery.recipe.settings import Constant, Setting, Spot, spot_of
from surgery.vectors import TaskVector, is_task_vector, open_task_vector

Model = Checkpoint | TaskVector | Adapter | LoraAdapter
"""What an input or a step can be. An adapter that was opened is an input alone, one that was
made is there to be written."""
KINDS = {
    Checkpoint: "a model",
    TaskVector: "a task vector",
    Adapter: "an adapter",
    LoraAdapter: "an adapter that isn't written yet",
}
Bar = Callable[[str, int], AbstractContextManager[Progress]]
"""Shows the progress of a job, by its name and its size in bytes."""
T = TypeVar("T", Checkpoint, TaskVector)
OURS = {
    MATCH_ROWS: "give the merge tokenizer: base, union or the name of a model to have rows matched "
    "by token",
    KEEP_TOKENIZER: "give the merge tokenizer: base with it to keep the base's",
    ALIGN_FIRST: "a merge with method: task_arithmetic, lines: [alpha, beta] and tokenizer: union "
    "matches rows by token, and scales as lines does",
}
"""What there is to do in a recipe, in the place of an argument or an option."""
THEIRS = {
    MATCH_ROWS: "add tokenizer_source: union (or base, or a model) to have rows matched by token",
    KEEP_TOKENIZER: "add tokenizer_source: base with it to keep the base's",
    RESIZE_ONE: f"{RESIZE_ONE} (tokenizer_source isn't there for slices that are put one after "
    f"another)",
}
"""The same in mergekit's configurations."""


@dataclass(frozen=True)
class Work:
    """How to build: on how many threads, shown by which bar; with `measure` False nothing but
    headers is read, and what takes more than them is made up."""

    measure: bool = True
    threads: int | None = None
    bar: Bar | None = None
    tell: Callable[[str], object] | None = None
    """Called with what is noticed and is no mistake."""

    def progress(self, label: str, size: int) -> AbstractContextManager[Progress | None]:
        return nullcontext() if self.bar is None else self.bar(label, size)


def open_inputs(recipe: Recipe, *, headers_only: bool = False) -> dict[str, Model]:
    """The inputs by name. Raises with everything that is wrong with any of them."""
    opened: dict[str, Model] = {}
    errors = Errors(recipe)
    for name, reference in recipe.inputs.items():
        with errors.of(("inputs", name)):
            opener: Callable[..., Model] = open_checkpoint
            if is_task_vector(reference):
                opener = open_task_vector
            elif is_adapter(reference):
                opener = open_adapter
            opened[name] = opener(reference, headers_only=headers_only)
        if isinstance(model := opened.get(name), Checkpoint) and name in recipe.anatomy:
            with errors.of(None):
                opened[name] = _corrected(recipe, name, model)
    errors.raise_all()
    return opened


def _corrected(recipe: Recipe, name: str, model: Checkpoint) -> Checkpoint:
    """An input with what the recipe says of its anatomy."""
    given = recipe.anatomy[name]
    if isinstance(given, str):
        return correct_anatomy(model, given)
    table = recipe.data
    for step in given:
        table = table[step]
    return correct(model, Given(recipe.document, given, table))


def build(recipe: Recipe, inputs: Mapping[str, Model], work: Work) -> dict[str, Model]:
    """Inputs and steps by name. Raises with everything that is wrong with any step; steps that
    need one that failed are left out."""
    made: dict[str, Model] = dict(inputs)
    errors = Errors(recipe)
    for step in recipe.steps:
        if any(name not in made for _, name in step.arguments.references()):
            continue
        before = len(errors.found)
        for key, at in step.required.items():
            with errors.of(at):
                check_every_tensor(step, key, made)
        if len(errors.found) > before:
            continue
        with errors.of(step.at, THEIRS if step.theirs else OURS):
            made[step.name] = _named(step, _Builder(step, made, work).build())
            if work.tell is not None:
                for text in unused_conditions(step, made[step.name], recipe.document):
                    work.tell(f"note: {text}")
    errors.raise_all()
    return made


def to_write(models: Mapping[str, Model], name: str) -> Weights:
    """What the step `name` has made, to be planned and written."""
    found = models[name]
    assert not isinstance(found, Adapter)  # which is an input alone
    return found


class Errors:
    """Errors from several places, raised together."""

    def __init__(self, recipe: Recipe) -> None:
        self.document = recipe.document
        self.found: list[tuple[type[SurgeryError], str]] = []

    @contextmanager
    def of(self, at: Steps | None, advice: Mapping[str, str] | None = None) -> Iterator[None]:
        """Keep what is wrong with the part of the recipe at `at`; None for errors that say where
        they are themselves. `advice` is what to do here, by what a caller would be told."""
        try:
            yield
        except SurgeryError as error:
            for text in error.problems:
                for there, here in (advice or {}).items():
                    text = text.replace(there, here)
                placed = text if at is None else self.document.problem(at, text)
                self.found.append((type(error), placed))

    def raise_all(self) -> None:
        """As what they all are, or else as an error of the recipe."""
        kinds = {kind for kind, _ in self.found}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        kind.raise_if(text for _, text in self.found)


def _named(step: Step, model: Model) -> Model:
    """What a step made, under the step's name."""
    if isinstance(model, (Adapter, LoraAdapter)):
        return model
    if isinstance(model, TaskVector):
        origin = next(iter(model.sources.values()))
        return replace(model, source=Source(step.name, origin.path, step=True))
    return replace(model, source=Source(step.name, model.source.path, step=True))


class _Builder:
    """One step, with what it refers to."""

    def __init__(self, step: Step, made: Mapping[str, Model], work: Work) -> None:
        self.step, self.made, self.work = step, made, work

    def build(self) -> Model:
        result: Model = getattr(self, f"_{self.step.operation}")(self.step.arguments)
        return result

    def _get(self, name: str, kind: type[T]) -> T:
        found = self.made[name]
        if not isinstance(found, kind):
            raise MismatchError(
                f"{name} is {KINDS[type(found)]}, and {self.step.operation} takes {KINDS[kind]} "
                f"there"
            )
        return found

    def _model(self, name: str) -> Checkpoint:
        return self._get(name, Checkpoint)

    def _merge(self, given: MergeArguments) -> Checkpoint:
        base = None if given.base is None else self._model(given.base)
        models = [self._model(name) for name in given.names]
        settings = self.step.settings
        fixed = {name: s.value for name, s in settings.items() if isinstance(s, Constant)}
        varying = {name: s for name, s in settings.items() if not isinstance(s, Constant)}
        scaling: Any = tuple(given.lines) if isinstance(given.lines, list) else given.lines
        if scaling is not None and "lambda" in varying:
            raise ArgumentError("lines has beta in the place of lambda, one number for all tensors")
        if scaling == "auto" and not self.work.measure:
            scaling = (1.0, fixed.pop("lambda", 1.0))  # any: what is planned doesn't depend on it
        per_tensor = None
        if varying:
            first = models[0] if base is None else base
            per_tensor = _PerTensor(self.step, given.method, varying, first)
        size = 4 * models[0].numel if scaling == "auto" else 0
        with self.work.progress("measuring", size) if size else nullcontext() as advance:
            return merge(
                models,
                base=base,
                method=given.method,
                seed=given.seed,
                lines=scaling,
                dtype=given.dtype,
                tokenizer=self._tokenizer(given),
                pad_to_multiple_of=given.pad_to_multiple_of,
                scope=given.scope,
                per_tensor=per_tensor,
                threads=self.work.threads,
                progress=advance,
                **fixed,
            )

    def _tokenizer(self, given: MergeArguments) -> Tokenizer | None:
        name = given.tokenizer
        whose: dict[str, Tokenizer] = {"base": "base", "union": "union"}
        return None if name is None else whose.get(name) or self._model(name)

    def _lines(self, given: LinesArguments) -> Checkpoint:
        return lines(
            self._model(given.base),
            self._model(given.tuned),
            alpha=given.alpha,
            beta=given.beta,
            outside=given.outside,
            scope=given.scope,
        )

    def _grow(self, given: GrowArguments) -> Checkpoint:
        measured = given.choose == "norm" and not self.work.measure
        return grow(
            self._model(given.model),
            factor=given.factor,
            width=given.width,
            layers=str(given.layers),
            scope=given.scope,
            experts=given.experts,
            multiple_of=given.multiple_of,
            choose="first" if measured else given.choose,
            symmetry_break=given.break_symmetry,
            seed=given.seed,
            uniform=given.uniform,
        )

    def _expand(self, given: ExpandArguments) -> Checkpoint:
        after = None if given.after is None else str(given.after)
        return expand(self._model(given.model), copies=given.copies, after=after)

    def _dequantize(self, given: DequantizeArguments) -> Checkpoint:
        return dequantize(self._model(given.model), dtype=given.dtype)

    def _task_vector(self, given: TaskVectorArguments) -> TaskVector:
        return task_vector(self._model(given.base), self._model(given.tuned), dtype=given.dtype)

    def _apply(self, given: ApplyArguments) -> Checkpoint:
        base = self._model(given.base)
        vectors = [
            adapter_task_vector(base, found)
            if isinstance(found := self.made[name], Adapter)
            else self._get(name, TaskVector)
            for name in given.vectors
        ]
        if not self.work.measure:  # whose they are is told by their base's weights
            vectors = [replace(vector, base=base) for vector in vectors]
        return apply(base, *vectors, scale=given.scale)

    def _lora(self, given: LoraArguments) -> LoraAdapter:
        base, tuned = self._model(given.base), self._model(given.tuned)
        how: dict[str, Any] = given.model_dump(exclude={"base", "tuned", "seed"})
        if not self.work.measure:
            return outline_lora(base, tuned, **how)
        with self.work.progress("decomposing", tuned.nbytes) as advance:
            return extract_lora(
                base, tuned, seed=given.seed, threads=self.work.threads, progress=advance, **how
            )

    def _compose(self, given: ComposeArguments) -> Checkpoint:
        blocks = []
        for item in given.blocks:
            model = self._model(item.model)
            depth = model.anatomy.stacks[main_stack(model)]
            for part in str(item.layers).split(","):  # one after another, as they are written
                blocks += [(model, at) for at in parse_layers(part, depth)]
        outside = {
            name: self._model(value)
            for name in ("before", "after")
            if (value := getattr(given, name)) is not None
        }
        return compose(blocks, **outside)


class _PerTensor:
    """Parameters of a merge by a tensor's name."""

    def __init__(
        self,
        step: Step,
        method: str,
        settings: Mapping[str, Setting | tuple[Setting | None, ...]],
        first: Checkpoint,
    ) -> None:
        self.defaults = {p.name: p.default for p in find_method(method).parameters}
        self.step, self.settings, self.first = step, settings, first

    def __call__(self, name: str) -> Mapping[str, Any]:
        anatomy = self.first.anatomy
        place = anatomy.places.get(name)
        spot = spot_of(name, place, anatomy, self.step.spans, self.step.behind)
        values = {}
        for key, setting in self.settings.items():
            if isinstance(setting, tuple):
                values[key] = tuple(self._value(key, one, spot) for one in setting)
            else:
                values[key] = self._value(key, setting, spot)
        return values

    def _value(self, key: str, setting: Setting | None, spot: Spot) -> Any:
        found = None if setting is None else setting.at(spot)
        return self.defaults[key] if found is None else found
