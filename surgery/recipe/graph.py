"""Problems of a recipe, with their lines, and the order of its steps."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.recipe.document import Document, Steps
from surgery.recipe.schema import Step

LONGEST_CHAIN = 50
"""Steps, each of which takes the one before. Rows are computed through all of them at once, which
takes some six calls for each."""


class Problems(list[str]):
    """What is wrong with a document, each with its line."""

    def __init__(self, document: Document) -> None:
        super().__init__()
        self.document = document

    def add(self, at: Steps, text: str) -> None:
        if (problem := self.document.problem(at, text)) not in self:
            self.append(problem)


def ordered(steps: Sequence[Step], problems: Problems) -> list[Step]:
    """The steps, each after those that it refers to. A cycle is a problem, and so is a chain that
    is too long."""
    by_name = {step.name: step for step in steps}
    depths: dict[str, int] = {}

    def visit(step: Step, above: tuple[str, ...]) -> int:
        """How many steps the longest chain has that ends with this one."""
        if step.name in above:
            circle = " -> ".join((*above[above.index(step.name) :], step.name))
            problems.add(step.at[:2], f"steps refer to each other in a circle: {circle}")
            return 0
        if step.name in depths or len(above) > LONGEST_CHAIN:
            return depths.get(step.name, LONGEST_CHAIN)
        needed = [by_name[name] for _, name in step.arguments.references() if name in by_name]
        depth = 1 + max((visit(other, (*above, step.name)) for other in needed), default=0)
        if depth == LONGEST_CHAIN + 1:
            problems.add(
                step.at[:2],
                f"this takes a chain of more than {LONGEST_CHAIN} steps: write one of them, and go "
                f"on from there in another recipe",
            )
        depths[step.name] = depth
        return depth

    for step in steps:
        visit(step, ())
    return [by_name[name] for name in depths]


def needed_for(output: str, steps: Sequence[Step]) -> set[str]:
    """The names of a step and of all that it takes, through others too."""
    by_name = {step.name: step for step in steps}
    found: set[str] = set()
    left = [output]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            if name in by_name:
                left += [other for _, other in by_name[name].arguments.references()]
    return found
