"""Problems of a recipe, with their lines, and the order of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.merging.parameters import unknown
from surgery.recipe.document import Document, Steps
from surgery.recipe.schema import Step


class Problems(list[str]):
    """What is wrong with a document, each with its line."""

    def __init__(self, document: Document) -> None:
        super().__init__()
        self.document = document

    def add(self, at: Steps, text: str) -> None:
        self.append(self.document.problem(at, text))


def ordered(steps: Sequence[Step], inputs: Mapping[str, str], problems: Problems) -> list[Step]:
    """The steps, each after those that it refers to. A name that isn't there and a cycle are
    problems."""
    by_name = {step.name: step for step in steps}
    known = [*inputs, *by_name]
    for step in steps:
        for at, name in step.arguments.references():
            if name not in known:
                problems.add((*step.at, *at), unknown("input or step", name, known))
    ordered: dict[str, Step] = {}

    def visit(step: Step, above: tuple[str, ...]) -> None:
        if step.name in above:
            circle = " -> ".join((*above[above.index(step.name) :], step.name))
            problems.add(step.at[:2], f"steps refer to each other in a circle: {circle}")
            return
        if step.name in ordered:
            return
        for _, name in step.arguments.references():
            if name in by_name:
                visit(by_name[name], (*above, step.name))
        ordered.setdefault(step.name, step)

    for step in steps:
        visit(step, ())
    return list(ordered.values())
