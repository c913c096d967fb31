"""Logits of a model larger than memory: time and private memory, against the arithmetic alone.

    python benchmarks/streamed_logits.py [--layers 32] [--limit 3] [--work DIR]

makes a Llama in bfloat16 as wide as those of 7B parameters (13.5 GB with 32 layers; the noise is
tiled, so that making it takes as long as writing it), grows it by half, and compares the logits of
both in float32 under a hard limit of private memory (RLIMIT_DATA). It prints one Markdown table:
wall time with start-up and peak of private memory, and the **floor**: reading the file once, and
the arithmetic of the forward passes (base, grown, and the permuted base of the noise floor), which
is one block of each with its weights in memory, times the blocks, and the head.

It needs room for the checkpoint on disk, which is removed unless `--work` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from math import prod
from pathlib import Path

from checkpoints import SHAPES, SPREAD, Shape
from measure import files_of, machine, run

WIDE = SHAPES["6.7B"]
FACTOR = 1.5
TOKENS = 128
NOISE = 1 << 24
"""Elements of the noise that weights are tiles of."""


def make_model(folder: Path, shape: Shape) -> None:
    """A checkpoint whose weights are tiles of one noise, each begun elsewhere."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NOISE, generator=generator).mul_(SPREAD)
    tiles = noise.to(torch.bfloat16).view(torch.uint8).numpy().data
    ones = (noise + 1).to(torch.bfloat16).view(torch.uint8).numpy().data
    header, at = {}, 0
    for name, size in shape.tensors():
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [at, at + 2 * prod(size)]}
        at += 2 * prod(size)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for number, (_, size) in enumerate(shape.tensors()):
            source, left, start = ones if len(size) == 1 else tiles, 2 * prod(size), 4096 * number
            while left:
                start %= len(source)
                part = source[start : start + left]
                file.write(part)
                left, start = left - len(part), start + len(part)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def compare(folder: Path, limit: float, streamed: bool) -> None:
    """In a process of its own: the logits, under the limit."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    from surgery import grow, open_checkpoint
    from surgery.verification import compare_logits

    base = open_checkpoint(folder)
    grown = grow(base, factor=FACTOR)
    found = compare_logits(base, grown, device="cpu", streamed=streamed)
    assert found.same, found
    print(found, file=sys.stderr)


def arithmetic(shape: Shape) -> None:
    """In a process of its own: seconds of the forward passes by the clock and of CPU, without any
    weights to fetch."""
    import numpy
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def seconds(mlp: int, layers: int) -> numpy.ndarray:
        config = {**replace(shape, mlp=mlp, layers=layers).config(), "dtype": "float32"}
        with torch.inference_mode():
            model = LlamaForCausalLM._from_config(
                LlamaConfig(**config), attn_implementation="eager"
            )
            ids = torch.randint(0, shape.vocabulary, (2, TOKENS // 2))
            times = []
            for _ in range(6):
                start = time.perf_counter(), time.process_time()
                model(ids, use_cache=False)
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        return numpy.median(times[1:], axis=0)

    head = seconds(shape.mlp, 0)
    base = seconds(shape.mlp, 1) - head
    grown = seconds(int(shape.mlp * FACTOR), 1) - head
    print(*((2 * base + grown) * shape.layers + 3 * head), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=WIDE.layers)
    parser.add_argument("--limit", type=float, default=3.0, help="GB of private memory; 0: none")
    parser.add_argument("--work", type=Path, help="keep the checkpoint here")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--part", choices=("compare", "arithmetic"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = replace(WIDE, layers=given.layers)
    if given.part == "compare":
        return compare(given.work, given.limit, streamed=True)
    if given.part == "arithmetic":
        return arithmetic(shape)
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-benchmark-"))
    try:
        folder = work / f"llama-{given.layers}"
        if not (folder / "config.json").exists():  # which is written last
            make_model(folder, shape)
            os.sync()
        report(folder, given.limit, given.layers, given.repeat)
    finally:
        if given.work is None:
            shutil.rmtree(work)
    return None


def report(folder: Path, limit: float, layers: int, repeat: int) -> None:
    """Measure, and print the table."""
    me = [sys.executable, __file__, "--layers", str(layers), "--limit", str(limit)]
    files = shlex.join(map(str, files_of([folder])))
    size = sum(file.stat().st_size for file in files_of([folder]))
    where, today = machine(folder), datetime.now(timezone.utc).date()
    print(f"{size / 1e9:.1f} GB in bfloat16. {where}. {today}.\n")
    print("| | wall | CPU | private memory | reading | arithmetic | its CPU | x floor |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for _ in range(repeat):
        reading = run(["sh", "-c", f"cat {files} | cat > /dev/null"]).wall
        done = run([*me, "--work", str(folder), "--part", "compare"])
        alone, cpu = said(["--layers", str(layers), "--part", "arithmetic"])
        print(
            f"| logits, {TOKENS} tokens, 3 models | {done.wall:.1f} s | {done.cpu:.1f} s | "
            f"{done.private / 1e6:,.0f} MB | {reading:.1f} s | {alone:.1f} s | "
            f"{cpu:.1f} s | {done.wall / (reading + alone):.2f} |",
            flush=True,
        )


def said(options: list[str]) -> list[float]:
    """The numbers that this script prints with these options, in another process."""
    import subprocess

    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in done.stderr.splitlines()[-1].split()]


if __name__ == "__main__":
    main()
