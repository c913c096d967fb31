"""How the matrices of a stack are stored, (out, in) or (in, out), where no bias tells; and what
neither names nor shapes tell of an MLP, so that it can't be grown unless a user says it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from surgery.anatomy.mlp import MLP
from surgery.anatomy.places import Place, Role
from surgery.tensor import LazyTensor

SAY = "--anatomy can say it (`surgery inspect MODEL --as-anatomy` prints what to start from)"

_IN = re.compile(
    r"(^|[._])(q|k|v|w?qkv|query|key|value|query_key_value|c_attn|up|gate|gate_up|wi|wi_[01]|w1|w3"
    r"|c_fc|fc1|fc_in|lin1|linear1|in|inner|expand|intermediate|dense_h_to_4h)"
    r"(_proj|_lin|_linear)?([._]dense)?$",
    re.IGNORECASE,
)
_OUT = re.compile(
    r"(^|[._])(o|wo|out|output|down|w2|fc2|fc_out|lin2|linear2|c_proj|contract|dense_4h_to_h)"
    r"(_proj|_lin|_linear)?([._]dense)?$",
    re.IGNORECASE,
)
_HALVES = re.compile(
    r"gate_?(and_?)?up|up_?(and_?)?gate|(^|[._])(fc1|linear_fc1|wi|w12|w13|w1_w3|net\.0\.proj)\b",
    re.IGNORECASE,
)
"""`net.0.proj` is the GEGLU of diffusers."""
_CHOICE = re.compile(r"router|(^|[._])(gate|selector|switch|chooser|pick)(\.weight)?$")


def told_layouts(
    tensors: Mapping[str, LazyTensor],
    places: Mapping[str, Place],
    hidden: Mapping[tuple[str, int], int | None],
) -> dict[str, set[bool]]:
    """What names and shapes together say, for every stack: True for (in, out), False for (out, in).

    By the names of the matrices that lead from the hidden states or back; and of three that make a
    gated MLP the two that are alike lead from them.
    """
    told: dict[str, set[bool]] = {}
    loose: dict[tuple[str, int], Counter[tuple[int, ...]]] = defaultdict(Counter)
    for name, place in places.items():
        if place.stack is None or place.block is None or place.role is Role.MIXER:
            continue
        found = told.setdefault(place.stack, set())
        size, shape = hidden[place.stack, place.block], tensors[name].shape
        if len(shape) != 2 or shape[0] == shape[1] or size not in shape:
            continue
        if (to_hidden := _leads_to_hidden(place.inner.removesuffix(".weight"))) is not None:
            found.add((shape[0] == size) != to_hidden)
        if place.role in (Role.UNKNOWN, Role.MLP):
            loose[place.stack, place.block][shape] += 1
    for (stack, block), shapes in loose.items():
        (most, count), *others = shapes.most_common()
        if count == 2 and others == [(most[::-1], 1)]:
            told[stack].add(most[0] == hidden[stack, block])
    return told


@lru_cache(maxsize=1 << 12)  # blocks have the same names inside
def _leads_to_hidden(stem: str) -> bool | None:
    """Whether the name of a matrix says that it leads back to the hidden states, or from them."""
    back = bool(_OUT.search(stem))
    return back if back or _IN.search(stem) else None


def what_is_not_told(
    mlp: MLP,
    tensors: Mapping[str, LazyTensor],
    layouts: Collection[bool],
    config: Mapping[str, Any],
) -> str | None:
    """Why an MLP may be another than it looks, if so. `tensors` are those of its block that don't
    mix tokens, `layouts` is what is told of its stack. A model type settles what only running the
    model can tell: that is how growth is verified."""
    block = f"{mlp.stack}.{mlp.block}."
    up, down = mlp.ups[0], mlp.down.weight.removeprefix(block)
    first = up.weight.removeprefix(block)
    if other := _chooses(mlp, tensors, config):
        return (
            f"{other.removeprefix(block)} may choose between experts that lie in {down} side by "
            f"side; if not, {SAY}"
        )
    if "model_type" in config:
        return None
    if not mlp.gated and up.bias is None and up.experts is None and not layouts:
        return f"nothing tells whether {first} and {down} are stored (out, in) or (in, out); {SAY}"
    gpt_oss = up.experts is not None and up.bias is not None  # which has them neuron by neuron
    if up.parts == 2 and not up.interleaved and (gpt_oss or not _HALVES.search(up.weight)):
        return (
            f"nothing tells whether gate and up are the halves of {first} or lie neuron by "
            f"neuron; {SAY}"
        )
    return None


def _chooses(mlp: MLP, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> str | None:
    """A matrix that gives a few numbers for each token, by which its width can be divided, in the
    module of the MLP or named like a router. In a model whose config says which widths are meant
    it is none where a matrix beside it leads those numbers back to the hidden size, nor outside
    that module where the config says nothing of so many experts: other things are routed too. The
    first matrix of an adapter gives its numbers to the second, which follows the MLP."""
    known = "model_type" in config
    module = _module(mlp.down.weight)
    adapters = {_module(each.name) for each in mlp.followers if len(tensors[each.name].shape) == 2}
    own = module.count(".") > f"{mlp.stack}.{mlp.block}.".count(".")
    for name, tensor in tensors.items():
        if name in mlp.tensors or len(tensor.shape) != 2 or mlp.hidden not in tensor.shape:
            continue
        if _module(name) in adapters:
            continue
        few = min(tensor.shape)
        if not 1 < few < mlp.hidden or mlp.width % few:
            continue
        inside = own and name.startswith(module)
        if not (inside or _CHOICE.search(name)) or (known and _leads_back(name, mlp, tensors)):
            continue
        if inside or not (known and own) or few in _expert_counts(config):
            return name
    return None


def _leads_back(name: str, mlp: MLP, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the numbers that a matrix gives go back to the hidden states, as in an adapter
    (Gemma 3n and 4): one of the opposite shape is in its module. Only where matrices are (out,
    in): in the other layout a bias for each expert has that shape."""
    shape = tensors[name].shape
    if mlp.down.in_out or shape[1] != mlp.hidden:
        return False
    return any(
        tensor.shape == shape[::-1] and _module(other) == _module(name)
        for other, tensor in tensors.items()
        if other not in mlp.tensors
    )


def _module(weight: str) -> str:
    """The module that a matrix is in, with a dot behind it."""
    return weight.removesuffix(".weight").rpartition(".")[0] + "."


def _expert_counts(config: Mapping[str, Any]) -> set[int]:
    """Whole numbers under keys that speak of experts, those of parts included."""
    counts = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            counts |= _expert_counts(value)
        elif type(value) is int and re.search(r"expert|moe", str(key)):
            counts.add(value)
    return counts
