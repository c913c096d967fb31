"""Fuzz the readers with atheris, which is guided by coverage: `pip install .[fuzz]`, then

    python tests/reliability/fuzz/run.py READER --seconds 600 --found FOLDER

What isn't an error of ours is kept in FOLDER once for each place that it comes from, and the run
goes on; a hang or more than a gigabyte of memory ends it, and its input is kept there too.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["surgery"]):
    import surgery.commands.inspect

    import surgery.lora.bake
    import surgery.recipe
    import surgery.verification
    import surgery.vocabulary.tokens
    import surgery.writing.card  # noqa: F401
    from reliability.fuzz.readers import READERS, outcome

from reliability.fuzz.mutate import mutated

SECONDS, MEMORY = 5.0, 1024
"""Of this process for one input, whatever else the machine does; and megabytes, torch's included."""
HANGS = 120
"""Seconds by the clock that end the run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("found"))
    given = parser.parse_args()
    reader = READERS[given.reader]
    given.found.mkdir(parents=True, exist_ok=True)
    start = given.found / f"corpus-{given.reader}"
    start.mkdir(exist_ok=True)
    for number, seed in enumerate(reader.seeds):
        (start / f"seed-{number}").write_bytes(seed)
    places: set[str] = set()

    def once(data: bytes) -> None:
        try:
            began = time.process_time()
            outcome(given.reader, data)
            if (seconds := time.process_time() - began) > SECONDS:
                raise TimeoutError(f"{seconds:.1f} s")
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} {Path(last.filename).name}:{last.name}"
            if place not in places:
                places.add(place)
                name = f"{given.reader}-{hashlib.sha256(data).hexdigest()[:12]}"
                (given.found / name).write_bytes(data)
                said = "".join(traceback.format_exception(error)[-6:])
                (given.found / f"{name}.txt").write_text(f"{place}\n{said}", errors="replace")
                print(f"FOUND {place}: {str(error)[:200]!a}", flush=True)
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise

    def change(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.6:
            made = mutated(bytes(data), reader.kind, rng)
            if len(made) <= longest:
                return made
        return bytes(atheris.Mutate(data, longest))

    options = [
        f"-max_total_time={given.seconds}", f"-runs={given.runs}", f"-timeout={HANGS}",
        f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={given.found}/{given.reader}-",
        f"-seed={given.seed}", "-max_len=16384", "-print_final_stats=1", str(start),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], once, custom_mutator=change)
    atheris.Fuzz()


main()
