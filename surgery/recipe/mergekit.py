"""mergekit's configurations as recipes: what is documented there means the same here, and what
isn't supported is refused by name. Where results differ, and why: docs/mergekit.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import RecipeError
from surgery.merging.methods import METHODS, Method
from surgery.merging.parameters import unknown
from surgery.recipe.document import Document, Steps
from surgery.recipe.graph import Problems, needed_for, ordered
from surgery.recipe.mergekit_checks import (
    check_added_base,
    check_no_base,
    check_together,
    required_parameters,
)
from surgery.recipe.mergekit_parameters import (
    Slice,
    Source,
    merged_settings,
    parameters_in,
)
from surgery.recipe.schema import Blocks, ComposeArguments, MergeArguments, Recipe, Step
from surgery.recipe.settings import Setting, shortened

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "name", "out_path", "random_seed",
)  # fmt: skip
OTHER_TOOLS = {
    "experts": "this is a file for mergekit-moe, and mixtures of experts aren't made here",
    "gate_mode": "this is a file for mergekit-moe, and mixtures of experts aren't made here",
    "genome": "this is a file for mergekit-evolve, and parameters aren't searched for here: run "
    "the configuration that it finds",
}
"""Keys of files that are another tool's as a whole."""
REFUSED = {
    "modules": "models made of several modules aren't supported yet",
    "chat_template": "put the template into the output's tokenizer files instead",
    "input_model_parameters": "give parameters beside each model",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass
class _Translation:
    """One document on its way to steps."""

    document: Document
    at: Steps
    """What stands before the places in this document, where there are several."""
    known: Mapping[str, str]
    """Steps by the name or the path that other documents call them."""
    taken: Sequence[str]
    """The names of all documents."""
    inputs: dict[str, str]
    lines: dict[Steps, int]
    """Where what the recipe has stands in the file."""
    problems: Problems
    notes: dict[str, None]
    steps: list[Step] = field(default_factory=list)

    def refer(self, given: Any, at: Steps) -> str:
        """The name under which a model is known, as an input or as another document."""
        reference = self._reference(given, at)
        if reference in self.known:
            return self.known[reference]
        parts = tuple(f"{name}:" for name in self.taken)  # the steps that put slices together
        clash = reference in self.taken or reference.startswith(parts)
        name = f"{reference} (input)" if clash else reference
        if name not in self.inputs:
            self.inputs[name] = reference
            self.lines["inputs", name] = self.document.lines[at]
        return name

    def _reference(self, given: Any, at: Steps) -> str:
        if isinstance(given, str) and given:
            return given
        if isinstance(given, Mapping):
            inner = given.get("model", given)
            lora = given.get("lora")
            if isinstance(inner, Mapping) and set(inner) <= {"path", "revision"}:
                revision = inner.get("revision")
                made = str(inner.get("path", "")) + (f"@{revision}" if revision else "")
                return made if lora is None else f"{made}+{self._reference(lora, at)}"
            if isinstance(inner, str) and lora is not None:
                return f"{inner}+{self._reference(lora, at)}"
        self.problems.add(at, f"{given!r} is no model that is supported: give a path or a Hub id")
        return ""


def translate(documents: Sequence[Document]) -> Recipe:
    """The recipe that these documents of one file make. Raises RecipeError with all that is
    wrong."""
    problems = Problems(documents[0])
    names = _names(documents, problems)
    known: dict[str, str] = {}
    for document, name in zip(documents, names, strict=True):
        known |= {given: name for key in ("name", "out_path") if (given := _text(document, key))}
    inputs: dict[str, str] = {}
    notes: dict[str, None] = {}
    steps: list[Step] = []
    lines: dict[Steps, int] = {}
    for document, name in zip(documents, names, strict=True):
        problems.document = document
        at = () if len(documents) == 1 else (name,)
        lines |= {(*at, *place): line for place, line in document.lines.items()}
        if not isinstance(document.data, Mapping):
            problems.add((), "a configuration is a table")
            continue
        one = _Translation(document, at, known, names, inputs, lines, problems, notes)
        _document(one, name)
        steps += one.steps
    data = [d.data for d in documents]
    whole = Document(documents[0].path, data[0] if len(data) == 1 else data, lines)
    problems.document = whole
    in_order = ordered(steps, problems)
    RecipeError.raise_if(problems)
    unnamed = [
        name
        for document, name in zip(documents, names, strict=True)
        if not _text(document, "name") and not _text(document, "out_path")
    ]
    output = (unnamed or names)[-1]
    needed = needed_for(output, steps)
    for name in names:
        if name not in needed:
            notes[f"{name} isn't needed for {output}, and isn't written"] = None
    return Recipe(inputs, tuple(in_order), output, (), whole, tuple(notes))


def _text(document: Document, key: str) -> str | None:
    """What a document has under `key`, if that is text."""
    given = document.data.get(key) if isinstance(document.data, Mapping) else None
    return given if isinstance(given, str) and given else None


def _names(documents: Sequence[Document], problems: Problems) -> list[str]:
    """What the documents are called. One without a name is the last merge, which takes others."""
    names: list[str] = []
    last: Document | None = None
    for number, document in enumerate(documents, 1):
        problems.document = document
        data = document.data if isinstance(document.data, Mapping) else {"name": None}
        called = {key: data[key] for key in ("name", "out_path") if key in data}
        for key, given in called.items():
            if given is not None and _text(document, key) is None:
                problems.add((key,), f"{given!r} isn't text")
        name = _text(document, "name")
        if name in names:
            problems.add(("name",), f"another document is called {name} as well")
        if not called:
            if last is not None:
                problems.add((), f"this has no name, and neither has {last.where(())}")
            last = document
        names.append(name or ("merged" if len(documents) == 1 else f"merge-{number}"))
    return names


def _document(one: _Translation, name: str) -> None:
    data, problems = one.document.data, one.problems
    before = len(problems)
    other = next((key for key in data if key in OTHER_TOOLS), None)
    if other is not None:  # what else it has, or lacks, is as that tool wants it
        problems.add((other,), OTHER_TOOLS[other])
        return
    for key in data:
        if key in REFUSED:
            problems.add((key,), f"{key} isn't supported: {REFUSED[key]}")
        elif key not in KEYS:
            problems.add((key,), unknown("key", key, KEYS))
    if data.get("merge_method") is None:
        problems.add((), "merge_method is missing: it says how, such as merge_method: linear")
        return
    given = str(data["merge_method"])
    method = METHODS.get(given)
    if method is None:
        problems.add(("merge_method",), unknown("merge method", given, METHODS))
        return
    if ("models" in data) == ("slices" in data):
        problems.add((), "give either models or slices")
        return
    parameters = parameters_in(
        data.get("parameters"), ("parameters",), method, one.problems, one.notes
    )
    base = one.refer(data["base_model"], ("base_model",)) if data.get("base_model") else None
    if base is None:
        check_no_base(problems, method)
    if "models" in data:
        slices: list[Slice] = [(_models(one, data["models"], base, method, parameters), {})]
    else:
        slices = _slices(one, data["slices"], method)
    written = {"dtype": _dtype(one), "seed": _seed(one), **_tokenizer(one, base, method)}
    columns = _columns(one, slices, base, method) if len(problems) == before else None
    if columns is None:
        return
    based, models = columns
    _note_left_out(one, models, method)
    cut = "slices" in data
    settings = merged_settings(method, slices, models, parameters)
    check_together(one.document, problems, method, models, settings)
    required = required_parameters(one.document, problems, method, settings)
    if len(problems) > before:
        return
    if cut and written["tokenizer"] is not None:
        _note_tokenizer(one, [based, *models])
    arguments = MergeArguments(
        models=[
            _column(one, name, at, column) if cut else column[0].model
            for at, column in enumerate(models, 1)
        ],
        base=_column(one, name, 0, based) if cut and based else base if based or not cut else None,
        method=method.name,
        **written,
    )
    if method.base == "none":
        arguments.base = None
    spans = tuple(stop - start for s, _ in slices for start, stop in [s[0].blocks or (0, 0)])
    one.steps.append(
        Step(
            name,
            "merge",
            arguments,
            one.at,
            settings=settings,
            spans=spans if cut else None,
            behind=0.0,
            theirs=True,
            required={name: (*one.at, *at) for name, at in required.items()},
        )
    )


def _models(
    one: _Translation,
    given: Any,
    base: str | None,
    method: Method,
    parameters: Mapping[str, Setting],
) -> list[Source]:
    """The sources of a merge of whole models. Where the method treats all alike the base is one
    too, and the first: config, tokenizer and types are its own."""
    at: Steps = ("models",)
    if not isinstance(given, list) or not given:
        one.problems.add(at, "this is a list of models")
        return []
    sources = [_source(one, item, (*at, number), method) for number, item in enumerate(given)]
    if not base or method.base != "none":
        return sources
    if base in [s.model for s in sources]:
        return sorted(sources, key=lambda source: source.model != base)
    check_added_base(base, method, len(sources), parameters, one.problems, one.notes)
    return [Source(base, ("base_model",), {}), *sources]


def _source(
    one: _Translation, item: Any, at: Steps, method: Method, extra: tuple[str, ...] = ()
) -> Source:
    if not isinstance(item, Mapping) or "model" not in item:
        one.problems.add(at, "give the model: - model: org/name")
        return Source("", at, {})
    for key in item:
        if key not in ("model", "parameters", *extra):
            one.problems.add((*at, key), unknown("key", key, ["model", "parameters", *extra]))
    model = one.refer(item["model"], (*at, "model"))
    parameters = parameters_in(
        item.get("parameters"), (*at, "parameters"), method, one.problems, one.notes
    )
    blocks = None
    if "layer_range" in extra:
        given = item.get("layer_range")
        ends = given if isinstance(given, list) else []
        if [type(end) for end in ends] == [int, int] and 0 <= ends[0] < ends[1]:
            blocks = (ends[0], ends[1])
        else:
            one.problems.add((*at, "layer_range"), f"{given!r} isn't [first, one past the last]")
            blocks = (0, 1)
    return Source(model, at, parameters, blocks)


def _slices(one: _Translation, given: Any, method: Method) -> list[Slice]:
    """For every slice its sources and its own parameters."""
    if not isinstance(given, list) or not given:
        one.problems.add(("slices",), "this is a list of slices, each with its sources")
        return []
    slices = []
    for number, item in enumerate(given):
        at: Steps = ("slices", number)
        sources = item.get("sources") if isinstance(item, Mapping) else None
        if not isinstance(sources, list) or not sources:
            one.problems.add(at, "a slice has sources: - sources: [{model: ..., layer_range: ...}]")
            continue
        for key in item:
            if key not in ("sources", "parameters"):
                one.problems.add((*at, key), unknown("key", key, ["sources", "parameters"]))
        found = [
            _source(one, source, (*at, "sources", i), method, ("layer_range",))
            for i, source in enumerate(sources)
        ]
        lengths = {stop - start for s in found for start, stop in [s.blocks or (0, 0)]}
        if len(lengths) > 1:
            one.problems.add(at, f"its sources have {sorted(lengths)} blocks, and need as many")
        slices.append(
            (
                found,
                parameters_in(
                    item.get("parameters"), (*at, "parameters"), method, one.problems, one.notes
                ),
            )
        )
    return slices


def _note_left_out(one: _Translation, models: Sequence[Sequence[Source]], method: Method) -> None:
    """Parameters beside a model that are one for all models."""
    for parameter in method.parameters:
        beside = [s for column in models for s in column if parameter.name in s.parameters]
        if beside and not parameter.per_model and len(models) > 1:
            one.notes[
                f"{parameter.name} is one for all models of {method.name}: beside a model it is "
                f"left out, as mergekit does"
            ] = None


def _columns(
    one: _Translation,
    slices: Sequence[tuple[Sequence[Source], Any]],
    base: str | None,
    method: Method,
) -> tuple[list[Source], list[list[Source]]] | None:
    """What is merged with what: the base's sources, one for each slice, and those of each model."""
    if not slices or not all(sources for sources, _ in slices):
        return None
    based: list[Source] = []
    rest: list[list[Source]] = []
    for number, (sources, _) in enumerate(slices):
        own = [s for s in sources if s.model == base and method.base != "none"]
        others = [s for s in sources if s not in own]
        if sources[0].blocks is not None and base is not None and method.base != "none":
            if len(own) != 1:
                one.problems.add(
                    ("slices", number), f"the base {base} has to be one of the slice's sources"
                )
                return None
            based += own
        rest.append(others)
    counts = {len(others) for others in rest}
    if len(counts) > 1:
        one.problems.add(
            ("slices",),
            f"the slices have {sorted(counts)} models to merge, and every slice needs as many",
        )
        return None
    if counts == {0}:
        one.problems.add(("base_model",), "there is nothing to merge with the base")
        return None
    return based, [list(column) for column in zip(*rest, strict=True)]


def _note_tokenizer(one: _Translation, columns: Sequence[Sequence[Source]]) -> None:
    """That blocks of several models in one column keep the rows that they come with."""
    if any(len({source.model for source in column}) > 1 for column in columns):
        one.notes[
            "tokenizer_source isn't there for slices that are put one after another: embedding and "
            "head are taken as they are"
        ] = None


def _column(one: _Translation, name: str, at: int, column: Sequence[Source]) -> str:
    """The name of a step that puts the blocks of a column together."""
    arguments = ComposeArguments(
        blocks=[
            Blocks(model=s.model, layers=f"{s.blocks[0]}-{s.blocks[1] - 1}")
            for s in column
            if s.blocks is not None
        ]
    )
    step = Step(
        f"{name}:base" if at == 0 else f"{name}:{at}",
        "compose",
        arguments,
        (*one.at, *column[0].at),
        theirs=True,
    )
    one.steps.append(step)
    return step.name


def _dtype(one: _Translation) -> Any:
    """The type to write: arithmetic is in float32 whatever `dtype` says."""
    for key in ("out_dtype", "dtype"):
        value = one.document.data.get(key)
        if value is not None:
            if value not in DTYPES:
                one.problems.add((key,), unknown("type", str(value), DTYPES))
                return None
            return value
    return None


def _seed(one: _Translation) -> int:
    """The seed of what is random. mergekit takes it from the command line, and files have it."""
    value = one.document.data.get("random_seed")
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        one.problems.add(("random_seed",), f"{shortened(value)} isn't a whole number")
        return 0
    return value


def _tokenizer(one: _Translation, base: str | None, method: Method) -> dict[str, Any]:
    data = one.document.data
    if data.get("tokenizer_source") is not None and data.get("tokenizer") is not None:
        one.problems.add(("tokenizer",), "give either tokenizer_source or tokenizer")
    source, at, pad = data.get("tokenizer_source"), ("tokenizer_source",), None
    given = data.get("tokenizer")
    if isinstance(given, Mapping):
        at = ("tokenizer",)
        source, pad = given.get("source", "union"), given.get("pad_to_multiple_of")
        for key in given:
            if key == "tokens":
                one.problems.add(
                    (*at, key), "tokens isn't supported: rows are matched by the token's string"
                )
            elif key not in ("source", "pad_to_multiple_of"):
                one.problems.add((*at, key), unknown("key", key, ["source", "pad_to_multiple_of"]))
        if pad is not None and not isinstance(pad, int):
            one.problems.add((*at, "pad_to_multiple_of"), f"{pad!r} is no whole number")
            pad = None
    elif given is not None:
        one.problems.add(("tokenizer",), "this is a table with a source")
    if source is None:
        return {"tokenizer": None, "pad_to_multiple_of": pad}
    if source == "base" and base is not None and method.base == "none":
        source = base  # which the merge itself doesn't know
    elif source not in ("base", "union"):
        plain = source.removeprefix("model:") if isinstance(source, str) else source
        source = one.refer(plain, at)
    return {"tokenizer": source, "pad_to_multiple_of": pad}
