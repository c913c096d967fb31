"""Verify: which proof applies to two checkpoints, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import RECORD, Checkpoint
from surgery.errors import InputError, VerificationError
from surgery.expansion import Expansion, expansion_of
from surgery.growth import Growth, growths_of
from surgery.opening import read_json
from surgery.parallel import Progress
from surgery.verification.certificate import Certificate, Relation, certify
from surgery.verification.device import VerifyDtype
from surgery.verification.discover import discover_growths
from surgery.verification.logits import NOISE_MULTIPLE, Logits, compare_logits


@dataclass(frozen=True)
class Verification:
    """What was found. A growth or an expansion must have both proofs; of two other models the
    logits are only reported, and `certificate` is None. `logits` is None if they weren't asked
    for."""

    certificate: Certificate | None
    logits: Logits | None

    @property
    def passed(self) -> bool | None:
        """Whether `other` computes what the base does; None where nothing has to hold."""
        if self.certificate is None:
            return None
        return self.certificate.holds and (self.logits is None or self.logits.same)

    @property
    def summary(self) -> str:
        """One sentence."""
        said = []
        if self.certificate is not None:
            certificate = self.certificate
            holds = "holds" if certificate.holds else "doesn't hold"
            said.append(
                f"the certificate {holds} for {certificate.tensors_compared} tensors, "
                f"{certificate.what}"
            )
        if self.logits is not None:
            logits = self.logits
            said.append(
                f"{'outputs' if logits.kl_mean is None else 'logits'} of {logits.inputs} in "
                f"{logits.dtype} on {logits.device} differ by at most {logits.max_difference:.3g}"
                + (f" (noise floor {logits.noise_floor:.3g})" if logits.noise_floor else "")
                + (f", KL mean {logits.kl_mean:.3g}" if logits.kl_mean is not None else "")
                + (f", first choices agree on {logits.top1:.1%}" if logits.top1 is not None else "")
                + (f"; {len(logits.unreached)} blocks weren't run" if logits.unreached else "")
            )
        return "; ".join(said) or "nothing was compared"

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the record and for `--json`."""
        logits = None
        if self.logits is not None:
            logits = asdict(self.logits) | {
                "threshold": self.logits.threshold,
                "same": self.logits.same,
            }
        certificate = None if self.certificate is None else asdict(self.certificate)
        return {
            "passed": self.passed,
            "summary": self.summary,
            "certificate": certificate,
            "logits": logits,
        }

    @property
    def problems(self) -> tuple[str, ...]:
        """All that doesn't hold, a sentence for each; nothing where nothing has to."""
        if self.passed is not False:
            return ()
        found = self.certificate.failures if self.certificate is not None else ()
        if self.logits is None or self.logits.same:
            return found
        where = self.logits.first_departure or "no single block; the output"
        return (
            *found,
            (
                f"logits differ by {self.logits.max_difference:.3g}, and rounding explains "
                f"{self.logits.threshold or 0:.3g} ({NOISE_MULTIPLE:g} noise floors); the first to "
                f"depart is {where}"
            ),
        )

    def require(self) -> None:
        """Raise VerificationError, with all that doesn't hold, unless it passed."""
        VerificationError.raise_if(self.problems)


def verify(
    base: Checkpoint,
    other: Checkpoint,
    *,
    logits: bool = True,
    device: str = "auto",
    dtype: VerifyDtype = "float32",
    text: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare `other` with `base`: the certificate if it was grown or expanded from it, and the
    logits, on random inputs or on `text`.

    Whether it was is taken from the edit that made `other`, from the record beside it, or else
    (a growth) found out from the weights themselves. The certificate comes first: where it fails,
    the logits are still compared, to say which layer departs first.
    """
    relation = find_relation(base, other)
    certificate = None
    if relation:
        certificate = certify(base, other, relation, threads=threads, progress=progress)
    compared = None
    if logits:
        compared = compare_logits(
            base, other, device=device, dtype=dtype, places=block_places(relation), text=text
        )
    return Verification(certificate, compared)


def find_relation(base: Checkpoint, other: Checkpoint) -> Relation:
    """How `other` was grown or expanded from `base`; no growths if it wasn't."""
    return find_expansion(base, other) or find_growths(base, other)


def find_expansion(base: Checkpoint, other: Checkpoint) -> Expansion | None:
    """How `other` was expanded from `base`, by the edit that made it or the record beside it."""
    for details in (_in_history(base, other, "expand"), _in_record(base, other, "expand")):
        if details:
            try:
                return expansion_of(details, base.anatomy)
            except (KeyError, TypeError, ValueError, OverflowError):
                continue  # the record tells of another base
    return None


def find_growths(base: Checkpoint, other: Checkpoint) -> Sequence[Growth]:
    """How `other` was grown from `base`; nothing if it wasn't."""
    told: Sequence[Growth] = ()
    for details in (_in_history(base, other, "grow"), _in_record(base, other, "grow")):
        if details:
            try:
                told = growths_of(details["mlps"], base.anatomy.all_mlps)
            except (KeyError, TypeError, ValueError, OverflowError):
                continue  # the record tells of another base: the weights decide
            if not _wider_besides(base, other, told):
                return told
    return discover_growths(base, other) or told


def _wider_besides(base: Checkpoint, other: Checkpoint, told: Sequence[Growth]) -> bool:
    """Whether more MLPs are wider than those that are told: other layers were grown before, and
    the record is of a base in between."""
    grown = {growth.mlp for growth in told}
    widths = {frozenset(mlp.tensors): mlp.width for mlp in other.anatomy.all_mlps}
    return any(
        widths.get(frozenset(mlp.tensors), 0) > mlp.width
        for mlp in base.anatomy.all_mlps
        if mlp not in grown
    )


def block_places(relation: Relation) -> Mapping[str, str]:
    """For every block of the base the name that it has in the other model, where it moved."""
    if not isinstance(relation, Expansion):
        return {}
    return {
        relation.name(old, "")[:-1]: relation.name(at, "")[:-1] for old, at in relation.kept.items()
    }


def _in_history(base: Checkpoint, other: Checkpoint, operation: str) -> Mapping[str, Any]:
    """The details of the last edit, if it was such an operation, and on the base."""
    *earlier, last = other.history or (None,)
    if last is None or last.operation != operation or tuple(earlier) != base.history:
        return {}
    return last.details


def _in_record(base: Checkpoint, other: Checkpoint, operation: str) -> Mapping[str, Any]:
    """The same from the record beside the files, of a checkpoint as it was opened."""
    if other.history:
        return {}
    *earlier, last = _recorded(other) or ({},)
    if last.get("operation") != operation:
        return {}
    if earlier and _told(earlier) != _told(_recorded(base)):
        return {}  # a recipe merged before it grew, say: what it grew isn't this base
    details = last.get("details")
    return details if isinstance(details, Mapping) else {}


def _recorded(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """The edits in the record; nothing where there is none, or it isn't ours."""
    if checkpoint.history:
        return []
    try:
        edits = read_json(checkpoint.source.path / RECORD)["edits"]
    except (InputError, KeyError):
        return []
    return [edit for edit in edits if isinstance(edit, Mapping)] if isinstance(edits, list) else []


def _told(edits: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What edits of a chain are known by."""
    return [[edit.get("operation"), edit.get("parameters")] for edit in edits]
