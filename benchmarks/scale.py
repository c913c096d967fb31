"""How time and memory grow with a model: the same commands on models of 0.5 to 8 GB.

    python benchmarks/scale.py [--sizes 0.5GB,1GB,2GB,4GB] [--repeat 3] [--work DIR] [--json OUT]

prints a Markdown table for each command (see measure.py for the columns). The certificate
(`verify --no-logits`) writes nothing: its floor is reading both models once. Needs room for three
models of the largest size on the disk, and memory to cache two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from checkpoints import SHAPES, make_models
from measure import Case, compare, machine, table


def measured(surgery: str, work: Path, size: str, repeat: int) -> dict[str, Case]:
    """Each command on models of one size."""
    base, tuned = make_models(work, size)
    out, grown = work / "out", work / "grown"
    growth = ["--factor", "2", "--layers", "1", "--uniform", "--no-verify"]
    commands = {
        "lines BASE TUNED --alpha 0.4": [base, tuned, "--alpha", "0.4"],
        "merge BASE TUNED --method ties --density 0.2": [
            base, tuned, "--method", "ties", "--density", "0.2",
        ],
        "grow BASE --factor 2 --layers 1 --uniform --no-verify": [base, *growth],
    }  # fmt: skip
    cases = {}
    for name, given in commands.items():
        inputs = [path for path in given if isinstance(path, Path)]
        command = [surgery, name.split()[0], *map(str, given), "-o", str(out)]
        cases[name] = Case(size, command, inputs, out)
    compare(cases.values(), repeat)
    subprocess.run([surgery, "grow", str(base), "-o", str(grown), *growth], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    name = "verify BASE GROWN --no-logits"
    command = [surgery, "verify", str(base), str(grown), "--no-logits"]
    cases[name] = Case(size, command, [base, grown])
    compare([cases[name]], repeat)
    shutil.rmtree(grown)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = [size for size in SHAPES if size.endswith("GB")]
    parser.add_argument("--sizes", default=",".join(sizes[:-1]), help=f"of {', '.join(sizes)}")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep the checkpoints here")
    parser.add_argument("--json", type=Path, help="write every single figure here")
    given = parser.parse_args()
    surgery = str(Path(sys.executable).with_name("surgery"))
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-benchmark-"))
    found: dict[str, list[Case]] = {}
    try:
        for size in given.sizes.split(","):
            for name, case in measured(surgery, work, size, given.repeat).items():
                found.setdefault(name, []).append(case)
            if given.work is None:
                for model in work.iterdir():
                    shutil.rmtree(model)
        where = machine(work)
    finally:
        if given.work is None:
            shutil.rmtree(work)
    today = datetime.now(timezone.utc).date()
    print(f"bfloat16, median of {given.repeat}. {where}. {today}.")
    for name, cases in found.items():
        print(f"\n`surgery {name}`\n\n{table(cases)}")
    if given.json is not None:
        figures = {name: [case.as_json() for case in cases] for name, cases in found.items()}
        given.json.write_text(json.dumps({"machine": where, "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
