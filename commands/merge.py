"""`surgery merge`: several models into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.errors import ArgumentError

from .opening import open_model
from .options import (
    MODEL,
    AnatomyFile,
    AsJson,
    Checksums,
    DryRun,
    Fresh,
    MaxShardSize,
    Out,
    Overwrite,
    Scope,
    SignKey,
    Threads,
)
from .output import console, progress, table
from .writes import Target, write_edited
from .writes import dry_run as show_plan

if TYPE_CHECKING:
    from surgery import Checkpoint, Written


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="BASE MODEL...", help=f"The base, then what to merge. {MODEL}"),
    ],
    method: Annotated[str, typer.Option(help="How to merge: see `surgery methods`.")],
    out: Out,
    weight: Annotated[
        str | None, typer.Option(help="One number for all models, or one for each: 0.5,0.5.")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="The part of each update to keep; one number, or one each.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another parameter of the method; repeatable."),
    ] = None,
    lines: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ALPHA,BETA",
            help="LiNeS on top: scale the merged update with depth, from ALPHA to ALPHA + BETA.",
        ),
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="There is no base: all models are to be merged.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="base|union|MODEL",
            help="Whose tokens, where vocabularies differ: rows are matched by token. base is the "
            "first model with --no-base.",
        ),
    ] = None,
    pad_to_multiple_of: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Round the rows up, with --tokenizer."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For methods that drop at random.")] = 0,
    scope: Scope = None,
    anatomy: AnatomyFile = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    checksums: Checksums = False,
    sign_key: SignKey = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    max_shard_size: MaxShardSize = "5GB",  # type: ignore[assignment]
    threads: Threads = None,
) -> None:
    """Merge fine-tunes of one base: `surgery merge BASE A B --method ties -o OUT`.

    `surgery methods` lists the methods, their parameters and their papers. With --lines auto
    the merged update is scaled with depth as LiNeS does, its alpha worked out from the models
    and its beta the method's lambda. arXiv 2410.17146. With --scope the tensors of other parts are
    the base's.
    """
    import surgery
    from surgery.writing.staging import check_target

    target = Target(out, max_shard_size, threads, overwrite, json, fresh, checksums, sign_key)
    given = _parameters(weight, density, param or [])
    scaling = _lines(lines)
    _check_base(method, models, no_base=no_base, lines=lines)
    if scaling == "auto" and dry_run:
        # what is planned doesn't depend on alpha, which takes reading every byte
        scaling = (1.0, given.pop("lambda", 1.0))
    opened = [open_model(model, anatomy, headers_only=dry_run) for model in models]
    vocabulary: Any = tokenizer
    if tokenizer not in (None, "base", "union"):  # its tokenizer is wanted, and no weights
        vocabulary = surgery.open_checkpoint(str(tokenizer), headers_only=True)
    base, tuned = (None, opened) if no_base else (opened[0], opened[1:])
    if not dry_run:  # before --lines auto reads every byte
        check_target(out.absolute(), [p for m in opened for p in m.paths], overwrite=overwrite)

    def run(advance: Any = None) -> Checkpoint:
        return surgery.merge(
            tuned,
            base=base,
            method=method,
            seed=seed,
            lines=scaling,
            tokenizer=vocabulary,
            pad_to_multiple_of=pad_to_multiple_of,
            scope=scope,
            threads=threads,
            progress=advance,
            **given,
        )

    if dry_run:
        show_plan(run(), target)
        return
    if scaling == "auto" and base is not None:
        with progress("measuring", base.numel * 4) as advance:
            edited = run(advance)
    else:
        edited = run()
    written = write_edited(edited, target)
    if not json:
        _print(written)


def _check_base(method: str, models: list[str], *, no_base: bool, lines: str | None) -> None:
    """A method without a base must not take the first of the models for one in silence."""
    from surgery.merging.methods import find_method

    chosen = find_method(method)
    if chosen.base == "none" and not no_base and lines is None:
        given = f"all {len(models)} models" if len(models) > 1 else "the model"
        raise ArgumentError(f"{method} takes no base: pass --no-base to merge {given} given")
    if no_base and chosen.needs_base:
        raise ArgumentError(f"{method} needs the base: leave --no-base out, and give it first")


def _parameters(weight: str | None, density: str | None, others: list[str]) -> dict[str, Any]:
    """What was given, by name. Raises ArgumentError for what can't be read."""
    given: list[tuple[str, str | None]] = [("weight", weight), ("density", density)]
    problems = []
    for text in others:
        name, found, after = text.partition("=")
        if not found:
            problems.append(f"--param {text}: give it as NAME=VALUE")
        given.append((name.strip(), after))
    values = {}
    for name, value in given:
        if value is None:
            continue
        if name in values:
            problems.append(f"{name} is given twice")
        values[name] = _value(value)
    ArgumentError.raise_if(problems)
    return values


def _value(text: str) -> Any:
    """A number, true or false, several of them between commas; or the text itself, which no
    parameter takes, for the error to show."""
    if "," in text:
        return tuple(_value(part) for part in text.split(","))
    word = text.strip()
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _lines(text: str | None) -> Any:
    """ "auto", or alpha and beta."""
    if text is None or text == "auto":
        return text
    value = _value(text)
    if not isinstance(value, tuple) or len(value) != 2:
        raise ArgumentError(f"--lines is {text!r}, and has to be auto or ALPHA,BETA: 0.3,0.7")
    return value


def _print(written: Written) -> None:
    edit = written.record["edits"][-1]
    out = console()
    for earlier in written.record["edits"]:
        if earlier["operation"] == "vocabulary":
            _print_vocabulary(earlier)
    if scaling := edit["details"].get("lines"):
        first, last = scaling["alpha"], scaling["alpha"] + scaling["beta"]
        out.print(f"lambda from {first:.4g} to {last:.4g}")
        if max(first, last) > 1 and edit["parameters"]["lines"] == "auto":
            out.print(
                "The merged update is made larger: auto adds the method's lambda (1 unless given) "
                "on top of alpha. Give a smaller one (--param lambda=0.5), or --lines ALPHA,BETA."
            )
    models = sum(role.startswith("model") for role in edit["inputs"])
    onto = " onto the base" if "base" in edit["inputs"] else ""
    out.print(f"Merged {models} model{'s'[: models > 1]}{onto} with {edit['parameters']['method']}")
    out.print(f"Written to {written.target}")


_ROWS = {
    "matched": "own",
    "from_base": "base's",
    "from_another": "another's",
    "averaged": "averaged",
    "unnamed": "own padding",
    "unnamed_from_another": "other padding",
    "zeros": "zeros",
}
"""Where rows come from, and the heading of their column."""


def _print_vocabulary(edit: dict[str, Any]) -> None:
    """How many rows each model had, and where those that it has now come from."""
    models = edit["details"]["models"]
    shown = [how for how in _ROWS if any(how in found for found in models.values())]
    rows = table("model", "rows", "now", *(_ROWS[how] for how in shown), left=("model",))
    for role, found in models.items():
        counts = (f"{found.get(how, 0):,}" for how in shown)
        now = f"{edit['details']['rows']:,}"
        rows.add_row(role.replace("_", " "), f"{found['rows_before']:,}", now, *counts)
    console().print(rows)
