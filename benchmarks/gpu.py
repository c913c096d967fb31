"""Verification on a GPU whose weights stream to it: bytes per second against the bus and the disk.

    python benchmarks/gpu.py [--layers 32] [--factor 1.5] [--work DIR] [--device cuda]

makes a Llama in bfloat16 with the shapes of those of 8B parameters (16 GB with 32 layers), grows
it, and runs the base, the grown model and the permuted base side by side, in bfloat16 and in
float32. The table says how many bytes came from the file and went over the bus each second, beside
what the disk gives (`cat` of the file), what the bus gives (a copy from pinned memory), and what
the device gives (one block of each model with its weights there, times the blocks).

Bfloat16 is measured for its speed: as a proof it is too coarse, since its rounding noise is as
large as what a weight that is wrong by a percent does.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import Shape
from measure import files_of, machine, run
from streamed_logits import make_model

from surgery import Checkpoint, grow, open_checkpoint
from surgery.modeling.build import build_deferred, build_model
from surgery.modeling.deferred import same_values
from surgery.modeling.streaming import run_together
from surgery.verification.logits import _permuted

SHAPE = Shape(4096, 32, 32, 8, 14336, 128256, 1)
TOKENS = 2, 64
COPY = 1 << 30


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits.cpu()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bus(device: str) -> float:
    """Bytes per second from pinned memory to the device."""
    pinned = torch.empty(COPY, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty(COPY, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        there.copy_(pinned, non_blocking=True)
        synchronize(device)
        best = max(best, COPY / (time.perf_counter() - start))
    return best


def streamed(
    checkpoints: list[Checkpoint], dtype: torch.dtype, device: str, ids: torch.Tensor
) -> tuple[float, int]:
    """Seconds, and the bytes that went over the bus: what the models share goes once."""
    models = [build_deferred(one, dtype, device).model for one in checkpoints]
    parameters = (parameter for model in models for parameter in model.parameters())
    sent = {same_values(parameter): 2 * parameter.numel() for parameter in parameters}
    synchronize(device)
    start = time.perf_counter()
    run_together(models, [partial(forward, model, ids) for model in models], device)
    return time.perf_counter() - start, sum(sent.values())


def arithmetic(shape: Shape, factor: float, dtype: torch.dtype, device: str) -> float:
    """Seconds of the three forward passes with the weights there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.zeros(TOKENS, dtype=torch.long, device=device)

    def seconds(mlp: int, layers: int) -> float:
        config = LlamaConfig(**replace(shape, mlp=mlp, layers=layers).config())
        with torch.device(device):
            model = LlamaForCausalLM._from_config(
                config, attn_implementation="eager", dtype=dtype
            ).eval()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            forward(model, ids)
            times.append(time.perf_counter() - start)
        return min(times)

    head = seconds(shape.mlp, 0)
    base, grown = (seconds(int(shape.mlp * f), 1) - head for f in (1, factor))
    return (2 * base + grown) * shape.layers + 3 * head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--hidden", type=int, help="a smaller model, to try the script")
    parser.add_argument("--factor", type=float, default=1.5)
    parser.add_argument("--work", type=Path, help="keep the checkpoint here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--whole", action="store_true", help="measure models loaded whole as well")
    given = parser.parse_args()
    shape = replace(SHAPE, layers=given.layers)
    if given.hidden:
        small = given.hidden
        shape = replace(shape, hidden=small, mlp=4 * small, vocabulary=1000)
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-benchmark-"))
    try:
        folder = work / f"llama-{shape.hidden}-{shape.layers}"
        if not (folder / "config.json").exists():  # which is written last
            make_model(folder, shape)
        report(folder, shape, given)
    finally:
        if given.work is None:
            shutil.rmtree(work)


def report(folder: Path, shape: Shape, given: argparse.Namespace) -> None:
    """Measure, and print the table."""
    base = open_checkpoint(folder)
    checkpoints = [base, grow(base, factor=given.factor), _permuted(base, 0)]
    ids = torch.zeros(TOKENS, dtype=torch.long, device=given.device)
    files = shlex.join(map(str, files_of([folder])))
    disk = base.nbytes / run(["sh", "-c", f"cat {files} | cat > /dev/null"]).wall
    name = torch.cuda.get_device_name() if given.device == "cuda" else "the CPU"
    today = datetime.now(timezone.utc).date()
    print(f"{base.nbytes / 1e9:.1f} GB in bfloat16, on {name}. {machine(folder)}. {today}.")
    print(f"Disk (or file cache) {disk / 1e9:.1f} GB/s, bus {bus(given.device) / 1e9:.1f} GB/s.\n")
    print("| | wall | from the file | over the bus | arithmetic alone | on the device at most |")
    print("|---|--:|--:|--:|--:|--:|")
    for dtype in (torch.bfloat16, torch.float32):
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wall, sent = streamed(checkpoints, dtype, given.device, ids)
        peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else 0
        alone = arithmetic(shape, given.factor, dtype, given.device)
        print(
            f"| 3 models, {str(dtype).removeprefix('torch.')} | {wall:.2f} s | "
            f"{base.nbytes / wall / 1e9:.2f} GB/s | {sent / wall / 1e9:.2f} GB/s | {alone:.2f} s | "
            f"{peak / 1e6:,.0f} MB |",
            flush=True,
        )
        if given.whole:
            start = time.perf_counter()
            for one in checkpoints:
                forward(build_model(one, dtype, given.device).model, ids)
            print(f"| the same, loaded whole | {time.perf_counter() - start:.2f} s | | | | |")


if __name__ == "__main__":
    main()
