"""What comes out of models, of their blocks and their routers, when they run on the same inputs."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError, UnsupportedError
from surgery.verification.device import VerifyDtype, check_size
from surgery.verification.outputs import are_logits, main_output

if TYPE_CHECKING:
    import torch

    from surgery.modeling.build import Built


@dataclass(frozen=True)
class Run:
    """Output of a model, (tokens, vocabulary or hidden size), and of each of its blocks."""

    output: torch.Tensor
    is_logits: bool
    blocks: Mapping[str, torch.Tensor]
    missing: tuple[str, ...]
    experts: tuple[int, int] | None
    streamed: bool


def run_all(
    checkpoints: Sequence[Checkpoint],
    inputs: Mapping[str, torch.Tensor],
    device: str,
    dtype: VerifyDtype,
    streamed: bool | None,
) -> Iterator[Run]:
    """What comes out of each, in order: of all at once, or of one model after the other."""
    import torch

    from surgery.modeling.build import build_deferred, build_model

    kind = getattr(torch, dtype)
    inputs = {
        name: value.to(device, kind if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    if streamed is not False:
        from surgery.modeling.deferred import UndeferrableError
        from surgery.modeling.streaming import run_together

        try:
            models = [_Watched(one, build_deferred(one, kind, device)) for one in checkpoints]
        except UndeferrableError as error:
            if streamed:
                raise UnsupportedError(
                    f"{checkpoints[0].source.reference} can't be run a module at a time: {error}"
                ) from error
            check_size(checkpoints, device, dtype, streamed=False)
        else:
            runs = [partial(model.run, inputs, streamed=True) for model in models]
            with torch.random.fork_rng(devices=[]):
                yield from run_together([model.built.model for model in models], runs, device)
            return
    for checkpoint in checkpoints:
        yield _Watched(checkpoint, build_model(checkpoint, kind, device)).run(inputs)
        gc.collect()


class _Watched:
    """A model, with hooks that keep what its blocks return and where its routers send tokens."""

    def __init__(self, checkpoint: Checkpoint, built: Built) -> None:
        self.built = built
        self._blocks: dict[str, torch.Tensor] = {}
        for stack in checkpoint.anatomy.stacks:
            for number, block in enumerate(_blocks(built.model, stack)):
                block.register_forward_hook(partial(self._keep, f"{stack}.{number}"))
        self._routed = _watch_experts(built.model)

    def _keep(self, name: str, _module: Any, _given: Any, output: Any) -> None:
        if (found := main_output(output)) is not None:  # moved later: a device needn't wait for it
            self._blocks[name] = found[1].detach().clone()

    def run(self, inputs: Mapping[str, torch.Tensor], *, streamed: bool = False) -> Run:
        """Run it once."""
        output, is_logits = _outputs(self.built.model, inputs)
        seen = [len(experts) for experts, _ in self._routed]
        experts = (sum(seen), sum(n for _, n in self._routed)) if seen and all(seen) else None
        return Run(
            output.to("cpu").reshape(-1, output.shape[-1] if output.dim() else 1),
            is_logits,
            {name: hidden.to("cpu") for name, hidden in self._blocks.items()},
            self.built.missing,
            experts,
            streamed,
        )


def _watch_experts(model: Any) -> list[tuple[set[int], int]]:
    """For every module of routed experts, how many it has, and which of them tokens went to: the
    first argument of whole numbers is the choice of the router."""

    def watch(module: Any, given: tuple[Any, ...], named: dict[str, Any], seen: set[int]) -> None:
        for value in (*given, *named.values()):
            if hasattr(value, "is_floating_point") and not value.is_floating_point():
                seen.update(n for n in value.unique().tolist() if 0 <= n < module.num_experts)
                return

    found: list[tuple[set[int], int]] = []
    for module in model.modules():
        count = getattr(module, "num_experts", None)
        if type(module).__name__.endswith("Experts") and type(count) is int:
            seen: set[int] = set()
            module.register_forward_pre_hook(partial(watch, seen=seen), with_kwargs=True)
            found.append((seen, count))
    return found


def _blocks(model: Any, stack: str) -> Any:
    """The modules of a stack; none where the model has no list of them by that name."""
    from surgery.modeling.stock import block_modules

    try:
        return block_modules(model, stack)
    except UnsupportedError:
        return ()


def _outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The output that is compared, and whether it is logits."""
    import torch

    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    options |= inputs
    exact = _float64_throughout() if model.dtype == torch.float64 else nullcontext()
    try:
        with torch.inference_mode(), exact, torch.random.fork_rng():
            torch.manual_seed(0)  # a model may draw: which patches are masked, say
            found = main_output(model(**options))
    except SurgeryError:  # of a file that is read meanwhile
        raise
    except Exception as error:  # of any type: sizes in the config that contradict each other
        if strange := sorted(inputs.keys() - accepted):
            raise UnsupportedError(
                f"{type(model).__name__} takes no {' and no '.join(strange)}, which is what the "
                f"other model runs on: models of different inputs can't be compared"
            ) from error
        raise UnsupportedError(
            f"transformers can't run the {type(model).__name__} of this config: {error}; "
            f"--no-logits leaves the certificate"
        ) from error
    if found is None:
        raise UnsupportedError(f"{type(model).__name__} returns no tensor that can be compared")
    name, value = found
    return value, are_logits(name, value, model.config)


def _float64_throughout() -> Any:
    """Inside it, code that asks for float32 (norms, softmax, rotary embeddings) gets float64:
    else float64 would be no more exact than float32."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Float64(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            if func is torch.Tensor.float:
                return args[0].double()
            swap = {torch.float32: torch.float64}
            args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
            kwargs = {
                key: swap.get(value, value) if isinstance(value, torch.dtype) else value
                for key, value in kwargs.items()
            }
            return func(*args, **kwargs)

    return Float64()
