"""Where a tensor stands: its stack of blocks, its block, and its role, from name and shape."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from surgery.tensor import LazyTensor


class Role(str, Enum):
    """What a tensor does in the model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"
    ROUTER = "router"
    NORM = "norm"
    HEAD = "head"
    BUFFER = "buffer"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Place:
    """Block `block` of `stack` (both None outside the stacks), and `inner`, the name in there."""

    role: Role
    inner: str
    stack: str | None = None
    block: int | None = None


_BLOCK = re.compile(r"(?:(.+?)\.)?(\d+)\.(.+)")

# Words of a name, most telling first. A word counts where it stands between dots and
# underscores, so that "proj" isn't in "projector"; "ln_1" and "layernorm" are patterns.
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.BUFFER, re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|num_batches_tracked)$")),
    (Role.EXPERT, re.compile(r"(^|[._])experts?([._]|$)", re.IGNORECASE)),
    (
        Role.ROUTER,
        re.compile(
            r"(^|[._])(router|e_score_correction_bias)([._]|$)|(mlp|moe)\.gate\.", re.IGNORECASE
        ),
    ),
    (
        Role.NORM,
        re.compile(r"(^|[._])(ln\d*|norm\d*|\w*(layer_?|_)norm\d*)([._]|$)", re.IGNORECASE),
    ),
    (
        Role.ATTENTION,
        re.compile(
            r"(^|[._])(\w*attn|\w*attention|[qkvo]_proj|qkv(_proj)?|att)([._]|$)", re.IGNORECASE
        ),
    ),
)
_OUTSIDE: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.BUFFER, _ROLES[0][1]),
    (Role.HEAD, re.compile(r"(^|[._])(lm_head|embed_out)([._]|$)")),
    (
        Role.EMBEDDING,
        re.compile(r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|shared)([._]|$)", re.IGNORECASE),
    ),
    (
        Role.HEAD,
        re.compile(r"(^|[._])(\w*head|score|classifier|predictions|pooler)([._]|$)", re.IGNORECASE),
    ),
    (Role.NORM, _ROLES[3][1]),
    (Role.HEAD, re.compile(r"^output\.", re.IGNORECASE)),
)
_LISTS = {"layers", "layer", "h", "blocks", "block"}


def find_places(
    tensors: Mapping[str, LazyTensor], depth: int | None
) -> tuple[dict[str, Place], dict[str, int]]:
    """The place of every tensor, and the number of blocks of every stack.

    A stack is a prefix that is followed by 0, 1, ... L-1 with like names inside. `depth` is the
    number of layers in the config, which settles whether a list of one is a stack.
    """
    stacks = _stacks(tensors, depth)
    places = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        stack = (match.group(1) or "") if match else None
        if match and stack in stacks:
            inner = match.group(3)
            places[name] = Place(_role(inner, tensor, _ROLES), inner, stack, int(match.group(2)))
        else:
            places[name] = Place(_role(name, tensor, _OUTSIDE), name)
    return places, stacks


def place_in_block(inner: str, tensor: LazyTensor, stack: str, block: int) -> Place:
    """The place of a tensor that is called `inner` in a block."""
    return Place(_role(inner, tensor, _ROLES), inner, stack, block)


def _stacks(names: Iterable[str], depth: int | None) -> dict[str, int]:
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _BLOCK.fullmatch(name):
            found[match.group(1) or ""][int(match.group(2))].add(match.group(3))
    return {
        prefix: len(blocks) for prefix, blocks in found.items() if _is_stack(prefix, blocks, depth)
    }


def _is_stack(prefix: str, blocks: Mapping[int, set[str]], depth: int | None) -> bool:
    """Numbers from 0 without a gap, and blocks that resemble each other: the numbered members of
    an `nn.Sequential` have gaps (activations hold no tensor) or names of their own."""
    if set(blocks) != set(range(len(blocks))):
        return False
    if len(blocks) == 1:
        return depth == 1 and prefix.rsplit(".", 1)[-1] in _LISTS
    often = Counter(inner for block in blocks.values() for inner in block)
    repeated = sum(count for count in often.values() if count > 1)
    several = max(len(block) for block in blocks.values()) > 2
    return several and 2 * repeated >= sum(often.values())


def _role(name: str, tensor: LazyTensor, rules: tuple[tuple[Role, re.Pattern[str]], ...]) -> Role:
    if tensor.dtype.kind == "integer":
        return Role.BUFFER
    if name.endswith(("attn.bias", "attention.bias")) and len(tensor.shape) == 4:
        return Role.BUFFER  # the causal mask of GPT-2, GPT-Neo(X): a float in old files
    for role, pattern in rules:
        if pattern.search(name):
            return role
    return Role.UNKNOWN
