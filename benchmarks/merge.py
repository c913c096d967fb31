"""`surgery merge` beside mergekit, on the same files: three checkpoints, the same YAML.

    python benchmarks/merge.py --mergekit /path/to/mergekit-yaml [--parameters 1.1B] [--repeat 5]
        [--methods task_arithmetic,ties,linear] [--work DIR] [--json OUT]

prints one Markdown table: wall time with start-up (the median), the ratio to mergekit's in the
same run, the floor, CPU and private memory (see measure.py). Both read the file that
`surgery run` and `mergekit-yaml` understand alike. mergekit is run `--peer-repeat` times (three:
it takes minutes). It needs about 10 GB of disk, and memory to cache it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from checkpoints import SHAPES, make_models
from measure import Case, compare, machine, table

METHODS = {
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.2},
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
}


def recipe(method: str, base: Path, tuned: list[Path], folder: Path) -> Path:
    """A configuration that both understand."""
    models = [base, *tuned] if method == "linear" else tuned[:1] if method == "slerp" else tuned
    given = {
        "merge_method": method,
        "models": [{"model": str(model)} for model in models],
        "parameters": METHODS[method],
        "dtype": "bfloat16",
    }
    if method != "linear":
        given["base_model"] = str(base)
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(given, indent=2))  # JSON is YAML
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--parameters", choices=SHAPES, default="1.1B")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peer-repeat", type=int, default=3)
    parser.add_argument("--methods", default="task_arithmetic,ties,linear")
    parser.add_argument("--work", type=Path, help="keep the checkpoints here")
    parser.add_argument("--json", type=Path, help="write every single figure here")
    given = parser.parse_args()
    surgery = str(Path(sys.executable).with_name("surgery"))
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-benchmark-"))
    measured: list[Case] = []
    ratios = []
    try:
        base, *tuned = make_models(work, given.parameters, 2)
        for method in given.methods.split(","):
            path = recipe(method, base, tuned, work)
            inputs = [base, *tuned[:1]] if method == "slerp" else [base, *tuned]
            out = work / "out"
            ours = Case(f"surgery run {path.name}", [surgery, "run", str(path), "-o", str(out)],
                        inputs, out)  # fmt: skip
            compare([ours], given.repeat)
            measured.append(ours)
            if given.mergekit is not None:
                command = [str(given.mergekit), str(path), str(out)]
                peer = Case(f"mergekit-yaml {path.name}", command, output=out)
                compare([peer], given.peer_repeat, warm_up=False)
                measured.append(peer)
                ratio = median(run.wall for run in peer.runs) / ours.wall
                ratios.append(f"{method}: mergekit takes {ratio:.1f} times as long")
        where = machine(work)
    finally:
        if given.work is None:
            shutil.rmtree(work)
    today = datetime.now(timezone.utc).date()
    print(f"{given.parameters} parameters in bfloat16. {where}. {today}.", end="\n\n")
    print(table(measured), *ratios, sep="\n")
    if given.json is not None:
        figures = [case.as_json() for case in measured]
        given.json.write_text(json.dumps({"machine": where, "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
