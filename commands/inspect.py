"""`surgery inspect`: what a checkpoint is, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .opening import open_model
from .options import MODEL, AnatomyFile, AsJson, Scope
from .output import block_ranges, console, count, print_json, size, table
from .terminal import one_line

if TYPE_CHECKING:
    from surgery import Checkpoint
    from surgery.anatomy import MLP


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    scope: Scope = None,
    anatomy: AnatomyFile = None,
    as_anatomy: Annotated[
        bool,
        typer.Option(
            "--as-anatomy", help="Print what was recognised as YAML, to correct for --anatomy."
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """Show what a checkpoint is and what was recognised in it, from headers alone."""
    checkpoint = open_model(model, anatomy, headers_only=True)
    if as_anatomy:
        from surgery.recipe import anatomy_yaml

        scales = checkpoint.scales.weight_of if checkpoint.scales else {}
        typer.echo(anatomy_yaml(checkpoint.anatomy, leave_out=scales), nl=False)
        return
    report = describe(checkpoint, scope)
    if json:
        print_json(report)
    else:
        _print(report)


def describe(checkpoint: Checkpoint, scope: str | None = None) -> dict[str, Any]:
    """The report as plain data, with the blocks that `scope` means."""
    from surgery.anatomy.infer import HEAD_KEYS, architecture, first, text_config
    from surgery.anatomy.mixing import find_mixing

    quantization = checkpoint.quantization
    scales = checkpoint.scales
    anatomy, config = checkpoint.anatomy, text_config(checkpoint.config)
    return {
        "model": checkpoint.source.reference,
        "revision": checkpoint.source.revision,
        "architecture": architecture(checkpoint.config),
        "model_type": checkpoint.config.get("model_type"),
        "parameters": checkpoint.numel,
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in checkpoint.values())),
        "files": dict(checkpoint.source.files),
        "heads": first(config, HEAD_KEYS),
        "key_value_heads": first(config, ("num_key_value_heads",)),
        "embedding": anatomy.embedding,
        "head": anatomy.head,
        "tied": anatomy.tied,
        "quantization": None if quantization is None else str(quantization),
        "blocks": _blocks(
            checkpoint, find_mixing(checkpoint.tensors, anatomy.places, config), scope
        ),
        "unrecognised": anatomy.unrecognised,
        "notes": [*checkpoint.notes, *(scales.problems if scales else ()), *anatomy.notes],
        "companions": sorted(checkpoint.companions),
        "left_behind": list(checkpoint.left_behind),
    }


def _blocks(
    checkpoint: Checkpoint, mixing: Mapping[tuple[str, int], Sequence[str]], scope: str | None
) -> list[dict[str, Any]]:
    """Every block: its parameters, what mixes tokens, its MLPs, and why those can't be grown if
    so."""
    from surgery.anatomy.scopes import in_scope, part_of

    anatomy = checkpoint.anatomy
    scales = checkpoint.scales.weight_of if checkpoint.scales else {}
    parameters: Counter[tuple[str, int]] = Counter()
    for name, place in anatomy.places.items():
        if place.stack is not None and place.block is not None and name not in scales:
            parameters[place.stack, place.block] += checkpoint[name].numel
    described = []
    for stack in anatomy.stacks if scope is None else in_scope(anatomy.stacks, scope):
        for block in range(anatomy.stacks[stack]):
            mlps = anatomy.in_block(stack, block)
            mlp = mlps[0] if mlps else None
            experts = anatomy.experts.get((stack, block), ())
            described.append(
                {
                    "stack": stack,
                    "part": part_of(stack),
                    "block": block,
                    "parameters": parameters[stack, block],
                    "mixing": list(mixing.get((stack, block), ())),
                    "mlp": None
                    if mlp is None
                    else {
                        "width": mlp.width,
                        "hidden": mlp.hidden,
                        "gated": mlp.gated,
                        "fused": mlp.ups[0].parts == 2,
                        "layout": "in, out" if mlp.down.in_out else "out, in",
                        "tensors": list(mlp.tensors),
                        "even": mlp.even_because,
                        "followers": [
                            {"tensor": each.name, "axis": each.axis, "even": each.even}
                            for each in mlp.followers
                        ],
                    },
                    "mlps": len(mlps),
                    "experts": [
                        {
                            "kind": expert.kind,
                            "width": expert.width,
                            "stacked": expert.down.experts,
                            "tensors": list(expert.tensors),
                        }
                        for expert in experts
                    ],
                    "no_growth": anatomy.no_growth.get((stack, block))
                    or _packed(checkpoint, [*mlps, *experts]),
                }
            )
    return described


def _packed(checkpoint: Checkpoint, mlps: Sequence[MLP]) -> str | None:
    """Why MLPs can't be grown as their weights are stored."""
    from surgery import UnsupportedError
    from surgery.operations.scales import neurons_in_a_block

    if checkpoint.quantization is None or not mlps:
        return None
    if checkpoint.scales is None or checkpoint.scales.problems:
        return "its weights are quantized"
    try:
        for mlp in mlps:
            neurons_in_a_block(checkpoint, mlp, checkpoint.scales.scaled)
    except UnsupportedError as error:
        return str(error)
    return None


