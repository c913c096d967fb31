"""The proofs, with progress, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .output import block_ranges, console, note, progress, size, table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.text import Text

    from surgery import Checkpoint, Verification
    from surgery.verification import Relation


def prove(
    base: Checkpoint,
    other: Checkpoint,
    relation: Relation,
    *,
    logits: bool,
    device: str,
    dtype: Literal["float32", "float64"],
    threads: int | None,
    text: Path | None = None,
) -> Verification:
    """`surgery.verify`, saying what it is at."""
    from surgery import Verification, certify
    from surgery.verification import block_places, compare_logits
    from surgery.verification.device import check_device

    if logits:
        check_device(base, other, device, dtype)
    certificate = None
    if relation:
        with progress("certificate", other.nbytes) as advance:
            certificate = certify(base, other, relation, threads=threads, progress=advance)
    compared = None
    if logits:
        note(f"comparing logits in {dtype}")
        compared = compare_logits(
            base, other, device=device, dtype=dtype, places=block_places(relation), text=text
        )
    return Verification(certificate, compared)


def print_verification(verification: Verification) -> None:
    """The proofs for people."""
    from rich.text import Text

    out = console()
    rows = table("check", "result", "", left=("check", "result", ""))
    if (certificate := verification.certificate) is not None:
        rows.add_row(
            "certificate",
            _mark(certificate.holds),
            f"{certificate.tensors_compared:,} tensors, {certificate.what}, "
            f"{size(certificate.bytes_compared)} compared",
        )
    if (logits := verification.logits) is not None:
        judged = verification.certificate is not None
        rows.add_row(
            "outputs" if logits.kl_mean is None else "logits",
            _mark(logits.same) if judged else Text("drift", style="bold"),
            f"{logits.inputs}, {logits.dtype} on {logits.device}",
        )
        limit = "" if logits.threshold is None else f"; rounding explains {logits.threshold:.2g}"
        rows.add_row("", "", f"max |d| {logits.max_difference:.2g}{limit}")
        rows.add_row("", "", f"relative to the largest {logits.relative:.2g}")
        if logits.kl_mean is not None and logits.top1 is not None:
            rows.add_row("", "", f"KL mean {logits.kl_mean:.2g}, max {logits.kl_max:.2g} nats")
            rows.add_row("", "", f"the same first choice on {logits.top1:.1%} of the tokens")
        if logits.experts is not None:
            reached, experts = logits.experts
            rows.add_row("", "", f"through {reached:,} of {experts:,} routed experts")
        if logits.unreached:
            covered = "; the certificate covers them" if judged else ""
            rows.add_row("", "", f"not run by these: {_named(logits.unreached)}{covered}")
        if logits.first_departure is not None:
            rows.add_row("", "", f"first block to depart: {logits.first_departure}")
        if logits.uninitialised:
            rows.add_row("", "", f"not in the files: {', '.join(logits.uninitialised)}")
    out.print(rows)


def _named(blocks: Sequence[str]) -> str:
    """Blocks, stack by stack."""
    stacks: dict[str, list[int]] = {}
    for block in blocks:
        stack, _, number = block.rpartition(".")
        stacks.setdefault(stack, []).append(int(number))
    return ", ".join(f"{stack} {block_ranges(sorted(n))}" for stack, n in stacks.items())


def _mark(good: bool) -> Text:
    from rich.text import Text

    return Text("holds", style="bold green") if good else Text("FAILS", style="bold red")
