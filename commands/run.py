"""`surgery run`: a recipe, from its inputs to what it writes."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    AnatomyFile,
    AsJson,
    Checksums,
    Device,
    DeviceOption,
    DryRun,
    Fresh,
    Logits,
    MaxShardSize,
    Overwrite,
    Report,
    SignKey,
    Threads,
    Verify,
    VerifyDtype,
    VerifyDtypeOption,
    parse_out,
)
from .output import command_line, console, note, print_json, print_plan, progress, table
from .writes import Proof, Target, planned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.recipe import Outcome, Recipe
    from surgery.recipe.checks import Check
    from surgery.writing.parts import Part


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a configuration of mergekit's.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=parse_out,
            metavar="PATH",
            help="Where to write the output, if no step says so.",
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change the recipe: inputs.base=./m; repeatable."
        ),
    ] = None,
    anatomy: AnatomyFile = None,
    report: Report = None,
    verify: Verify = True,
    logits: Logits = True,
    device: DeviceOption = Device.auto,
    verify_dtype: VerifyDtypeOption = VerifyDtype.float32,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write the I-th of N parts of the shards alone, on one of many machines.",
        ),
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Check and publish what all N parts have written.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Write the parts as tasks of a Ray cluster: auto, local, or its address.",
        ),
    ] = None,
    checksums: Checksums = False,
    sign_key: SignKey = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    max_shard_size: MaxShardSize = "5GB",  # type: ignore[assignment]
    threads: Threads = None,
) -> None:
    """Run a recipe: named steps in YAML, checked as a whole, verified, written in one pass.

    Nothing is read but headers until all inputs and steps are known to fit, and nothing is
    written until everything that the recipe requires holds. mergekit's files run as they are.

    On many machines with one file system: `--shards 1/16` to `--shards 16/16`, each anywhere and
    at any time, and then `--finish`, which proves, checks every byte and publishes.
    """
    from surgery.recipe import load_recipe, run_recipe
    from surgery.recipe.chain import Work
    from surgery.recipe.checks import Proving

    part = _part(shards, finish=finish, fresh=fresh, ray=ray)
    given = load_recipe(recipe, changes=change or [], anatomy=anatomy)
    for text in given.notes:
        note(f"note: {text}")
    if dry_run:
        target = Target(
            out or Path(), max_shard_size, threads, overwrite, json, fresh, checksums, sign_key
        )
        proof = Proof(verify, logits, device.value, verify_dtype.value)
        _dry_run(given, out, target, proof)
        return
    if ray is not None:
        from surgery.recipe.on_ray import write_parts

        with redirect_stdout(sys.stderr):  # Ray prints what it has to say of lost workers
            write_parts(
                given,
                out,
                address=ray,
                overwrite=overwrite,
                max_shard_bytes=max_shard_size,
                threads=threads,
                tell=note,
            )
    outcome = run_recipe(
        given,
        out,
        overwrite=overwrite,
        max_shard_bytes=max_shard_size,
        verify=verify,
        proving=Proving(logits, device.value, verify_dtype.value),
        report=report,
        checked=partial(_show_checks, json=json),
        work=Work(threads=threads, bar=progress, tell=note),
        command=command_line(),
        resume=not fresh,
        part=part,
        finish=finish or ray is not None,
        tell=note,
        checksums=checksums,
        sign_key=sign_key,
    )
    for name, one in outcome.written.items():
        for text in one.record["notes"]:
            note(f"note: {name}: {text}")
    if part is not None:
        _print_part(outcome, given.output, json=json)
    elif json:
        told = {
            name: {"out": str(one.target), **one.record} for name, one in outcome.written.items()
        }
        print_json(_output_first(told, given.output))
    else:
        _print(outcome)


def _part(shards: str | None, *, finish: bool, fresh: bool, ray: str | None) -> Part | None:
    """The part that is asked for, if one is."""
    from surgery.errors import ArgumentError
    from surgery.writing.parts import parse_part

    asked = {"--shards": shards is not None, "--finish": finish, "--ray": ray is not None}
    names = [name for name, given in asked.items() if given]
    if len(names) > 1:
        raise ArgumentError(f"{' and '.join(names)} can't be given together: each is a step alone")
    if names and fresh:
        raise ArgumentError(
            f"--fresh would remove what other parts have written: use `surgery clean`, then "
            f"{names[0]} without it"
        )
    return None if shards is None else parse_part(shards)


def _print_part(outcome: Outcome, output: str, *, json: bool) -> None:
    told = {
        name: {
            "out": None,
            "target": str(one.target),
            "part": str(one.part),
            "shards": list(one.shards),
            "kept": list(one.kept),
        }
        for name, one in outcome.parts.items()
    }
    if json:
        print_json(_output_first(told, output))
        return
    for name, one in outcome.parts.items():
        console().print(
            f"{name}: part {one.part}, {len(one.shards)} of {len(one.plan.shards)} shards, is "
            f"ready for --finish"
        )


def _dry_run(recipe: Recipe, out: Path | None, target: Target, proof: Proof) -> None:
    """Show what would be written; raise what running would raise from headers alone."""
    from surgery.recipe.chain import Work, build, open_inputs, to_write
    from surgery.recipe.checks import Proving, check_requirements, requirements
    from surgery.recipe.run import check_targets, targets_of

    required = requirements(recipe, verify=proof.verify)
    targets = targets_of(recipe, out)
    inputs = open_inputs(recipe, headers_only=True)
    models = build(recipe, inputs, Work(measure=False, tell=note))
    check_requirements(recipe, models, required, Proving(proof.logits, proof.device, proof.dtype))
    check_targets(targets, inputs, models, overwrite=target.overwrite)
    plans = {
        name: planned(
            to_write(models, name), replace(target, out=path), proof if required else None
        )
        for name, path in targets.items()
    }
    if target.json:
        told = {name: {"out": str(targets[name]), **plan} for name, plan in plans.items()}
        print_json(_output_first(told, recipe.output))
    else:
        for name, plan in plans.items():
            print_plan(plan, targets[name])


def _output_first(told: dict[str, dict[str, Any]], output: str) -> dict[str, Any]:
    """What there is to say of the output, and under `steps` of others that are written too."""
    others = {name: one for name, one in told.items() if name != output}
    return {**told[output], **({"steps": others} if others else {})}


def _show_checks(checks: Sequence[Check], *, json: bool) -> None:
    """What was found, also where something doesn't hold and nothing will be written."""
    if json:
        if any(check.problems for check in checks):
            print_json({"out": None, "checks": [check.as_json() for check in checks]})
        return
    if not checks:
        return
    rows = table("check", "result", "max |d|", "KL mean", "top-1", left=("check", "result"))
    rows.columns[0].no_wrap = False
    for check in checks:
        logits = check.verification.logits
        figures = [None] * 3 if logits is None else [logits.max_difference, logits.kl_mean]
        shown = ["" if figure is None else f"{figure:.2g}" for figure in figures[:2]]
        top1 = "" if logits is None or logits.top1 is None else f"{logits.top1:.1%}"
        rows.add_row(check.name, "FAILS" if check.problems else "holds", *shown, top1)
    console().print(rows)


def _print(outcome: Outcome) -> None:
    for name, written in outcome.written.items():
        console().print(f"{name} written to {written.target}")
