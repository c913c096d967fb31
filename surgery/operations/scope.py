"""Which stacks an edit is of, in a model of several parts."""

from __future__ import annotations

from collections.abc import Iterable

from surgery.anatomy import MLP, Anatomy, Role
from surgery.anatomy.scopes import in_scope, usual
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError


def chosen_stacks(base: Checkpoint, scope: str | None) -> tuple[list[str], tuple[str, ...]]:
    """The stacks whose MLPs are to grow, and a sentence for each that is left as it is.

    A list of modules in which no MLP was recognised (a detection head, a pyramid of convolutions)
    is left where others can grow, unless `scope` names it.
    """
    anatomy = base.anatomy
    keys = (*anatomy.mlps, *anatomy.several, *anatomy.experts, *anatomy.no_growth)
    stacks = sorted({stack for stack, _ in keys})
    if not stacks:
        raise UnsupportedError(
            f"{base.source.reference} has no MLP that was recognised: `surgery inspect` shows "
            f"what was found"
        )
    seen = [stack for stack in stacks if _has_mlps(anatomy, stack)]
    if scope is None:
        meant = usual(seen, speaks=_speaks(base)) or stacks
    else:
        meant = in_scope(stacks, scope)
    known = [stack for stack in meant if stack in seen]
    if not known or (scope in meant and scope not in known):
        return meant, ()  # which is refused, block by block
    notes = [
        f"{stack} stays as it is: {_reason(anatomy, stack)}"
        for stack in (stacks if scope is None else meant)
        if stack not in seen
    ]
    if others := [stack for stack in seen if stack not in meant and scope is None]:
        notes.append(f"{', '.join(others)} isn't grown: --scope all grows every stack")
    return known, tuple(notes)


def may_follow(base: Checkpoint, chosen: Iterable[MLP], scope: str | None) -> list[MLP]:
    """The MLPs that may grow with the chosen ones, if a key sets the width of both: those beside
    the stacks and, where no scope is given, those of other stacks."""
    anatomy, taken = base.anatomy, set(chosen)
    others = list(anatomy.beside)
    if scope is None:
        others += [mlp for mlp in anatomy.every_mlp if mlp not in taken]
    return [mlp for mlp in others if (mlp.stack, mlp.block) not in anatomy.no_growth]


def _speaks(base: Checkpoint) -> bool:
    """Whether a model makes text: by its head, or by the name of its class."""
    classes = base.config.get("architectures") or [""]
    makers = ("ForCausalLM", "ForConditionalGeneration", "LMHead", "MaskedLM")
    return base.anatomy.head is not None or any(word in str(classes[0]) for word in makers)


def _has_mlps(anatomy: Anatomy, stack: str) -> bool:
    keys = (*anatomy.mlps, *anatomy.several, *anatomy.experts)
    return any(own == stack for own, _ in keys) or any(
        place.stack == stack and place.role is Role.EXPERT for place in anatomy.places.values()
    )


def _reason(anatomy: Anatomy, stack: str) -> str:
    return next(why for (own, _), why in sorted(anatomy.no_growth.items()) if own == stack)
