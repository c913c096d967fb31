"""`surgery run`: a recipe, from its inputs to what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    AsJson,
    Device,
    DeviceOption,
    DryRun,
    Logits,
    MaxShardSize,
    Overwrite,
    Report,
    Threads,
    Verify,
    VerifyDtype,
    VerifyDtypeOption,
)
from .output import command_line, console, note, print_json, progress, table
from .writes import Proof, Target
from .writes import dry_run as show_plan

if TYPE_CHECKING:
    from surgery.recipe import Outcome


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a configuration of mergekit's.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write the output, if no step says so."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change the recipe: inputs.base=./m; repeatable."
        ),
    ] = None,
    report: Report = None,
    verify: Verify = True,
    logits: Logits = True,
    device: DeviceOption = Device.auto,
    verify_dtype: VerifyDtypeOption = VerifyDtype.float32,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: AsJson = False,
    max_shard_size: MaxShardSize = "5GB",  # type: ignore[assignment]
    threads: Threads = None,
) -> None:
    """Run a recipe: named steps in YAML, checked as a whole, verified, written in one pass.

    Nothing is read but headers until all inputs and steps are known to fit, and nothing is
    written until everything that the recipe requires holds. mergekit's files run as they are.
    """
    from surgery.recipe import load_recipe, run_recipe
    from surgery.recipe.chain import Work, build, open_inputs, to_write
    from surgery.recipe.checks import Proving

    given = load_recipe(recipe, changes=change or [])
    for text in given.notes:
        note(f"note: {text}")
    if dry_run:
        target = Target(out or Path(given.output), max_shard_size, threads, overwrite, json)
        models = build(given, open_inputs(given, headers_only=True), Work(measure=False))
        proof = Proof(verify, logits, device.value, verify_dtype.value)
        show_plan(to_write(models, given.output), target, proof)
        return
    outcome = run_recipe(
        given,
        out,
        overwrite=overwrite,
        max_shard_bytes=max_shard_size,
        verify=verify,
        proving=Proving(logits, device.value, verify_dtype.value),
        report=report,
        work=Work(threads=threads, bar=progress),
        command=command_line(),
    )
    if json:
        last = outcome.written[given.output]
        print_json({"out": str(last.target), **last.record})
    else:
        _print(outcome)


def _print(outcome: Outcome) -> None:
    out = console()
    if outcome.checks:
        rows = table("check", "result", "max |d|", "KL mean", "same first choice",
                     left=("check", "result"))  # fmt: skip
        for check in outcome.checks:
            logits = check.verification.logits
            shown = (
                ("", "", "")
                if logits is None
                else (
                    f"{logits.max_difference:.2g}",
                    "" if logits.kl_mean is None else f"{logits.kl_mean:.2g}",
                    "" if logits.top1 is None else f"{logits.top1:.1%}",
                )
            )
            rows.add_row(check.name, "holds", *shown)
        out.print(rows)
    for name, written in outcome.written.items():
        out.print(f"{name} written to {written.target}")
