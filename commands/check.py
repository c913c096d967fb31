"""`surgery check`: whether a model on disk is whole, and what it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import MODEL, AsJson, Threads
from .output import console, print_json, progress, size

if TYPE_CHECKING:
    from surgery.integrity.check import Report


def check(
    model: Annotated[str, typer.Argument(help=f"{MODEL.partition(';')[0]}.")],
    sums: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="SHA-256 digests to compare with, as sha256sum writes them. "
            "[default: SHA256SUMS in the directory, if it is there]",
        ),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Verify model.sig against this public key (PEM)."),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="WHO",
            help="Verify model.sig: this e-mail address or workflow has to have signed.",
        ),
    ] = None,
    identity_provider: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The OpenID provider that vouches for the identity."),
    ] = None,
    signature: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The signature. [default: model.sig in the directory]"),
    ] = None,
    json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Read every byte of a model once, and name all that is wrong with it.

    NaN and infinity; pages of zeros that were never written (a download that stopped, a sparse
    copy); files that differ from their SHA-256 in SHA256SUMS or in the Hub's cache, are missing,
    or extra; and, as a warning, weight files that seem to be another model's.

    Exit code 3 if anything is wrong; warnings and notes don't change it.
    """
    import surgery
    from surgery.integrity.check import bytes_to_check
    from surgery.integrity.signing import Signer

    signer = None
    if public_key is not None or identity is not None or identity_provider is not None:
        signer = Signer(public_key, identity, identity_provider)
    with progress("checking", bytes_to_check(model)) as advance:
        report = surgery.check(
            model,
            sums=sums,
            signer=signer,
            signature=signature,
            threads=threads,
            progress=advance,
        )
    if json:
        print_json(report.as_json())
    else:
        _print(report)
    report.require()


def _print(report: Report) -> None:
    out = console()
    read = f"{len(report.files):,} weight file{'s'[: len(report.files) > 1]}, {size(report.nbytes)}"
    out.print(f"read      {read}, {report.tensors:,} tensors", soft_wrap=True)
    if report.compared:
        agree = f"{len(report.digests):,} files compared with {' and '.join(report.compared)}"
    else:
        agree = "none to compare with"
    out.print(f"digests   {agree}", soft_wrap=True)
    if report.signed is not None:
        out.print(f"signed    by {report.signed}, and holds", soft_wrap=True)
    for finding in report.notes:
        out.print(f"note      {finding.text}", soft_wrap=True)
    for finding in report.warnings:
        out.print(f"warning   {finding.text}", soft_wrap=True)
    count = len(report.problems)
    out.print(f"result    {f'{count:,} problem' + 's'[: count > 1] if count else 'sound'}")
