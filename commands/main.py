"""`surgery`: the verbs, and what an error becomes on the way out.

Nothing heavy is imported before a verb runs: `surgery --help` needs no torch.
"""

from __future__ import annotations

import functools
import gc
import inspect as inspection
import os
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from surgery.errors import SurgeryError

from . import stopping
from .apply import apply
from .check import check
from .clean import clean
from .demo import demo
from .dequantize import dequantize
from .diff import diff
from .expand import expand
from .grow import grow
from .inspect import inspect
from .lines import lines
from .lora import lora
from .merge import merge
from .methods import methods
from .run import run as run_
from .stopping import Phase
from .task_vector import task_vector
from .terminal import one_problem
from .verify import verify

GC_THRESHOLDS = 5_000_000, 20, 50
"""A checkpoint is many small objects that stay: with Python's own thresholds the search for
garbage among them takes half of the time of opening one of 100,000 tensors."""
SHOWN = 12
"""Problems of one error that are printed; a wrong pair of models can have thousands."""

NO_MEMORY = (
    "there isn't enough memory: pass fewer --threads, or raise the limit (ulimit -v, or that of "
    "the container)"
)

EXIT_CODES = (
    "Exit codes: 0 done; 1 too little memory; 2 an argument that can't be meant; 3 something "
    "wrong with an input; 4 an input that can't be edited this way; 5 the output can't be "
    "written; 6 verification failed, and nothing was written; 130 interrupted; 143 terminated."
)

app = typer.Typer(
    name="surgery",
    help="Post-hoc surgery on model checkpoints.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

P = ParamSpec("P")


def with_exit_codes(verb: Callable[P, None]) -> Callable[P, None]:
    """Turn an error of ours into its message on stderr and its exit code."""

    @functools.wraps(verb)
    def run_verb(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            stopping.phase = Phase.at_work
            verb(*args, **kwargs)
        except SurgeryError as error:
            for problem in error.problems[:SHOWN]:
                print(f"error: {one_problem(problem)}", file=sys.stderr)
            if len(error.problems) > SHOWN:
                print(
                    f"error: and {len(error.problems) - SHOWN:,} more like these", file=sys.stderr
                )
            raise typer.Exit(error.exit_code) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_of_memory(error):
                raise
            print(f"error: {NO_MEMORY}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            stopping.phase = Phase.done
            number = stopping.number_of(interrupt)
            print(stopping.said(number), file=sys.stderr)
            raise typer.Exit(stopping.exit_code(number)) from None
        finally:
            stopping.phase = Phase.done

    return run_verb


def _is_of_memory(error: BaseException) -> bool:
    """Whether the system has refused memory. torch and threading have no exception for it."""
    texts = ("can't allocate memory", "can't start new thread", "bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def _paragraphs(verb: Callable[..., None]) -> str:
    """A docstring as help: its lines run on, so that a terminal can break them where it ends."""
    text = inspection.getdoc(verb) or ""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


VERBS = (
    inspect, diff, lines, merge, methods, task_vector, apply, lora, grow, expand, dequantize,
    run_, verify, check, clean, demo,
)  # fmt: skip
for verb in VERBS:
    app.command(help=_paragraphs(verb))(with_exit_codes(verb))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("model-surgery"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Post-hoc surgery on model checkpoints."""


def run() -> None:
    """The console script."""
    stopping.take_signals()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        app()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        _leave(code)


def _leave(code: int) -> None:
    """End the process without taking down the interpreter: that takes torch 0.4 s, and aborts
    where native threads are still at work after an interrupt."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read our output has gone, or the disk that it went to is full
        code = code or 1
    os._exit(code)
