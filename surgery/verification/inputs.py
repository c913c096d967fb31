"""The inputs that models are compared on: tokens, images, videos and sounds, as the stock class
takes them.

There is no table of families. The arguments of `forward` say what kinds a model takes, the config
in which sizes, and a model without weights is run with one candidate after another until one goes
through. That run also says which MLPs the inputs reach: of the others the logits prove nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, UnsupportedError
from surgery.verification.candidates import MOST_TRIES, candidates
from surgery.verification.outputs import main_output
from surgery.verification.texts import TEXT_TOKENS, Texts
from surgery.verification.trials import Trials

if TYPE_CHECKING:
    import torch

    from surgery.modeling.hollow import HollowModel


@dataclass(frozen=True)
class Inputs:
    """Arguments of `forward`, what they are in words, and which MLPs they don't go through, as
    (stack, block, kind); None where that isn't known."""

    values: Mapping[str, torch.Tensor]
    what: str
    unreached: frozenset[tuple[str, int, str]] | None = None


def make_inputs(checkpoint: Checkpoint, *, seed: int = 0, text: str | Path | None = None) -> Inputs:
    """Inputs for the stock class of a checkpoint, random unless `text` has some for it.

    Where a model takes text and images, videos or sounds, they come together if that goes through,
    with as many placeholders among the tokens as there are features. Raises UnsupportedError if
    nothing that was tried goes through, FormatError if the text can't be had.
    """
    from surgery.modeling.hollow import HollowModel

    hollow = HollowModel(checkpoint)
    given = None if text is None else _tokenized(checkpoint, Path(text))
    first: Exception | None = None
    for mend in (False, True):  # as they were thought of first: what is mended is a guess more
        trials = Trials(hollow, seed, mend=mend)
        for candidate in islice(candidates(hollow, trials, seed, given), MOST_TRIES):
            settled = trials.settle(candidate.values, lambda r: main_output(r) is not None)
            if settled is not None:
                values, attempt = settled
                reached = _unreached(checkpoint, hollow, attempt.called)
                return Inputs(values, candidate.said(values), reached)
        first = first or trials.first
    if "input_ids" in hollow.accepts:  # the real model may take what one without values doesn't
        plain = next(Texts(hollow, seed, given).alone())
        return Inputs(plain.values, plain.what)
    name = type(hollow.model).__name__
    why = f": {' '.join(str(first).split())[:200]}" if first is not None else ""
    raise UnsupportedError(
        f"{checkpoint.source.reference}: none of the inputs that were tried go through "
        f"{name}{why}; --no-logits leaves the certificate"
    )


def _unreached(
    checkpoint: Checkpoint, hollow: HollowModel, called: frozenset[str]
) -> frozenset[tuple[str, int, str]]:
    """The MLPs whose module wasn't called, or isn't known."""
    found, seen = set(), set()
    for mlp in checkpoint.anatomy.every_mlp:
        if mlp.block is None:
            continue
        key = mlp.stack, mlp.block, mlp.kind
        if key in seen and mlp.kind != "dense":  # experts are a module together
            continue
        seen.add(key)
        inner = checkpoint.anatomy.places[mlp.down.weight].inner
        if hollow.module_of(mlp.stack, mlp.block, inner) not in called:
            found.add(key)
    return frozenset(found)


def _tokenized(checkpoint: Checkpoint, path: Path) -> torch.Tensor:
    """The first tokens of a text by the checkpoint's own tokenizer, (1, count)."""
    from surgery.modeling.tokenizer import tokenize

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(f"the text {path} can't be read: {reason}") from error
    if not text.strip():  # a tokenizer that begins with a token of its own makes one of nothing
        raise FormatError(f"the text {path} is empty")
    ids = tokenize(checkpoint, text[: 64 * TEXT_TOKENS])[:, :TEXT_TOKENS]
    if not ids.numel():
        raise FormatError(f"the text {path} has no token")
    return ids
