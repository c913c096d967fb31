"""`surgery verify`: compare two checkpoints on disk."""

from __future__ import annotations

from typing import Annotated

import typer

from .opening import open_model
from .options import (
    MODEL,
    AnatomyFile,
    AsJson,
    Device,
    DeviceOption,
    Logits,
    Report,
    Text,
    Threads,
    VerifyDtype,
    VerifyDtypeOption,
)
from .output import console, print_json
from .proof import print_verification, prove


def verify(
    base: Annotated[str, typer.Argument(help=MODEL)],
    other: Annotated[str, typer.Argument(help="The model to compare with it.")],
    logits: Logits = True,
    device: DeviceOption = Device.auto,
    verify_dtype: VerifyDtypeOption = VerifyDtype.float32,
    text: Text = None,
    anatomy: AnatomyFile = None,
    report: Report = None,
    json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Prove that an edited model computes what its base does, or show how far two models drifted.

    If OTHER was grown or expanded from BASE, its weights have to pass the certificate and its
    logits have to agree (exit code 6 otherwise). Of two other models the logits are compared and
    reported. The models run on random tokens, images or sounds, as they take them, or on a text.
    """
    from surgery.verification import find_relation

    first, second = open_model(base, anatomy), open_model(other, anatomy)
    verification = prove(
        first,
        second,
        find_relation(first, second),
        logits=logits,
        device=device.value,
        dtype=verify_dtype.value,
        text=text,
        threads=threads,
    )
    if report is not None:
        from surgery.verification.report import Case, write_report

        what = "drift from" if verification.passed is None else "computes what is in"
        name = f"{other}: {what} {base}"
        write_report(
            report, "surgery verify", [Case(name, verification.summary, verification.problems)]
        )
    if json:
        print_json(verification.as_json())
    else:
        print_verification(verification)
        if verification.certificate is None:
            console().print(
                f"{other} isn't {base} grown or expanded and nothing else: nothing has to hold, "
                f"this is the drift."
            )
    verification.require()
