"""The demo's story, with every number computed as it runs: a model, its fine-tune that forgot,
the fine-tune edited with LiNeS, and the model grown.

Losses are on text that neither model was trained on (text.py), in nats per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.demo.text import DOMAINS, held_out, windows
from surgery.opening import open_checkpoint
from surgery.operations.grow import grow
from surgery.operations.lines import lines
from surgery.verification import Verification, certify, find_growths, verify
from surgery.writing import write

WINDOW = 256
"""Bytes that are read at a time; losses are averaged over all but the first of each."""
WINDOWS = 64
STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Where the two curves are computed."""
KEEP = 0.9
"""The share of what fine-tuning learnt that LiNeS has to leave."""


@dataclass(frozen=True)
class Losses:
    """Held-out loss by domain, nats per byte."""

    prose: float
    code: float


@dataclass(frozen=True)
class Story:
    """What the demo found. The curves map alpha (LiNeS) and the scale of the whole update
    (uniform) to losses; `like` is the uniform scale whose code loss is that of `edited`, and
    `uniform` the losses there."""

    base: Losses
    tuned: Losses
    lines_curve: Mapping[float, Losses]
    uniform_curve: Mapping[float, Losses]
    alpha: float
    edited: Losses
    like: float
    uniform: Losses
    grown: Losses
    verification: Verification
    folders: Mapping[str, Path]

    @property
    def recovered(self) -> float:
        """The share of the forgotten prose loss that LiNeS won back."""
        return (self.tuned.prose - self.edited.prose) / (self.tuned.prose - self.base.prose)


def weights(name: str) -> Path:
    """The directory of the model `name`, "base" or "tuned", that comes with the package."""
    return Path(str(resources.files(__package__).joinpath("weights", name)))


def tell(target: Path, said: Callable[[str], object] = lambda text: None) -> Story:
    """Run the whole story; the edited and the grown model are written below `target`.

    `said` is told what is being done, a line at a time.
    """
    texts = {domain: windows(held_out(domain), WINDOW, WINDOWS) for domain in DOMAINS}

    def losses(checkpoint: Checkpoint) -> Losses:
        return Losses(**_losses(checkpoint, texts))

    base, tuned = open_checkpoint(weights("base")), open_checkpoint(weights("tuned"))
    said("held-out losses of the base and of its fine-tune")
    of_base, of_tuned = losses(base), losses(tuned)
    said(f"LiNeS and uniform scaling at {len(STEPS)} points each")
    ends = {0.0: of_base, 1.0: of_tuned}
    uniform = {s: ends.get(s) or losses(lines(base, tuned, alpha=s, beta=0)) for s in STEPS}
    curve = {a: of_tuned if a == 1 else losses(lines(base, tuned, alpha=a)) for a in STEPS}
    alpha = _choose(curve, of_base, of_tuned)
    said("the uniform scale that has learnt as much")
    like, matched = _uniform_like(
        curve[alpha].code, lambda scale: losses(lines(base, tuned, alpha=scale, beta=0))
    )
    said(
        f"writing the fine-tune edited with alpha = {alpha}, and the base grown to twice the width"
    )
    edited = lines(base, tuned, alpha=alpha)
    write(edited, target / "lines")
    wide = grow(base)
    verification = verify(base, wide)
    verification.require()
    growths = find_growths(base, wide)
    write(
        wide,
        target / "grown",
        check=lambda staged: Verification(certify(base, staged, growths), None).require(),
        verification=verification.as_json(),
    )
    return Story(
        base=of_base,
        tuned=of_tuned,
        lines_curve=curve,
        uniform_curve=uniform,
        alpha=alpha,
        edited=curve[alpha],
        like=like,
        uniform=matched,
        grown=losses(open_checkpoint(target / "grown")),
        verification=verification,
        folders={
            "base": weights("base"),
            "fine-tuned": weights("tuned"),
            "lines": target / "lines",
            "grown": target / "grown",
        },
    )


def _choose(curve: Mapping[float, Losses], base: Losses, tuned: Losses) -> float:
    """The smallest alpha, the one that remembers most, that keeps KEEP of what was learnt."""
    enough = base.code - KEEP * (base.code - tuned.code)
    return min(alpha for alpha, losses in curve.items() if losses.code <= enough)


def _uniform_like(
    code: float, losses_at: Callable[[float], Losses], steps: int = 6
) -> tuple[float, Losses]:
    """The scale of the whole update at which the code loss is `code`, by bisection, and the
    losses there: the curve is bent, so that a line between two of its points would flatter
    whatever is compared with it."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        scale = (low + high) / 2
        found = losses_at(scale)
        low, high = (scale, high) if found.code > code else (low, scale)
    return scale, found


def _losses(checkpoint: Checkpoint, texts: Mapping[str, Sequence[bytes]]) -> dict[str, float]:
    import torch

    from surgery.modeling.build import build_model

    model: Any = build_model(checkpoint, torch.float32, "cpu").model
    found = {}
    with torch.inference_mode():
        for domain, pieces in texts.items():
            tokens = torch.tensor([list(piece) for piece in pieces])
            total = 0.0
            for start in range(0, len(tokens), 16):
                batch = tokens[start : start + 16]
                logits = model(batch).logits[:, :-1].flatten(0, 1)
                target = batch[:, 1:].flatten()
                total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            found[domain] = total / tokens[:, 1:].numel()
    return found
