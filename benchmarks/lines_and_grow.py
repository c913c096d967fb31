"""`surgery lines` and `surgery grow` against the floor: what no program that writes them can save.

    python benchmarks/lines_and_grow.py [--parameters 1.1B] [--repeat 5] [--work DIR] [--json OUT]

prints one Markdown table: wall time with start-up (the median), the floor of the same run and the
ratio of the two, CPU and private memory (see measure.py for what they mean). `--work` keeps the
checkpoints there for the next run; without it they go to a temporary directory, which is removed.
It needs about 20 bytes of disk for every parameter, and as much memory for the file cache.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from checkpoints import SHAPES, make_models
from measure import Case, compare, machine, table


def cases(surgery: list[str], base: Path, tuned: Path, work: Path) -> list[Case]:
    """What is measured. The names in the table are the commands as a user would type them."""
    layers = SHAPES[base.name.removesuffix("-base")].layers
    middle = f"{layers // 2 - 2}-{layers // 2 + 1}"
    commands = {
        "lines BASE TUNED --alpha 0.4": ([base, tuned], ["--alpha", "0.4"]),
        "grow BASE --factor 2 --no-verify": ([base], ["--factor", "2", "--no-verify"]),
        f"grow BASE --factor 2 --layers {middle} --uniform --no-verify": (
            [base],
            ["--factor", "2", "--layers", middle, "--uniform", "--no-verify"],
        ),
    }
    found = []
    for number, (name, (inputs, options)) in enumerate(commands.items()):
        output = work / f"out-{number}"
        given = [name.split()[0], *map(str, inputs), "-o", str(output), *options]
        found.append(Case(f"surgery {name}", [*surgery, *given], inputs, output))
    copy = work / "out-cp"
    found.append(Case("cp -r BASE", ["cp", "-r", str(base), str(copy)], output=copy))
    found.append(Case("surgery --help", [*surgery, "--help"]))
    found.append(Case('python -c "import torch"', [sys.executable, "-c", "import torch"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", choices=SHAPES, default="1.1B")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep the checkpoints here")
    parser.add_argument("--json", type=Path, help="write every single figure here")
    parser.add_argument("--surgery", help="the command to measure, if it isn't the installed one")
    given = parser.parse_args()
    installed = Path(sys.executable).with_name("surgery")
    surgery = shlex.split(given.surgery) if given.surgery else [str(installed)]
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-benchmark-"))
    try:
        base, tuned = make_models(work, given.parameters)
        measured = cases(surgery, base, tuned, work)
        compare(measured, given.repeat)
        where = machine(work)
    finally:
        if given.work is None:
            shutil.rmtree(work)
    today = datetime.now(timezone.utc).date()
    print(f"{given.parameters} parameters in bfloat16, median of {given.repeat}. {where}. {today}.")
    print()
    print(table(measured))
    if given.json is not None:
        figures = [case.as_json() for case in measured]
        given.json.write_text(json.dumps({"machine": where, "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
