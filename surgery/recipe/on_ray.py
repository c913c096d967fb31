"""The parts of an output as tasks of a Ray cluster whose machines share the file system.

A task that is lost with its worker is run again, and keeps the shards that it had finished. What
comes after the parts (proof, check of every byte, publishing) is the driver's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.errors import ArgumentError, OutputError, SurgeryError
from surgery.parallel import default_threads
from surgery.recipe.chain import Work, build, open_inputs, to_write
from surgery.recipe.run import run_recipe, targets_of
from surgery.recipe.schema import Recipe
from surgery.writing.parts import Part, forget_parts
from surgery.writing.plan import MAX_SHARD_BYTES, plan

RETRIES = 3
"""Times that a task is run again after its worker was lost."""


def write_parts(
    recipe: Recipe,
    out: str | Path | None,
    *,
    address: str = "auto",
    parts: int | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int | None = None,
    tell: Callable[[str], object] | None = None,
) -> None:
    """Write all shards of `recipe`, a task for each part; `run_recipe` with `finish` does the rest.

    `address` is "auto" (the cluster that RAY_ADDRESS names, or that runs here), "local" (one that
    is started for this), or an address. As many parts as the cluster has room for twice over, so
    that a slow machine holds up little, or as many as said, but no more than there are shards.

    Raises what a part raises, or OutputError if one was lost too often.
    """
    try:
        import ray
    except ImportError as error:
        raise ArgumentError("--ray needs Ray: pip install 'model-surgery[ray]'") from error
    say = tell or (lambda _: None)
    most = _most_shards(recipe, out, max_shard_bytes)
    started = not ray.is_initialized()
    if started:
        _connect(ray, address)
    try:
        cores = threads or default_threads()
        room = max(1, int(ray.cluster_resources().get("CPU", 1)) // cores)
        count = min(most, parts or 2 * room)
        task = ray.remote(num_cpus=cores, max_retries=RETRIES)(_write_one)
        given = (recipe, out, overwrite, max_shard_bytes, threads, os.getcwd())
        for target in targets_of(recipe, out).values():
            forget_parts(target)  # of an earlier cluster, which may have had more room
        running = {task.remote(Part(n, count), *given): n for n in range(1, count + 1)}
        say(f"{count} parts as tasks of Ray, {room} at a time")
        _wait(ray, running, count, say)
    finally:
        if started:
            ray.shutdown()


def _most_shards(recipe: Recipe, out: str | Path | None, max_shard_bytes: int) -> int:
    """The shards of the output that has the most. Raises what the recipe has wrong from headers
    alone, before any task is made."""
    models = build(recipe, open_inputs(recipe, headers_only=True), Work(measure=False))
    return max(
        len(plan(to_write(models, name), max_shard_bytes=max_shard_bytes).shards)
        for name in targets_of(recipe, out)
    )


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False
                 if address == "local" else None)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"--ray {address}: no cluster can be reached: {error}") from error


def _write_one(
    part: Part,
    recipe: Recipe,
    out: str | Path | None,
    overwrite: bool,
    max_shard_bytes: int,
    threads: int | None,
    folder: str,
) -> dict[str, int]:
    """A task: one part, in the driver's working directory. Returns how many shards were kept."""
    os.chdir(folder)
    outcome = run_recipe(
        recipe,
        out,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        work=Work(threads=threads),
        part=part,
    )
    return {name: len(one.kept) for name, one in outcome.parts.items()}


def _wait(ray: Any, running: dict[Any, int], count: int, say: Callable[[str], object]) -> None:
    """Wait for all tasks, and say which are done; the first that fails ends the rest."""
    left = list(running)
    try:
        while left:
            (done,), left = ray.wait(left, num_returns=1)
            kept = sum(_result(ray, done, running[done], count).values())
            note = f", going on from {kept} shards" if kept else ""
            say(f"part {running[done]}/{count} is written{note}; {len(left)} to go")
    finally:
        for one in left:
            ray.cancel(one, force=True)


def _result(ray: Any, done: Any, number: int, count: int) -> dict[str, int]:
    try:
        found: dict[str, int] = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SurgeryError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"part {number}/{count} was lost with its worker {RETRIES + 1} times: {error}; run "
            f"the same command again to go on"
        ) from error
    return found
