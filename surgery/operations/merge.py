"""Merge: several models, or what fine-tuning did to them, made into one, tensor by tensor.

The methods are in `surgery/merging/`; here is what they have in common: what has to agree, tied
heads, what isn't merged, and LiNeS on top.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from surgery.anatomy import Role, untied_config
from surgery.anatomy.scopes import names_in_scope
from surgery.checkpoint import Checkpoint, Edit
from surgery.dtypes import DTYPES, DType
from surgery.errors import ArgumentError
from surgery.merging.finite import finite
from surgery.merging.job import Job
from surgery.merging.methods import Method, find_method, joint_problems
from surgery.merging.parameters import resolve, unknown
from surgery.operations.dequantize import computable
from surgery.operations.dtype import main_dtype, with_dtype
from surgery.operations.lines import depth_scale, scale_of
from surgery.operations.mergeable import Lines, check_arguments, check_together
from surgery.operations.vocabulary import Tokenizer, align_vocabulary, check_same_tokens
from surgery.parallel import Progress
from surgery.tensor import LazyTensor

PerTensor = Callable[[str], Mapping[str, Any]]
KEEP_TOKENIZER = "pass tokenizer='base' (--tokenizer base) with it to keep the base's"


def merge(
    models: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    method: str,
    seed: int = 0,
    lines: Lines = None,
    dtype: str | None = None,
    per_tensor: PerTensor | None = None,
    tokenizer: Tokenizer | None = None,
    pad_to_multiple_of: int | None = None,
    scope: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Checkpoint:
    """The merge of `models` by `method` (one of `METHODS`, with its `parameters`).

    A parameter that is per model takes a number, or one for each model; `lambda` is written
    `lambda_`. `per_tensor` gives, by a tensor's name, parameters that differ for it. With
    `lines=(alpha, beta)` the merged update is scaled with depth, theta = theta_base +
    lambda(l) * tau_merged (LiNeS, arXiv 2410.17146); "auto" takes alpha = ||sum tau_i||_1 /
    (N ||tau_merged||_1), for which every input is read here, by `threads`, and the method's
    `lambda` as beta.

    With `dtype` ("float32", "bfloat16", ...) tensors of the type that most of the weights have
    are rounded to that one instead; those that another type sets apart keep it.

    Models whose vocabularies differ are refused unless `tokenizer` says whose is wanted: "base",
    "union", or a checkpoint; rows are then matched by token (see `align_vocabulary`), and
    `pad_to_multiple_of` rounds their number up.

    With `scope` ("language", "vision", "encoder", the name of a stack; see anatomy/scopes.py) only
    those tensors are merged, and the others are the base's, or the first model's.

    Integers and buffers stay as they are. Dtypes, config and companion files are those of the
    base, or of the first model if the method takes none. Raises ArgumentError, MismatchError or
    UnsupportedError, with all that is wrong, and with `tokenizer` also what `align_vocabulary`
    raises of tokenizers that can't be read.
    """
    chosen = find_method(method)
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    sample = dict(given)
    if per_tensor is not None and models:  # what differs by tensor has to be given only there
        sample |= per_tensor(next(iter(models[0] if base is None else base), ""))
    values = check_arguments(chosen, models, base, sample, lines)
    base, models, tokenizer = _computable(models, base, tokenizer)
    if tokenizer is None:
        ArgumentError.raise_if(_padding_alone(pad_to_multiple_of))
        check_together(models, base)
        check_same_tokens(models, base)
    else:
        base, models = align_vocabulary(
            models, base=base, tokenizer=tokenizer, pad_to_multiple_of=pad_to_multiple_of
        )
        check_together(models, base)
    if scope is not None and dtype is not None:
        raise ArgumentError("give scope or dtype: with both, what isn't merged keeps its own type")
    meant = names_in_scope((models[0] if base is None else base).anatomy, scope)
    merging = _Merging(chosen, models, base, seed, given, per_tensor, _float_type(dtype), meant)
    values |= dict.fromkeys(merging.varying, "differs by tensor")
    if lines is not None and "lambda" in merging.varying:
        raise ArgumentError("lines takes lambda as its beta, which is one number for all tensors")
    scales, details = None, {}
    if lines is not None:
        assert base is not None
        alpha, beta = lines if lines != "auto" else (0.0, 0.0)
        if lines == "auto":
            from surgery.merging.alpha import automatic_alpha

            alpha = automatic_alpha(merging.updates(), len(models), threads, progress)
            beta = values.get("lambda", 1.0)
        scales = merging.scales(alpha, beta)
        details = {"lines": _lines_details(base, alpha, beta)}
    edit = Edit(
        "merge",
        {
            "method": method,
            **values,
            **({"seed": seed} if chosen.random else {}),
            "lines": list(lines) if isinstance(lines, tuple) else lines,
            **({} if dtype is None else {"dtype": dtype}),
            **({} if scope is None else {"scope": scope}),
        },
        {
            **({} if base is None else {"base": base.source}),
            **{f"model_{at}": model.source for at, model in enumerate(models, 1)},
        },
        details,
    )
    return merging.first.edited(edit, merging.tensors(scales), merging.config(), others=models)


def _computable(
    models: Sequence[Checkpoint], base: Checkpoint | None, tokenizer: Tokenizer | None
) -> tuple[Checkpoint | None, Sequence[Checkpoint], Tokenizer | None]:
    """All inputs, with 8-bit floats times their scales. `tokenizer` stays one of them if it is."""
    roles = {f"model {at}": model for at, model in enumerate(models, 1)}
    given = {**({} if base is None else {"base": base}), **roles}
    found = computable(**given)
    pairs = list(zip(given.values(), found, strict=True))
    notes = [note for before, after in pairs[1:] for note in after.notes[len(before.notes) :]]
    if notes:  # they go with the result, which starts as the first
        found[0] = replace(found[0], notes=(*found[0].notes, *dict.fromkeys(notes)))
    for before, after in zip(given.values(), found, strict=True):
        tokenizer = after if tokenizer is before else tokenizer
    return (None, found, tokenizer) if base is None else (found[0], found[1:], tokenizer)


def _padding_alone(multiple: int | None) -> Iterator[str]:
    if multiple is not None:
        yield f"pad_to_multiple_of pads the rows of a tokenizer: {KEEP_TOKENIZER}"


class _Merging:
    """A merge that has been checked: which tensors, of which inputs, with which parameters."""

    def __init__(
        self,
        method: Method,
        models: Sequence[Checkpoint],
        base: Checkpoint | None,
        seed: int,
        given: Mapping[str, Any],
        per_tensor: PerTensor | None,
        dtype: DType | None,
        meant: Collection[str],
    ) -> None:
        self.method, self.models, self.base, self.seed = method, models, base, seed
        self.first = models[0] if base is None else base
        self.dtypes = {} if dtype is None else {main_dtype(self.first): dtype}
        every = models if base is None else (base, *models)
        self.tied = all(model.anatomy.tied for model in every)
        heads = [model.anatomy.head for model in every if model.anatomy.head is not None]
        self.head = heads[0] if heads and not self.tied else self.first.anatomy.head
        self.names = [
            name
            for name, tensor in self.first.items()
            if tensor.dtype.kind == "float"
            and self.first.anatomy.places[name].role is not Role.BUFFER
            and name in meant
        ]
        of_head = self.first.anatomy.embedding
        if self.head is not None and self.head not in self.first and of_head in meant:
            self.names.append(self.head)
        self.values = self._values(given, per_tensor)
        first_values = next(iter(self.values.values()), {})
        self.varying = [
            name
            for name, value in first_values.items()
            if any(own[name] != value for own in self.values.values())
        ]
        """Parameters that differ from tensor to tensor."""
        self.made: dict[str, LazyTensor] = {}
        """Updates that were made to be measured."""

    def _values(
        self, given: Mapping[str, Any], per_tensor: PerTensor | None
    ) -> dict[str, dict[str, Any]]:
        """The parameters of every tensor."""
        if per_tensor is None:  # one for all, and `check_arguments` found nothing wrong with it
            same, _ = resolve(self.method.parameters, given, len(self.models))
            return dict.fromkeys(self.names, same)
        values = {}
        problems: dict[str, list[str]] = {}
        for name in self.names:
            own = {**given, **per_tensor(name)}
            values[name], found = resolve(self.method.parameters, own, len(self.models))
            for problem in found + joint_problems(self.method, values[name], len(self.models)):
                problems.setdefault(problem, []).append(name)
        ArgumentError.raise_if(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {problem}"
            for problem, names in problems.items()
        )
        return values

    def tensors(self, scales: Mapping[str, float] | None) -> dict[str, LazyTensor]:
        """Every merged tensor by name; `scales` takes the place of the method's own factor."""
        return {
            name: self._build(name, None if scales is None else scales[name]) for name in self.names
        }

    def updates(self) -> dict[str, tuple[LazyTensor, LazyTensor]]:
        """For every tensor the sum of the task vectors and the merged one, unscaled."""
        self.made = {name: self._update(name) for name in self.names}
        return {name: (self._sum(name), made) for name, made in self.made.items()}

    def scales(self, alpha: float, beta: float) -> dict[str, float]:
        """lambda(l) of LiNeS for every tensor."""
        anatomy = self.first.anatomy
        return {
            name: scale_of(anatomy.places[name], anatomy, alpha, beta, "alpha")
            if name in anatomy.places
            else alpha
            for name in self.names
        }

    def config(self) -> dict[str, Any]:
        """The config, untied if head and embedding are now two."""
        config = self.first.settled_config
        for dtype in self.dtypes.values():
            config = with_dtype(config, dtype)
        if self.tied or self.head not in self.names or not self.first.anatomy.tied:
            return config
        return untied_config(config)

    def _build(self, name: str, scale: float | None) -> LazyTensor:
        if scale is None:
            return self.method.build(self._job(name, self.values[name].get("lambda", 1.0)))
        job = self._job(name)
        assert self.base is not None
        if self.method.base == "none":
            return _scaled_merge(self.method, job, self._of(self.base, name), scale)
        built = self.method.build(replace(job, scale=scale))
        known = self.made.get(name)
        if built.measure is None or known is None:
            return built
        return replace(built, measure=partial(_already_measured, known))

    def _job(self, name: str, scale: float = 1.0) -> Job:
        place = self.first.anatomy.places.get(name)
        tied = self.tied and name == self.head
        first = self.first[self._name_in(self.first, name)]
        return Job(
            # noise goes by the name: a tied head stored twice gets that of the embedding
            name=self.first.anatomy.embedding or name if tied else name,
            base=None
            if self.base is None or self.method.base == "none"
            else self._of(self.base, name),
            models=tuple(self._of(model, name) for model in self.models),
            parameters=self.values[name],
            dtype=self.dtypes.get(first.dtype, first.dtype),
            seed=self.seed,
            scale=scale,
            matrix=len(first.shape) == 2
            and place is not None
            and place.block is not None
            and place.role is not Role.NORM,
        )

    def _of(self, model: Checkpoint, name: str) -> LazyTensor:
        """The tensor `name` of a model, to compute with."""
        return finite(model, self._name_in(model, name))

    def _name_in(self, model: Checkpoint, name: str) -> str:
        """What `name` is called in a model, which may tie its head to its embedding."""
        if name not in model and name == self.head and model.anatomy.embedding is not None:
            return model.anatomy.embedding
        return name

    def _update(self, name: str) -> LazyTensor:
        """tau_merged, unscaled, in the type that it is computed in."""
        job = self._job(name)
        if self.method.base != "none":
            return self.method.build(replace(job, bare=True))
        from surgery.kernels.merging import difference

        assert self.base is not None
        merged = self.method.build(replace(job, dtype=job.compute))
        return LazyTensor(
            merged.shape,
            job.compute,
            inputs=(self._of(self.base, name), merged),
            kernel=partial(difference, compute=job.compute, dtype=job.compute),
        )

    def _sum(self, name: str) -> LazyTensor:
        from surgery.kernels.merging import Combination, combine

        assert self.base is not None
        job = replace(self._job(name), base=self._of(self.base, name), bare=True)
        chosen = Combination(1.0, (1.0,) * len(job.models))
        return job.tensor(partial(combine, combination=chosen), spreads=True)


def _float_type(name: str | None) -> DType | None:
    floats = {t.torch_name: t for t in DTYPES.values() if t.kind == "float"}
    if name is not None and name not in floats:
        raise ArgumentError(unknown("type", name, [str(known) for known in floats]))
    return None if name is None else floats[name]


def _scaled_merge(method: Method, job: Job, base: LazyTensor, scale: float) -> LazyTensor:
    """base + scale * (merged - base), for a method that knows no base, rounded once."""
    from surgery.kernels.updates import scale_update

    merged = method.build(replace(job, dtype=job.compute))
    kernel = partial(scale_update, scale=scale, compute=job.compute, dtype=job.dtype)
    return LazyTensor(base.shape, job.dtype, inputs=(base, merged), kernel=kernel)


def _already_measured(known: LazyTensor, inputs: tuple[LazyTensor, ...]) -> Any:
    """What was measured of the same inputs before."""
    return known.measured


def _lines_details(base: Checkpoint, alpha: float, beta: float) -> dict[str, Any]:
    return {
        "alpha": alpha,
        "beta": beta,
        "scales": {
            stack: [depth_scale(block, depth, alpha, beta) for block in range(depth)]
            for stack, depth in base.anatomy.stacks.items()
        },
    }
