"""What the verbs that write a checkpoint have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .output import command_line, note, plan_as_json, print_json, print_plan, progress
from .proof import print_verification, prove

if TYPE_CHECKING:
    from surgery import Checkpoint, Written
    from surgery.checkpoint import Weights
    from surgery.verification import Relation


@dataclass(frozen=True)
class Target:
    """Where and how to write, as the options say."""

    out: Path
    max_shard_size: int
    threads: int | None
    overwrite: bool
    json: bool
    fresh: bool = False
    checksums: bool = False
    sign_key: Path | None = None

    def __post_init__(self) -> None:
        if self.sign_key is not None:  # before hours of work
            from surgery.integrity.signing import require_signing_key

            require_signing_key(self.sign_key)


@dataclass(frozen=True)
class Proof:
    """What is to be proved before anything is written, as the options say."""

    verify: bool
    logits: bool
    device: str
    dtype: Literal["float32", "float64"]
    text: Path | None = None


def dry_run(edited: Weights, target: Target, proof: Proof | None = None) -> None:
    """Show what writing `edited` would do; raise what it would raise, but for a full disk."""
    shown = planned(edited, target, proof)
    if target.json:
        print_json(shown)
    else:
        print_plan(shown, target.out)


def planned(edited: Weights, target: Target, proof: Proof | None = None) -> dict[str, Any]:
    """What writing `edited` would do, as plain data."""
    from surgery import Checkpoint
    from surgery.writing.plan import free_bytes, plan
    from surgery.writing.write import peak_memory, prepare

    prepare(edited, target.out.absolute(), overwrite=target.overwrite)
    layout = plan(edited, max_shard_bytes=target.max_shard_size)
    memory = peak_memory(layout, target.threads)
    if isinstance(edited, Checkpoint) and proof is not None and proof.verify and proof.logits:
        from surgery.verification.device import memory_needed

        memory = max(memory, memory_needed(edited, proof.dtype))
    return plan_as_json(layout, free_bytes(target.out), memory)


def write_edited(
    edited: Weights,
    target: Target,
    *,
    check: Callable[[Checkpoint], object] | None = None,
    verification: Mapping[str, Any] | None = None,
) -> Written:
    """`surgery.write`, with progress and the command for the record; with --json the record is
    printed."""
    import surgery
    from surgery.integrity.seal import bytes_to_hash

    total = edited.nbytes + (bytes_to_hash(edited) if target.checksums else 0)
    with progress("writing and hashing" if target.checksums else "writing", total) as advance:
        written = surgery.write(
            edited,
            target.out,
            overwrite=target.overwrite,
            max_shard_bytes=target.max_shard_size,
            threads=target.threads,
            progress=advance,
            check=check,
            verification=verification,
            command=command_line(),
            resume=not target.fresh,
            tell=note,
            checksums=target.checksums,
            sign_key=target.sign_key,
        )
    for text in written.record["notes"]:
        note(f"note: {text}")
    if target.json:
        print_json({"out": str(written.target), **written.record})
    return written


def write_proven(
    base: Checkpoint, edited: Checkpoint, relation: Relation, target: Target, proof: Proof
) -> Written:
    """Prove that `edited`, made of `base` as `relation` says, computes what it does; write it;
    and look at the weights once more as they lie on disk, before they get their final name."""
    if not proof.verify:
        return write_edited(edited, target)
    import surgery
    from surgery.writing.locks import locked
    from surgery.writing.write import check_space, prepare

    prepare(edited, target.out.absolute(), overwrite=target.overwrite)
    check_space(surgery.plan(edited), target.out.absolute())
    with locked(target.out.absolute()):  # the proof can take hours: another run is refused now
        verification = prove(
            base,
            edited,
            relation,
            logits=proof.logits,
            device=proof.device,
            dtype=proof.dtype,
            text=proof.text,
            threads=target.threads,
        )
        if not target.json:
            print_verification(verification)
        verification.require()

        def certify_staged(staged: Checkpoint) -> None:
            certificate = surgery.certify(base, staged, relation, threads=target.threads)
            surgery.Verification(certificate, None).require()

        return write_edited(
            edited, target, check=certify_staged, verification=verification.as_json()
        )
