"""Run a recipe: build the chain, check what has to hold, write what is to be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import ArgumentError, OutputError, VerificationError
from surgery.integrity.seal import bytes_to_hash
from surgery.recipe.chain import Model, Work, build, open_inputs, to_write
from surgery.recipe.checks import Check, Proving, check, check_requirements, requirements
from surgery.recipe.schema import Recipe
from surgery.verification import Relation, Verification, certify, find_relation
from surgery.verification.report import Case, write_report
from surgery.writing.locks import locked, staging_folder
from surgery.writing.parts import Part
from surgery.writing.plan import MAX_SHARD_BYTES, plan
from surgery.writing.resume import require_all
from surgery.writing.staging import Stage, check_target
from surgery.writing.write import PartWritten, Written, check_space, write, write_part


@dataclass(frozen=True)
class Outcome:
    """What was checked, and what was written, by the name of the step."""

    checks: tuple[Check, ...]
    written: Mapping[str, Written]
    parts: Mapping[str, PartWritten] = field(default_factory=dict)
    """What was written of a part of the shards alone, which has no final name yet."""


def run_recipe(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = True,
    proving: Proving | None = None,
    report: str | Path | None = None,
    checked: Callable[[Sequence[Check]], object] | None = None,
    work: Work | None = None,
    command: str | None = None,
    resume: bool = True,
    part: Part | None = None,
    finish: bool = False,
    tell: Callable[[str], object] | None = None,
    checksums: bool = False,
    sign_key: str | Path | None = None,
) -> Outcome:
    """Do what `recipe` says, and write its output to `out`, all of it or nothing.

    The chain is lazy: a step is written only if it has a `write` of its own. All inputs are
    opened and all steps checked, from headers, before anything is read; then what has to hold is
    checked, and only then is anything written. With `verify` steps that promise to keep the
    function (grow, expand) are proved to, whatever the recipe requires besides. `report` is a
    file for the results of the checks, in JUnit's format, written whether they hold or not, and
    `checked` is called with them. `checksums`, `sign_key`, `resume` and `tell` are as in `write`.

    With `part` the shards of that part are written into the stage and nothing else is done;
    `finish`, after all parts, does the rest: it checks what has to hold and that every shard is
    there as it was written, and publishes. The proof is made there, once, and not in every part.

    Raises RecipeError or what the step that is wrong raises; VerificationError with every
    check that doesn't hold; OutputError.
    """
    work, proving = work or Work(), proving or Proving()
    required = requirements(recipe, verify=verify)
    targets = targets_of(recipe, out)
    inputs = open_inputs(recipe)
    if report is not None:
        _check_report(Path(report).absolute(), recipe, targets, inputs)
    planned = build(recipe, inputs, Work(measure=False))
    check_requirements(recipe, planned, required, proving)
    check_targets(targets, inputs, planned, overwrite=overwrite)
    for name, target in targets.items():
        layout = plan(to_write(planned, name), max_shard_bytes=max_shard_bytes)
        check_space(layout, target)
    if part is not None:
        return _write_part(
            build(recipe, inputs, work), targets, part, overwrite, max_shard_bytes, work, tell
        )
    with ExitStack() as locks:
        for name, target in targets.items():  # checks can take hours: another run is refused now
            locks.enter_context(locked(target))
            if finish:
                layout = plan(to_write(planned, name), max_shard_bytes=max_shard_bytes)
                require_all(Stage(target, staging_folder(target)), layout)
        models = build(recipe, inputs, work)
        checks = check(recipe, models, required, proving, work)
        if report is not None:
            cases = [Case(one.name, one.verification.summary, one.problems) for one in checks]
            write_report(Path(report), recipe.document.path, cases)
        if checked is not None:
            checked(checks)
        VerificationError.raise_if(problem for one in checks for problem in one.problems)
        proved = {tuple(r.pair): r for r, _ in required if r.same}
        written = {}
        for name, target in targets.items():
            weights = to_write(models, name)
            total = weights.nbytes + (bytes_to_hash(weights) if checksums else 0)
            doing = "writing and hashing" if checksums else "writing"
            with work.progress(f"{doing} {name}", total) as advance:
                written[name] = write(
                    weights,
                    target,
                    overwrite=overwrite,
                    max_shard_bytes=max_shard_bytes,
                    threads=work.threads,
                    progress=advance,
                    check=_again(
                        models, name, [pair[0] for pair in proved if pair[1] == name], work
                    ),
                    verification=_verification(checks),
                    recipe=recipe.data,
                    command=command,
                    checksums=checksums,
                    sign_key=sign_key,
                    resume=resume,
                    complete=finish,
                    tell=tell,
                )
        return Outcome(tuple(checks), written)


def _write_part(
    models: Mapping[str, Model],
    targets: Mapping[str, Path],
    part: Part,
    overwrite: bool,
    max_shard_bytes: int,
    work: Work,
    tell: Callable[[str], object] | None,
) -> Outcome:
    parts = {}
    for name, target in targets.items():
        weights = to_write(models, name)
        layout = plan(weights, max_shard_bytes=max_shard_bytes)
        size = sum(shard.size - len(shard.head) for shard in part.shards(layout))
        with work.progress(f"writing {part} of {name}", size) as advance:
            parts[name] = write_part(
                weights,
                target,
                part,
                overwrite=overwrite,
                max_shard_bytes=max_shard_bytes,
                threads=work.threads,
                progress=advance,
                tell=tell,
            )
    return Outcome((), {}, parts)


def targets_of(recipe: Recipe, out: str | Path | None) -> dict[str, Path]:
    """Where what is written, the output last. Raises ArgumentError or OutputError."""
    targets = {
        step.name: Path(os.path.expanduser(step.write)).absolute()
        for step in recipe.steps
        if step.write is not None
    }
    own = targets.pop(recipe.output, None)
    if out is None and own is None:
        raise ArgumentError(
            f"where is {recipe.output} to be written? Give -o OUT, or the step a `write: OUT`"
        )
    targets[recipe.output] = Path(out or own or "").absolute()
    places = list(targets.items())
    OutputError.raise_if(
        f"{one} and {other} would be written to {a} and {b}, one in the other"
        for at, (one, a) in enumerate(places)
        for other, b in places[at + 1 :]
        if a == b or a in b.parents or b in a.parents
    )
    return targets


def check_targets(
    targets: Mapping[str, Path],
    inputs: Mapping[str, Model],
    planned: Mapping[str, Model],
    *,
    overwrite: bool,
) -> None:
    """Raise OutputError, with all that is wrong, if a target exists or could harm an input: its
    own or that of another step, which is read after it was written."""
    every = [path for model in inputs.values() for path in model.paths]
    problems: list[str] = []
    for name, target in targets.items():
        try:
            check_target(
                target, dict.fromkeys([*every, *to_write(planned, name).paths]), overwrite=overwrite
            )
        except OutputError as error:
            problems += error.problems
    OutputError.raise_if(dict.fromkeys(problems))


def _again(models: Mapping[str, Model], name: str, bases: Sequence[str], work: Work) -> Any:
    """A look at what was staged, if it was proved to compute what another does."""
    given = models[name]
    if not bases or not isinstance(given, Checkpoint):
        return None
    pairs = [(m, find_relation(m, given)) for b in bases if isinstance(m := models[b], Checkpoint)]
    return partial(_certify_staged, pairs=pairs, threads=work.threads)


def _certify_staged(
    staged: Checkpoint, *, pairs: Sequence[tuple[Checkpoint, Relation]], threads: int | None
) -> None:
    for base, relation in pairs:
        Verification(certify(base, staged, relation, threads=threads), None).require()


def _verification(checks: Sequence[Check]) -> dict[str, Any] | None:
    if not checks:
        return None
    return {
        "passed": True,
        "summary": "; ".join(f"{one.name}: {one.verification.summary}" for one in checks),
        "checks": [one.as_json() for one in checks],
    }


def _check_report(
    path: Path, recipe: Recipe, targets: Mapping[str, Path], inputs: Mapping[str, Model]
) -> None:
    """Raise OutputError if the report couldn't be written, or would harm what is there."""
    if path.is_dir() or not path.parent.is_dir():
        why = "that is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise OutputError(f"the report can't be written to {path}: {why}")
    if path.resolve() == Path(recipe.document.path).resolve():
        raise OutputError(f"the report would replace the recipe {path}: choose another place")
    read = {place for model in inputs.values() for place in model.paths}
    OutputError.raise_if(
        f"the report {path} would be inside {place}, which is {what}: choose another place"
        for what, places in (("an input", read), ("written as a whole", targets.values()))
        for place in sorted(places)
        if place.resolve() in path.resolve().parents
    )
