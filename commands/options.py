"""Arguments and options that several verbs share."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

MODEL = (
    "A directory, a .safetensors file, or a Hub id org/name[@revision]; MODEL+ADAPTER is the model "
    "with a LoRA adapter in its weights."
)


class Device(str, Enum):
    """Where models are run for verification."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class VerifyDtype(str, Enum):
    """The type that models are run in for verification."""

    float32 = "float32"
    float64 = "float64"


def parse_size(text: str) -> int:
    """Bytes, from "5GB" or "200MB" (powers of ten, as on the Hub)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = (
        int(float(match.group(1)) * 1000 ** " KMGT".index(match.group(2).upper() or " "))
        if match
        else 0
    )
    if size < 1:
        raise typer.BadParameter(f"{text!r} isn't a size such as 5GB or 200MB")
    return size


def parse_out(text: str) -> Path:
    """A directory to write. An empty name would be the one that we are in: an unset variable."""
    if not text.strip():
        raise typer.BadParameter("it is empty")
    return Path(text)


Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        parser=parse_out,
        metavar="PATH",
        help="The directory to write; it must not exist yet.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output directory, as a whole.")
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Start anew, even if a run that was stopped could be gone on with."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="From headers alone, show what would be written; write nothing."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
MaxShardSize = Annotated[
    int,
    typer.Option(
        "--max-shard-size", parser=parse_size, metavar="SIZE", help="Largest shard, such as 5GB."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Worker threads; the result doesn't depend on it."),
]
Checksums = Annotated[
    bool,
    typer.Option(
        "--checksums",
        help="Record the SHA-256 of every input, and write that of every output to SHA256SUMS, "
        "which `surgery check` and `sha256sum -c` verify.",
    ),
]
SignKey = Annotated[
    Path | None,
    typer.Option(
        "--sign-key",
        metavar="FILE",
        help="Sign the output with this private key (elliptic curve, PEM), as model.sig; needs "
        "the extra 'signing' of model-surgery.",
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Prove that the function is kept.")
]
AnatomyFile = Annotated[
    Path | None,
    typer.Option(
        "--anatomy",
        metavar="FILE",
        help="Corrections of what is recognised, as YAML: `surgery inspect MODEL --as-anatomy` "
        "prints what to start from.",
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        "--scope",
        metavar="language|vision|audio|encoder|decoder|all|STACK",
        help="The part of the model that is meant: by its kind, or by the name of a stack that "
        "`surgery inspect` prints.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", help="Write what was verified to this file, as JUnit's XML."),
]
Logits = Annotated[
    bool,
    typer.Option("--logits/--no-logits", help="Compare logits too, or rely on the weights alone."),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Compare on the start of this text, by the model's own tokenizer, rather than on "
        "random tokens.",
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the models are run.")]
VerifyDtypeOption = Annotated[
    VerifyDtype, typer.Option("--verify-dtype", help="The type in which the models are run.")
]
