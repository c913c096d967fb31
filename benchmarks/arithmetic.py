"""What a faster place for the arithmetic of merges (a GPU, say) could save at most.

    python benchmarks/arithmetic.py [--parameters 1.1B] [--repeat 5] [--work DIR]
        [--methods task_arithmetic,linear,slerp,dare_ties,della,ties]

runs the merges of merge.py and adds up the time that threads spend in compiled kernels. It prints
one Markdown table: wall time, CPU, the seconds of CPU in kernels, their part of it, the **bound**
(the wall time if they took none: what is left of it once they are spread over the threads), and
bytes of the inputs per second of kernel. All medians; one command after the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import SHAPES, make_models
from measure import files_of, machine, warm
from merge import METHODS, recipe


def timed(path: str, out: str) -> None:
    """Run a recipe here, and print the seconds that threads were in kernels."""
    from surgery.commands.main import app

    from surgery.kernels import compiled

    spent: list[float] = []

    def with_clock(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            start = time.thread_time()
            made = kernel(*given)
            spent.append(time.thread_time() - start)
            return made

        return run

    library = compiled.library()
    if library is None:
        sys.exit("there are no compiled kernels here")
    for name, kernel in vars(library).copy().items():
        if name.startswith("surgery_"):
            setattr(library, name, with_clock(kernel))
    start = time.perf_counter(), time.process_time()
    app(["run", path, "-o", out], standalone_mode=False)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(json.dumps({"wall": wall, "cpu": cpu, "kernels": sum(spent)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", choices=SHAPES, default="1.1B")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=Path, help="keep the checkpoints here")
    parser.add_argument("--timed", nargs=2, metavar=("RECIPE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.timed:
        timed(*given.timed)
        return
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-benchmark-"))
    try:
        base, *tuned = make_models(work, given.parameters, 2)
        print("| | wall | CPU | kernels | part | bound | a core reads |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        for method in given.methods.split(","):
            path, out = recipe(method, base, tuned, work), work / "out"
            inputs = [base, *tuned[:1]] if method == "slerp" else [base, *tuned]
            nbytes = sum(file.stat().st_size for file in files_of(inputs))
            runs: list[dict[str, float]] = []
            for _ in range(given.repeat + 1):  # the first to warm up
                shutil.rmtree(out, ignore_errors=True)
                warm(inputs)
                command = [sys.executable, __file__, "--timed", str(path), str(out)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(out)
            wall, cpu, kernels = (
                median(one[what] for one in runs[1:]) for what in ("wall", "cpu", "kernels")
            )
            print(
                f"| {method} | {wall:.2f} s | {cpu:.2f} s | {kernels:.2f} s | {kernels / cpu:.0%} "
                f"| {wall * (1 - kernels / cpu):.2f} s | {nbytes / kernels / 1e9:.1f} GB/s |",
                flush=True,
            )
        where = machine(work)
    finally:
        if given.work is None:
            shutil.rmtree(work)
    today = datetime.now(timezone.utc).date()
    print(f"\n{given.parameters} parameters in bfloat16. {where}. {today}.")


if __name__ == "__main__":
    main()