def _print(report: dict[str, Any]) -> None:
    out = console()
    facts = table("", "", left=("",))
    facts.show_header = False
    for column in facts.columns:
        column.justify = "left"
        column.no_wrap = False
    dtypes = ", ".join(f"{name} ({n:,})" for name, n in report["dtypes"].items())
    heads = report["heads"] and (
        f"{report['heads']}"
        + (f", {report['key_value_heads']} for keys" if report["key_value_heads"] else "")
    )
    where = report["head"] or (f"tied to {report['embedding']}" if report["tied"] else None)
    for label, value in (
        ("model", report["model"]),
        ("revision", report["revision"]),
        ("architecture", report["architecture"] or report["model_type"]),
        ("parameters", f"{count(report['parameters'])} in {report['tensors']:,} tensors"),
        ("types", dtypes),
        ("files", f"{len(report['files'])}, {size(report['bytes'])}"),
        ("attention heads", heads),
        ("head", where),
        ("quantization", report["quantization"]),
    ):
        if value:
            facts.add_row(label, str(value))
    out.print(facts)
    if report["blocks"]:
        out.print(_block_table(report["blocks"]))
    for title, lines in (
        ("Can't be grown", _refusals(report["blocks"])),
        ("Not recognised (copied as they are)", report["unrecognised"]),
        ("Noticed", report["notes"]),
        ("Files that don't travel", report["left_behind"]),
    ):
        if lines:
            out.print(title, style="bold")
            for line in lines[:20]:
                out.print(f"  {one_line(line)}")
            if len(lines) > 20:
                out.print(f"  and {len(lines) - 20:,} more")


def _block_table(blocks: list[dict[str, Any]]) -> Any:
    """One row for each run of like blocks."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for block in blocks:
        mlp = block["mlp"] or {}
        experts = _experts(block["experts"])
        kind = (
            ("gated" if mlp["gated"] else "plain") + (", fused" if mlp["fused"] else "")
            if mlp
            else ""
        )
        kind += ", (in, out)" if mlp.get("layout") == "in, out" else ""
        kind = f"{block['mlps']} {kind}" if block["mlps"] > 1 else kind
        known = "; ".join(filter(None, (kind, experts)))
        key = (
            block["stack"],
            block["parameters"],
            " + ".join(block["mixing"]) or "none",
            f"{mlp['width']:,}" if mlp else "",
            known or ("not recognised" if block["no_growth"] else "no MLP"),
            _grows(block) if known or block["no_growth"] else "",
        )
        alike.setdefault(key, []).append(block["block"])
    made = table(
        "stack", "blocks", "parameters", "mixes tokens", "width", "MLP", "grow",
        left=("stack", "blocks", "mixes tokens", "MLP", "grow"),
    )  # fmt: skip
    for column in made.columns[3:]:
        column.no_wrap = False
    for (stack, parameters, *rest), numbers in alike.items():
        made.add_row(stack, block_ranges(numbers), count(parameters), *rest)
    return made


def _grows(block: dict[str, Any]) -> str:
    if block["no_growth"]:
        return "no"
    return "by whole factors" if (block["mlp"] or {}).get("even") else "yes"


def _refusals(blocks: list[dict[str, Any]]) -> list[str]:
    """Why blocks can't be grown, a line for those of a stack that have the same reason."""
    alike: dict[tuple[str, str], list[int]] = {}
    for block in blocks:
        if block["no_growth"]:
            reason = block["no_growth"].replace(f"{block['stack']}.{block['block']}.", "")
            alike.setdefault((block["stack"], reason), []).append(block["block"])
    return [
        f"{stack} {block_ranges(numbers)}: {reason}" for (stack, reason), numbers in alike.items()
    ]


def _experts(experts: list[dict[str, Any]]) -> str:
    """ "128 routed of 768, 1 shared of 1,024"."""
    numbers: Counter[tuple[str, int]] = Counter()
    for expert in experts:
        numbers[expert["kind"], expert["width"]] += expert["stacked"] or 1
    return ", ".join(f"{n:,} {kind} of {width:,}" for (kind, width), n in numbers.items())
