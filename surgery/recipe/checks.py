"""What has to hold of a recipe's checkpoints, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import ArgumentError
from surgery.recipe.chain import KINDS, Errors, Model, Work
from surgery.recipe.document import Steps
from surgery.recipe.schema import ExpandArguments, GrowArguments, Recipe, Requirement
from surgery.verification import (
    Verification,
    block_places,
    certify,
    compare_logits,
    find_relation,
)
from surgery.verification.device import VerifyDtype

_Keeping = tuple[GrowArguments | ExpandArguments, Steps]
"""A step that keeps the function, and where it stands."""


@dataclass(frozen=True)
class Proving:
    """How models are compared: whether their logits are, where, and in which type."""

    logits: bool = True
    device: str = "auto"
    dtype: VerifyDtype = "float32"


@dataclass(frozen=True)
class Check:
    """A requirement, what was found, and what doesn't hold."""

    name: str
    requirement: Requirement
    verification: Verification
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the record and for `--json`."""
        return {
            "name": self.name,
            "holds": not self.problems,
            "problems": list(self.problems),
            "required": self.requirement.model_dump(exclude_defaults=True),
            **self.verification.as_json(),
        }


def requirements(recipe: Recipe, *, verify: bool) -> list[tuple[Requirement, Steps]]:
    """What the recipe requires, and with `verify` that every step which promises to keep the
    function keeps it."""
    keeping: dict[str, _Keeping] = {
        step.name: (step.arguments, step.at)
        for step in recipe.steps
        if isinstance(step.arguments, (GrowArguments, ExpandArguments))
    }
    own: list[tuple[Requirement, Steps]] = []
    for requirement, at in recipe.requirements:
        if requirement.same is None:
            own.append((requirement, at))
        else:
            own += [(Requirement(same=pair), at) for pair in _links(requirement.same, keeping)]
    given = [requirement.same for requirement, _ in own]
    promised = [
        (Requirement(same=pair), at)
        for name, (arguments, at) in keeping.items()
        if verify and arguments.verify and (pair := [arguments.model, name]) not in given
    ]
    return promised + own


def _links(pair: list[str], keeping: Mapping[str, _Keeping]) -> list[list[str]]:
    """The pairs that a requirement comes down to: what was grown of what was grown is proved step
    by step."""
    first, name = pair
    found: list[list[str]] = []
    while name != first and name in keeping:
        found.insert(0, [keeping[name][0].model, name])
        name = keeping[name][0].model
    return found if name == first and found else [pair]


def check_requirements(
    recipe: Recipe,
    models: Mapping[str, Model],
    required: Sequence[tuple[Requirement, Steps]],
    proving: Proving,
) -> None:
    """Raise ArgumentError where something can't be looked at. Nothing is compared yet."""
    problems = []
    for requirement, at in required:
        if requirement.compare and not proving.logits:
            problems.append(recipe.document.problem(at, "this takes logits, which are left out"))
        problems += [
            recipe.document.problem(
                at, f"{name} is {KINDS[type(models[name])]}, which computes nothing"
            )
            for name in requirement.pair
            if not isinstance(models[name], Checkpoint)
        ]
    ArgumentError.raise_if(problems)


def check(
    recipe: Recipe,
    models: Mapping[str, Model],
    required: Sequence[tuple[Requirement, Steps]],
    proving: Proving,
    work: Work,
) -> list[Check]:
    """Compare the models that the requirements name. Raises with all that can't be compared."""
    found = []
    errors = Errors(recipe)
    for requirement, at in required:
        with errors.of(at):
            found.append(_check(recipe, models, requirement, at, proving, work))
    errors.raise_all()
    return found


def _check(
    recipe: Recipe,
    models: Mapping[str, Model],
    requirement: Requirement,
    at: Steps,
    proving: Proving,
    work: Work,
) -> Check:
    first, second = requirement.pair
    base, other = models[first], models[second]
    assert isinstance(base, Checkpoint)
    assert isinstance(other, Checkpoint)
    certificate, places = None, {}
    if requirement.same:
        relation = find_relation(base, other)
        places = dict(block_places(relation))
        with work.progress(f"certificate of {second}", other.nbytes) as advance:
            certificate = certify(base, other, relation, threads=work.threads, progress=advance)
    logits = None
    if proving.logits:
        with work.progress(f"logits of {first} and {second}", base.nbytes + other.nbytes) as done:
            logits = compare_logits(
                base, other, device=proving.device, dtype=proving.dtype, places=places
            )
            if done is not None:
                done(base.nbytes + other.nbytes)
    verification = Verification(certificate, logits)
    name = f"{second} computes what {first} does" if requirement.same else f"{second} near {first}"
    found = _problems(requirement, verification)
    return Check(
        name, requirement, verification, tuple(recipe.document.problem(at, text) for text in found)
    )


def _problems(requirement: Requirement, verification: Verification) -> list[str]:
    if requirement.same:
        return list(verification.problems)
    problems = []
    for bounds, word in ((requirement.at_most, "at most"), (requirement.at_least, "at least")):
        for name, bound in bounds.items():
            found = getattr(verification.logits, name)
            if found is None:
                problems.append(f"{name} can't be had of a model without a head")
            elif not (found <= bound if word == "at most" else found >= bound):
                problems.append(f"{name} is {found:.4g}, and has to be {word} {bound:g}")
    return problems
