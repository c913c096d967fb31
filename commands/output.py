"""What verbs print: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from .terminal import one_problem, plain_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from surgery import Plan
    from surgery.parallel import Progress

PLAIN_INTERVAL = 5.0
"""Seconds between two lines of progress where the output is no terminal."""


_FLAGS = ("--json", "--overwrite", "--fresh", "--finish")
_VALUES = ("--threads", "--report", "--sign-key", "--shards", "--ray")


def command_line() -> str:
    """The command as it was given, for the record, but for what decides no byte of the output: how
    it was run and shown is left out, so that many machines give the same bytes as one, and where
    it was written to is OUT."""
    kept = ["surgery"]
    words = iter(sys.argv[1:])
    for word in words:
        name, equals, _ = word.partition("=")
        if word in ("-o", "--out"):
            kept += [word, "OUT"]
            next(words, None)
        elif name == "--out":
            kept.append("--out=OUT")
        elif word in _VALUES:
            next(words, None)
        elif word in _FLAGS or (equals and name in _VALUES):
            continue
        else:
            kept.append("-oOUT" if re.match(r"-o[^-]", word) else word)
    return shlex.join(kept)


def print_json(value: Any) -> None:
    """One JSON document on stdout; an infinity or a NaN, which JSON hasn't got, is null."""
    from surgery.writing.record import finite

    print(json.dumps(finite(value), indent=2))


def console() -> Console:
    """Where tables go. Piped output isn't cut to 80 columns, and what files say is no markup."""
    return plain_console(soft_wrap=False, width=None if sys.stdout.isatty() else 120)


BETWEEN, EDGES = 3, 2
"""Blanks between two columns of a table, and at both ends of a line."""


def table(*columns: str, title: str | None = None, left: Sequence[str] = ()) -> Table:
    """A table whose columns are figures, but for those named in `left`, which go on in the next
    line where there is no room: a figure that is cut is another figure."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        if column in left:
            made.add_column(column, justify="left", overflow="fold")
        else:
            made.add_column(column, justify="right", no_wrap=True)
    return made


def groups(first: int, widths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Columns, by the widths of what is in them, as ranges that fit in a `table` of so much room
    each, one column at least. The `first` column is in every table."""
    ranges = [[0, 0]]
    used = first
    for at, width in enumerate(widths):
        if used + BETWEEN + width > room - EDGES and ranges[-1][1] > ranges[-1][0]:
            ranges.append([at, at])
            used = first
        used += BETWEEN + width
        ranges[-1][1] = at + 1
    return [(first, end) for first, end in ranges]


def size(nbytes: float) -> str:
    """Bytes for people: 2.20 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def count(number: float) -> str:
    """A number of parameters for people: 1.10B."""
    for unit in ("", "K", "M", "B"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def block_ranges(blocks: Sequence[int]) -> str:
    """Ascending block numbers, shortened: 0-3,7."""
    from surgery.operations.layers import as_ranges

    return ",".join(f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in as_ranges(blocks))


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """Show bytes done of `total`: a bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        yield from _bar(label, total)
        return
    lock, start = Lock(), time.monotonic()
    done, said = 0, start

    def advance(nbytes: int) -> None:
        nonlocal done, said
        with lock:
            done += nbytes
            now = time.monotonic()
            if now - said >= PLAIN_INTERVAL:
                said = now
                note(f"{label}: {size(done)} of {size(total)}")

    yield advance
    seconds = time.monotonic() - start
    note(f"{label}: {size(total)} in {seconds:.1f} s")


def _bar(label: str, total: int) -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=plain_console(stderr=True)) as bars:
        task = bars.add_task(label, total=total)
        yield lambda nbytes: bars.advance(task, nbytes)


def note(text: str) -> None:
    """A line on stderr."""
    print(one_problem(text), file=sys.stderr, flush=True)


def plan_as_json(layout: Plan, free: int, memory: int) -> dict[str, Any]:
    """What would be written."""
    from surgery import Checkpoint
    from surgery.writing.record import notes_of

    weights = layout.weights
    return {
        "shards": [
            {"name": shard.name, "bytes": shard.size, "tensors": len(shard.offsets)}
            for shard in layout.shards
        ],
        "companions": sorted(weights.companions),
        "left_behind": list(weights.left_behind),
        "tensors": {
            "computed": list(layout.computed),
            "copied": list(layout.copied),
            "untouched": list(layout.untouched),
            "unrecognised": weights.unrecognised,
        },
        "bytes_needed": layout.bytes_needed,
        "bytes_free": free,
        "memory_peak": memory,
        "notes": [
            *notes_of(weights),
            *(weights.anatomy.notes if isinstance(weights, Checkpoint) else ()),
        ],
    }


def print_plan(plan: Mapping[str, Any], target: object) -> None:
    """A plan for people."""
    out = console()
    shards = table("shard", "size", "tensors", left=("shard",))
    for shard in plan["shards"]:
        shards.add_row(shard["name"], size(shard["bytes"]), f"{shard['tensors']:,}")
    out.print(f"Would write to {target}, and nothing was read but headers:")
    out.print(shards)
    tensors = plan["tensors"]
    out.print(
        f"tensors   {len(tensors['computed']):,} computed, {len(tensors['copied']):,} made of rows "
        f"that are copied, {len(tensors['untouched']):,} untouched"
    )
    if tensors["unrecognised"]:
        out.print(f"          not recognised: {', '.join(tensors['unrecognised'][:8])}")
    out.print(f"files     {', '.join(plan['companions']) or 'none'} travel along")
    if plan["left_behind"]:
        out.print(f"          left behind: {', '.join(plan['left_behind'])}")
    enough = "" if plan["bytes_needed"] <= plan["bytes_free"] else "  NOT ENOUGH"
    out.print(f"disk      {size(plan['bytes_needed'])} of {size(plan['bytes_free'])} free{enough}")
    out.print(f"memory    about {size(plan['memory_peak'])} at the peak")
    for text in plan["notes"]:
        out.print(f"note      {text}")
