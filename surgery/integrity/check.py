"""Checking a model on disk: every byte is read once, and all that is wrong with it is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.anatomy import Anatomy, infer
from surgery.checkpoint import SIGNATURE
from surgery.errors import FormatError
from surgery.hub import Source, resolve
from surgery.integrity.signing import Signer, verify_signature
from surgery.opening import TASK_VECTOR, open_checkpoint, open_tensors
from surgery.parallel import Progress
from surgery.tensor import LazyTensor


@dataclass(frozen=True)
class Finding:
    """Something that was found: `kind` for programs, `text` for people, and where."""

    kind: str
    text: str
    file: str | None = None
    tensor: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "file": self.file,
            "tensor": self.tensor,
            **self.details,
            "text": self.text,
        }


@dataclass(frozen=True)
class Report:
    """What `check` found. `problems` make the model unusable, or not what it was; `warnings` are
    odd; `notes` are worth knowing.

    `digests` are those of the files that were hashed, by name, and `compared` says with what:
    "SHA256SUMS", "the Hub"; nothing where there was nothing to compare with. `signed` is who has
    signed, where that was asked and holds.
    """

    reference: str
    folder: Path
    files: Mapping[str, int]
    tensors: int
    nbytes: int
    digests: Mapping[str, str]
    compared: tuple[str, ...]
    signed: str | None
    problems: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not self.problems

    def require(self) -> None:
        """Raise FormatError with all problems, if there are any."""
        FormatError.raise_if(problem.text for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.reference,
            "sound": self.sound,
            "files": dict(self.files),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "sha256": dict(self.digests),
            "compared": list(self.compared),
            "signed": self.signed,
            "problems": [finding.as_json() for finding in self.problems],
            "warnings": [finding.as_json() for finding in self.warnings],
            "notes": [finding.as_json() for finding in self.notes],
        }


def check(
    model: str | Path,
    *,
    sums: str | Path | None = None,
    signer: Signer | None = None,
    signature: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read every byte of a model (or a task vector, or an adapter) once, and say what is wrong.

    - NaN and infinity, by tensor;
    - pages of zeros that nobody wrote: a download that stopped, a sparse copy;
    - files that differ from their SHA-256: in `sums`, a file as `sha256sum` writes it (by default
      SHA256SUMS beside the weights, if there is one), and in the Hub's cache; files that are
      missing or extra;
    - a signature that isn't `signer`'s, or of other files (`signature`, by default model.sig);
    - weight files of another model: a warning, from the numbers, where no digest can tell.

    Raises what opening raises for headers, index and names that don't agree. What is wrong beyond
    that doesn't raise: it is in the report, whose `require` does.
    """
    from surgery.integrity.examine import examine

    report = examine(open_any(model), sums, threads, progress)
    return report if signer is None else _verified(report, signer, signature)


def _verified(report: Report, signer: Signer, signature: str | Path | None) -> Report:
    """The report, with what the signature says. model-signing reads all files once more."""
    place = report.folder / SIGNATURE if signature is None else Path(signature)
    problems = [
        Finding("signature", text) for text in verify_signature(report.folder, place, signer)
    ]
    signed = None if problems else str(signer)
    return replace(report, signed=signed, problems=(*report.problems, *problems))


def bytes_to_check(model: str | Path) -> int:
    """How many bytes `check` reports as progress, about: those of the tensors."""
    return sum(tensor.nbytes for tensor in open_any(model).tensors.values())


@dataclass(frozen=True)
class Opened:
    """What is checked, opened from its headers."""

    source: Source
    tensors: Mapping[str, LazyTensor]
    anatomy: Anatomy


def open_any(model: str | Path) -> Opened:
    """Any directory of ours or of others: a model, a task vector, an adapter."""
    source = resolve(model)
    marks = {TASK_VECTOR: "task_vector", "adapter_config.json": "adapter_model"}
    here = [path.name for path in source.path.glob("*.safetensors")]
    for mark, stem in marks.items():
        if (source.path / mark).is_file() and here and all(name.startswith(stem) for name in here):
            tensors, source = open_tensors(source, stem)
            return Opened(source, tensors, infer(tensors, {}))
    opened = open_checkpoint(model)
    return Opened(opened.source, opened.tensors, opened.anatomy)
